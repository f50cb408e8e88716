import pytest
import torch

from lobcq_fx.calibration import ActivationStatistics
from lobcq_fx.calibration import statistics as module
from lobcq_fx.calibration.synthetic import synthetic
from lobcq_fx.errors import CalibrationError
from lobcq_fx.format import FormatSpec

SPEC = FormatSpec(8, 16)


def statistics_of(*batches: torch.Tensor, sampled_arrays: int = 50) -> ActivationStatistics:
    statistics = ActivationStatistics("model.layers.3.mlp", SPEC, sampled_arrays)
    for batch in batches:
        statistics.update(batch)
    return statistics


@pytest.mark.parametrize("cut", [1, 7, 64])
@pytest.mark.parametrize("columns", [48, 37])
def test_batches_equal_their_concatenation(cut, columns):
    x = synthetic("student-t4", (64, columns), seed=1)
    whole, parts = statistics_of(x), statistics_of(*x.split(cut))
    assert torch.equal(whole.absmax(), parts.absmax())
    torch.testing.assert_close(whole.mean_squares(), parts.mean_squares())
    assert torch.equal(whole.sample(), parts.sample())
    assert torch.equal(whole.sample_in_row_scales(), parts.sample_in_row_scales())
    assert (whole.num_rows, whole.num_scalars) == (parts.num_rows, parts.num_scalars) == (64, 64 * columns)


def test_working_in_chunks_changes_nothing(monkeypatch):
    x = synthetic("gaussian", (64, 48), seed=2)
    whole = statistics_of(x)
    monkeypatch.setattr(module, "CHUNK", 100)
    torch.testing.assert_close(whole.mean_squares(), statistics_of(x).mean_squares())
    assert torch.equal(whole.sample(), statistics_of(x).sample())


def test_against_plain_arithmetic():
    x = synthetic("gaussian", (3, 5, 32), seed=3) * 7
    statistics = statistics_of(x)
    assert statistics.absmax() == x.abs().max()
    assert statistics.static_tensor_scale() == x.abs().max() / 13888
    assert statistics.num_rows == 15
    torch.testing.assert_close(statistics.mean_squares(), x.reshape(-1, 32).square().mean(0))
    expected = {tuple(row) for row in x.reshape(-1, 16).tolist()}
    assert {tuple(row) for row in statistics.sample().tolist()} == expected


def test_sample_in_row_scales_divides_by_the_rows_own_scale():
    x = torch.cat((torch.full((1, 16), 1.0), torch.full((1, 16), 100.0)))
    assert torch.allclose(statistics_of(x).sample_in_row_scales(), torch.full((2, 16), 13888.0))


def test_columns_are_padded_with_zeros_that_are_not_counted():
    statistics = statistics_of(torch.ones((2, 20)))
    assert statistics.num_scalars == 40
    assert sorted(row.count(0.0) for row in statistics.sample().tolist()) == [0, 0, 12, 12]


def test_memory_is_constant():
    statistics = ActivationStatistics("layer", SPEC, sampled_arrays=8)
    for seed in range(20):
        statistics.update(synthetic("gaussian", (16, 64), seed))
    assert statistics.sample().shape == (8, 16)
    assert statistics.num_rows == 320
    assert statistics.mean_squares().shape == (64,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_its_fp32_values(dtype):
    x = synthetic("gaussian", (8, 32), seed=4).to(dtype)
    assert torch.equal(statistics_of(x).mean_squares(), statistics_of(x.float()).mean_squares())
    assert statistics_of(x).sample().dtype == torch.float32
    assert statistics_of(x).absmax().dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (0,), (4, 0)])
def test_empty_tensors_are_no_data(shape):
    statistics = statistics_of(torch.empty(shape))
    assert statistics.num_updates == 1
    assert not statistics.seen
    with pytest.raises(CalibrationError):
        statistics.absmax()
    statistics.update(torch.ones((1, 32)))
    assert statistics.seen


def test_one_dimensional_activations_are_one_row():
    assert statistics_of(torch.ones(32)).num_rows == 1


@pytest.mark.parametrize(
    "question", ["absmax", "static_tensor_scale", "sample", "sample_in_row_scales", "mean_squares"]
)
def test_never_saw_data_is_an_error_that_names_layer_and_remedy(question):
    statistics = statistics_of()
    assert not statistics.seen
    with pytest.raises(CalibrationError, match=r"model\.layers\.3\.mlp was observed: pass calibration data"):
        getattr(statistics, question)()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_activations_are_refused_and_leave_no_trace(bad):
    statistics = statistics_of(torch.ones((2, 32)))
    x = torch.ones((3, 32))
    x[1, 5] = bad
    with pytest.raises(CalibrationError, match=r"model\.layers\.3\.mlp holds -?(nan|inf) at row 1, column 5"):
        statistics.update(x)
    assert statistics.num_rows == 2
    assert statistics.absmax() == 1


def test_zeros_are_data():
    statistics = statistics_of(torch.zeros((2, 32)))
    assert statistics.seen
    assert statistics.static_tensor_scale() == 1
    assert not statistics.mean_squares().any()


def test_an_activation_that_needs_a_gradient_is_only_read():
    x = torch.ones((2, 32), requires_grad=True)
    assert not statistics_of(x).sample().requires_grad


def test_divided_statistics_are_those_of_the_divided_activation():
    x = synthetic("student-t4", (64, 37), seed=5)
    scale = torch.exp2(torch.arange(37) % 5 - 2.0)
    statistics, expected = (ActivationStatistics("layer", SPEC, 500) for _ in range(2))
    statistics.update(x)
    expected.update(x / scale)
    divided = statistics.divided(scale)
    assert torch.equal(divided.absmax(), expected.absmax())
    assert torch.equal(divided.sample(), expected.sample())
    torch.testing.assert_close(divided.mean_squares(), expected.mean_squares())
    rows = x / scale
    torch.testing.assert_close(divided.encoded_moments(x.T @ x), rows.T @ rows)
    torch.testing.assert_close(divided.sample_in_row_scales(), expected.sample() / expected.static_tensor_scale())
    assert torch.equal(statistics.absmax(), x.abs().max())
