"""`lobcq::grouped_linear` (W4A4), `.int8_activation` (W4A8), `.float_activation` (W4A16): groups of an activation's
rows, each multiplied with a matrix of its own of a stacked weight. Implementations and fake kernels.

Which rows are a group comes from tensors that nobody has checked: whatever they hold, no row is read that does not
exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.errors import OperandError
from lobcq_fx.format import Int8Activation, product_in_fp32, scale_product
from lobcq_fx.format.stacked import by_groups, group_bounds
from lobcq_fx.ops.linear import scaled_entries
from lobcq_fx.ops.operand_checks import check, check_fake
from lobcq_fx.ops.schemas import (
    GROUPED_LINEAR,
    GROUPED_LINEAR_FLOAT_ACTIVATION,
    GROUPED_LINEAR_INT8_ACTIVATION,
    GROUPED_LINEAR_PREPACKED,
    GROUPED_LINEAR_PREPACKED_FLOAT_ACTIVATION,
    argument_names,
)

Given = Mapping[str, Any]
"""A call's arguments by the schema's names, the activation's first."""


def _given(local: Given) -> Given:
    return {name: value for name, value in local.items() if name != "self"}


@dataclass(frozen=True)
class StoredGroupedLinears:
    """The grouped linears of weights as they are stored; `scaled_entries` is as `StoredLinears` takes it."""

    scaled_entries: Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Tensor]

    def grouped_linear(
        self,
        codes: Tensor,
        selectors: Tensor,
        scales: Tensor,
        tensor_scale: Tensor,
        codebooks: Tensor,
        w_codes: Tensor,
        w_selectors: Tensor,
        w_scales: Tensor,
        w_tensor_scale: Tensor,
        w_codebooks: Tensor,
        offsets: Tensor | None,
        rows: Tensor | None,
        in_features: int,
        array_size: int,
        dtype: torch.dtype,
        activation_array_size: int | None = None,
    ) -> Tensor:
        """`x[group e] @ w[e].T` for each of E groups of rows.

        Args:
            codes, selectors, scales, tensor_scale: an activation from `lobcq::quantize_activation`, [T, K], or without
                offsets [E, M, K].
            codebooks: int8 [N_c, 16], the activation's.
            w_codes, w_selectors, w_scales, w_tensor_scale: weights [E, N, K] packed as at rest, tensor scales fp32 [E].
            w_codebooks: int8 [N_c, 16], the weights'.
            offsets: int32 [E], where each group of rows ends, as `format.group_bounds` takes it; None where group e is
                [e, :].
            rows: int64 [S], from 0 to T - 1: the S rows to multiply are these of the activation; None: all T, in order.
            in_features: K.
            array_size: L_A, of both operands.
            dtype: of the result.
            activation_array_size: L_A of the activation, where it is another.

        Returns:
            [T or S, N], or [E, M, N], in `dtype`; NaN in rows whose tensor scale is NaN, zeros in those of no group.

        Raises:
            OperandError: an operand is not what `contracts` says, or a row does not exist (on the CPU).
        """
        given = _given(locals())
        check(GROUPED_LINEAR, given)
        check_groups(GROUPED_LINEAR, given)
        a = self.scaled_entries(codes, selectors, scales, codebooks, in_features, activation_array_size or array_size)
        return self._products(given, a, tensor_scale.reshape(-1, 1), dtype)

    def grouped_linear_int8_activation(
        self,
        entries: Tensor,
        scales: Tensor,
        tensor_scale: Tensor,
        w_codes: Tensor,
        w_selectors: Tensor,
        w_scales: Tensor,
        w_tensor_scale: Tensor,
        w_codebooks: Tensor,
        offsets: Tensor | None,
        rows: Tensor | None,
        in_features: int,
        array_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """The same of an activation from `lobcq::quantize_activation_int8`."""
        given = _given(locals())
        check(GROUPED_LINEAR_INT8_ACTIVATION, given)
        check_groups(GROUPED_LINEAR_INT8_ACTIVATION, given)
        a = Int8Activation.flattened(entries, scales, tensor_scale, in_features)
        return self._products(given, a.scaled_entries(), a.tensor_scale, dtype)

    def grouped_linear_float_activation(
        self,
        x: Tensor,
        w_codes: Tensor,
        w_selectors: Tensor,
        w_scales: Tensor,
        w_tensor_scale: Tensor,
        w_codebooks: Tensor,
        offsets: Tensor | None,
        rows: Tensor | None,
        array_size: int,
    ) -> Tensor:
        """The same of a float activation, in fp32; the result as x is."""
        given = _given(locals())
        check(GROUPED_LINEAR_FLOAT_ACTIVATION, given)
        check_groups(GROUPED_LINEAR_FLOAT_ACTIVATION, given)
        return self._products(given, x.reshape(x.shape[:-1].numel(), x.shape[-1]).float(), None, x.dtype)

    def _products(self, given: Given, a: Tensor, a_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """a: fp32 [T, K], to be multiplied with a_scale [T, 1] once the sums are made, or as it is."""
        w_scale, codebooks, rows = given["w_tensor_scale"], given["w_codebooks"], given["rows"]
        if rows is not None:
            a = a[rows]
            a_scale = None if a_scale is None else a_scale[rows]
        codes, selectors, scales = given["w_codes"], given["w_selectors"], given["w_scales"]

        def product(index: int, group: slice) -> Tensor:
            parts = codes[index], selectors[index], scales[index]
            w = self.scaled_entries(*parts, codebooks, a.shape[1], given["array_size"])
            if a_scale is None:
                return product_in_fp32(a[group], w * w_scale[index])
            return scale_product(product_in_fp32(a[group], w), a_scale[group], w_scale[index], None)

        bounds = group_bounds(_ends(given["offsets"], len(codes), len(a)), len(a))
        return by_groups(bounds, a, codes.shape[1], product).to(dtype).view(result_shape(given, codes.shape[1]))


def _ends(offsets: Tensor | None, groups: int, rows: int) -> list[int]:
    """Where groups of rows end. On a GPU this waits for it."""
    if offsets is not None:
        ends: list[int] = offsets.tolist()
        return ends
    return [rows // max(1, groups) * (index + 1) for index in range(groups)]


def result_shape(given: Given, outputs: int) -> tuple[int, ...]:
    """Of a grouped linear's result: the activation comes first among the arguments."""
    leading = next(iter(given.values())).shape[:-1] if given["rows"] is None else given["rows"].shape
    return (*leading, outputs)


def check_group_ranks(op: str, given: Given) -> None:
    """Refuse an activation that does not have its rows in the form which `offsets` and `rows` speak of.

    Raises:
        OperandError: says what to pass.
    """
    name, activation = next(iter(given.items()))
    if given["offsets"] is not None and activation.dim() != 2:
        raise OperandError(f"{op}: {name} is {list(activation.shape)}: pass rows [T, ...] with offsets")
    if given["offsets"] is None and (activation.dim() != 3 or given["rows"] is not None):
        raise OperandError(f"{op}: {name} is {list(activation.shape)}: without offsets pass [E, M, ...], and no rows")


def check_groups(op: str, given: Given) -> None:
    """The same, the number of groups, and on the CPU, that all rows exist.

    Raises:
        OperandError: says what to pass.
    """
    check_group_ranks(op, given)
    name, activation = next(iter(given.items()))
    experts = given["w_codes" if "w_codes" in given else "weights"].shape[0]
    if given["offsets"] is None and activation.shape[0] != experts:
        raise OperandError(f"{op}: {name} has {activation.shape[0]} groups and the weight {experts} matrices")
    rows, count = given["rows"], activation.shape[0]
    if rows is None or rows.device.type != "cpu" or not rows.numel():
        return  # on a GPU it would be waited for
    first, last = (int(bound) for bound in rows.aminmax())
    if first < 0 or last >= count:
        raise OperandError(f"{op}: rows reach from {first} to {last}: the activation has rows 0 to {count - 1}")


_DEFAULT = StoredGroupedLinears(scaled_entries)
grouped_linear = _DEFAULT.grouped_linear
grouped_linear_int8_activation = _DEFAULT.grouped_linear_int8_activation
grouped_linear_float_activation = _DEFAULT.grouped_linear_float_activation


def _fake_of(name: str) -> Callable[..., Tensor]:
    """The fake kernel of any of these ops, whose activation comes first."""
    names = argument_names(name)

    def fake(activation: Tensor, *rest: Any) -> Tensor:
        given = dict(zip(names, (activation, *rest), strict=False))  # those left to their defaults are absent
        check_fake(name, given)
        check_group_ranks(name, given)
        outputs = given["out_features"] if "out_features" in given else given["w_codes"].shape[1]
        return activation.new_empty(result_shape(given, outputs), dtype=given.get("dtype", activation.dtype))

    return fake


for _name, _implementation in (
    (GROUPED_LINEAR, grouped_linear),
    (GROUPED_LINEAR_INT8_ACTIVATION, grouped_linear_int8_activation),
    (GROUPED_LINEAR_FLOAT_ACTIVATION, grouped_linear_float_activation),
):
    torch.library.impl(_name, "CompositeExplicitAutograd", _implementation)
    torch.library.register_fake(_name, _fake_of(_name))

# What a prepacked weight's bytes mean is known to the device that packed them: there is no default implementation.
for _name in (GROUPED_LINEAR_PREPACKED, GROUPED_LINEAR_PREPACKED_FLOAT_ACTIVATION):
    torch.library.register_fake(_name, _fake_of(_name))
