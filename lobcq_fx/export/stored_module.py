"""The graph on stored weights as a module of its own, ready for torch.export."""

from __future__ import annotations

from torch import fx, nn

from lobcq_fx.errors import ExportError
from lobcq_fx.export.float32 import ComputeInFloat32
from lobcq_fx.export.kept_positions import KEPT, FixKeptPositions, placeholders
from lobcq_fx.export.squeezes import SqueezeOnesOnly
from lobcq_fx.export.unsupported import explain_complex
from lobcq_fx.graph.attributes import register_attribute
from lobcq_fx.graph.graph_module import LobcqGraphModule, copied
from lobcq_fx.model import QuantizedModel
from lobcq_fx.passes.eliminate_dead_code import EliminateDeadCode
from lobcq_fx.passes.infra import Sequential
from lobcq_fx.passes.real_arithmetic import RealArithmetic
from lobcq_fx.storage.stored_tensors import stored_tensors


def stored_module(q: QuantizedModel, *, last_logits_only: bool = False) -> fx.GraphModule:
    """A copy of q's stored graph that computes in fp32 whatever is not quantized; the model is not touched.

    Args:
        q: the model.
        last_logits_only: a language model returns the logits of the last position, not of all.

    Raises:
        ExportError: the graph cannot be told which positions' logits to return, or needs complex numbers.
    """
    root = nn.Module()
    for name, tensor in stored_tensors(q.graph_module, [q.stored_graph]).items():
        register_attribute(root, name, tensor)
    graph = copied(q.stored_graph)
    if last_logits_only and not placeholders(graph):
        raise ExportError(f"last_logits_only asks for a language model that takes {KEPT}: leave it out")
    graph_module = LobcqGraphModule(root, graph, class_name="LobcqGraph").eval()
    Sequential((FixKeptPositions(last_logits_only), EliminateDeadCode(), SqueezeOnesOnly()))(graph_module)
    real = RealArithmetic()
    real(graph_module)
    if real.refusals:
        raise ExportError(explain_complex(real.refusals[0]))
    ComputeInFloat32()(graph_module)
    return graph_module
