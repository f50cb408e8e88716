"""Runs the written ONNX model in ONNX Runtime and the torch graph on the same samples, and compares.

Where activations are encoded, fp32 rounding becomes another code here and there, and from layer to layer the
difference grows without bound. So torch goes on from ONNX Runtime's encoded activations, each of which must be its own
but for a few codes: what follows then differs by rounding alone, however deep the model is.

Not compared is what masks hide, and rows that are rounding and nothing else beside their tensor's largest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, fx

from lobcq_fx.errors import ExportError
from lobcq_fx.export.hidden import Hidden, find_hidden
from lobcq_fx.export.library import is_available, register
from lobcq_fx.export.schemas import DOMAIN, QUANTIZE_ACTIVATION, QUANTIZE_ACTIVATION_INT8
from lobcq_fx.export.signature import Signature
from lobcq_fx.graph.stored_linear import ENCODERS, stored_linears

FOLDING_LIMIT = 1 << 20
"""Bytes of a constant that ONNX Runtime may compute at session creation: look-up tables, but no decoded weight."""

FOLDING_KEY = "optimization.constant_folding_max_output_size_in_bytes"

TOLERANCE = 1e-4
"""Root mean square, relative, that an output may differ by: fp32 sums in another order."""

MOVED_CODES = 0.05
"""Share of an activation's bytes that rounding may move; other activations of a model share about one in eight."""

NEGLIGIBLE = 1e-6
"""Magnitude of a row, relative to its tensor's largest: what is left where fp32 numbers of that size cancel, such as
`exp(x) - 1` near 0. Its scale, and its codes with it, is another in every runtime."""

CHECKED = "checked.onnx"


@dataclass(frozen=True)
class Differences:
    """functions, library: the largest between ONNX Runtime and torch, relative to an output's largest magnitude, with
    function bodies and, where there is one, with the op library. moved_codes: the largest share of an activation's
    bytes that differ.
    """

    functions: float
    library: float | None
    moved_codes: float


def check_sessions(path: Path, signature: Signature, torch_graph: fx.GraphModule) -> Differences:
    """Compare all outputs, and every encoded activation, on the signature's samples.

    Raises:
        ExportError: ONNX Runtime refuses the model, or something differs.
    """
    hidden = [find_hidden(torch_graph, sample) for sample in signature.samples]
    checked = path.with_name(CHECKED)
    proto = onnx.load(str(path), load_external_data=False)
    encoders = ((DOMAIN, QUANTIZE_ACTIVATION), (DOMAIN, QUANTIZE_ACTIVATION_INT8))
    encoded = [node.output for node in proto.graph.node if (node.domain, node.op_type) in encoders]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for names in encoded for name in names)
    onnx.save(proto, str(checked))
    try:
        sizes = [len(names) for names in encoded]
        functions, moved = _check(checked, signature, torch_graph, hidden, sizes, use_library=False)
        library: tuple[float | None, float] = (None, 0.0)
        if is_available():
            library = _check(checked, signature, torch_graph, hidden, sizes, use_library=True)
    finally:
        checked.unlink()
    return Differences(functions, library[0], max(moved, library[1]))


def _check(
    path: Path,
    signature: Signature,
    graph: fx.GraphModule,
    hidden: Sequence[Hidden],
    sizes: Sequence[int],
    *,
    use_library: bool,
) -> tuple[float, float]:
    """The largest difference of an output, and the largest share of moved codes.

    sizes: how many parts each encoded activation has; they follow the outputs.
    """
    what = f"ONNX Runtime {ort.__version__} with {'the op library' if use_library else 'function bodies'}"
    count, largest, moved = len(signature.outputs), 0.0, 0.0
    calls = _run(path, signature, use_library, what)
    for sample, unseen, results in zip(signature.samples, hidden, calls, strict=True):
        parts = iter(results[count:])
        replay = _Replay(graph, [list(islice(parts, size)) for size in sizes], unseen.rows, what)
        with torch.inference_mode():
            expected = replay.run(*[tensor.clone() for tensor in sample])
        masks: Sequence[Tensor | None] = unseen.values or [None] * count
        for name, want, have, mask in zip(signature.outputs, expected, results[:count], masks, strict=True):
            largest = max(largest, _difference(name, want, have, what, mask))
        moved = max(moved, replay.moved)
    return largest, moved


class _Replay(fx.Interpreter):
    """Runs a graph on activations as ONNX Runtime encoded them; those it has in another order, and equal ones once."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        encoded: Sequence[Sequence[Tensor]],
        hidden: Mapping[str, Tensor],
        what: str,
    ) -> None:
        super().__init__(graph_module)
        self.encoded, self.hidden, self.what, self.moved = encoded, hidden, what, 0.0
        self.extra_traceback = False  # of the model's code, in the message of an error that names the node
        self.dispatched = {
            linear.encoder
            for linear in stored_linears(graph_module.graph)
            if linear.grouped and linear.groups[0] is not None and linear.groups[1] is None
        }

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; for an encoded activation, ONNX Runtime's that is nearest to it."""
        result = super().run_node(n)
        if n.target not in ENCODERS.values() or not result[0].numel():
            return result
        own = [part.view(torch.uint8) if part.element_size() == 1 else part for part in result]
        candidates = [
            [part.view(mine.dtype).view(mine.shape) for part, mine in zip(parts, own, strict=True)]
            for parts in self.encoded
            if [part.numel() for part in parts] == [mine.numel() for mine in own]
        ]
        if n in self.dispatched:
            compared = [_row_by_row(parts, own) for parts in candidates]
        else:
            compared = [(_agreement(parts, own, self.hidden.get(n.name)), parts) for parts in candidates]
        share, nearest = max(compared, key=itemgetter(0), default=(0.0, own))
        if share < 1 - MOVED_CODES:
            raise ExportError(
                f"{n.format_node()}: {self.what} encodes no activation alike, the nearest has {share:.0%} of its bytes:"
                " please report this, with the model's configuration"
            )
        self.moved = max(self.moved, 1 - share)
        return tuple(part.view(mine.dtype) for part, mine in zip(nearest, result, strict=True))


def _agreement(parts: Sequence[Tensor], own: Sequence[Tensor], hidden: Tensor | None = None) -> float:
    """Share of equal codes (entries), selectors or scales, whichever is least; 0 where the tensor scales are others.

    `hidden` has the rows that do not count; nor do those that are negligible in both.
    """
    magnitudes = _magnitudes(own)
    counted = ~(torch.maximum(magnitudes, _magnitudes(parts)) <= NEGLIGIBLE * magnitudes.max())  # NaN counts
    if hidden is not None:
        counted &= ~hidden
    *parts, tensor_scale = [part[counted] for part in parts]
    *mine, scale = [part[counted] for part in own]
    if not torch.allclose(tensor_scale, scale, rtol=TOLERANCE, atol=0, equal_nan=True):
        return 0.0
    return min((float((x == y).float().mean()) for x, y in zip(parts, mine, strict=True) if x.numel()), default=1.0)


def _row_by_row(parts: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """Rows in the order of experts: what masks hide decides where the others stand, in torch as in ONNX Runtime.

    Each row gets the one of `parts` that has its tensor scale, where their codes agree, and stays as it is otherwise:
    what it does to the outputs is compared anyway.

    Returns:
        The share of equal codes in rows that were found, and the rows.
    """
    scales, wanted = parts[-1][:, 0], own[-1][:, 0].contiguous()
    ranked, order = scales.sort()
    place = torch.searchsorted(ranked, wanted).clamp(max=len(scales) - 1)
    before = (place - 1).clamp(min=0)
    nearer = (ranked[before] - wanted).abs() < (ranked[place] - wanted).abs()
    found = order[torch.where(nearer, before, place)]
    equal = (parts[0][found] == own[0]).float().mean(-1)
    alike = (equal >= 1 - MOVED_CODES) & torch.isclose(scales[found], wanted, rtol=TOLERANCE, atol=0)
    share = float(equal[alike].mean()) if bool(alike.any()) else 0.0
    return share, [torch.where(alike[:, None], part[found], mine) for part, mine in zip(parts, own, strict=True)]


def _magnitudes(encoded: Sequence[Tensor]) -> Tensor:
    """Of each row: its tensor scale times its largest scale, 0 for a row of zeros."""
    *_, scales, tensor_scale = encoded
    return tensor_scale[..., 0] * scales.view(torch.float8_e4m3fn).float().amax(-1)


def _run(path: Path, signature: Signature, use_library: bool, what: str) -> Iterator[list[Tensor]]:
    try:
        options = ort.SessionOptions()
        options.add_session_config_entry(FOLDING_KEY, str(FOLDING_LIMIT))
        options.log_severity_level = 4  # errors are raised as well
        if use_library:
            register(options)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        for sample in signature.samples:
            inputs = zip(signature.inputs, sample, strict=True)
            feeds = {name: ort.OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in inputs}
            yield [_tensor(value) for value in session.run_with_ort_values(names, feeds)]
    except ExportError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        remedy = "a newer onnxruntime; before 1.22, fuse=False"
        raise ExportError(f"{what} refuses the exported model: {error}. Remedy: {remedy}") from error


def _tensor(value: Any) -> Tensor:
    """A copy; numpy has no E4M3, which comes as its bytes."""
    if value.data_type() != "tensor(float8e4m3fn)":
        return torch.from_numpy(np.array(value.numpy()))
    tensor = torch.empty(value.shape(), dtype=torch.uint8, device="cpu")
    ctypes.memmove(tensor.data_ptr(), value.data_ptr(), tensor.numel())
    return tensor


def _difference(name: str, expected: Tensor, have: Tensor, what: str, hidden: Tensor | None = None) -> float:
    """The largest of an output, relative to its largest magnitude; `hidden` has the values that do not count."""
    if expected.shape != have.shape:
        raise ExportError(f"output {name} has shape {list(have.shape)} in {what}, {list(expected.shape)} in torch")
    if hidden is not None:
        expected, have = expected[~hidden], have[~hidden]
        if hidden.numel() and hidden.all():
            raise ExportError(f"the masks of the example hide all of output {name}: pass one that shows some of it")
    want, have = expected.double(), have.double()
    finite = want.isfinite()
    if not torch.allclose(want[~finite], have[~finite], equal_nan=True):
        raise ExportError(f"output {name}: NaN or infinity in {what} and in torch stand at different places")
    difference, want = (have - want)[finite], want[finite]
    if not want.numel():
        return 0.0
    allowed = TOLERANCE * want.square().mean().sqrt()
    if not difference.square().mean().sqrt() <= allowed:
        raise ExportError(
            f"output {name} differs by up to {difference.abs().max():.3g} between {what} and torch, where values are"
            f" about {want.square().mean().sqrt():.3g}: please report this, with the model's configuration"
        )
    return float(difference.abs().max() / want.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
