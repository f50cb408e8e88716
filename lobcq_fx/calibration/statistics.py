"""What an observer keeps of one matmul's activations: constant memory, however much it sees."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lobcq_fx.calibration.groups import Groups, prior_rows, with_prior
from lobcq_fx.calibration.reservoir import Reservoir
from lobcq_fx.errors import CalibrationError
from lobcq_fx.format.rotation import rotate
from lobcq_fx.format.scales import absmax_row_scale, block_arrays, tensor_scale_of_absmax
from lobcq_fx.format.spec import ENTRY_MAX, FormatSpec

SAMPLED_ARRAYS = 4096
"""Block arrays kept for fitting codebooks: 1 MiB a layer at L_A = 64."""

CHUNK = 1 << 20
"""Scalars that are looked at together, 4 MiB in fp32: each look sorts the sample anew."""


ROWS = 256
"""Of second moments that are rotated together."""

_SEEN = ("num_updates", "num_rows", "num_scalars", "group_rows", "_absmax", "_square_sums")


class ActivationStatistics:
    """Streaming statistics of one activation operand x [..., K], whose rows may be of E groups.

    The result depends on the rows and their order, not on how they are cut into batches, but for the last bits of sums.

    Attributes:
        layer: the layer whose activations these are, for messages.
        spec: gives L_A.
        num_updates: tensors seen, empty ones included.
        num_rows: rows (tokens) seen.
        num_scalars: scalars seen, padding not counted.
        group_rows: rows that each expert of a mixture got, int64 [E]; None where rows are of no groups.
    """

    def __init__(self, layer: str, spec: FormatSpec, sampled_arrays: int = SAMPLED_ARRAYS, seed: int = 0) -> None:
        self.layer = layer
        self.spec = spec
        self.num_updates = 0
        self.num_rows = 0
        self.num_scalars = 0
        self.group_rows: Tensor | None = None
        self._absmax: Tensor | None = None  # fp32 [E, K], E = 1 without groups
        self._square_sums: Tensor | None = None  # fp64 [E, K]
        self._sample = Reservoir(sampled_arrays, seed)
        self._divisor: Tensor | None = None  # fp32 [E or 1, K]: what became of the columns since they were seen
        self._rotated_columns = 0

    def state(self) -> dict[str, Any]:
        """What was seen, for `restore`: numbers and tensors. Not of statistics that were divided or rotated."""
        return {**{name: getattr(self, name) for name in _SEEN}, "sample": self._sample.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Have seen what others have that were made alike, and nothing else; go on as they would."""
        for name in _SEEN:
            setattr(self, name, state[name])
        self._sample.restore(state["sample"])

    @property
    def seen(self) -> bool:
        """Whether any data arrived: False until an update brings a scalar."""
        return self.num_scalars > 0

    def update(self, x: Tensor) -> None:
        """Add an activation x [..., K], fp32, bf16 or fp16, on any device.

        Raises:
            CalibrationError: NaN or infinity in x; nothing of x is counted then.
        """
        rows = x.detach().reshape(-1, x.shape[-1]) if x.numel() else x.detach().new_zeros((0, max(x.shape[-1], 1)))
        self._add(Groups.one(rows))

    def update_groups(self, x: Tensor, offsets: Tensor | None) -> None:
        """Add an activation whose rows are of groups.

        Args:
            x: [T, K] with offsets; [E, M, K] without, where rows of zeros are those of tokens for other experts.
            offsets: int32 [E], where each group ends.

        Raises:
            CalibrationError: NaN or infinity in x; nothing of x is counted then.
        """
        groups = Groups.of(x.detach(), offsets)
        self._add(groups)
        self.group_rows = groups.counts if self.group_rows is None else self.group_rows + groups.counts

    def absmax(self) -> Tensor:
        """Largest magnitude seen, fp32 [].

        Raises:
            CalibrationError: no data seen.
        """
        self._require_data()
        assert self._absmax is not None
        return self._absmax.max()

    def mean_squares(self) -> Tensor:
        """The mean square of each column, fp32 [K], on the CPU.

        Raises:
            CalibrationError: no data seen.
        """
        self._require_data()
        assert self._square_sums is not None
        return (self._square_sums.sum(0) / self.num_rows).float()

    def mean_squares_of_groups(self) -> Tensor:
        """The same of each group and of prior rows (`groups.PRIOR`), fp32 [E, K].

        Raises:
            CalibrationError: no data seen.
        """
        self._require_data()
        assert self._square_sums is not None
        assert self.group_rows is not None
        columns = self._square_sums.shape[1]
        sums = with_prior(self._square_sums, self._square_sums.sum(0), self.num_rows, columns)
        return (sums / (self.group_rows + prior_rows(columns))[:, None]).float()

    @property
    def undersampled(self) -> int | None:
        """How many groups have fewer rows than prior ones; None where there are no groups."""
        if self.group_rows is None or not self.seen:
            return None
        return int((self.group_rows < prior_rows(self.num_scalars // self.num_rows)).sum())

    @property
    def shares(self) -> list[float]:
        """Of all rows, those of each group; 1 where there are no groups."""
        if self.group_rows is None:
            return [1.0]
        shares: list[float] = (self.group_rows / max(1, int(self.group_rows.sum()))).tolist()
        return shares

    def divided(self, scale: Tensor) -> ActivationStatistics:
        """Those of x / scale, fp32 [K] or of each group [E, K], on the CPU, powers of two.

        Rows of the sample have no tensor scale of their own any more: all have the static one.

        Raises:
            CalibrationError: no data seen.
        """
        self._require_data()
        assert self._absmax is not None
        assert self._square_sums is not None
        result, scale = copy.copy(self), scale.view(-1, scale.shape[-1])
        result._absmax, result._square_sums = self._absmax / scale, self._square_sums / scale.double().square()
        result._divisor = scale if self._divisor is None else self._divisor * scale
        rows = self._sample.rows()
        arrays, places, groups = rows[:, :-3], rows[:, -2].long(), rows[:, -1].long()
        scales = torch.nn.functional.pad(scale, (0, -scale.shape[-1] % self.spec.array_size), value=1.0)
        scales = scales.unflatten(1, (-1, self.spec.array_size)).expand(len(self._absmax), -1, -1)
        static = tensor_scale_of_absmax(result._absmax.max()).expand(len(rows), 1)
        result._sample = self._sample.replaced(
            torch.cat((arrays / scales[groups, places], static, rows[:, -2:]), dim=1)
        )
        return result

    def rotated(self, size: int) -> ActivationStatistics:
        """Those of x with each `size` columns rotated.

        Of the samples, that is; nothing is known of the extremes of rotated columns. K and L_A are multiples of `size`.

        Raises:
            CalibrationError: no data seen.
        """
        self._require_data()
        assert self.spec.array_size % size == 0
        result = copy.copy(self)
        result._absmax = result._square_sums = None
        result._rotated_columns = size
        rows = self._sample.rows()
        arrays = rotate(rows[:, :-3], size)
        # A rotated array may outgrow its row's scale: then it sets that scale.
        scales = torch.maximum(rows[:, -3:-2], tensor_scale_of_absmax(arrays.abs().amax(1, keepdim=True)))
        result._sample = self._sample.replaced(torch.cat((arrays, scales, rows[:, -2:]), dim=1))
        return result

    def static_tensor_scale(self, entry_max: int = ENTRY_MAX) -> Tensor:
        """The static scale for this operand, whose entries reach `entry_max`: of the largest magnitude seen, fp32 [].

        Raises:
            CalibrationError: no data seen.
        """
        return tensor_scale_of_absmax(self.absmax(), entry_max)

    def sample(self) -> Tensor:
        """A uniform sample of the block arrays seen, fp32 [n, L_A], n at most `sampled_arrays`, in random order.

        Raises:
            CalibrationError: no data seen.
        """
        self._require_data()
        return self._sample.rows()[:, :-3].clone()

    def sample_in_row_scales(self) -> Tensor:
        """`sample()`, each array divided by its own row's tensor scale: what per-token scales make of it.

        Raises:
            CalibrationError: no data seen.
        """
        self._require_data()
        rows = self._sample.rows()
        return rows[:, :-3] / rows[:, -3:-2]

    def sampled_places(self) -> Tensor:
        """Which array of its row each array of `sample()` is, int64 [n].

        Raises:
            CalibrationError: no data seen.
        """
        self._require_data()
        return self._sample.rows()[:, -2].long()

    def encoded_moments(self, moments: Tensor, group: int = 0) -> Tensor:
        """Second moments fp32 [K, K] of a group as it was seen, divided and rotated as these statistics were."""
        if self._divisor is not None:
            divisor = self._divisor[group if len(self._divisor) > 1 else 0].to(moments.device)
            moments = (moments / divisor).div_(divisor[:, None])
        if self._rotated_columns:
            moments = moments.clone() if self._divisor is None else moments
            for matrix in (moments, moments.t()):  # columns, and rows as columns of the transpose
                for rows in matrix.split(ROWS):  # rotated apart from each other: of all at once there would be copies
                    rows.copy_(rotate(rows, self._rotated_columns))
        return moments

    def _add(self, seen: Groups) -> None:
        rows, columns = seen.rows, seen.rows.shape[1]
        row_scale = absmax_row_scale(rows)
        if bool(row_scale.isnan().any()):
            self._refuse_non_finite(rows)
        self.num_updates += 1
        self.num_rows += rows.shape[0]
        self.num_scalars += rows.numel()
        if not rows.numel():
            return
        if self._absmax is None or self._square_sums is None:
            self._absmax = torch.zeros((len(seen.bounds), columns), dtype=torch.float32, device="cpu")
            self._square_sums = torch.zeros((len(seen.bounds), columns), dtype=torch.float64, device="cpu")
        size = max(1, CHUNK // columns)
        for part, scales in zip(seen.split(size), row_scale.split(size), strict=True):
            part = replace(part, rows=part.rows.float())
            for group in part.counts.nonzero().flatten().tolist():
                of_group = part.of_group(group)
                self._absmax[group] = torch.maximum(self._absmax[group], of_group.abs().amax(0).cpu())
                self._square_sums[group] += of_group.square().double().sum(0).cpu()
            self._offer(part, scales)

    def _offer(self, seen: Groups, row_scale: Tensor) -> None:
        """Of rows fp32 [n, K] the block arrays; with the rows' tensor scales fp32 [n, 1]."""
        arrays = block_arrays(seen.rows, self.spec)
        ends = torch.tensor([stop for _, stop in seen.bounds], dtype=torch.int64, device=arrays.device)

        def sampled(chosen: Tensor) -> Tensor:
            """Arrays by their places among all [n, L_A + 3]: values, their rows' scales, places in rows, groups."""
            row, place = chosen // arrays.shape[1], chosen % arrays.shape[1]
            numbers = torch.stack((place, torch.bucketize(row, ends, right=True)), dim=1)
            return torch.cat((arrays[row, place], row_scale[row], numbers.float()), dim=1)

        self._sample.offer(arrays.shape[0] * arrays.shape[1], sampled, arrays.device)

    def _require_data(self) -> None:
        if not self.seen:
            raise CalibrationError(
                f"no activation of {self.layer} was observed: pass calibration data that reaches this layer, or use "
                "per-token scales and the universal codebooks, which need none"
            )

    def _refuse_non_finite(self, rows: Tensor) -> None:
        bad = (~torch.isfinite(rows)).nonzero()
        row, column = bad[0].tolist()
        raise CalibrationError(
            f"the activation of {self.layer} holds {rows[row, column].item()} at row {row}, column {column} "
            f"({bad.shape[0]} such values in this batch): leave this input out, or run the model in a wider dtype"
        )


def scaled_sample(statistics: ActivationStatistics, activation_scale: str, entry_max: int = ENTRY_MAX) -> Tensor:
    """Sampled block arrays [n, L_A] in units of the tensor scales that "static" or "per_token" scales will give them.

    entry_max: what the entries reach that they are to be encoded to.

    Raises:
        CalibrationError: the layer saw no data.
    """
    if activation_scale == "static":
        return statistics.sample() / statistics.static_tensor_scale(entry_max)
    return statistics.sample_in_row_scales() * (entry_max / ENTRY_MAX)
