"""The inventory: every matmul of a traced model, what became of it, and why."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from lobcq_fx.refusal import Refusal


@dataclass(frozen=True)
class MatmulRecord:
    """One matmul.

    layer: module path, for example `model.layers.0.self_attn.q_proj`.
    operation: what it was in the traced graph, for example `linear`, `addmm`, `scaled_dot_product_attention`.
    shape: (N, K) of the constant weight, (E, N, K) of the weights of E experts; None for activation x activation.
    reason: why it was left in float; None if it was quantized.
    format: name of the number format, mode: `w4a4`, `w4a8` or `w4a16`; None if left in float.
    float_bytes, packed_bytes: of the weight, before and after (equal if left in float; 0 without a weight, and for all
        but the first matmul that reads it; float_bytes is 0 where the float weight stays for something else).
    weight_sqnr_db, activation_sqnr_db: signal-to-quantization-noise ratio in dB; None if not measured.
    multiply_adds: with its weight, in the example that the model was traced with; routed experts count by the tokens
        they get. None in folders of releases that did not count them.
    excluded: a pattern of the settings asked for it to stay in float.
    activation_format: the activation's, where it is another than the weight's.
    smoothing: where the division of its activation by scales went, "folded" or "multiplied"; None without one.
    rotated: whether the columns of its block arrays are rotated.
    unreached: of a mixture, how many experts got no token of the calibration data; None where that was not counted.
    undersampled: how many got so few, or none, that they were smoothed or compensated by what all experts of the layer
        got more than by their own. None where experts were neither.
    """

    layer: str
    operation: str
    shape: tuple[int, ...] | None
    reason: str | None = None
    format: str | None = None
    mode: str | None = None
    float_bytes: int = 0
    packed_bytes: int = 0
    weight_sqnr_db: float | None = None
    activation_sqnr_db: float | None = None
    multiply_adds: int | None = None
    excluded: bool = False
    activation_format: str | None = None
    smoothing: str | None = None
    rotated: bool = False
    unreached: int | None = None
    undersampled: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MatmulRecord:
        """Of JSON values, as `asdict` gives them."""
        return cls(**{**values, "shape": tuple(values["shape"]) if values["shape"] else None})

    @property
    def quantized(self) -> bool:
        """Whether the matmul now runs in LO-BCQ."""
        return self.reason is None

    @property
    def number_format(self) -> str | None:
        """Its mode and formats for people, `"W4A4, format 8x64, activations 16x64"`; None if left in float."""
        if self.mode is None:
            return None
        activations = "" if self.activation_format is None else f", activations {self.activation_format}"
        return f"{self.mode.upper()}, format {self.format}{activations}"

    @property
    def least_sqnr_db(self) -> float:
        """Of its weight's and its activation's; infinite where neither was measured, or both are exact."""
        values = (self.weight_sqnr_db, self.activation_sqnr_db)
        return min((value for value in values if value is not None), default=math.inf)

    @property
    def scalars(self) -> int:
        """Of its weight: N * K, or E * N * K; 0 without one."""
        return prod(self.shape) if self.shape else 0

    @property
    def macs(self) -> int:
        """Multiply-adds with its weight; where they were not counted N * K, which is those of one token."""
        return self.scalars if self.multiply_adds is None else self.multiply_adds


@dataclass(frozen=True)
class Inventory:
    """Every matmul of a model, and the model's bytes before and after.

    model_parameters: scalars in all parameters of the traced model.
    model_float_bytes, model_packed_bytes: bytes of all parameters before and after.
    refusals: what the passes for the device that the model is on left as it was, and why.
    """

    records: tuple[MatmulRecord, ...]
    model_parameters: int
    model_float_bytes: int
    model_packed_bytes: int
    refusals: tuple[Refusal, ...] = ()

    def __iter__(self) -> Iterator[MatmulRecord]:
        return iter(self.records)

    @property
    def quantized(self) -> tuple[MatmulRecord, ...]:
        """The matmuls that run in LO-BCQ."""
        return tuple(record for record in self.records if record.quantized)

    @property
    def left_alone(self) -> tuple[MatmulRecord, ...]:
        """The matmuls left in float, each with its reason."""
        return tuple(record for record in self.records if not record.quantized)

    @property
    def left_alone_by_reason(self) -> dict[str, list[MatmulRecord]]:
        """The same under each reason, the reason with the most multiply-adds first."""
        groups: dict[str, list[MatmulRecord]] = defaultdict(list)
        for record in self.left_alone:
            groups[record.reason or ""].append(record)
        return dict(sorted(groups.items(), key=lambda item: -sum(record.macs for record in item[1])))

    def worst(self, count: int) -> list[MatmulRecord]:
        """The quantized matmuls with the least SQNR, weights' and activations' taken together, worst first."""
        measured = [record for record in self.quantized if record.least_sqnr_db < math.inf]
        return sorted(measured, key=lambda record: record.least_sqnr_db)[:count]

    @property
    def parameters_outside_matmuls(self) -> int:
        """Scalars in parameters that no matmul reads as its weight: embedding tables, norms, biases."""
        # A weight that serves several matmuls carries its bytes in the first record only.
        in_matmuls = sum(record.scalars for record in self.records if record.packed_bytes)
        return max(0, self.model_parameters - in_matmuls)

    @property
    def parameter_coverage(self) -> float:
        """Share of the model's parameters that are now packed, from 0 to 1."""
        return sum(record.scalars for record in self._distinct_weights()) / max(1, self.model_parameters)

    @property
    def mac_coverage(self) -> float:
        """Share of the multiply-adds with a weight that now run in LO-BCQ, from 0 to 1.

        Convolutions, recurrent layers and experts count too, by what they do in the traced example.
        """
        return self.mac_share(self.quantized)

    def mac_share(self, records: Iterable[MatmulRecord]) -> float:
        """Share of the model's multiply-adds with a weight that some of its matmuls do, from 0 to 1."""
        return sum(record.macs for record in records) / max(1, sum(record.macs for record in self.records))

    @property
    def asked_coverage(self) -> float:
        """The same among what no pattern of the settings left in float, from 0 to 1; 1 where that is nothing."""
        total = sum(record.macs for record in self.records if not record.excluded)
        return sum(record.macs for record in self.quantized) / total if total else 1.0

    @property
    def bits_per_scalar(self) -> float:
        """Stored bits per scalar over all packed weights, padding and scales included; 0 if there are none."""
        weights = self._distinct_weights()
        return 8 * sum(w.packed_bytes for w in weights) / max(1, sum(w.scalars for w in weights))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Inventory:
        """Inverse of `to_dict`."""
        records = tuple(map(MatmulRecord.from_dict, values["records"]))
        refusals = tuple(Refusal(**refusal) for refusal in values.get("refusals", ()))
        return cls(**{**values, "records": records, "refusals": refusals})

    def _distinct_weights(self) -> list[MatmulRecord]:
        # A tied weight serves several matmuls and is stored once: only its first record carries bytes.
        return [record for record in self.quantized if record.packed_bytes]


def readable_size(count: int) -> str:
    """A number of bytes for people: `"12.4 KiB"`, `"3.06 MiB"`, `"13.48 GiB"`."""
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
