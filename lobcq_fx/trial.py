"""Trials: the float model, its traced graphs and the quantized model run once on the same calls, before a user does.

A traced graph must give the float model's results to rounding: a branch that tracing fixed, a state it lost, an output
it cannot put together all show here. The quantized model must give finite results of the same structure and types. How
close they are is the relative RMS error over all outputs, |quantized - float| / |float|.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lobcq_fx.errors import LobcqError, TraceError
from lobcq_fx.graph.written import kept, module_kept, state_of
from lobcq_fx.tracing.trace import MAIN, TracedGraphs, TracedModel

logger = logging.getLogger(__name__)

WIDE = (torch.float32, torch.float64)

TRACED, TRACED_NARROW = 1e-3, 1e-1
"""Relative RMS error that a traced graph may have whose results and parameters are of these types, and whose are bf16
or fp16: rounding alone."""

REPEATED, REPEATED_NARROW = 1e-5, 2e-2
"""Both of graphs of which not every layer was traced: what their operators, the model's own, are seen to differ by."""

SUSPICIOUS = 1.0
"""Relative RMS error of a quantized model from which on a warning says so: its results have little in common."""

OTHER_EXAMPLE = "pass example_inputs that the model can be called with"
"""Remedy for a model that fails on the call it was given to be tried on."""

Callee = Callable[..., Any]


@dataclass(frozen=True)
class Outcome:
    """What a trial is judged by. structure: compared as it is. tensors: compared by value."""

    structure: Any
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, outputs: Any) -> Outcome:
        """Every leaf of what a call returned."""
        leaves, spec = pytree.tree_flatten(outputs)
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        return cls((type(outputs), spec, others), tuple(leaf for leaf in leaves if isinstance(leaf, Tensor)))


Trial = Callable[[Callee], Outcome]
"""Calls what behaves as the model does: the model itself, a traced graph or the quantized model."""


def call_trial(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Trial:
    """One call; on copies, since a forward may write to its inputs."""

    def run(callee: Callee) -> Outcome:
        own_args, own_kwargs = pytree.tree_map_only(Tensor, torch.clone, (tuple(args), dict(kwargs)))
        return Outcome.of(callee(*own_args, **own_kwargs))

    return run


def traced_callee(traced: TracedModel) -> Callee:
    """A traced graph, called as the model is."""

    def call(*args: Any, **kwargs: Any) -> Any:
        inputs = traced.calling.flatten(args, kwargs)
        return traced.calling.unflatten(traced.graph_module(*inputs), args, kwargs)

    return call


def expected_of(model: nn.Module, trial: Trial, written: Collection[str] = (), remedy: str = OTHER_EXAMPLE) -> Outcome:
    """What the float model gives; it is left as it was, its buffers and its mode too.

    Args:
        model: of any mode.
        trial: a call.
        written: names of parameters that its forward is known to write to.
        remedy: for a model that fails.

    Raises:
        TraceError: the model itself fails on the call.
    """
    try:
        with module_kept(model, written):
            return _run(trial, model.eval())
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} itself fails on the example: {type(error).__name__}: {error}. Remedy: {remedy}"
        ) from error


def differing(traced: TracedGraphs, trials: Mapping[str, Trial], expected: Mapping[str, Outcome]) -> dict[str, str]:
    """Run every traced graph; why those besides the main one do not compute what the model does, by name.

    Raises:
        TraceError: the main one does not; or any, of which not every layer was traced.
    """
    found = {}
    for name, one in traced.graphs.items():
        reason = _difference_of_traced(one, trials[name], expected[name], repeated=traced.repeated)
        if reason is not None and traced.repeated:
            raise TraceError(f"layers are not alike: the {name} graph that was made so is not the model: {reason}")
        if reason is not None and name == MAIN:
            raise TraceError(
                f"the traced graph is not the model: {reason}. Remedy: pass example_inputs that take the branch you"
                " want; quantize the submodules around what depends on sizes or values; or report the model's class"
            )
        if reason is not None:
            logger.warning("the quantized model will have no %s graph: %s", name, reason)
            found[name] = reason
    return found


def _difference_of_traced(traced: TracedModel, trial: Trial, expected: Outcome, *, repeated: bool) -> str | None:
    """What the traced graph does otherwise than the float model, or None."""
    try:
        with kept(state_of(traced.graph_module)):
            outcome = _run(trial, traced_callee(traced))
    except Exception as error:
        return f"it fails on the call that it was traced for: {type(error).__name__}: {error}"
    found = _difference(expected, outcome)
    if found is not None:
        return found
    error_ = relative_error(expected, outcome)
    # Logits may be cast to fp32 at the end of a model in bf16, which rounds as such.
    parameters = [one for one in traced.graph_module.parameters() if one.is_floating_point()]
    wide, narrow = (REPEATED, REPEATED_NARROW) if repeated else (TRACED, TRACED_NARROW)
    types = {one.dtype for one in (*expected.tensors, *parameters)}
    allowed = max((wide if one in WIDE else narrow for one in types), default=0.0)
    if error_ > allowed:
        return f"its results differ from the model's by {100 * error_:.3g} % (relative RMS)"
    return None


def check_quantized(callee: nn.Module, graph_module: fx.GraphModule, trial: Trial, expected: Outcome) -> None:
    """Run the quantized model, whose graph for this trial is `graph_module`, and log how close it is.

    Raises:
        LobcqError: it fails, gives another structure, or NaN or infinity where the float model gives numbers.
    """
    name = type(callee).__name__
    try:
        with kept(state_of(graph_module)):
            outcome = _run(trial, callee)
    except Exception as error:
        raise LobcqError(f"the {name} fails on the example: {type(error).__name__}: {error}") from error
    found = _difference(expected, outcome)
    if found is not None:
        raise LobcqError(f"the {name} was run on the example: {found}")
    error_ = relative_error(expected, outcome)
    level = logging.WARNING if error_ > SUSPICIOUS else logging.INFO
    logger.log(level, "on the example the quantized model differs by %.3g %% (relative RMS)", 100 * error_)


def relative_error(expected: Outcome, actual: Outcome) -> float:
    """Relative RMS error over the finite values of all floating-point outputs; 0 where there are none."""
    error = power = 0.0
    for want, have in zip(expected.tensors, actual.tensors, strict=True):
        if want.is_floating_point():
            finite = want.isfinite() & have.isfinite()
            wanted = want[finite].double()
            error += float((have[finite].double() - wanted).square().sum())
            power += float(wanted.square().sum())
    return math.sqrt(error / power if power else error)


def _run(trial: Trial, callee: Callee) -> Outcome:
    """With the same random numbers for every callee."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trial(callee)


def _difference(expected: Outcome, actual: Outcome) -> str | None:
    """What differs besides rounding, or None."""
    if expected.structure != actual.structure:
        return f"it returns {actual.structure} where the model returns {expected.structure}"
    for index, (want, have) in enumerate(zip(expected.tensors, actual.tensors, strict=True)):
        if (want.shape, want.dtype) != (have.shape, have.dtype):
            shapes = f"{have.dtype} {list(have.shape)} where the model returns {want.dtype} {list(want.shape)}"
            return f"its tensor {index} is {shapes}"
        if want.is_floating_point() and _is_bad(want, have):
            return f"its tensor {index} holds NaN or infinity where the model's has numbers"
    return None


def _is_bad(want: Tensor, have: Tensor) -> bool:
    """Whether there is NaN for a number, or infinity in a result that has none: what is masked, rounding may change."""
    number = want.isfinite()
    if bool((have.isnan() & number).any()):
        return True
    return not bool(want.isinf().any()) and bool((have.isinf() & number).any())
