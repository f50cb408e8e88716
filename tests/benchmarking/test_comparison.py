"""Ours against every peer that is installed, on shapes too small to say anything about speed."""

from __future__ import annotations

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from lobcq_fx.benchmarking.comparison import Comparison, Plan
from lobcq_fx.benchmarking.contender import Contender, Starter, WrongProductError
from lobcq_fx.benchmarking.encoding import encoding_rates
from lobcq_fx.benchmarking.machine import cpu_name
from lobcq_fx.benchmarking.measure import measure, torch_threads
from lobcq_fx.benchmarking.ours import EXACT, OurLinear
from lobcq_fx.benchmarking.peers import PEERS, RESEMBLES, Peer
from lobcq_fx.format import FormatSpec
from lobcq_fx.kernels.bind import bind_cpu_core

needs_core = pytest.mark.skipif(not bind_cpu_core(), reason="the CPU core was not built, or is switched off")
SHAPE = (48, 256)
WEIGHT = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) / 16
X = torch.randn(3, 256, generator=torch.Generator().manual_seed(4))


def test_peers_have_names_of_their_own() -> None:
    assert len({peer.name for peer in PEERS}) == len(PEERS)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_computes_the_product(peer: Peer) -> None:
    if peer.missing:
        pytest.skip(f"not installed: {', '.join(peer.missing)}")
    # In a process of its own: ONNX Runtime's shared pool, once made, is every later session's, for good.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(check_peer, PEERS.index(peer)).result()


def check_peer(index: int) -> None:
    contender = PEERS[index].make(WEIGHT, 1)
    exact = X.double() @ WEIGHT.double().t()
    Starter(contender).check(X, exact, RESEMBLES)
    one, other = (contender.product(contender.copy()(contender.accept(X))) for _ in range(2))
    assert torch.equal(one, other)
    assert WEIGHT.numel() // 2 <= contender.weight_bytes <= WEIGHT.nbytes
    with pytest.raises(WrongProductError):
        Starter(contender).check(X, exact.flip(1), RESEMBLES)


@needs_core
@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
@pytest.mark.parametrize("name", ["8x64", "16x128"])
def test_ours_is_held_to_the_format(name: str, mode: str) -> None:
    ours = OurLinear.of(WEIGHT, FormatSpec.from_name(name), mode)
    Starter(ours.contender()).check(X, ours.expected(X), EXACT)
    codes = ours.weight.codes.clone()
    codes[5, 7] ^= 1  # one weight of 12,288 moves to the entry beside it
    broken = dataclasses.replace(ours, weight=dataclasses.replace(ours.weight, codes=codes))
    with pytest.raises(WrongProductError):
        Starter(broken.contender()).check(X, ours.expected(X), EXACT)


def liar(weight: torch.Tensor, _threads: int) -> Contender:
    return Contender(weight.nbytes, lambda: lambda x: -(x @ weight.t()))


def broken(weight: torch.Tensor, _threads: int) -> Contender:
    raise RuntimeError("no kernel for this CPU\nand a long story")


@needs_core
def test_a_peer_that_cannot_run_is_named_and_gets_no_speed() -> None:
    absent = Peer("absent", broken, packages=("no_such_package_at_all",))
    plan = Plan((FormatSpec(),), rounds=1, peers=(Peer("liar", liar), Peer("broken", broken), absent, PEERS[0]))
    comparison = Comparison(SHAPE, plan)
    (result,) = comparison.results(2)
    assert list(result.speedups) == list(result.peer_seconds) == [PEERS[0].name]
    assert comparison.not_run.pop("liar").startswith("with 2 rows: the product is wrong: relative error 2")
    assert comparison.not_run == {
        "broken": "no kernel for this CPU",
        "absent": "not installed: no_such_package_at_all",
    }


@needs_core
def test_nothing_is_timed_where_ours_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OurLinear, "expected", lambda self, x: torch.ones(x.shape[0], SHAPE[0]).double())
    with pytest.raises(WrongProductError):
        Comparison(SHAPE, Plan((FormatSpec(),), rounds=1, peers=())).results(1)


@needs_core
def test_a_share_of_the_reading_speed_at_one_row() -> None:
    specs = (FormatSpec(8, 64), FormatSpec(16, 64))
    comparison = Comparison(SHAPE, Plan(specs, rounds=3, peers=()))
    first, second = comparison.results(1)
    for result in (first, second):
        values = result.to_dict()
        assert values["gb_per_second"] == pytest.approx(result.weight_bytes / result.seconds / 1e9)
        assert values["gmac_per_second"] == pytest.approx(48 * 256 / result.seconds / 1e9)
        assert values["read_share"] > 0
        assert values["cold"] is False
    assert second.weight_bytes > first.weight_bytes
    assert second.read_seconds / first.read_seconds == pytest.approx(second.weight_bytes / first.weight_bytes)
    assert "read_share" not in comparison.results(9)[0].to_dict()


@needs_core
def test_the_measurement_leaves_torch_as_it_was() -> None:
    before = torch.get_num_threads()
    found = measure([SHAPE], Plan((FormatSpec(),), rows=(1,), rounds=1, threads=2, peers=()), lambda *_: None)
    assert (found["threads"], torch.get_num_threads()) == (2, before)
    with torch_threads(3):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


@needs_core
def test_encoding_has_rates() -> None:
    rates = encoding_rates([FormatSpec(8, 64), FormatSpec(16, 64)], rounds=1)
    assert list(rates) == ["8x64", "16x64"]
    assert all(value > 0 for of_format in rates.values() for value in of_format.values())


def test_the_processor_has_a_name() -> None:
    assert cpu_name().strip()
