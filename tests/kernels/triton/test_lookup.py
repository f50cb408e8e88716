"""Tables against the definition of the nearest entry, grid value by grid value."""

from __future__ import annotations

import pytest
import torch

from lobcq_fx.format.codes import CodeTables
from lobcq_fx.format.spec import ALLOWED_NUM_CODEBOOKS, GRID_MAX, FormatSpec
from lobcq_fx.kernels.triton.lookup import FIRST_BUCKET, LAST_BUCKET, Lookup
from tests.kernels.triton.operands import DEVICE, codebooks


@pytest.mark.parametrize("num_codebooks", ALLOWED_NUM_CODEBOOKS)
def test_a_bucket_has_the_nearest_entry_of_each_of_its_grid_values(num_codebooks: int) -> None:
    books = codebooks(FormatSpec(num_codebooks, 64))
    lookup = Lookup.of(books)
    bucket = ((torch.arange(-GRID_MAX, GRID_MAX + 1, device=DEVICE) - 1) >> 3).clamp(FIRST_BUCKET, LAST_BUCKET)
    codes = lookup.codes[bucket - FIRST_BUCKET]
    assert torch.equal(codes, CodeTables.of(books).nearest)
    entries = lookup.entries.view(torch.int8)[bucket - FIRST_BUCKET]
    assert torch.equal(entries[:, :num_codebooks], books.t().gather(0, codes.long()))


@pytest.mark.parametrize("num_codebooks", ALLOWED_NUM_CODEBOOKS)
def test_bytes_and_back(num_codebooks: int) -> None:
    lookup = Lookup.of(codebooks(FormatSpec(num_codebooks, 64)))
    back = Lookup.from_bytes(lookup.to_bytes())
    for name in ("codebooks", "entries", "codes"):
        assert torch.equal(getattr(back, name), getattr(lookup, name))
    assert back.codebooks.data_ptr() % 16 == 0


def test_other_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="17 bytes are no set's look-up tables"):
        Lookup.from_bytes(torch.zeros(17, dtype=torch.uint8))
    with pytest.raises(ValueError, match="not sorted ascending"):
        Lookup.of(torch.tensor([[1, 0] + [2] * 14], dtype=torch.int8))
