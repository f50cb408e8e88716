"""What tracing assumed of sizes: it follows the way that the example takes, and the graph holds that way alone.

torch.export notes a guard where it had to look at the example. That is too much and too little: its operators guard
sizes for reasons of their own (strides, kernels), which the operators in the graph see to again; and where a guard
already decides what the model asks, the answer is not noted. So the model's own decisions are recorded when it makes
them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.fx.experimental import sym_node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions as sym_functions

from lobcq_fx.errors import TraceError
from lobcq_fx.tracing.guards import SIZE, SizeGuards
from lobcq_fx.tracing.sizes import fixed_size
from lobcq_fx.tracing.sizes_of_one import wrong_at_one

aten = torch.ops.aten

_BINARY: dict[Any, str] = {
    sym_functions.FloorDiv: "//",
    sym_functions.CleanDiv: "//",
    sym_functions.Mod: "%",
    sym_functions.PythonMod: "%",
}
_FOLDED: dict[Any, str] = {
    sympy.Mul: "*",
    sympy.Min: "min",
    sympy.Max: "max",
    sym_functions.Min: "min",
    sym_functions.Max: "max",
    sympy.And: "and",
    sympy.Or: "or",
}
_RELATIONS: dict[Any, str] = {
    sympy.Eq: "==",
    sympy.Ne: "!=",
    sympy.StrictLessThan: "<",
    sympy.LessThan: "<=",
    sympy.StrictGreaterThan: ">",
    sympy.GreaterThan: ">=",
}
_FLIPPED = {"==": "==", "!=": "!=", "<": ">", "<=": ">=", ">": "<", ">=": "<="}
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)

Tree = Any


class SizeDecisions:
    """A context in which a model is traced, to record which way it goes, or how often, wherever it looks at a size.

    trusted: a package whose code is known to mean the same for a size of 1 as for others, although it asks; of the rest
        of such a trace only its decisions count, since operators take sizes to be at least 2 in it.
    """

    def __init__(self, trusted: str | None = None) -> None:
        self._trusted = trusted
        self._made: dict[tuple[sympy.Basic, bool], None] = {}  # an ordered set

    def __enter__(self) -> SizeDecisions:
        self._bool, self._expect = torch.SymBool.__bool__, sym_node.SymNode.expect_true
        self._int = sym_node.SymNode.int_
        decisions = self

        def __bool__(value: torch.SymBool) -> bool:  # noqa: N807
            answer: bool = decisions._bool(value)
            decisions._record(value.node, answer, sys._getframe(1))
            return answer

        def expect_true(node: sym_node.SymNode, file: str, line: int) -> bool:
            answer: bool = decisions._expect(node, file, line)
            decisions._record(node, answer, sys._getframe(1))
            return answer

        def int_(node: sym_node.SymNode) -> int:
            expression, answer = node.expr, decisions._int(node)
            if expression.free_symbols and not _in_operator(sys._getframe(1)):
                decisions._made[sympy.Eq(expression, answer), True] = None
            return answer

        torch.SymBool.__bool__ = __bool__  # type: ignore[method-assign]
        sym_node.SymNode.expect_true = expect_true  # type: ignore[assignment, method-assign]
        sym_node.SymNode.int_ = int_  # type: ignore[assignment, method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        torch.SymBool.__bool__ = self._bool  # type: ignore[method-assign]
        sym_node.SymNode.expect_true = self._expect  # type: ignore[method-assign]
        sym_node.SymNode.int_ = self._int  # type: ignore[method-assign]

    def _record(self, node: Any, answer: bool, frame: FrameType) -> None:
        expression = node.expr
        if expression.free_symbols and not _in_operator(frame):
            trusted = self._trusted is not None and _package(frame) == self._trusted
            if not (trusted and _tells_one_from_more(expression)):
                self._made[expression, answer] = None

    def guards(self, graph_module: fx.GraphModule) -> SizeGuards:
        """What has to hold of the inputs of the graph that came of the trace, for it to be the model.

        Raises:
            TraceError: the inputs' sizes depend on something that is no size of theirs.
        """
        sizes = _InputSizes(graph_module)
        if sizes.shape_env is None:
            return SizeGuards()
        facts = [expression if answer else sympy.Not(expression) for expression, answer in self._made]
        facts += list(_squeezed(graph_module))
        if self._trusted is None:  # how many parts a chunking makes, for example, is the operator's question
            facts += [guard.expr for guard in sizes.shape_env.guards if isinstance(guard.expr, sympy.Eq)]
        trees = [*sizes.relations, *(tree for fact in facts for tree in sizes.conditions(fact))]
        if self._trusted is None:
            trees += sizes.ranges(graph_module)
        return SizeGuards(tuple({repr(tree): tree for tree in trees}.values()))


class _InputSizes:
    """Where a traced graph's symbols stand among its inputs' sizes.

    relations: conditions of the sizes that are no symbol of their own, such as equal ones.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.shape_env: ShapeEnv | None = None
        self.relations: list[Tree] = []
        self._places: dict[sympy.Symbol, Tree] = {}
        self._hints: dict[sympy.Symbol, int] = {}
        derived: list[tuple[sympy.Expr, Tree]] = []
        for place, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
            value = node.meta["val"]
            for dim, size in enumerate(value.shape):
                if isinstance(size, int) or fixed_size(size) is not None:
                    continue
                self.shape_env = size.node.shape_env
                expression, leaf = size.node.expr, [SIZE, place, dim]
                if expression.is_Symbol and expression not in self._places:
                    self._places[expression], self._hints[expression] = leaf, size.node.hint
                else:
                    derived.append((expression, leaf))
        for expression, leaf in derived:
            tree = self._tree(expression)
            if tree is None:
                raise TraceError(
                    f"a size of the example is {expression} of others, which no call can be checked against: pass"
                    " example_inputs whose sizes are not multiples of each other"
                )
            self.relations.append(["==", leaf, tree])

    def conditions(self, fact: sympy.Basic) -> list[Tree]:
        """A fact as conditions; where it is beyond their grammar, the sizes it is about stay those of the example."""
        assert self.shape_env is not None
        fact = self.shape_env.replace(fact)
        known = [symbol for symbol in sorted(fact.free_symbols, key=str) if symbol in self._places]
        if not known or len(known) < len(fact.free_symbols):  # a number, or one that depends on values
            return []
        tree = self._tree(fact)
        if tree is None:
            return [["==", self._places[symbol], self._hints[symbol]] for symbol in known]
        return [] if _trivial(tree) else [tree]

    def ranges(self, graph_module: fx.GraphModule) -> list[Tree]:
        """The bounds that operators found for single sizes, or that a trace which was not size-oblivious began with."""
        assert self.shape_env is not None
        env, trees = self.shape_env, list[Tree]()
        # A trace that took sizes for at least 2 went the general way: that is nearly always right for 1, but not for 0.
        assumed = {symbol: 0 if symbol in env.size_like else 2 for symbol in self._places}
        doubtful = {s: self._hints[s] for s, least in assumed.items() if env.var_to_range[s].lower <= least == 2}
        wrong = wrong_at_one(graph_module, doubtful) if doubtful else frozenset()
        for symbol, place in self._places.items():
            bounds = env.var_to_range[symbol]
            least = int(bounds.lower) if bounds.lower > assumed[symbol] else min(assumed[symbol], 1)
            least = 2 if symbol in wrong else least
            if least > 0:
                trees.append([">=", place, least])
            if isinstance(bounds.upper, sympy.Integer):
                trees.append(["<=", place, int(bounds.upper)])
        return trees

    def _tree(self, expression: sympy.Basic) -> Tree | None:
        """The expression in the grammar of `SizeGuards`; None where it is beyond that."""
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if isinstance(expression, sympy.Symbol):
            return self._places.get(expression)
        if isinstance(expression, sympy.Add):
            return self._sum(expression)
        if isinstance(expression, sympy.Pow):
            base, exponent = expression.args
            whole = isinstance(exponent, sympy.Integer) and 1 < exponent < 5
            return self._fold("*", [base] * int(exponent)) if whole else None
        for kinds, build in ((_RELATIONS, self._relation), (_BINARY, self._fold), (_FOLDED, self._fold)):
            if type(expression) in kinds:
                return build(kinds[type(expression)], expression.args)
        return None

    def _fold(self, head: str, arguments: Any) -> Tree | None:
        trees = [self._tree(argument) for argument in arguments]
        if any(tree is None for tree in trees):
            return None
        folded = trees[0]
        for tree in trees[1:]:
            folded = [head, folded, tree]
        return folded

    def _sum(self, expression: sympy.Add) -> Tree | None:
        negative = [term for term in expression.args if term.could_extract_minus_sign()]
        positive = [term for term in expression.args if term not in negative]
        total = self._fold("+", positive) if positive else 0
        for term in negative:
            tree = self._tree(-term)
            if total is None or tree is None:
                return None
            total = ["-", total, tree]
        return total

    def _relation(self, head: str, arguments: Any) -> Tree | None:
        left, right = (self._tree(argument) for argument in arguments)
        if left is None or right is None:
            return None
        if isinstance(left, int):
            head, left, right = _FLIPPED[head], right, left
        if isinstance(right, int) and head in ("<", ">"):  # one spelling, so that a range does not repeat it
            head, right = (f"{head}=", right + 1 if head == ">" else right - 1)
        return [head, left, right]


def _trivial(tree: Tree) -> bool:
    """Whether a condition holds of any sizes, since none is negative."""
    head, left, right = tree
    of_size = isinstance(left, list) and left[0] == SIZE and isinstance(right, int)
    return of_size and ((head == ">=" and right <= 0) or (head == "!=" and right < 0))


def _squeezed(graph_module: fx.GraphModule) -> Iterator[sympy.Basic]:
    """That sizes which the trace did not squeeze are not 1: the graph behind goes by the number of dimensions."""
    for node in graph_module.graph.nodes:
        if node.target in _SQUEEZES:
            shape = node.args[0].meta["val"].shape
            dims = node.args[1] if len(node.args) > 1 else range(len(shape))
            for dim in [dims] if isinstance(dims, int) else dims:
                if fixed_size(shape[dim]) is None:
                    yield sympy.Ne(shape[dim].node.expr, 1)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _in_operator(frame: FrameType) -> bool:
    """Whether an operator asks, which will ask again when the graph runs, and not the model."""
    return any(one.f_code.co_name == "__torch_dispatch__" for one in _frames(frame))


def _package(frame: FrameType) -> str:
    """Whose code asks: the innermost that is not torch's."""
    names = (str(one.f_globals.get("__name__", "")).partition(".")[0] for one in _frames(frame))
    return next((name for name in names if name not in ("torch", __name__.partition(".")[0])), "")


def _tells_one_from_more(expression: sympy.Basic) -> bool:
    return isinstance(expression, sympy.core.relational.Relational) and 1 in expression.args
