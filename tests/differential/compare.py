"""One random module: quantized, called at many sizes, and compared with itself on decoded weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils import _pytree as pytree

import lobcq_fx
from lobcq_fx import FormatSpec, LobcqConfig
from lobcq_fx.errors import CallError, ConfigError, TraceError
from lobcq_fx.format import decode, encode, universal_codebooks
from lobcq_fx.storage.graph_json import operators
from lobcq_fx.tracing.names import usable_name
from tests.differential.modules import WIDTH, Generated, as_matrix

CONFIG = LobcqConfig(mode="w4a16")
"""Activations in float: a rounding difference cannot flip a code, so that outputs agree to rounding."""

CALLS = 6


class DifferentError(AssertionError):
    """A quantized module that gave what the module does not, or failed where it does not."""


@dataclass(frozen=True)
class Compared:
    """Counts of what became of a module and its calls; the operators of its graph."""

    counts: Counter[str]
    operators: frozenset[str] = frozenset()


def compare(seed: int) -> Compared:
    """Make a module, quantize it, call both.

    Raises:
        DifferentError: a call gave something else than the model on decoded weights, silently or not.
    """
    rng = Random(seed)
    model = Generated(seed).eval()
    sizes = (rng.randint(1, 3), rng.randint(1, 9))
    try:
        q = lobcq_fx.quantize(model, config=CONFIG, example_inputs=_call(model, rng, *sizes))
    except (ConfigError, TraceError, CallError) as error:
        return Compared(Counter(modules=1, refused_modules=1, **{f"refused: {type(error).__name__}": 1}))
    if seed % 8 == 0:
        q = _saved_and_loaded(q)
    reference = decoded(Generated(seed).eval(), q)  # not a copy, whose steps would hold the layers of the first one
    counts = Counter(modules=1)
    others = [(rng.randint(1, 4), rng.randint(1, 12)) for _ in range(CALLS - 1)]
    for batch, length in [sizes, *others]:
        counts[_one_call(q, reference, _call(model, rng, batch, length), f"seed {seed}, {model.texts}, {sizes}")] += 1
    if counts["served"] == 0:
        counts["modules that served no call"] = 1
    return Compared(counts, operators(q.stored_graph))


def decoded(model: nn.Module, q: nn.Module) -> nn.Module:
    """The module with what the quantized one has packed decoded in its place, by the format alone."""
    spec = FormatSpec()
    stored = q.state_dict()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                continue
            matrix = as_matrix(name, weight.detach())
            packed = [part for part in _parts(usable_name(name)) if f"{part}.codes" in stored]
            rows = [len(stored[f"{part}.codes"]) for part in packed]
            assert sum(rows) in (0, len(matrix)), name
            books = universal_codebooks(spec.num_codebooks)
            for part in matrix.split(rows) if rows else ():
                part.copy_(decode(encode(part, spec, books, search_scales=True)))
    return model


def _parts(name: str) -> list[str]:
    """What a weight may be packed as: whole, or in parts, those of queries, and of keys and values."""
    return [name, f"{name}_part", f"{name}_part_1"]


def _saved_and_loaded(q: lobcq_fx.QuantizedModel) -> lobcq_fx.QuantizedModel:
    with TemporaryDirectory() as folder:
        q.save_pretrained(folder)
        return lobcq_fx.load(folder)


def _call(model: Generated, rng: Random, batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    call = {"x": torch.randn(batch, length, WIDTH, generator=generator)}
    if model.second is not None:
        other = length if model.second == "add" else rng.randint(1, 5)
        call["y"] = torch.randn(batch, other, WIDTH, generator=generator)
    return call


@torch.no_grad()
def _one_call(q: nn.Module, reference: nn.Module, call: dict[str, torch.Tensor], where: str) -> str:
    where = f"{where} called with {[list(tensor.shape) for tensor in call.values()]}"
    before = {name: tensor.clone() for name, tensor in reference.named_buffers()}
    try:
        expected = reference(**call)
    except (RuntimeError, IndexError, ValueError, TypeError):
        expected = None
        for name, tensor in before.items():  # it may have counted before it failed
            reference.get_buffer(name).copy_(tensor)
    state = {name: tensor.clone() for name, tensor in q.named_buffers() if name.split(".")[-1] in before}
    try:
        actual = q(**call)
    except CallError:
        for name, tensor in before.items():
            owner, _, last = name.rpartition(".")
            reference.get_submodule(owner)._buffers[last] = tensor
        return "refused" if expected is not None else "refused, as the model does"
    except Exception as error:
        if expected is not None:
            raise DifferentError(f"{where}: {type(error).__name__}: {error}") from error
        for name, tensor in state.items():
            q.get_buffer(name).copy_(tensor)
        return "failed, as the model does"
    if expected is None:
        raise DifferentError(f"{where}: a result where the model fails")
    _check_equal(actual, expected, where)
    return "served"


def _largest(tensor: torch.Tensor) -> float:
    return max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0


def _check_equal(actual: object, expected: object, where: str) -> None:
    have, spec = pytree.tree_flatten(actual)
    want, wanted_spec = pytree.tree_flatten(expected)
    if spec != wanted_spec:
        raise DifferentError(f"{where}: {spec} where the model returns {wanted_spec}")
    for one, other in zip(have, want, strict=True):
        try:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * _largest(other), equal_nan=True)
        except AssertionError as error:
            raise DifferentError(f"{where}: {error}") from None
