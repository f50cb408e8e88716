"""`lobcq::compensate`: default implementation and fake kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lobcq_fx.format import FormatSpec
from lobcq_fx.format.feedback import round_with_feedback
from lobcq_fx.format.spec import BLOCK_SIZE
from lobcq_fx.ops.operand_checks import check, check_fake, check_whole_arrays
from lobcq_fx.ops.schemas import COMPENSATE

Rounded = tuple[Tensor, Tensor, Tensor, Tensor]


def compensate(
    weight: Tensor,
    other_errors: Tensor,
    coupling: Tensor,
    power: Tensor,
    tensor_scale: Tensor,
    codebooks: Tensor,
    array_size: int,
) -> Rounded:
    """Round a weight with feedback of its errors; `lobcq_fx.format.feedback` has the rule.

    Args:
        weight: fp32 [N, K], K a multiple of L_A.
        other_errors: fp32 [N, K], of another rounding, whose cost is wanted too.
        coupling: fp32 [K, K], upper triangular with ones on the diagonal.
        power: fp32 [K].
        tensor_scale: fp32 [].
        codebooks: int8 [N_c, 16].
        array_size: L_A.

    Returns:
        codes uint8 [N, K], selectors uint8 [N, K/8], scales float8_e4m3fn [N, K/L_A], costs fp64 [N, 2]. Kernels agree
        up to the order in which the errors of the columns before are summed.

    Raises:
        OperandError: an operand is not what `contracts` says, or K is no multiple of L_A.
    """
    check(COMPENSATE, locals())
    check_whole_arrays(COMPENSATE, "weight", weight, array_size)
    spec = FormatSpec(codebooks.shape[0], array_size)
    done = round_with_feedback(weight, other_errors, coupling, power, tensor_scale, codebooks, spec)
    return done.codes, done.selectors, done.scales, done.costs


torch.library.impl(COMPENSATE, "CompositeExplicitAutograd", compensate)


@torch.library.register_fake(COMPENSATE)
def _fake(
    weight: Tensor,
    other_errors: Tensor,
    coupling: Tensor,
    power: Tensor,
    tensor_scale: Tensor,
    codebooks: Tensor,
    array_size: int,
) -> Rounded:
    check_fake(COMPENSATE, locals())
    rows, columns = weight.shape
    return (
        weight.new_empty((rows, columns), dtype=torch.uint8),
        weight.new_empty((rows, columns // BLOCK_SIZE), dtype=torch.uint8),
        weight.new_empty((rows, columns // array_size), dtype=torch.float8_e4m3fn),
        weight.new_empty((rows, 2), dtype=torch.float64),
    )
