"""onnxscript's rewrite rules without their tolerance for 0 and 1.

They take a constant within 1e-8 of 0 for 0 and one within 1e-5 of 1 for 1. `rsqrt(mean(x**2) + 1e-8)`, as Helium norms,
loses its epsilon to `x + 0`, and a row of zeros becomes NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from onnxscript.rewriter._matcher import SimplePatternMatcher
from onnxscript.rewriter._pattern_ir import Constant

_NEUTRAL = (0, 1)
"""What rules leave out of a sum or a product. Other constants, such as GELU's, are in a graph as fp32 has them."""


@contextmanager
def exact_constants() -> Iterator[None]:
    """Within the block, a rule for 0 or 1 fires for exactly that."""
    tolerant = SimplePatternMatcher._match_constant

    def match(self: Any, pattern: Any, value: Any) -> bool:
        if not isinstance(pattern.value, list) and pattern.value in _NEUTRAL:
            pattern = Constant(pattern.value, rel_tol=0.0, abs_tol=0.0)
        found: bool = tolerant(self, pattern, value)
        return found

    SimplePatternMatcher._match_constant = match
    try:
        yield
    finally:
        SimplePatternMatcher._match_constant = tolerant
