"""Operators that a saved graph may call: `python -m benchmarks.quality.operators` writes storage/operators.txt.

The list is what tracing has been seen to emit (every family of benchmarks/results/families.json, the static-cache
graphs of tests/families.py, random modules of tests/differential), and what a module of the user's own may well use:
the functional operators of torch's core set, and those of `ORDINARY`. `DENIED` leaves it, whoever asks for it. Read the
difference before committing it: a folder from anywhere may call what is on it.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch

import lobcq_fx
from lobcq_fx.storage.graph_json import operators
from lobcq_fx.storage.operators import FILE
from tests.differential.modules import Generated
from tests.families import WITH_STATIC_CACHE, quantized_causal_lm

FAMILIES = Path(__file__).parents[1] / "results" / "families.json"

_ORDINARY = """
__and__ __or__ __xor__ abs absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
adaptive_max_pool1d adaptive_max_pool2d add addbmm addcdiv addcmul addmm addmv addr all alpha_dropout amax amin
aminmax any arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort asin asinh atan atan2
atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear bitwise_and
bitwise_not bitwise_or bitwise_xor bmm broadcast_tensors broadcast_to bucketize cartesian_prod cat cdist ceil celu
chain_matmul channel_shuffle chunk clamp clamp_max clamp_min clip clone column_stack concatenate constant_pad_nd
contiguous
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d copysign cos cosh cosine_similarity
count_nonzero cross cummax cummin cumprod cumsum deg2rad det detach diag diag_embed diagonal diff digamma dist div
divide dot dropout dstack einsum elu embedding eq erf erfc exp exp2 expand expand_as expm1 eye feature_dropout
flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac full full_like gather ge gelu glu
greater greater_equal group_norm gt hardshrink hardsigmoid hardswish hardtanh heaviside hstack hypot index_add
index_copy index_fill index_put index_select inner instance_norm isclose isfinite isinf isnan isneginf isposinf kron
kthvalue layer_norm ldexp le leaky_relu lerp less less_equal lgamma linalg_matrix_norm linalg_norm
linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logaddexp2 logcumsumexp
logical_and logical_not logical_or logical_xor logit logspace logsumexp lt margin_ranking_loss masked_fill matmul
matrix_power max max_pool1d max_pool2d max_pool3d maximum mean median meshgrid min minimum mish mm movedim moveaxis
mT mul multiply mv nan_to_num narrow ne neg negative new_full new_ones new_zeros norm not_equal numel one_hot ones
ones_like outer pad permute pixel_shuffle pixel_unshuffle pow prelu prod rad2deg ravel reciprocal reflection_pad1d
reflection_pad2d relu relu6 remainder repeat replication_pad1d replication_pad2d reshape reshape_as rms_norm roll
rot90 round rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention scatter scatter_add select select_scatter
selu sgn sigmoid sign silu sin sinc sinh slice slice_scatter softmax softmin softplus softshrink softsign sort split
split_with_sizes sqrt square squeeze stack std std_mean sub subtract sum swapaxes swapdims sym_numel sym_size t
take_along_dim tan tanh tensor_split tensordot threshold tile to topk trace transpose tril triu true_divide trunc
type_as unbind unflatten unfold unsqueeze upsample_bilinear2d upsample_linear1d upsample_nearest1d
upsample_nearest2d upsample_nearest3d upsample_bicubic2d var var_mean vander view view_as vstack where xlogy zeros
zeros_like
angle complex conj imag polar real resolve_conj view_as_complex view_as_real
"""
ORDINARY = tuple(_ORDINARY.split())
"""Of aten, by name: all functional overloads of each."""

_IN_PLACE = """
abs_.default add_.Scalar add_.Tensor addcdiv_.default addcmul_.default ceil_.default celu_.default clamp_.default
clamp_max_.default clamp_min_.default copy_.default cos_.default detach_.default div_.Scalar div_.Tensor elu_.default
exp_.default fill_.Scalar fill_.Tensor floor_.default gelu_.default hardsigmoid_.default hardswish_.default
hardtanh_.default index_add_.default index_copy_.default index_fill_.int_Scalar index_put_.default leaky_relu_.default
lerp_.Scalar lerp_.Tensor log_.default logical_not_.default masked_fill_.Scalar masked_fill_.Tensor mish_.default
mul_.Scalar mul_.Tensor neg_.default pow_.Scalar reciprocal_.default relu6_.default relu_.default round_.default
rsqrt_.default scatter_.src scatter_.value selu_.default sigmoid_.default silu_.default sin_.default sqrt_.default
square_.default sub_.Scalar sub_.Tensor tanh_.default threshold_.default tril_.default triu_.default zero_.default
"""
IN_PLACE = tuple(_IN_PLACE.split())
"""Of aten: what models write their state with. They write to tensors of the model, of the call, or of their own."""

DENIED = {
    "_adaptive": "is a kernel behind one that checks its operands",
    "_cdist": "is a kernel behind one that checks its operands",
    "_fft": "is a kernel behind one that checks its operands",
    "_grouped_mm": "reads out of bounds where an offset is too large",
    "_local_scalar_dense": "makes a size of a tensor's value",
    "_pdist": "is a kernel behind one that checks its operands",
    "alpha_dropout": "moves the random state",
    "as_strided": "looks at memory wherever it likes",
    "backward": "is for training",
    "col2im": "is not needed for inference",
    "embedding_bag": "reads out of bounds where an offset is negative",
    "empty": "shows memory that nothing has written to",
    "feature_dropout": "moves the random state",
    "fused": "is a kernel behind one that checks its operands",
    "gru": "corrupts memory where a state is of another batch than its input",
    "lstm": "corrupts memory where a state is of another batch than its input",
    "narrow.Tensor": "makes a size of a tensor's value",
    "native_batch_norm": "reads beyond statistics that are too short",
    "native_dropout": "moves the random state",
    "native_group_norm": "is a kernel behind one that checks its operands",
    "native_layer_norm": "is a kernel behind one that checks its operands",
    "nonzero": "makes a size of a tensor's value",
    "quantize": "is not needed: weights are of this package's format",
    "rand": "moves the random state",
    "repeat_interleave.Tensor": "makes a size of a tensor's value",
    "repeat_interleave.self_Tensor": "makes a size of a tensor's value",
    "resize": "changes the size of memory that others look at",
    "rnn": "corrupts memory where a state is of another batch than its input",
    "rrelu": "moves the random state",
    "select.t": "is TorchScript's",
    "set_": "makes a tensor look at other memory",
    "sym_storage_offset": "tells where in memory a tensor lies",
    "sym_stride": "tells how a tensor lies in memory",
    "tensor_split.tensor": "makes sizes of a tensor's values",
    "unsafe": "says so itself",
}
"""Beginnings of names of aten, or words within, and what is wrong with them."""

_ONE = ("Tensor", "int", "float", "number", "bool", "str", "Device", "Layout", "MemoryFormat", "ScalarType")
TYPES = frozenset(
    form.format(kind) for kind in _ONE for form in ("{}", "Optional[{}]", "List[{}]", "Optional[List[{}]]")
) | {"List[Optional[Tensor]]"}
"""Of the operands of operators that are allowed by rule."""

CAPTURED_ALL_THE_SAME = ("ops.aten.empty_like.default", "ops.aten.new_empty.default")
"""Operators that are denied but for what real models do: they fill it before they read it."""

CHECKED = tuple(f"ops.aten.{name}.input" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))
"""Denied as well, but for graphs in which passes/guard_recurrence.py has checked what their kernels trust."""


def main() -> None:
    """Collect, print what changes, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=200, help="random modules")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    before = set(FILE.read_text(encoding="utf-8").split()) if FILE.exists() else set()
    found = captured(arguments.modules) | by_rule()
    for name in sorted(before ^ found):
        print("-" if name in before else "+", name)
    FILE.write_text("".join(f"{name}\n" for name in sorted(found)), encoding="utf-8")


def captured(modules: int) -> set[str]:
    """What tracing emits.

    Raises:
        RuntimeError: it emits something that is denied, which needs a decision.
    """
    families = json.loads(FAMILIES.read_text(encoding="utf-8"))["families"]
    found = {name for row in families.values() for name in row.get("operators", ())}
    for family in WITH_STATIC_CACHE:
        found |= called_by(quantized_causal_lm(family)[1])
    for seed in range(modules):
        try:
            module = Generated(seed).eval()
            found |= called_by(lobcq_fx.quantize(module, example_inputs=torch.randn(2, 5, 16)))
        except (lobcq_fx.LobcqError, RuntimeError):
            continue  # one that cannot be traced
    found = {name for name in found if name.startswith("ops.")}
    denied = [name for name in found if denial(name) and name not in CAPTURED_ALL_THE_SAME]
    if denied:
        raise RuntimeError(f"tracing emits {denied}, which is denied: {[denial(name) for name in denied]}")
    return found


def called_by(q: lobcq_fx.QuantizedModel) -> set[str]:
    """What the graphs of a model call."""
    return set(frozenset().union(*(operators(one.stored) for one in q.graphs.values())))


def by_rule() -> set[str]:
    """What follows from this file and torch alone."""
    aten = [f"ops.aten.{name}" for name in IN_PLACE]
    aten += [name for packet in ORDINARY for name in functional(packet, core=False)]
    aten += [name for packet in dir(torch.ops.aten) + _core() for name in functional(packet, core=True)]
    ours = (
        "linear.default", "linear.float_activation", "grouped_linear.default", "grouped_linear.float_activation",
        "grouped_linear.int8_activation", "quantize_activation.default", "rotate.default", "selective_scan.default",
        "chunk_scan.default", "gated_delta_rule.default",
    )  # fmt: skip
    return {name for name in aten if not denial(name)} | {f"ops.lobcq.{name}" for name in ours} | set(CHECKED)


def functional(packet: str, *, core: bool) -> list[str]:
    """The overloads of one operator of aten that write to nothing; of torch's core set alone where `core` says so."""
    found = getattr(torch.ops.aten, packet, None)
    if not isinstance(found, torch._ops.OpOverloadPacket):
        return []
    overloads = {name: getattr(found, name) for name in found.overloads()}
    return [
        f"ops.aten.{packet}.{name}"
        for name, overload in overloads.items()
        if is_plain(overload) and (not core or torch.Tag.core in overload.tags)
    ]


def is_plain(overload: torch._ops.OpOverload) -> bool:
    """Whether an operator writes to nothing, draws no random numbers, and takes and returns tensors and numbers."""
    schema = overload._schema
    taken, returned = ([str(one.type) for one in side] for side in (schema.arguments, schema.returns))
    seeded = torch.Tag.nondeterministic_seeded in overload.tags
    may_draw = seeded and not any(one.name in ("train", "training", "dropout_p") for one in schema.arguments)
    tensors = all(kind in ("Tensor", "List[Tensor]") for kind in returned) or schema.name.startswith("aten::sym_")
    return not schema.is_mutable and not may_draw and tensors and TYPES.issuperset(taken)


def denial(name: str) -> str | None:
    """Why an operator is not on the list, None where nothing speaks against it."""
    if not name.startswith("ops.aten."):
        return None
    own = name.removeprefix("ops.aten.")
    return next((reason for text, reason in DENIED.items() if own.startswith(text) or f"_{text}" in own), None)


def _core() -> list[str]:
    """Names of all operators of aten."""
    return sorted({schema.name[6:] for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::")})


if __name__ == "__main__":
    main()
