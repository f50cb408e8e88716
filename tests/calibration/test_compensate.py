"""Rounding with feedback: what the textbook's formula gives, and never worse where it counts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import lobcq_fx
from lobcq_fx import FormatSpec, LobcqConfig
from lobcq_fx.calibration.compensate import DAMPING, _arranged, _factor, compensate
from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.errors import CalibrationError
from lobcq_fx.format import Encoded, decode, encode, universal_codebooks
from lobcq_fx.format.packing import pack_codes, pack_selectors, unpack_codes
from lobcq_fx.format.spec import BLOCK_SIZE
from lobcq_fx.kernels.bind import bind_cpu_core


def inputs(rows, columns, seed=0):
    """Correlated, with a few columns of far more power, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    power = torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) @ mixing * power


def compensated(weight, moments, spec):
    """The weight with feedback, and to the nearest."""
    nearest = encode(weight, spec, universal_codebooks(spec.num_codebooks))
    return compensate(weight, moments, nearest), nearest


def weights(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def row_costs(weight, encoded, moments):
    """Of each output of the layer, in fp64: the diagonal of (W - V) H (W - V)^T."""
    error = (weight - decode(encoded)).double()
    return ((error @ moments.double()) * error).sum(1)


def cost(weight, encoded, moments):
    return float(row_costs(weight, encoded, moments).sum())


def by_the_textbook(weight, moments, encoded):
    """Optimal brain surgery in fp64, one row, with the scales of `encoded`: each column's error goes, by the inverse of
    H over the columns to come, to those; a block's codebook is the one whose errors cost least."""
    spec, books = encoded.spec, encoded.codebooks.double()
    columns = len(weight)
    mean = moments.diagonal().mean().double()
    hessian = moments.double() + torch.eye(columns) * (DAMPING * mean)
    order = moments.diagonal().view(-1, spec.array_size).sum(1).argsort(descending=True, stable=True)
    scales = (encoded.scales[0].float() * encoded.tensor_scale).double()
    state = weight.double().clone(), torch.linalg.inv(hessian)
    chosen = torch.empty(columns)
    for array in order.tolist():
        for begin in range(array * spec.array_size, (array + 1) * spec.array_size, BLOCK_SIZE):
            tried = []
            for book in books:
                values, inverse = state[0].clone(), state[1].clone()
                total, rounded = 0.0, []
                for column in range(begin, begin + BLOCK_SIZE):
                    grid = (values[column] / scales[array] * 16).round().clamp(-2047, 2047) / 16
                    rounded.append(book[(book - grid).abs().argmin()] * scales[array])
                    error = values[column] - rounded[-1]
                    total += float(error**2 / inverse[column, column])
                    values -= error / inverse[column, column] * inverse[column]
                    inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
                    inverse[column, column] = 1  # never looked at again
                    inverse[column, :column], inverse[:column, column] = 0, 0
                tried.append((total, torch.stack(rounded), (values, inverse)))
            _, chosen[begin : begin + BLOCK_SIZE], state = min(tried, key=lambda one: one[0])
    return chosen


@pytest.mark.parametrize("name", ["8x64", "4x32", "1x16"])
def test_it_is_the_textbook_s_formula(name):
    spec = FormatSpec.from_name(name)
    x, w = inputs(500, 128), weights(3, 128)
    moments = x.t() @ x
    encoded, _ = compensated(w, moments, spec)
    values = decode(encoded)
    for row in range(3):
        one = replace(encoded, scales=encoded.scales[row : row + 1])
        torch.testing.assert_close(values[row], by_the_textbook(w[row], moments, one), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["8x64", "16x64", "2x128", "8x32"])
@pytest.mark.parametrize("columns", [192, 172, 40])
def test_the_output_s_error_is_far_smaller(name, columns):
    spec = FormatSpec.from_name(name)
    x, w = inputs(1000, columns), weights(48, columns)
    held_out = inputs(1000, columns, seed=0)[500:]
    moments, unseen = x[:500].t() @ x[:500], held_out.t() @ held_out
    encoded, nearest = compensated(w, moments, spec)
    assert cost(w, encoded, unseen) < 0.75 * cost(w, nearest, unseen)
    assert (encoded.codes.shape, encoded.selectors.shape) == (nearest.codes.shape, nearest.selectors.shape)
    assert encoded.tensor_scale == nearest.tensor_scale
    assert encoded.columns == columns


def test_without_correlations_it_is_rounding_by_itself():
    """Codes, codebooks and scales: the cheapest of each, which nothing else changes."""
    w = weights(16, 128)
    encoded, nearest = compensated(w, torch.eye(128), FormatSpec())
    squares = (w - decode(encoded)).square().sum(), (w - decode(nearest)).square().sum()
    assert squares[0] <= squares[1]
    same = (encoded.scales.view(torch.uint8) == nearest.scales.view(torch.uint8)).repeat_interleave(64, 1)
    assert 0.2 < same.float().mean() < 1
    # The format compares distances on its grid of sixteenths: two codebooks that are as near there may not be in fp32.
    assert (unpack_codes(encoded.codes) == unpack_codes(nearest.codes))[same].float().mean() > 0.95


def hard_inputs(kind):
    """[rows, 172]: what makes second moments singular, or of a range that fp32 hardly holds."""
    x = inputs(400, 172)
    if kind == "none":
        x[:] = 0
    elif kind == "few rows, some columns dead, two equal":
        x = x[:5]
        x[:, 10], x[:, 100:140] = x[:, 11], 0
    elif kind == "all columns equal":
        x[:] = x[:, :1]
    elif kind == "a constant column":
        x[:, 70] = 1e3
    elif kind == "powers from 1e-12 to 1e12":
        x *= torch.logspace(-6, 6, 172)[torch.randperm(172, generator=torch.Generator().manual_seed(2))]
    elif kind == "huge":
        x *= 1e15
    elif kind == "tiny":
        x *= 1e-18
    return x


KINDS = (
    "none", "few rows, some columns dead, two equal", "all columns equal", "a constant column",
    "powers from 1e-12 to 1e12", "huge", "tiny",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_row_is_worse_than_rounded_to_the_nearest(kind, dtype):
    x, w = hard_inputs(kind), weights(24, 172).to(dtype)
    moments = x.t() @ x
    encoded, nearest = compensated(w, moments, FormatSpec())
    costs = [row_costs(w, one, moments) for one in (encoded, nearest)]
    assert bool((costs[0] <= costs[1] * (1 + 1e-3) + 1e-6 * costs[1].mean()).all())
    if kind != "none":
        assert costs[0].sum() < 0.75 * costs[1].sum()
    assert (w - decode(encoded)).square().mean() < 0.05 * w.square().mean()


def test_a_row_that_feedback_makes_worse_keeps_its_rounding():
    """Where columns hardly move together there is little to win, and some rows lose."""
    x, w = torch.randn(4000, 64, generator=torch.Generator().manual_seed(4)), weights(300, 64)
    moments = x.t() @ x
    encoded, nearest = compensated(w, moments, FormatSpec())
    assert bool((row_costs(w, encoded, moments) <= row_costs(w, nearest, moments) * (1 + 1e-5)).all())
    kept = (encoded.codes == nearest.codes).all(1) & (encoded.selectors == nearest.selectors).all(1)
    assert 0 < kept.sum() < 150


def test_fp32_suffices_for_the_factor():
    """The most that 1 % of damping leaves: nearly all power in one direction. The truth is a factor in fp64."""
    direction, w = inputs(1, 1024), weights(16, 1024)
    moments = direction.t() @ direction + torch.eye(1024) * 1e-9
    moments /= moments.diagonal().mean()
    coupling, power, damping = _factor(moments, 1.0, torch.arange(1024))
    damped = moments.double() + torch.eye(1024) * damping
    exact = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    factors = (coupling, power), ((exact / exact.diagonal()).float(), exact.diagonal().square().float())
    costs = []
    for one in factors:
        rest = (w.abs().max() / 13888, universal_codebooks(8), 64)
        codes, selectors, scales, _ = torch.ops.lobcq.compensate(w, w, *one, *rest)
        packed = Encoded(
            pack_codes(codes), pack_selectors(selectors, 3), scales, rest[0], rest[1], FormatSpec(), w.shape[1]
        )
        costs.append(cost(w, packed, damped))
    assert damping == DAMPING
    assert abs(costs[0] / costs[1] - 1) < 5e-3


@pytest.mark.parametrize("columns", [100, 600], ids=["padded", "padded, in several pieces"])
def test_moments_are_arranged_as_the_factor_takes_them(columns: int):
    padded, generator = FormatSpec().padded_columns(columns), torch.Generator().manual_seed(5)
    moments, places = torch.randn(columns, columns, generator=generator), torch.randperm(padded, generator=generator)
    wanted = nn.functional.pad(moments / 1.7, (0, padded - columns, 0, padded - columns))[places][:, places]
    found = _arranged(moments, 1.7, places)
    assert torch.equal(found, wanted)
    assert found.t().is_contiguous()


PROCESS = """
import re
from pathlib import Path
import torch
from lobcq_fx.calibration.compensate import compensate
from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.format import FormatSpec, universal_codebooks

def resident(which="VmRSS"):
    return 1024 * int(re.search(which + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def peak(columns):
    x, w = torch.randn(512, columns), torch.randn(32, columns)
    moments, nearest = x.t() @ x, encode_weight(w, FormatSpec(), universal_codebooks(8), "w")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls back to what is resident now
    before = resident()
    compensate(w, moments, nearest)
    return resident("VmHWM") - before

peak(64)
print(peak(4096) / 4096**2 / 4)
"""


@pytest.mark.skipif(sys.platform != "linux" or not bind_cpu_core(), reason="reads /proc; the core makes one copy")
def test_two_matrices_besides_the_moments_are_in_memory():
    # What is freed goes back at once: how much of it glibc would keep depends on what was freed before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) < 2.15


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(CalibrationError, match="NaN"):
        compensated(weights(8, 192), torch.full((192, 192), float("nan")), FormatSpec())


def test_a_weight_of_zeros_stays_zero():
    assert bool((decode(compensated(torch.zeros(8, 192), torch.eye(192), FormatSpec())[0]) == 0).all())


@pytest.mark.skipif(not bind_cpu_core(), reason="sums are torch's without the core, and depend on the threads")
def test_more_threads_change_nothing():
    x, w, threads = inputs(300, 1024), weights(64, 1024), torch.get_num_threads()
    moments, found = x.t() @ x, []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(compensated(w, moments, FormatSpec())[0])
    torch.set_num_threads(threads)
    assert torch.equal(found[0].codes, found[1].codes)
    assert torch.equal(found[0].scales.view(torch.uint8), found[1].scales.view(torch.uint8))


class Two(torch.nn.Module):
    """A weight that two layers read, one of them of another input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.last = torch.nn.Linear(64, 8)

    def forward(self, x):
        return self.last(self.second(torch.relu(self.first(x))))


def test_a_model_s_weights_are_encoded_with_what_its_layers_were_given():
    torch.manual_seed(0)
    model, x = Two().eval(), inputs(256, 64)
    config = LobcqConfig(rounding="compensated", overrides={"last": {"rounding": "nearest"}})
    q = lobcq_fx.quantize(model, [x[:128], x[128:]], config)
    with torch.no_grad():
        hidden = torch.relu(model.first(x))
    moments = x.t() @ x + hidden.t() @ hidden
    expected = encode_weight(model.first.weight, FormatSpec(), universal_codebooks(8), "w", moments)
    stored = q.state_dict()
    (name,) = {key for key in stored if key.endswith("first.weight.codes") or key.endswith("second.weight.codes")}
    different = (stored[name] != expected.codes).float().mean()
    assert different < 0.01  # sums of other batches may round otherwise
    assert torch.equal(
        stored["last.weight.codes"],
        encode(model.last.weight, FormatSpec(), universal_codebooks(8), search_scales=True).codes,
    )


def test_a_weight_that_is_not_finite_is_named():
    w = weights(8, 128)
    w[3, 77] = float("inf")
    with pytest.raises(lobcq_fx.LobcqError, match=r"cannot encode layer\.weight: x\[3, 77\] is inf"):
        encode_weight(w, FormatSpec(), universal_codebooks(8), "layer.weight", torch.eye(128))


def test_it_needs_data_and_says_so():
    with pytest.raises(CalibrationError, match="compensated rounding and budgets of bits need calibration_data"):
        lobcq_fx.quantize(torch.nn.Linear(64, 64), config=LobcqConfig(rounding="compensated"))
