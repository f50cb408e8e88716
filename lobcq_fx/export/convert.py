"""From a stored graph to an ONNX model in memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import Dim

from lobcq_fx.errors import ExportError
from lobcq_fx.export.exact_constants import exact_constants
from lobcq_fx.export.flat_module import PREFIX, FlatModule
from lobcq_fx.export.functions import function_body
from lobcq_fx.export.functions.body import OPSET
from lobcq_fx.export.fusions import use_runtime_operators
from lobcq_fx.export.schemas import DOMAIN, VERSION
from lobcq_fx.export.signature import Signature
from lobcq_fx.export.translation import translation_table
from lobcq_fx.export.unsupported import explain
from lobcq_fx.graph.fake_tensors import uncached_fake_tensors
from lobcq_fx.integrations.transformers_onnx import conversion_fixes, fix_onnx_program

OUTPUT = "lobcq_output."
"""Outputs while the graph is made: the names they end with may be those of inner values."""


def to_onnx(module: FlatModule, signature: Signature, *, fuse: bool) -> ir.Model:
    """Convert, and add the function bodies of the operators that the graph uses.

    Args:
        module: the graph.
        signature: its inputs and outputs.
        fuse: use ONNX Runtime's own norms, activations and rotary embeddings.

    Raises:
        ExportError: an operator has no translation; names it.
    """
    program = _export(module, signature)
    with _quiet(), exact_constants(), conversion_fixes(program.graph_module) as translations:
        try:
            onnx_program = torch.onnx.export(
                program,
                (),
                input_names=list(signature.inputs),
                output_names=[f"{OUTPUT}{index}" for index in range(len(signature.outputs))],
                custom_translation_table={**translations, **translation_table()},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(explain(error, program)) from error
    assert onnx_program is not None
    fix_onnx_program(onnx_program)
    model = onnx_program.model
    for value in list(model.graph.initializers.values()):
        value.name = str(value.name).removeprefix(PREFIX)
    model.functions.clear()  # LobcqQuantizer's: fusing would put the bodies in the operators' place
    if fuse:
        with _quiet(), exact_constants():
            use_runtime_operators(model)
    _name_dimensions(model, signature.dynamic)
    _name_outputs(model.graph, signature)
    add_function_bodies(model)
    model.producer_name = "lobcq_fx"
    return model


def add_function_bodies(model: ir.Model) -> None:
    """Give every operator of ours that the graph uses its function body."""
    used = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    for name in sorted(used):
        body = function_body(name)
        model.functions[body.identifier()] = body
    if used:
        model.opset_imports[DOMAIN] = VERSION


def _export(module: FlatModule, signature: Signature) -> torch.export.ExportedProgram:
    inputs = list(signature.inputs.values())
    shapes = [_dynamic(tensor, signature.dynamic[name]) for name, tensor in signature.inputs.items()]
    with torch.no_grad(), uncached_fake_tensors():
        return torch.export.export(module, (inputs,), dynamic_shapes=(shapes,), strict=False)


def _dynamic(tensor: Tensor, names: Mapping[int, str]) -> dict[int, object]:
    return {dim: Dim.AUTO if dim in names else Dim.STATIC for dim in range(tensor.dim())}


def _name_outputs(graph: ir.Graph, signature: Signature) -> None:
    """Only now: before, a name may be an inner value's, which gets another one."""
    taken = {*signature.inputs, *signature.outputs}
    inner = [value for node in graph.all_nodes() for value in node.outputs] + list(graph.initializers.values())
    for value in inner:
        if value.name in taken:
            value.name = f"{value.name}_inner"
    for value, name in zip(graph.outputs, signature.outputs, strict=True):
        value.name = name


def _name_dimensions(model: ir.Model, dynamic: Mapping[str, Mapping[int, str]]) -> None:
    """Give the free dimensions of the inputs their names, wherever they occur."""
    renamed: dict[str, str] = {}
    for value in model.graph.inputs:
        for dim, name in dynamic[str(value.name)].items():
            assert value.shape is not None
            size = value.shape[dim]
            if isinstance(size, int):
                raise ExportError(f"dimension {dim} of input {value.name} was free and became {size} in the export")
            if size.value is not None:
                renamed.setdefault(size.value, name)
    for value in _values(model.graph):
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else size.value for size in value.shape]
            value.shape = ir.Shape([renamed.get(size, size) if isinstance(size, str) else size for size in sizes])


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx and onnxscript warn about their own insides; what they produce is checked against the model."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
