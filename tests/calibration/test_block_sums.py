import pytest
import torch

from lobcq_fx.calibration.block_sums import block_sums


def blocks(count: int) -> torch.Tensor:
    return torch.randint(0, 4095, (count, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


@pytest.mark.parametrize("columns", [1, 2, 16, 40])
@pytest.mark.parametrize("largest", [6.5e6, 1.0, 3e-9])
def test_nearly_as_exact_as_fp64(columns, largest):
    table = torch.rand((4095, columns), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * largest
    expected = table[blocks(500).long()].sum(dim=1)
    torch.testing.assert_close(block_sums(blocks(500), table), expected, rtol=0, atol=8 * largest * 2.0**-43)


def test_exact_for_the_squared_errors_of_integer_entries():
    """The largest there are: a grid value of 2047 against an entry of -31, eight times over."""
    table = (torch.arange(-2047, 2048).double() + 496).square().view(-1, 1)
    expected = table[blocks(500).long()].sum(dim=1)
    assert float(table.max()) * 8 < 2**26
    assert torch.equal(block_sums(blocks(500), table), expected)


def test_a_table_of_zeros():
    assert torch.equal(block_sums(blocks(3), torch.zeros((4095, 2), dtype=torch.float64)), torch.zeros((3, 2)).double())
