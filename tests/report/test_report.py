from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx.config import LobcqConfig
from lobcq_fx.errors import CheckpointError, ReportError
from lobcq_fx.format import universal_codebooks
from lobcq_fx.inventory import Inventory, MatmulRecord, readable_size
from lobcq_fx.report import write_report
from lobcq_fx.report.content import ReportContent
from lobcq_fx.report.plots import FAINT, Blocks, codebook_strips, error_by_layer, size_bars
from lobcq_fx.report.render import render

VOID = {"meta", "link", "br", "input", "img"}


def record(layer: str, weight: float | None = 24.0, activation: float | None = 23.0) -> MatmulRecord:
    return MatmulRecord(layer, "linear", (64, 128), None, "8x64", "w4a4", 4 * 64 * 128, 64 * 72 + 4, weight, activation)


def left(layer: str, reason: str, shape: tuple[int, int] | None = (256, 64)) -> MatmulRecord:
    size = 4 * shape[0] * shape[1] if shape else 0
    return MatmulRecord(layer, "linear" if shape else "sdpa", shape, reason, float_bytes=size, packed_bytes=size)


RECORDS = (
    record("model.layers.0.q_proj"),
    record("model.layers.0.down_proj", 22.5, 18.25),
    left("model.layers.0.attn", "activation x activation", None),
    record("model.layers.1.q_proj", 21.0, None),
    record("model.layers.1.down_proj", 25.0, math.inf),
    left("model.layers.1.attn", "activation x activation", None),
    left("lm_head", "excluded by pattern '*lm_head'"),
)


@pytest.fixture
def content() -> ReportContent:
    inventory = Inventory(
        RECORDS, 4 * 64 * 128 + 256 * 64, 4 * (4 * 64 * 128 + 256 * 64), 4 * (64 * 72 + 4) + 4 * 256 * 64
    )
    return ReportContent(
        "tiny", "TinyForCausalLM", inventory, LobcqConfig(), {"lobcq.codebooks": universal_codebooks(8)}
    )


class Page(HTMLParser):
    """Checks nesting and collects what the page refers to, its text, and its ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        values = {key: value or "" for key, value in attrs}
        self.references += [values[key] for key in ("src", "href", "xlink:href", "data", "action") if key in values]
        if "id" in values:
            self.ids.append(values["id"])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_the_page_is_well_formed_and_needs_nothing_else(content: ReportContent) -> None:
    page = Page(render(content))
    assert all(reference.startswith("#") for reference in page.references)
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in render(content)
    assert not re.search(r"url\((?!#)", render(content))
    assert page.tags.count("svg") == 3
    assert page.tags.count("script") == 1


def test_the_page_says_what_the_inventory_holds(content: ReportContent) -> None:
    text = Page(render(content)).text
    for one in RECORDS:
        assert one.layer in text
    coverage = 4 * 64 * 128 / (4 * 64 * 128 + 256 * 64)
    assert f"{100 * coverage:.1f} % of the parameters" in text
    assert f"{100 * coverage:.1f} % of the multiply-adds" in text
    assert "4.5 bits stored per quantized weight" in text
    assert "192.0 KiB to 82.0 KiB" in text
    assert "18.25 dB least SQNR of a layer: model.layers.0.down_proj" in text
    assert "3 of 7 matmuls" in text
    assert "codes 4 selectors 0.375 scales 0.125" in text
    assert "exact" in text  # an infinite ratio
    for key, value in LobcqConfig().to_dict().items():
        assert key in text
        assert str(value) in text or isinstance(value, (list, dict))


def test_names_from_outside_are_escaped(content: ReportContent) -> None:
    evil = "<script>alert(1)</script>"
    records = (record(f"{evil}.q_proj"), left(f"{evil}.head", f"reason {evil}"))
    page = render(replace(content, name=evil, architecture=evil, inventory=replace(content.inventory, records=records)))
    assert evil not in page
    assert "&lt;script&gt;" in page
    Page(page)


def opacities(svg: str) -> dict[str, float]:
    """Of the fields of the maps."""
    found = re.findall(r'<g id="sqnr-(\w+-\d+)">.*?<path [^>]*opacity: ([\d.]+)', svg, re.DOTALL)
    return {name: float(opacity) for name, opacity in found}


def test_each_finite_value_is_a_field_with_a_tooltip() -> None:
    quantized = [one for one in RECORDS if one.quantized]
    svg = error_by_layer(quantized)
    assert re.findall(r"<title>(.*?)</title>", svg) == [
        "model.layers.0.q_proj: weight 24.00 dB",
        "model.layers.0.down_proj: weight 22.50 dB",
        "model.layers.1.q_proj: weight 21.00 dB",
        "model.layers.1.down_proj: weight 25.00 dB",
        "model.layers.0.q_proj: activation 23.00 dB",
        "model.layers.0.down_proj: activation 18.25 dB",
    ]
    found = opacities(svg)
    # The darker, the more error: 6 dB below the best would be full colour.
    for name, decibels in {"weight-0": 24, "weight-1": 22.5, "weight-2": 21, "weight-3": 25}.items():
        assert found[name] == pytest.approx(FAINT + (1 - FAINT) * (25 - decibels) / 6, abs=1e-6)
    assert found["activation-1"] == pytest.approx(FAINT + (1 - FAINT) * 4.75 / 6, abs=1e-6)
    assert [text for text in ("q_proj", "down_proj", "layers", "21.0 to 24.0") if f">{text}</text>" not in svg] == []


def test_layers_outside_of_blocks_are_dots_in_proportion() -> None:
    records = [record("first", 24.0, None), record("second", 21.0, 18.0), record("third", 23.0, math.inf)]
    svg = error_by_layer(records)
    across = {
        name: float(re.search(rf'id="sqnr-{name}">.*?<use [^>]*x="([\d.]+)"', svg, re.DOTALL)[1])  # type: ignore[index]
        for name in ("weight-0", "weight-1", "weight-2", "activation-1")
    }
    decibel = (across["weight-0"] - across["activation-1"]) / 6
    assert across["weight-1"] - across["activation-1"] == pytest.approx(3 * decibel, rel=1e-3)
    assert across["weight-2"] - across["activation-1"] == pytest.approx(5 * decibel, rel=1e-3)
    assert "activation-2" not in svg


def test_a_small_spread_looks_small() -> None:
    nearly = tuple(record(f"model.layers.{index}.q_proj", 20 + 0.4 * index / 29, None) for index in range(30))
    found = opacities(error_by_layer(nearly))
    assert len(found) == 30
    assert max(found.values()) - min(found.values()) == pytest.approx((1 - FAINT) * 0.4 / 6, abs=1e-6)


def test_colours_follow_the_page() -> None:
    for svg in (error_by_layer(RECORDS[:5]), error_by_layer(RECORDS[:1]), codebook_strips(universal_codebooks(2))):
        assert "var(--weights)" in svg
        assert "#0102" not in svg


def test_codebooks_are_drawn_entry_by_entry() -> None:
    codebooks = universal_codebooks(4)
    svg = codebook_strips(codebooks)
    for row, entries in enumerate(codebooks.tolist()):
        group = re.search(rf'<g id="codebooks-codebook-{row}">(.*?)\n  *</g>\n  *</g>', svg, re.DOTALL)
        assert group is not None
        across = [float(x) for x in re.findall(r'<use [^>]*?x="([\d.]+)"', group[1])]
        assert len(across) == 16
        step = (across[-1] - across[0]) / (entries[-1] - entries[0])
        assert across == pytest.approx([across[0] + step * (entry - entries[0]) for entry in entries], abs=0.01)


def test_many_layers_and_none(content: ReportContent) -> None:
    many = tuple(record(f"model.layers.{index}.{name}_proj") for index in range(60) for name in ("q", "down"))
    numbers = re.findall(r">(\d+)</text>", error_by_layer(many))
    assert len(numbers) == 2 * 15
    assert numbers[:2] == ["0", "4"]
    crowd = [record(f"layer_{index}", 20 + index / 100, None) for index in range(100)]
    assert len(re.findall("<title>", error_by_layer(crowd))) == 40
    assert "layer_99" not in error_by_layer(crowd)
    assert "<svg" in error_by_layer([])
    nothing = replace(content, inventory=Inventory(RECORDS[-1:], 10, 40, 40))
    assert "0.0 %" in Page(render(nothing)).text
    everything = replace(content, inventory=Inventory(RECORDS[:1], 64 * 128, 4 * 64 * 128, 64 * 72 + 4))
    assert "Nothing: every matmul of the model runs in LO-BCQ." in Page(render(everything)).text


def test_it_says_when_activations_were_not_measured(content: ReportContent) -> None:
    records = tuple(replace(one, activation_sqnr_db=None) for one in RECORDS)
    unmeasured = replace(content, inventory=replace(content.inventory, records=records))
    assert "Activations were not measured" in Page(render(unmeasured)).text
    weights_only = replace(unmeasured, config=LobcqConfig(mode="w4a16"))
    assert "Activations stay in float" in Page(render(weights_only)).text


def test_size_bars_are_in_proportion(content: ReportContent) -> None:
    svg = size_bars(content.inventory)
    assert re.findall(r">([\d.]+ [KM]iB)</text>", svg) == ["192.0 KiB", "82.0 KiB"]
    bars = re.findall(r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*"[^>]*style="fill: var\(--(weights|float)\)"', svg)
    widths = [float(right) - float(start) for start, right, _ in bars][:4]
    per_byte = widths[0] / (4 * 4 * 64 * 128)
    assert widths == pytest.approx([per_byte * b for b in (131072, 65536, 4 * 4612, 65536)], rel=1e-3)


def test_order_of_worst_layers_and_reasons(content: ReportContent) -> None:
    assert [one.layer for one in content.inventory.worst(3)] == [
        "model.layers.0.down_proj", "model.layers.1.q_proj", "model.layers.0.q_proj",
    ]  # fmt: skip
    reasons = content.inventory.left_alone_by_reason
    assert list(reasons) == ["excluded by pattern '*lm_head'", "activation x activation"]
    assert [len(records) for records in reasons.values()] == [1, 2]


def test_parameters_that_no_matmul_reads(content: ReportContent) -> None:
    assert "take part in no matmul" not in Page(render(content)).text
    bigger = replace(content, inventory=replace(content.inventory, model_parameters=4 * 64 * 128 + 256 * 64 + 49152))
    assert "49,152 parameters (50.0 %: embedding tables, norms, biases)" in Page(render(bigger)).text


def test_names_and_sizes() -> None:
    layers = ("model.layers.3.mlp.up_proj", "model.layers.11.mlp.up_proj", "model.layers.11.mlp.experts.0.w", "lm_head")
    blocks = Blocks.of([record(layer) for layer in layers])
    assert (blocks.name, blocks.numbers, blocks.parts) == ("layers", [3, 11], ["mlp.up_proj", "mlp.experts.0.w"])
    assert blocks.places == {0: (0, 0), 1: (0, 1), 2: (1, 1)}
    assert not Blocks.of([record("h.11.attn"), record("lm_head")]).places
    assert readable_size(3 * 2**20) == "3.00 MiB"
    assert readable_size(2048) == "2.0 KiB"
    assert readable_size(5 * 2**29) == "2.50 GiB"


@pytest.fixture(scope="module")
def quantized() -> lobcq_fx.QuantizedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    return lobcq_fx.quantize(model, [torch.randn(4, 64) for _ in range(3)])


def test_a_model_and_its_folder_make_the_same_report(quantized: lobcq_fx.QuantizedModel, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path / "saved")
    of_model, of_folder = ReportContent.of_model(quantized), ReportContent.of_folder(tmp_path / "saved")
    assert of_folder.name == of_model.name == "model"
    assert of_model.inventory == of_folder.inventory
    assert of_model.config == of_folder.config
    assert list(of_model.codebooks) == list(of_folder.codebooks) == ["lobcq.codebooks"]
    assert torch.equal(of_model.codebooks["lobcq.codebooks"], of_folder.codebooks["lobcq.codebooks"])
    assert torch.equal(of_model.codebooks["lobcq.codebooks"], universal_codebooks(8))
    write_report(quantized, tmp_path / "model.html")
    write_report(tmp_path / "saved", tmp_path / "folder.html")
    page = (tmp_path / "folder.html").read_text(encoding="utf-8")
    assert (tmp_path / "model.html").read_text(encoding="utf-8") == page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.html", "model.html", "saved"]


SECTION = {
    "kind": "text",
    "source": "texts/<novel>.txt",
    "settings": {"tokens": 6144, "window": 512, "stride": 256},
    "models": [{"perplexity": 46.4}, {"perplexity": 43.6}],
    "together": {"kl_divergence": 0.0911, "top1_agreement": 0.823},
    "seconds": 1.0,
}
SCORES = {"models": [{"quantized": True}, {"quantized": False}], "results": [SECTION]}


def test_scores_stand_on_the_page(quantized: lobcq_fx.QuantizedModel, tmp_path: Path) -> None:
    write_report(quantized, tmp_path / "page.html", SCORES)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    text = Page(page).text
    for words in (
        "<novel>.txt: 6,144 tokens",
        "Perplexity 46.4000 43.6000 +6.42 %",
        "KL divergence, nats 0.0911",
        "82.3 %",
    ):
        assert words in text, words
    assert "<novel>" not in page


@pytest.mark.parametrize("scores", [{}, {**SCORES, "results": [{"kind": "text"}]}, {"models": [], "results": [3]}])
def test_other_files_are_no_scores(quantized: lobcq_fx.QuantizedModel, tmp_path: Path, scores: dict[str, Any]) -> None:
    with pytest.raises(ReportError, match="lobcq eval -o FILE"):
        write_report(quantized, tmp_path / "page.html", scores)
    assert not (tmp_path / "page.html").exists()


def test_what_is_no_quantized_model(quantized: lobcq_fx.QuantizedModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a quantized model"):
        write_report(tmp_path, tmp_path / "r.html")
    quantized.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "inventory.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        write_report(tmp_path / "saved", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(OSError, match="No such file"):
        write_report(quantized, tmp_path / "no" / "r.html")
