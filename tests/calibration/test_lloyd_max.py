import numpy as np
import pytest
import torch

from lobcq_fx.calibration.lloyd_max import NUM_BINS, companded_entries, lloyd_max, squared_errors
from lobcq_fx.format.codes import CodeTables, assign_codes
from lobcq_fx.format.spec import GRID_MAX
from tests.calibration import naive


def histogram(values: torch.Tensor) -> torch.Tensor:
    return torch.bincount(values.flatten() + GRID_MAX, minlength=NUM_BINS).view(1, -1)


def gaussian_grid(count: int, seed: int) -> torch.Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 160).round().clamp(-496, 496).long()


def test_squared_errors_are_those_of_the_nearest_entry():
    codebooks = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).double().mul(200).sort(dim=1).values
    grid = np.arange(-GRID_MAX, GRID_MAX + 1, dtype=np.float64)
    expected = naive.nearest_errors(grid, codebooks.numpy())[1]
    np.testing.assert_allclose(squared_errors(codebooks).numpy(), expected.T, rtol=1e-12)


def test_squared_errors_of_integer_codebooks_are_those_of_the_formats_codes():
    codebooks = torch.randint(-31, 32, (1, 16), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    codebooks = codebooks.sort(dim=1).values
    grid = torch.arange(-GRID_MAX, GRID_MAX + 2).int()  # one more, for a whole number of blocks
    codes, _ = assign_codes(grid.clamp(max=GRID_MAX).view(1, -1), CodeTables.of(codebooks))
    chosen = codebooks[0, codes[0, :-1].long()].double() * 16
    assert torch.equal(squared_errors(codebooks.double() * 16)[:, 0], (grid[:-1] - chosen).square())


@pytest.mark.parametrize("count", [30, 400, 5000])
def test_equals_lloyd_max_over_the_scalars_themselves(count):
    values = gaussian_grid(count, seed=count)
    start = companded_entries(histogram(values))
    expected = naive.lloyd_max(values.double().numpy(), start[0].numpy())
    np.testing.assert_allclose(lloyd_max(histogram(values), start)[0].numpy(), expected, rtol=1e-12)


def test_never_beats_the_global_optimum_and_stays_at_it():
    values = gaussian_grid(120, seed=3)
    optimal, least = naive.optimal_codebook(values.double().numpy(), 16)
    found = lloyd_max(histogram(values), companded_entries(histogram(values)))
    assert naive.nearest_errors(values.double().numpy(), found.numpy())[1].sum() >= least * (1 - 1e-9)
    at_optimum = lloyd_max(histogram(values), torch.from_numpy(optimal).view(1, -1))
    np.testing.assert_allclose(at_optimum[0].numpy(), optimal, rtol=1e-12)


def test_sixteen_distinct_values_are_met_exactly():
    values = torch.arange(-240, 241, 32)
    found = lloyd_max(histogram(values), companded_entries(histogram(values)))
    assert found[0].tolist() == values.tolist()


def test_an_entry_without_scalars_stays_and_the_order_holds():
    start = torch.linspace(-480, 480, 16, dtype=torch.float64).view(1, -1)
    found = lloyd_max(histogram(torch.tensor([0, 1, 2, 400])), start)
    assert bool((found.diff(dim=1) >= 0).all())
    assert found[0, 0] == -480
    assert found[0, -1] == 480


def test_an_empty_histogram_changes_nothing():
    start = companded_entries(torch.zeros((1, NUM_BINS), dtype=torch.long))
    assert bool((start.diff(dim=1) > 0).all())
    assert torch.equal(lloyd_max(torch.zeros((1, NUM_BINS), dtype=torch.long), start), start)
