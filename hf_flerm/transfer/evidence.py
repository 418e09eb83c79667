"""From a base's rates and a target's to the scales of the target's learning rates: plain numbers, no modules."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..profile.rate_profile import RateProfile, RateProfileError, check_names
from ..rates.estimators import average_weights
from ..rates.measurement import Measurement
from .mapping import ProfileMap

POOLS = ("kind", "unit")
_LEAST_VARIANCE = 1e-12  # of a measurement without error (`exact`)


def match_rates(
    base: RateProfile | str | os.PathLike[str] | Mapping[str, float], measured: Mapping[str, float] | Measurement
) -> dict[str, float]:
    """Scales that make every tensor move the outputs as far per unit learning rate as it did in the base run.

    Args:
        base: `{canonical name: rate}` of the base run, or its profile (an object, a folder, a file or a repository),
            whose first step is taken.
        measured: The target's rates, with the same names.

    Returns:
        `{name: base rate / measured rate}`; 1 where either is 0 or not finite (LoRA's A while B is still 0).

    Raises:
        RateProfileError: If the names differ.
    """
    rates = measured.rates if isinstance(measured, Measurement) else measured
    wanted = base if isinstance(base, Mapping) else RateProfile.from_pretrained(base).at(0)
    check_names(wanted, rates, "the base", "the target")
    return {name: wanted[name] / rates[name] if _positive(wanted[name], rates[name]) else 1.0 for name in wanted}


@dataclass(frozen=True)
class Evidence:
    """What a target has measured so far of the scale that each unit needs, and what scales came of it.

    Attributes:
        units: Names of the units.
        steps: The steps at which was measured.
        weights: How much each step's measurement says of a whole training: the nominal learning rate in force.
        logs: log(wanted rate / own rate), float64 [T, U]; nan where either was 0.
        errors: Standard errors of the logarithm of the own rate, float64 [T, U]; nan where not known.
        scales: Log-scales of the units, float64 [U]; 0 before anything could be compared.
    """

    units: tuple[str, ...]
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    logs: Tensor
    errors: Tensor
    scales: Tensor

    @classmethod
    def recorded(cls, record: Mapping[str, Any] | None, mapped: ProfileMap) -> Evidence:
        """Go on from a record, or from nothing.

        Args:
            record: What `record` gave, or None.
            mapped: What is matched.

        Returns:
            The evidence.

        Raises:
            RateProfileError: If it is of other units, or is no whole record.
        """
        units = tuple(mapped.measured_units)
        if record is None:
            nothing = torch.empty(0, len(units), dtype=torch.float64)
            return cls(units, (), (), nothing, nothing, torch.zeros(len(units), dtype=torch.float64))
        try:
            check_names(record["scales"], dict.fromkeys(units), "what the checkpoint matched", "what this run matches")
            steps, weights = tuple(map(int, record["steps"])), tuple(map(float, record["weights"]))
            logs, errors = (_table(record[key], units) for key in ("logs", "errors"))
            scales = torch.tensor([record["scales"][unit] for unit in units], dtype=torch.float64)
        except RateProfileError:
            raise
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise _broken(repr(error)) from error
        counts = (len(steps), len(weights), len(logs), len(errors))
        if len(set(counts)) > 1 or logs.ndim != 2 or errors.ndim != 2 or scales.ndim != 1:
            raise _broken(f"its steps, weights, logs and errors are {counts} rows")
        if not bool(scales.isfinite().all()) or not _positive(*weights):
            raise _broken("its scales must be finite, its weights positive")
        return cls(units, steps, weights, logs, errors, scales)

    def record(self) -> dict[str, Any]:
        """Write as JSON can hold it; unknown numbers are None.

        Returns:
            The attributes, by unit.
        """

        def columns(values: Tensor) -> dict[str, list[float | None]]:
            plain = [[value if math.isfinite(value) else None for value in row] for row in values.T.tolist()]
            return dict(zip(self.units, plain, strict=True))

        return {
            "steps": list(self.steps),
            "weights": list(self.weights),
            "logs": columns(self.logs),
            "errors": columns(self.errors),
            "scales": dict(zip(self.units, self.scales.tolist(), strict=True)),
        }

    def appended(self, step: int, mapped: ProfileMap, measurement: Measurement, weight: float = 1.0) -> Evidence:
        """Add a measurement.

        Args:
            step: When it was made.
            mapped: What is wanted of the units.
            measurement: Of the target.
            weight: How much it counts.

        Returns:
            More evidence, with the scales from before.
        """
        units = mapped.measured_units.values()
        joint = measurement.joint_rates({unit.name: unit.shares for unit in units})
        row = []
        for unit in units:
            rate, error = joint[unit.name]
            wanted = mapped.base.interpolated(unit.rates, step).item()
            comparable = _positive(wanted, rate)
            row.append((math.log(wanted) - math.log(rate), error / rate) if comparable else (math.nan, math.nan))
        logs, errors = torch.tensor(row, dtype=torch.float64).T.unsqueeze(1)
        return replace(
            self,
            steps=(*self.steps, step),
            weights=(*self.weights, weight),
            logs=torch.cat([self.logs, logs]),
            errors=torch.cat([self.errors, errors]),
        )

    def held(self, max_scale: float) -> list[str]:
        """Find the units whose scale has met its limit.

        Args:
            max_scale: The limit.

        Returns:
            Their names.
        """
        limit = math.log(max_scale)
        return [unit for unit, log in zip(self.units, self.scales.tolist(), strict=True) if abs(log) >= limit > 0]

    def estimated(
        self,
        mapped: ProfileMap,
        *,
        pool: str = "kind",
        beta: float | None = None,
        max_scale: float = math.inf,
        max_change: float = math.inf,
    ) -> Evidence:
        """Estimate the scales.

        Args:
            mapped: What is matched.
            pool: `kind` takes the mean over the units of one kind, `unit` leaves each on its own.
            beta: None: measurements count by what is known of their errors (`random_effects_mean`), and a log-scale
                moves from 0 only as far as it is known: it is multiplied by 1 - variance / log-scale^2 (James and
                Stein), at least 0. A number: the decay of a bias-corrected running average: 1 is the plain mean, 0.9
                the paper's, 0 the latest alone.
            max_scale: Scales are held between its inverse and it.
            max_change: Once it is known, a scale changes by at most this factor from one measurement to the next.

        Returns:
            The evidence with the scales that it supports.
        """
        if not self.steps:
            return self
        members = list(_members(mapped, pool).values())
        if beta is None:
            levels, variances = self._averaged(members, torch.ones(len(self.steps), dtype=torch.float64))
            levels = (levels * (1 - variances / levels.square()).clamp(min=0)).nan_to_num(0.0)
        else:
            logs = self._means(members)
            levels = torch.stack([_running_average(column[column.isfinite()], beta) for column in logs.T])
        limit, change = math.log(max_scale), math.log(max_change)
        scales = self.scales.clone()
        for index, level in zip(members, levels.tolist(), strict=True):
            old = self.scales[index]
            nearby = torch.full_like(old, level).clamp(old - change, old + change)
            known_before = self.logs[:-1, index].isfinite().any()
            scales[index] = (nearby if known_before else torch.full_like(old, level)).clamp(-limit, limit)
        return replace(self, scales=scales)

    def levels(self, mapped: ProfileMap, pool: str) -> dict[str, tuple[float, float]]:
        """What the evidence says of the log-scales of a whole training: measurements count by their weights.

        The scales of a run do not: at the small learning rates of a warm-up they had better be those of then.

        Args:
            mapped: What is matched.
            pool: As for `estimated`.

        Returns:
            `{kind or unit: (log-scale, standard error)}` of what could be compared.
        """
        members = _members(mapped, pool)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        levels, variances = self._averaged(list(members.values()), weights)
        found = zip(members, levels.tolist(), variances.sqrt().tolist(), strict=True)
        return {name: (level, error) for name, level, error in found if math.isfinite(error)}

    def _averaged(self, members: list[list[int]], weights: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.stack([self.logs[:, index].isfinite().sum(1) for index in members], 1)
        squares = torch.stack([self.errors[:, index].square().nanmean(1) for index in members], 1).nan_to_num()
        known = 2 * squares / counts.clamp(min=1)  # twice: the base was measured with errors, too
        return random_effects_mean(self._means(members), known, weights)

    def _means(self, members: list[list[int]]) -> Tensor:
        return torch.stack([self.logs[:, index].nanmean(1) for index in members], 1)


def random_effects_mean(values: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Average repeated measurements whose errors are known in part (DerSimonian and Laird, 1986).

    Beyond their own errors, measurements of one quantity scatter by a variance that is the same for all quantities; it
    is estimated from the scatter itself. Each counts by its weight and by the inverse of its total variance.

    Args:
        values: Float64 [T, G]; nan where nothing was measured.
        variances: Of the known errors, [T, G].
        weights: Of the measurements, positive, [T].

    Returns:
        Means and their variances, float64 [G]; nan and infinite where nothing was measured.
    """
    seen = values.isfinite()
    shares = seen * weights.unsqueeze(1)
    means = (shares * values.nan_to_num()).sum(0) / shares.sum(0)
    squares = shares * (values - means).nan_to_num().square()
    freedom = shares.sum() - (shares.square().sum(0) / shares.sum(0)).nansum()
    known = (shares * variances).sum() / shares.sum()
    scatter = squares.sum() / freedom if freedom > _LEAST_VARIANCE * shares.sum() else known
    total = (variances + (scatter - known).clamp(min=0)).clamp(min=_LEAST_VARIANCE)
    precisions = shares / total
    sums = precisions.sum(0)
    spread = (precisions.square() * total).sum(0) / sums.square()
    return (precisions * values.nan_to_num()).sum(0) / sums, spread.nan_to_num(math.inf)


def _members(mapped: ProfileMap, pool: str) -> dict[str, list[int]]:
    """The positions of the units that share a scale."""
    groups: dict[str, list[int]] = {}
    for index, unit in enumerate(mapped.measured_units.values()):
        groups.setdefault(unit.kind if pool == "kind" else unit.name, []).append(index)
    return groups


def _running_average(values: Tensor, beta: float) -> Tensor:
    return average_weights(len(values), beta) @ values if len(values) else values.new_zeros(())


def _table(columns: Mapping[str, Any], units: tuple[str, ...]) -> Tensor:
    """Float64 [T, U] from a record's columns."""
    rows = [[math.nan if value is None else value for value in columns[unit]] for unit in units]
    return torch.tensor(rows, dtype=torch.float64).transpose(0, 1)


def _broken(reason: str) -> RateProfileError:
    return RateProfileError(
        f"the checkpoint's profile holds no whole record of its matching: {reason}. Resume from another checkpoint."
    )


def _positive(*rates: float) -> bool:
    return all(math.isfinite(rate) and rate > 0 for rate in rates)
