"""ONNX Runtime's own operators in place of what computes the same, in a form that every tool can read."""

from __future__ import annotations

import onnx_ir as ir

from lobcq_fx.integrations.transformers_onnx import fuse_for_cpu


def use_runtime_operators(model: ir.Model) -> None:
    """Fuse norms, activations and rotary embeddings as transformers does."""
    fuse_for_cpu(model)
    for node in list(model.graph):
        if node.op_type == "SimplifiedLayerNormalization" and node.domain == "":
            _spell_out(model.graph, node)
        if node.op_type == "FusedMatMul":
            _restore_transposes(model.graph, node)
    for value in model.graph.initializers.values():
        if value.const_value is not None:  # the fusions leave some with another's shape
            value.shape = ir.Shape(list(value.const_value.shape.numpy()))


def _spell_out(graph: ir.Graph, node: ir.Node) -> None:
    """ONNX Runtime keeps its RMS norm in ONNX's domain, where ONNX's checker finds no such operator. It fuses these
    nodes again when it opens the model.
    """
    x, weight = node.inputs
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    tape = ir.tape.Tape(graph)
    square = tape.op("Pow", [x, tape.initializer(ir.tensor(2.0), f"{node.name}_exponent")])
    mean = tape.op("ReduceMean", [square, tape.initializer(ir.tensor([-1]), f"{node.name}_axes")])
    moved = tape.op("Add", [mean, tape.initializer(ir.tensor(epsilon), f"{node.name}_epsilon")])
    normed = tape.op("Div", [x, tape.op("Sqrt", [moved])])
    output, old = tape.op("Mul", [normed, weight]), node.outputs[0]
    graph.insert_before(node, tape.nodes)
    output.shape, output.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    output.name = old.name


def _restore_transposes(graph: ir.Graph, node: ir.Node) -> None:
    """ONNX Runtime's FusedMatMul moves an operand's first dimension behind the others (`transBatchA`) only where both
    operands are of one rank, 3 or more; the fusion asks for it whatever the other operand is, say a matrix.
    """
    ranks = [None if value is None or value.shape is None else len(value.shape) for value in node.inputs]
    if None in ranks or (ranks[0] == ranks[1] and ranks[0] > 2):  # type: ignore[operator]
        return
    for index, side in enumerate("AB"):
        operand = node.inputs[index]
        if not node.attributes.pop(f"transBatch{side}", None):
            continue
        first, *others, last = range(ranks[index])  # type: ignore[arg-type]
        order = [*others, first, last]  # `transA` swaps the last two after that, and may stay
        transposed = ir.node("Transpose", [operand], {"perm": order})
        graph.insert_before(node, transposed)
        moved = transposed.outputs[0]
        assert operand is not None
        assert operand.shape is not None  # its rank is known
        moved.shape, moved.type = ir.Shape([operand.shape[dim] for dim in order]), operand.type
        node.replace_input_with(index, moved)
