"""Our linear against those of others on one shape: results checked, then timed in one race."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lobcq_fx.benchmarking.contender import COLD_BYTES, COLD_ROWS, Starter, checked_rows, copies_needed
from lobcq_fx.benchmarking.ours import EXACT, OurLinear
from lobcq_fx.benchmarking.peers import PEERS, RESEMBLES, Peer
from lobcq_fx.benchmarking.race import median_ratio, race
from lobcq_fx.benchmarking.reading import READERS, reading_bursts
from lobcq_fx.calibration.synthetic import synthetic
from lobcq_fx.format import FormatSpec

SHAPES = ((2048, 2048), (4096, 4096), (11008, 4096), (4096, 11008))
"""N, K of linears in models of one to seven billion parameters."""

ROWS = (1, 8, 64, 512)


@dataclass(frozen=True)
class Plan:
    """What to compare on every shape.

    Args:
        formats: ours.
        rows: each M.
        rounds: of every race.
        threads: that every contender gets.
        mode: "w4a4", "w4a8" or "w4a16".
        peers: those with packages that are not installed are left out.
    """

    formats: tuple[FormatSpec, ...]
    rows: tuple[int, ...] = ROWS
    rounds: int = 5
    threads: int = 1
    mode: str = "w4a4"
    peers: tuple[Peer, ...] = PEERS


@dataclass(frozen=True)
class Result:
    """One race of ours in one format.

    seconds: median over the rounds, of a call with the activation's encoding.
    weight_bytes: as our kernel reads them.
    read_seconds: the fastest plain read of as many bytes; at one row only.
    read_share: median over the rounds of that read's time to ours; at one row only.
    peer_seconds: median over the rounds, by name.
    speedups: median over the rounds of a peer's time to ours, by name.
    """

    shape: tuple[int, int]
    rows: int
    format: str
    seconds: float
    weight_bytes: int
    peer_seconds: dict[str, float]
    speedups: dict[str, float]
    read_seconds: float | None = None
    read_share: float | None = None

    @property
    def cold(self) -> bool:
        """Whether no cache can have held our weights: there were few rows, and the copies were larger than caches."""
        return self.rows <= COLD_ROWS and self.weight_bytes * copies_needed(self.weight_bytes, self.rows) > COLD_BYTES

    @property
    def macs_per_second(self) -> float:
        """Multiply-adds a second."""
        n, k = self.shape
        return self.rows * n * k / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; rates in 1e9 a second."""
        values = {
            "shape": shape_name(self.shape),
            "rows": self.rows,
            "format": self.format,
            "seconds": self.seconds,
            "gmac_per_second": self.macs_per_second / 1e9,
            "weight_bytes": self.weight_bytes,
            "cold": self.cold,
            "peer_seconds": self.peer_seconds,
            "speedups": self.speedups,
        }
        if self.read_seconds is not None:
            values["gb_per_second"] = self.weight_bytes / self.seconds / 1e9
            values["read_gb_per_second"] = self.weight_bytes / self.read_seconds / 1e9
            values["read_share"] = self.read_share
        return values


@dataclass
class Comparison:
    """The contenders of one shape; `not_run` collects why peers are missing, by name."""

    shape: tuple[int, int]
    plan: Plan
    not_run: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, k = self.shape
        self._weight = synthetic("gaussian", (n, k), seed=0) / k**0.5
        self._ours = {spec.name: OurLinear.of(self._weight, spec, self.plan.mode) for spec in self.plan.formats}
        self._starters = {name: Starter(ours.contender()) for name, ours in self._ours.items()}
        self._peers: dict[str, Starter] = {}
        for peer in self.plan.peers:
            try:
                if peer.missing:
                    raise ImportError(f"not installed: {', '.join(peer.missing)}")
                self._peers[peer.name] = Starter(peer.make(self._weight, self.plan.threads))
            except Exception as error:  # a foreign library: whatever it raises is why it does not run here
                self.not_run[peer.name] = _first_line(error)

    def results(self, rows: int) -> list[Result]:
        """Check and race at a number of rows; a result for each of our formats.

        Raises:
            WrongProductError: a product of ours is wrong.
        """
        x = synthetic("gaussian", (rows, self.shape[1]), seed=rows)
        for name, starter in self._starters.items():
            starter.check(x, self._ours[name].expected(checked_rows(x)), EXACT)
        contenders = self._starters | self._sound_peers(x)
        bursts = {name: starter.burst(x) for name, starter in contenders.items()}
        if rows == 1:
            bursts |= reading_bursts(self._weight_bytes(self.plan.formats[0].name))
        times = race(bursts, self.plan.rounds)
        return [self._result(rows, name, times) for name in self._ours]

    def _sound_peers(self, x: Tensor) -> dict[str, Starter]:
        """Those whose product resembles the exact one."""
        exact = checked_rows(x).double() @ self._weight.double().t()
        for name, starter in list(self._peers.items()):
            try:
                starter.check(x, exact, RESEMBLES)
            except Exception as error:  # as where it was made
                self.not_run[name] = f"with {x.shape[0]} rows: {_first_line(error)}"
                del self._peers[name]
        return self._peers

    def _result(self, rows: int, name: str, times: Mapping[str, Sequence[float]]) -> Result:
        own = times[name]
        read_seconds, read_share = self._reading(name, times) if rows == 1 else (None, None)
        return Result(
            self.shape,
            rows,
            name,
            seconds=statistics.median(own),
            weight_bytes=self._weight_bytes(name),
            peer_seconds={peer: statistics.median(times[peer]) for peer in self._peers},
            speedups={peer: median_ratio(times[peer], own) for peer in self._peers},
            read_seconds=read_seconds,
            read_share=read_share,
        )

    def _reading(self, name: str, times: Mapping[str, Sequence[float]]) -> tuple[float, float]:
        """Seconds of the fastest read of as many bytes, and its share in our time."""
        scale = self._weight_bytes(name) / self._weight_bytes(self.plan.formats[0].name)  # what was read
        fastest = min((times[reader] for reader in READERS), key=statistics.median)
        return scale * statistics.median(fastest), scale * median_ratio(fastest, times[name])

    def _weight_bytes(self, name: str) -> int:
        return self._starters[name].contender.weight_bytes


def shape_name(shape: tuple[int, int]) -> str:
    """`"<N>x<K>"`."""
    return f"{shape[0]}x{shape[1]}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
