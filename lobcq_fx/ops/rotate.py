"""`lobcq::rotate`: default implementation and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format import rotation
from lobcq_fx.ops.operand_checks import check, check_fake, check_whole_arrays
from lobcq_fx.ops.schemas import ROTATE


def rotate(x: Tensor, array_size: int) -> Tensor:
    """Rotate the columns of each block array of an activation that is then encoded.

    Args:
        x: [..., K], fp32, bf16 or fp16, K a multiple of L_A.
        array_size: L_A.

    Returns:
        fp32 [..., K], contiguous.

    Raises:
        OperandError: an operand is not what `contracts` says, or K is no multiple of L_A.
    """
    check(ROTATE, locals())
    check_whole_arrays(ROTATE, "x", x, array_size)
    return rotation.rotate(x.float(), array_size)


torch.library.impl(ROTATE, "CompositeExplicitAutograd", rotate)


@torch.library.register_fake(ROTATE)
def _fake(x: Tensor, array_size: int) -> Tensor:
    check_fake(ROTATE, locals())
    return x.new_empty(x.shape, dtype=torch.float32)
