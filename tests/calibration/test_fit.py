from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lobcq_fx.calibration import fit_codebooks, grid_blocks
from lobcq_fx.calibration.fit import round_entries
from lobcq_fx.calibration.grid_blocks import GridBlocks
from lobcq_fx.calibration.seeding import random_codebooks
from lobcq_fx.calibration.synthetic import SOURCES, synthetic
from lobcq_fx.errors import CalibrationError
from lobcq_fx.format import FormatSpec, check_codebooks, decode, encode
from tests.calibration import naive

SPEC = FormatSpec(4, 64)


class Chunks:
    """A source that can be read again and again, as a data set would be."""

    def __init__(self, arrays: Tensor, size: int) -> None:
        self.arrays, self.size, self.reads = arrays, size, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.reads += 1
        return iter(self.arrays.split(self.size))


def same(a, b) -> bool:
    return torch.equal(a.codebooks, b.codebooks) and a.mse_history == b.mse_history and a.mse_rounded == b.mse_rounded


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_error_never_rises(source, init):
    arrays = synthetic(source, (512, 64), seed=1)
    fit = fit_codebooks(arrays, FormatSpec(8, 64), init=init, max_iterations=60, tolerance=0.0)
    history = np.array(fit.mse_history)
    assert fit.iterations > 5
    assert (np.diff(history) <= 1e-12 * history[:-1]).all()
    check_codebooks(fit.codebooks, FormatSpec(8, 64))


def test_equals_the_fit_spelt_out_in_numpy():
    arrays = synthetic("laplace", (40, 64), seed=2)
    blocks = torch.cat(list(GridBlocks(arrays, SPEC))).double().numpy()
    start = random_codebooks(4, torch.Generator().manual_seed(3))
    expected, history = naive.fit(blocks, start.numpy(), iterations=6)
    fit = fit_codebooks(arrays, SPEC, init="random", seed=3, max_iterations=6, tolerance=0.0)
    unit = blocks.size * 16**2
    np.testing.assert_allclose(np.array(fit.mse_history) * unit, history, rtol=1e-9)
    assert torch.equal(fit.codebooks, round_entries(torch.from_numpy(expected)))
    _, rounded = naive.assign(blocks, fit.codebooks.double().numpy() * 16)
    assert fit.mse_rounded * unit == pytest.approx(rounded, rel=1e-12)
    assert fit.rounding_cost_db == pytest.approx(10 * np.log10(rounded / history[-1]))


def test_rounded_error_is_the_formats_error():
    """Against encode and decode: arrays with amax 31 * 448 each, so that every scale is 1 and units agree."""
    arrays = synthetic("gaussian", (200, 64), seed=4)
    arrays = arrays / arrays.abs().amax(dim=1, keepdim=True) * 13888
    fit = fit_codebooks(arrays, SPEC)
    noise = (decode(encode(arrays, SPEC, fit.codebooks)) - arrays).double() / 448
    grid_step = 1 / 16
    assert float(noise.square().mean()) == pytest.approx(fit.mse_rounded + grid_step**2 / 12, rel=2e-3)


@pytest.mark.parametrize("size", [9, 37, 4096])
def test_chunked_equals_one_shot(size):
    arrays = synthetic("gaussian", (300, 64), seed=5)
    whole = fit_codebooks(arrays, SPEC, seed=7)
    assert same(whole, fit_codebooks(Chunks(arrays, size), SPEC, seed=7))
    assert same(whole, fit_codebooks(list(arrays.split(size)), SPEC, seed=7))


def test_a_source_too_long_to_keep_is_read_again(monkeypatch):
    arrays = synthetic("gaussian", (300, 64), seed=5)
    whole = fit_codebooks(arrays, SPEC, seed=7)
    kept = Chunks(arrays, 50)
    fit_codebooks(kept, SPEC, seed=7)
    assert kept.reads == 2  # once for the tensor scale, once for the blocks
    monkeypatch.setattr(grid_blocks.GridBlocks.__init__, "__defaults__", (None, 1000))
    read_again = Chunks(arrays, 50)
    assert same(whole, fit_codebooks(read_again, SPEC, seed=7))
    assert read_again.reads == 1 + 1 + len(whole.mse_history) + 1  # scale, seeding, passes, rounding


def test_seed_decides_the_result():
    arrays = synthetic("gaussian", (300, 64), seed=5)
    assert same(fit_codebooks(arrays, SPEC, seed=1), fit_codebooks(arrays, SPEC, seed=1))
    assert not same(fit_codebooks(arrays, SPEC, seed=1), fit_codebooks(arrays, SPEC, seed=2))


def test_units_of_the_data_do_not_matter():
    arrays = synthetic("gaussian", (300, 64), seed=5)
    assert same(fit_codebooks(arrays, SPEC), fit_codebooks(arrays * 2.0**-20, SPEC))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_takes_half_precision(dtype):
    arrays = synthetic("gaussian", (100, 64), seed=6).to(dtype)
    assert same(fit_codebooks(arrays, SPEC), fit_codebooks(arrays.float(), SPEC))


def test_kmeans_plus_plus_starts_better_than_random():
    arrays = synthetic("gaussian", (1000, 64), seed=8)
    start = {
        init: fit_codebooks(arrays, SPEC, init=init, max_iterations=0).mse_history for init in ("kmeans++", "random")
    }
    assert start["kmeans++"][0] < 0.7 * start["random"][0]


def test_one_codebook_of_sixteen_values_is_exact():
    values = torch.arange(-30, 31, 4).float()  # 16 values, symmetric: the largest is 30, which becomes entry 31
    arrays = values.repeat(64, 4)
    fit = fit_codebooks(arrays, FormatSpec(1, 64), tolerance=0.0)
    assert fit.mse_history[-1] == 0.0
    assert fit.codebooks[0, -1] == 31


def test_codebooks_that_no_block_uses_are_revived():
    """16 random codebooks and data that need them: narrow blocks first leave most codebooks unused."""
    arrays = synthetic("student-t4", (400, 64), seed=9)
    spec = FormatSpec(16, 64)
    fit = fit_codebooks(arrays, spec, init="random", max_iterations=60, tolerance=0.0)
    blocks = torch.cat(list(GridBlocks(arrays, spec))).double().numpy()
    cluster, _ = naive.assign(blocks, fit.codebooks.double().numpy() * 16)
    assert len(np.unique(cluster)) == 16


def test_fewer_blocks_than_codebooks():
    arrays = synthetic("gaussian", (1, 16), seed=10)
    fit = fit_codebooks(arrays, FormatSpec(16, 16), max_iterations=20, tolerance=0.0)
    assert fit.num_blocks == 2
    assert fit.mse_history[-1] == pytest.approx(0.0, abs=1e-12)  # 8 scalars, 16 entries
    check_codebooks(fit.codebooks, FormatSpec(16, 16))


@pytest.mark.parametrize("value", [1.0, -3.5, 1e-30])
def test_constant_data(value):
    fit = fit_codebooks(torch.full((20, 64), value), SPEC)
    assert fit.mse_history[-1] == 0.0
    decoded = decode(encode(torch.full((20, 64), value), SPEC, fit.codebooks))
    assert float(decoded[0, 0]) == pytest.approx(value, rel=0.02)


def test_data_of_zeros():
    fit = fit_codebooks(torch.zeros((20, 64)), SPEC)
    assert (fit.num_blocks, fit.mse_rounded, fit.rounding_cost_db) == (0, 0.0, 0.0)
    assert fit.converged
    check_codebooks(fit.codebooks, SPEC)


def test_arrays_of_zeros_do_not_count():
    arrays = synthetic("gaussian", (100, 64), seed=11)
    fit = fit_codebooks(torch.cat((arrays, torch.zeros((500, 64)))), SPEC)
    assert fit.num_blocks == 800
    assert same(fit, fit_codebooks(arrays, SPEC))


def test_reports_each_pass():
    calls: list[tuple[int, float]] = []
    arrays = synthetic("gaussian", (100, 64), seed=12)
    fit = fit_codebooks(arrays, SPEC, on_iteration=lambda i, mse: calls.append((i, mse)))
    assert calls == list(enumerate(fit.mse_history))
    assert fit.iterations == len(calls) - 1


def test_iterations_are_limited():
    fit = fit_codebooks(synthetic("gaussian", (200, 64), seed=1), SPEC, max_iterations=2, tolerance=0.0)
    assert fit.iterations == 2
    assert not fit.converged


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (torch.zeros((0, 64)), "no block arrays"),
        ([], "no block arrays"),
        (torch.zeros((4, 32)), r"\[4, 32\].*4x64"),
        (torch.tensor([[1.0] * 64, [float("nan")] * 64]), "block array 1 holds NaN"),
        (iter([torch.ones((4, 64))]), "iterator"),
    ],
)
def test_refuses_what_it_cannot_fit(arrays, message):
    with pytest.raises(CalibrationError, match=message):
        fit_codebooks(arrays, SPEC)


def test_refuses_an_unknown_start():
    with pytest.raises(ValueError, match=r"kmeans\+\+"):
        fit_codebooks(torch.ones((4, 64)), SPEC, init="zeros")  # type: ignore[arg-type]
