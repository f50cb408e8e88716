"""Check packed tensors that come from a file before any kernel indexes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

import lobcq_fx.ops  # noqa: F401  (registers the ops whose operands are checked)
from lobcq_fx.errors import CheckpointError
from lobcq_fx.format import Encoded, EncodedStack, FormatSpec, check_codebooks
from lobcq_fx.format.spec import ALLOWED_ARRAY_SIZES, E4M3_MAX, ENTRY_MAX
from lobcq_fx.graph.attributes import delete_attribute, get_attribute, named_arguments, register_attribute
from lobcq_fx.graph.recurrence import recurrences
from lobcq_fx.graph.stored_linear import ENCODERS, StoredLinear, stored_linears
from lobcq_fx.modules.packed_weight import PARTS, PackedWeight, parts_of

LARGEST_SCALE = torch.finfo(torch.float32).max / (E4M3_MAX * ENTRY_MAX)
"""Of a tensor: beyond it, its largest scalar is none of fp32."""


def restore_packed_weights(module: nn.Module, graphs: Sequence[fx.Graph]) -> None:
    """Validate what the `lobcq::` ops of graphs read, and gather each weight's parts into a `PackedWeight` module.

    Raises:
        CheckpointError: a wrong shape or dtype, a scale that is not finite, codebooks out of range, two ops that read
            one weight differently; names the tensor.
    """
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    try:
        _check_activations(module, nodes)
        _check_weight_norms(module, nodes)
        for graph in graphs:
            _check_recurrences(module, graph)
        _restore_weights(module, [linear for graph in graphs for linear in stored_linears(graph)])
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"graph.json: an op does not read what it should: {error}") from None


def check_parameters(parameters: Mapping[str, Tensor]) -> None:
    """That weights of norms, and biases, are numbers; embeddings would take long to look through.

    Raises:
        CheckpointError: names the first that is not.
    """
    for name, tensor in parameters.items():
        if tensor.dim() <= 1 and tensor.is_floating_point() and tensor.element_size() > 1 and not _all_finite(tensor):
            raise CheckpointError(f"{name} holds NaN or infinity: the file is damaged")


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _check_activations(module: nn.Module, nodes: Sequence[fx.Node]) -> None:
    """The codebooks and static scales that activations are encoded with."""
    for node in nodes:
        if node.target not in ENCODERS.values():
            continue
        arguments = named_arguments(node)
        if "codebooks" in arguments:
            name = _stored(arguments["codebooks"])
            _spec(get_attribute(module, name), arguments["array_size"], name)
        scale = arguments.get("static_scale")
        if scale is None:
            continue
        value = get_attribute(module, _stored(scale))
        if value.dtype != torch.float32 or value.dim() or not 0 < float(value) <= LARGEST_SCALE:
            raise CheckpointError(
                f"{scale.target} is {value}: a static scale is one positive fp32 number of at most {LARGEST_SCALE:.3g}"
            )


def _check_weight_norms(module: nn.Module, nodes: Sequence[fx.Node]) -> None:
    """The lengths of weights that are normalized by rows: torch reads as many as there are rows."""
    for node in nodes:
        if node.target is not torch.ops.aten._weight_norm.default:
            continue
        arguments = named_arguments(node)
        direction, length = (get_attribute(module, _stored(arguments[name])) for name in ("v", "g"))
        rows, name = direction.shape[arguments.get("dim", 0)], arguments["g"].target
        if length.numel() != rows or length.dtype != direction.dtype:
            raise CheckpointError(
                f"{name} is {length.dtype} {list(length.shape)}; what it is the length of has {rows} rows of"
                f" {direction.dtype}"
            )


def _check_recurrences(module: nn.Module, graph: fx.Graph) -> None:
    """That the parameters of recurrent layers fit each other; passes/guard_recurrence.py fits the rest to them."""
    for one in recurrences(graph):
        name = one.node.name
        cells, parts = one.levels * one.directions, 4 if one.has_biases else 2
        if one.training or len(one.states) != one.wanted_states or len(one.parameters) != cells * parts or cells < 1:
            raise CheckpointError(
                f"graph.json: node {name!r} is no recurrent layer of {one.levels} levels for inference"
            )
        tensors = [get_attribute(module, _stored(node)) for node in one.parameters]
        hidden, columns = tensors[1].shape[-1], tensors[0].shape[-1]
        for place, tensor in enumerate(tensors):
            cell, part = divmod(place, parts)
            inputs = columns if cell < one.directions else hidden * one.directions
            wanted = [one.gates * hidden, *([inputs], [hidden], [], [])[part]]
            if list(tensor.shape) != wanted or tensor.dtype != tensors[0].dtype:
                raise CheckpointError(
                    f"{one.parameters[place].target} is {tensor.dtype} {list(tensor.shape)};"
                    f" node {name!r} needs {tensors[0].dtype} {wanted}"
                )


def _restore_weights(module: nn.Module, linears: Sequence[StoredLinear]) -> None:
    done: dict[str, tuple[str, int, bool, int]] = {}
    for linear in linears:
        for part in linear.weight_nodes:
            _stored(part)
        if linear.encodes_activation and linear.encoder is None:
            raise CheckpointError(f"graph.json: node {linear.node.name!r} reads no activation as it was encoded for it")
        name, codebooks_name = linear.weight, str(linear.codebooks.target)
        tensors = {part: get_attribute(module, f"{name}.{part}") for part in PARTS}
        codebooks = get_attribute(module, codebooks_name)
        spec = _spec(codebooks, linear.array_size, codebooks_name)
        columns = linear.arguments.get("in_features", tensors["scales"].shape[-1] * spec.array_size)
        _check_kernel_array_size(linear, columns)
        read = (codebooks_name, spec.array_size, linear.grouped, columns)
        if done.setdefault(name, read) != read:
            raise CheckpointError(
                f"{name} is read as {read} and as {done[name]} (codebooks, array size, stacked, columns)"
            )
        if isinstance(get_attribute(module, name), PackedWeight):
            continue
        encoded: Encoded | EncodedStack
        if linear.grouped:
            encoded = EncodedStack(**tensors, codebooks=codebooks, spec=spec, columns=columns)
        else:
            encoded = Encoded(**tensors, codebooks=codebooks, spec=spec, columns=columns)
        check_encoded(name, encoded)
        delete_attribute(module, name)
        register_attribute(module, name, PackedWeight(encoded))


def _check_kernel_array_size(linear: StoredLinear, columns: int) -> None:
    """Kernels repeat a weight's scales for the shorter arrays of its activation."""
    size, whole = linear.kernel_array_size, linear.array_size
    if size != whole and (size not in ALLOWED_ARRAY_SIZES or size > whole or columns % whole):
        raise CheckpointError(
            f"graph.json: node {linear.node.name!r} multiplies arrays of {whole} by arrays of {size}, K = {columns}:"
            " the activation's are shorter, and K is a multiple of the weight's"
        )


def _stored(node: fx.Node) -> str:
    """The name of a tensor that an op reads.

    Raises:
        TypeError: the node computes something instead.
    """
    if node.op != "get_attr":
        raise TypeError(f"{node.name!r} is no stored tensor")
    return str(node.target)


def _spec(codebooks: Tensor, array_size: int, name: str) -> FormatSpec:
    try:
        spec = FormatSpec(codebooks.shape[0], array_size)
        check_codebooks(codebooks, spec)
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
    return spec


def check_encoded(name: str, encoded: Encoded | EncodedStack) -> None:
    """That the parts of a weight are of the format, and its scales numbers.

    Raises:
        CheckpointError: names the part.
    """
    spec, columns, stacked = encoded.spec, encoded.columns, isinstance(encoded, EncodedStack)
    if encoded.codes.dim() != (3 if stacked else 2) or (stacked and not encoded.codes.shape[0]):
        expected = "a stack of weights has [E, N, ...]" if stacked else "a weight has [N, ...]"
        raise CheckpointError(f"{name}.codes is {list(encoded.codes.shape)}: {expected}")
    *stack, rows = encoded.codes.shape[:-1]
    for part, (dtype, shape) in parts_of(rows, columns, spec, tuple(stack)).items():
        tensor = getattr(encoded, part)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            actual = f"{tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(
                f"{name}.{part} is {actual}; format {spec.name} with K = {columns} has {dtype} {list(shape)}"
            )
    for scale in encoded.tensor_scale.flatten().tolist():
        if not 0 <= scale <= LARGEST_SCALE:
            raise CheckpointError(f"{name}.tensor_scale is {scale}: it must be from 0 to {LARGEST_SCALE:.3g}")
    scales = encoded.scales.view(torch.uint8)
    if bool((scales > 0x7E).any()):  # 0x7F is E4M3's NaN, 0x80 and up are negative
        raise CheckpointError(f"{name}.scales holds NaN or a negative scale: the file is damaged")
    # Codes and selectors need no check of their own: N_c and 16 are powers of two, every bit pattern is in range.
