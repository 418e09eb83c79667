"""Evidence for scales: what the measurements of a target say about the scale of each unit. No modules, only numbers.

At a measured step t, unit u (one tensor, or several that are matched together; see `mapping.Unit`) wants the scale

    s[u] = base rate[u](t) / own rate[u](t)

Single quotients are noisy, so scales are averaged in logarithms: y[t, u] = log s[u] at step t. Axes and symbols:

    T   measurements so far        y   log quotients                     float64 [T, U], nan where there is none
    U   units                      e   standard errors of log own rate   float64 [T, U], nan where not known
    K   kinds of units             w   weights of measurements           positive, [T]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..profile.rate_profile import RateProfileError, check_names
from ..rates.estimators import average_weights
from ..rates.measurement import Measurement
from .mapping import ProfileMap, Unit

# Smallest variance of a measurement: estimator `exact` states an error of 0, by which nothing can be divided.
_LEAST_VARIANCE = 1e-12

# A unit of several tensors is compared only if fewer than this part of its matrices stands still. While LoRA's B is 0,
# its A stands still: half of the matrices (AdaLoRA: two thirds), and the joint rate is that of B alone.
_STANDING_STILL = 0.25
# Optimizer steps after the first measurement for which such a unit waits. Tensors that are held back by weights of 0
# follow one step after these weights; what stands still for longer (a learning rate of 0, LoRA-FA) will not move.
_WAIT = 8


@dataclass(frozen=True)
class Evidence:
    """What a target has measured of the scales of its units, and the scales that follow.

    Attributes:
        units: Names of the units.
        steps: Optimizer steps of the measurements.
        weights: Nominal learning rate at each measurement; measurements count by it in `mean_log_scales`.
        logs: log(base rate / own rate), float64 [T, U]; nan where the two could not be compared.
        errors: Standard errors of log(own rate), float64 [T, U]; nan where not known.
        scales: Logarithms of the scales in force, float64 [U]; 0 before the first comparison.
    """

    units: tuple[str, ...]
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    logs: Tensor
    errors: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, mapped: ProfileMap) -> Evidence:
        """Return evidence without any measurement: all scales are 1."""
        units = tuple(mapped.measured_units)
        nothing = torch.empty(0, len(units), dtype=torch.float64)
        return cls(units, (), (), nothing, nothing, torch.zeros(len(units), dtype=torch.float64))

    @classmethod
    def from_record(cls, record: Mapping[str, Any], mapped: ProfileMap) -> Evidence:
        """Read what `to_record` wrote into the metadata of a checkpoint's profile.

        Raises:
            RateProfileError: If the record is about other units than `mapped`, or is damaged.
        """
        units = tuple(mapped.measured_units)
        try:
            check_names(record["scales"], dict.fromkeys(units), "what the checkpoint matched", "what this run matches")
            steps, weights = tuple(map(int, record["steps"])), tuple(map(float, record["weights"]))
            logs, errors = (_table(record[key], units) for key in ("logs", "errors"))
            scales = torch.tensor([record["scales"][unit] for unit in units], dtype=torch.float64)
        except RateProfileError:
            raise
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise _damaged(repr(error)) from error
        counts = (len(steps), len(weights), len(logs), len(errors))
        if len(set(counts)) > 1 or logs.ndim != 2 or errors.ndim != 2 or scales.ndim != 1:
            raise _damaged(f"steps, weights, logs and errors have {counts} rows, which must be equal")
        if not bool(scales.isfinite().all()) or not _positive(*weights):
            raise _damaged("its scales must be finite and its weights positive")
        return cls(units, steps, weights, logs, errors, scales)

    def to_record(self) -> dict[str, Any]:
        """Return the attributes as JSON can hold them, by name of the unit; nan becomes None."""

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
        """Return the evidence with one more measurement; the scales stay.

        A unit is not compared at this step if its rate is 0 on either side, or if it has several tensors of which a
        good part does not move the outputs yet (LoRA's A in the first step): their joint rate says nothing about the
        rest of the training, and following it has ruined runs. Where it is the base of which a part stood still, its
        joint rate is too small and the scale errs on the safe side, so that is compared.

        Args:
            step: Optimizer step of the measurement.
            mapped: The rates that the units should have.
            measurement: Measured on the target.
            weight: Nominal learning rate at that step.
        """
        units = mapped.measured_units.values()
        joint = measurement.joint_rates({unit.name: unit.shares for unit in units})
        is_early = not self.steps or step < self.steps[0] + _WAIT
        row = []
        for unit in units:
            rate, error = joint[unit.name]
            wanted = mapped.base.interpolated(unit.rates, step).item()
            comparable = _positive(wanted, rate) and not (is_early and _stands_still(unit, mapped, measurement))
            row.append((math.log(wanted) - math.log(rate), error / rate) if comparable else (math.nan, math.nan))
        logs, errors = torch.tensor(row, dtype=torch.float64).T.unsqueeze(1)
        return replace(
            self,
            steps=(*self.steps, step),
            weights=(*self.weights, weight),
            logs=torch.cat([self.logs, logs]),
            errors=torch.cat([self.errors, errors]),
        )

    def at_limit(self, max_scale: float) -> list[str]:
        """Return the names of the units whose scale is `max_scale` or its inverse."""
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
        """Return the evidence with the scales that it supports.

        Args:
            mapped: What is matched.
            pool: What log-scales are averaged over: all units of one "kind", or not at all ("unit").
            beta: How log-scales are averaged over measurements. None: by `random_effects_mean`, followed by shrinkage
                (below). A number: decay of a bias-corrected running average; 1 is the plain mean, 0.9 the value of the
                paper, 0 the latest measurement.
            max_scale: Largest scale, and the inverse of the smallest.
            max_change: Largest factor by which a scale changes from one measurement to the next. The first scale of a
                single tensor may be larger (LoRA with a gaussian A needs 20 to 40 at once); that of several tensors
                together may not.
        """
        if not self.steps:
            return self
        columns = list(_columns(mapped, pool).values())
        if beta is None:
            means, variances = self._averaged(columns, torch.ones(len(self.steps), dtype=torch.float64))
            # The positive-part James-Stein shrinkage towards a scale of 1, mu * max(0, 1 - v / mu^2) for a mean mu with
            # variance v: a scale that differs from 1 by less than its standard error stays 1, one far from it moves
            # almost all the way. nan_to_num: a mean of nan (nothing compared) or 0 gives 0.
            means = (means * (1 - variances / means.square()).clamp(min=0)).nan_to_num(0.0)
        else:
            by_step = self._means(columns)
            means = torch.stack([_running_average(column[column.isfinite()], beta) for column in by_step.T])
        limit, change = math.log(max_scale), math.log(max_change)
        is_joint = [unit.is_joint for unit in mapped.measured_units.values()]
        scales = self.scales.clone()
        for index, mean in zip(columns, means.tolist(), strict=True):
            old = self.scales[index]
            new = torch.full_like(old, mean)
            compared_before = bool(self.logs[:-1, index].isfinite().any())
            if compared_before or any(is_joint[column] for column in index):
                new = new.clamp(old - change, old + change)
            scales[index] = new.clamp(-limit, limit)
        return replace(self, scales=scales)

    def mean_log_scales(self, mapped: ProfileMap, pool: str) -> dict[str, tuple[float, float]]:
        """Estimate one scale for a whole training: measurements count by their weights (learning rates).

        `estimated` does not weigh them: the scales at the small learning rates of a warm-up had better be those that
        fit then.

        Args:
            mapped: What is matched.
            pool: As for `estimated`.

        Returns:
            `{kind or unit: (log-scale, its standard error)}`, of those that could be compared.
        """
        columns = _columns(mapped, pool)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        means, variances = self._averaged(list(columns.values()), weights)
        estimates = zip(columns, means.tolist(), variances.sqrt().tolist(), strict=True)
        return {name: (mean, error) for name, mean, error in estimates if math.isfinite(error)}

    def _averaged(self, columns: list[list[int]], weights: Tensor) -> tuple[Tensor, Tensor]:
        """Means over units and measurements, and their variances, [K] each.

        The mean of n units has the variance 2 e^2 / n: twice, because the base was measured with errors, too, which are
        not in its profile and are taken to be the target's. Units whose error is not known count with that of the
        others.
        """
        counts = torch.stack([self.logs[:, index].isfinite().sum(1) for index in columns], 1)
        squares = torch.stack([self.errors[:, index].square().nanmean(1) for index in columns], 1).nan_to_num()
        variances = 2 * squares / counts.clamp(min=1)
        return random_effects_mean(self._means(columns), variances, weights)

    def _means(self, columns: list[list[int]]) -> Tensor:
        """Means over the units of each kind, [T, K]; nan where no unit was compared."""
        return torch.stack([self.logs[:, index].nanmean(1) for index in columns], 1)


def random_effects_mean(values: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Average repeated measurements that scatter more than their stated errors (DerSimonian and Laird, 1986).

    The model of K quantities, each measured up to T times:

        y[t, k] = mu[k] + sampling error of variance v[t, k] + scatter of variance tau^2

    with one tau^2 for all quantities, by the method of moments: Q is the weighted scatter around plain weighted means,
    and its expectation is F (tau^2 + vbar) where vbar is the weighted mean of v.

        m[k]   = sum_t w y / sum_t w                       Q = sum_tk w (y - m)^2
        F      = sum_tk w - sum_k (sum_t w^2 / sum_t w)    (for weights of 1: T K - K degrees of freedom)
        tau^2  = max(0, Q / F - vbar)                      (0 where every quantity was measured once, F = 0)
        p      = w / (v + tau^2)
        mu[k]  = sum_t p y / sum_t p
        Var mu = sum_t p^2 (v + tau^2) / (sum_t p)^2

    DerSimonian and Laird have one quantity and w = 1 / v.

    Args:
        values: y, float64 [T, K]; nan where nothing was measured.
        variances: v, [T, K].
        weights: w > 0, [T].

    Returns:
        mu and Var mu, float64 [K]; nan and infinity where nothing was measured.
    """
    w = values.isfinite() * weights.unsqueeze(1)  # [T, K], 0 where nothing was measured
    y = values.nan_to_num()
    plain_means = (w * y).sum(0) / w.sum(0)
    squares = w * (values - plain_means).nan_to_num().square()
    freedom = w.sum() - (w.square().sum(0) / w.sum(0)).nansum()
    mean_variance = (w * variances).sum() / w.sum()
    scatter = squares.sum() / freedom if freedom > _LEAST_VARIANCE * w.sum() else mean_variance
    total = (variances + (scatter - mean_variance).clamp(min=0)).clamp(min=_LEAST_VARIANCE)  # v + tau^2
    precisions = w / total
    sums = precisions.sum(0)
    mean_variances = (precisions.square() * total).sum(0) / sums.square()
    return (precisions * y).sum(0) / sums, mean_variances.nan_to_num(math.inf)


def _columns(mapped: ProfileMap, pool: str) -> dict[str, list[int]]:
    """The columns (units) that are averaged and share one scale, by kind or by unit."""
    columns: dict[str, list[int]] = {}
    for column, unit in enumerate(mapped.measured_units.values()):
        columns.setdefault(unit.kind if pool == "kind" else unit.name, []).append(column)
    return columns


def _stands_still(unit: Unit, mapped: ProfileMap, measurement: Measurement) -> bool:
    """Whether a good part of the tensors of a unit does not move the outputs at this step.

    Biases and norms are not counted beside matrices: a key's bias never moves the outputs, and many biases would hide
    that half of the matrices stands still.
    """
    counted = [name for name in unit.shares if len(mapped.shapes[name]) > 1] or list(unit.shares)
    return sum(measurement.rates[name] == 0 for name in counted) >= _STANDING_STILL * len(counted)


def _running_average(values: Tensor, beta: float) -> Tensor:
    return average_weights(len(values), beta) @ values if len(values) else values.new_zeros(())


def _table(columns: Mapping[str, Any], units: tuple[str, ...]) -> Tensor:
    """Float64 [T, U] from the columns of a record."""
    rows = [[math.nan if value is None else value for value in columns[unit]] for unit in units]
    return torch.tensor(rows, dtype=torch.float64).transpose(0, 1)


def _damaged(reason: str) -> RateProfileError:
    return RateProfileError(
        f"the record of the matching in the checkpoint's profile is damaged: {reason}. Resume from another checkpoint."
    )


def _positive(*numbers: float) -> bool:
    return all(math.isfinite(number) and number > 0 for number in numbers)
