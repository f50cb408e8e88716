"""Rounding with feedback: what the textbook's formula gives, and never worse where it counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lobcq_fx
from lobcq_fx import FormatSpec, LobcqConfig
from lobcq_fx.calibration.compensate import DAMPING, compensate
from lobcq_fx.calibration.encode_weight import encode_weight
from lobcq_fx.errors import CalibrationError
from lobcq_fx.format import decode, encode, universal_codebooks
from lobcq_fx.format.packing import unpack_codes
from lobcq_fx.format.spec import BLOCK_SIZE


def inputs(rows, columns, seed=0):
    """Correlated, with a few columns of far more power, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    power = torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator) @ mixing * power


def weights(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def cost(weight, encoded, moments):
    """Of the layer's output, in fp64: trace((W - V) H (W - V)^T)."""
    error = (weight - decode(encoded)).double()
    return float(((error @ moments.double()) * error).sum())


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
    encoded = compensate(w, moments, spec, universal_codebooks(spec.num_codebooks))
    values = decode(encoded)
    for row in range(3):
        one = replace(encoded, scales=encoded.scales[row : row + 1])
        torch.testing.assert_close(values[row], by_the_textbook(w[row], moments, one), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["8x64", "16x64", "2x128", "8x32"])
@pytest.mark.parametrize("columns", [192, 172, 40])
def test_the_output_s_error_is_far_smaller(name, columns):
    spec = FormatSpec.from_name(name)
    books, x, w = universal_codebooks(spec.num_codebooks), inputs(1000, columns), weights(48, columns)
    held_out = inputs(1000, columns, seed=0)[500:]
    moments, unseen = x[:500].t() @ x[:500], held_out.t() @ held_out
    encoded, nearest = compensate(w, moments, spec, books), encode(w, spec, books)
    assert cost(w, encoded, unseen) < 0.75 * cost(w, nearest, unseen)
    assert (encoded.codes.shape, encoded.selectors.shape) == (nearest.codes.shape, nearest.selectors.shape)
    assert encoded.tensor_scale == nearest.tensor_scale
    assert encoded.columns == columns


def test_without_correlations_it_is_rounding_by_itself():
    """Codes, codebooks and scales: the cheapest of each, which nothing else changes."""
    spec, books, w = FormatSpec(), universal_codebooks(8), weights(16, 128)
    encoded, nearest = compensate(w, torch.eye(128), spec, books), encode(w, spec, books)
    squares = (w - decode(encoded)).square().sum(), (w - decode(nearest)).square().sum()
    assert squares[0] <= squares[1]
    same = (encoded.scales.view(torch.uint8) == nearest.scales.view(torch.uint8)).repeat_interleave(64, 1)
    assert 0.2 < same.float().mean() < 1
    # The format compares distances on its grid of sixteenths: two codebooks that are as near there may not be in fp32.
    assert (unpack_codes(encoded.codes) == unpack_codes(nearest.codes))[same].float().mean() > 0.95


def test_inputs_that_tell_nothing_are_taken_as_they_are():
    """No inputs, columns that are always 0, columns that are equal, fewer rows than columns."""
    spec, books, w = FormatSpec(), universal_codebooks(8), weights(8, 192)
    few = inputs(5, 192)
    few[:, 10] = few[:, 11]
    few[:, 100:140] = 0
    for moments in (torch.zeros(192, 192), few.t() @ few, torch.ones(192, 192), 1e30 * (few.t() @ few)):
        encoded = compensate(w, moments, spec, books)
        assert (w - decode(encoded)).square().mean() < 0.05 * w.square().mean()
    assert bool((decode(compensate(torch.zeros(8, 192), few.t() @ few, spec, books)) == 0).all())
    with pytest.raises(CalibrationError, match="NaN"):
        compensate(w, torch.full((192, 192), float("nan")), spec, books)


def test_more_threads_change_nothing():
    x, w, threads = inputs(300, 256), weights(64, 256), torch.get_num_threads()
    moments, found = x.t() @ x, []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(compensate(w, moments, FormatSpec(), universal_codebooks(8)))
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
        stored["last.weight.codes"], encode(model.last.weight, FormatSpec(), universal_codebooks(8)).codes
    )


def test_a_weight_that_is_not_finite_is_named():
    w = weights(8, 128)
    w[3, 77] = float("inf")
    with pytest.raises(lobcq_fx.LobcqError, match=r"cannot encode layer\.weight: x\[3, 77\] is inf"):
        encode_weight(w, FormatSpec(), universal_codebooks(8), "layer.weight", torch.eye(128))


def test_it_needs_data_and_says_so():
    with pytest.raises(CalibrationError, match="compensated rounding need calibration_data"):
        lobcq_fx.quantize(torch.nn.Linear(64, 64), config=LobcqConfig(rounding="compensated"))
