"""Evidence for scales: what the measurements of a target say about the scale of each unit. Tensors only, no modules.

At a measured step t, unit u (one tensor, or several that are matched together, see `mapping.Unit`) should have scale

    s[u] = base rate[u](t) / target rate[u](t)

Single quotients are noisy, so scales are averaged in logarithms: y[t, u] = log s[u] at step t. The joint rate of the
whole model gives one more quotient at each step, the level; `strategy` says how scales follow from both. Axes and
symbols:

    T   measurements so far     y   log quotients                        float64 [T, U], nan if not compared
    U   units                   e   standard errors of log target rate   float64 [T, U], nan if not known
    K   kinds of units          w   weights of measurements              positive, [T]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..profile.rate_profile import RateProfileError, check_names
from ..rates.estimators import average_weights
from ..rates.measurement import Measurement
from .mapping import ProfileMap, Unit

# Smallest variance of a measurement. It avoids a division by 0 with estimator `exact`, whose error is 0.
_LEAST_VARIANCE = 1e-12

# A unit of several tensors is compared only if less than this fraction of its matrices has rate 0. While LoRA's B is 0,
# A has rate 0: half of the matrices (AdaLoRA: two thirds), and the joint rate is the rate of B alone.
_MANY_ZERO_RATES = 0.25
# For this many optimizer steps after the first measurement, such a unit is not compared. A tensor blocked by weights of
# 0 gets a rate one step after these weights move. A rate that is 0 for longer (learning rate 0, LoRA-FA) stays 0.
_WAIT_STEPS = 8


@dataclass(frozen=True)
class Evidence:
    """The measured quotients base rate / target rate of each unit, and the scales that follow from them.

    Attributes:
        units: Names of the units.
        steps: Optimizer steps of the measurements.
        weights: Nominal learning rate at each measurement: its weight in `mean_log_scales`.
        log_quotients: log(base rate / target rate), float64 [T, U]; nan if the two could not be compared.
        errors: Standard errors of log(target rate), float64 [T, U]; nan if not known.
        levels: log(base joint rate / joint rate of the target at the scales in force, without their level), float64
            [T]; nan if the two could not be compared.
        level_errors: Standard errors of the logarithm of that joint rate, float64 [T]; nan if not known.
        log_scales: Logarithms of the current scales, float64 [U]; 0 before the first comparison.
        log_level: Logarithm of the factor that all scales have in common; included in `log_scales`.
    """

    units: tuple[str, ...]
    steps: tuple[int, ...]
    weights: tuple[float, ...]
    log_quotients: Tensor
    errors: Tensor
    levels: Tensor
    level_errors: Tensor
    log_scales: Tensor
    log_level: float = 0.0

    @classmethod
    def empty(cls, mapped: ProfileMap) -> Evidence:
        """Return evidence without any measurement: all scales are 1."""
        units = tuple(mapped.measured_units)
        rows, numbers = torch.empty(0, len(units), dtype=torch.float64), torch.empty(0, dtype=torch.float64)
        return cls(units, (), (), rows, rows, numbers, numbers, torch.zeros(len(units), dtype=torch.float64))

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
            log_quotients, errors = (_table(record[key], units) for key in ("logs", "errors"))
            log_scales = torch.tensor([record["scales"][unit] for unit in units], dtype=torch.float64)
            # Version 0.1 recorded no levels.
            levels, level_errors = (
                _numbers(record.get(key, [None] * len(steps))) for key in ("levels", "level_errors")
            )
            log_level = float(record.get("level", 0.0))
        except RateProfileError:
            raise
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise _damaged(repr(error)) from error
        counts = (len(steps), len(weights), len(log_quotients), len(errors), len(levels), len(level_errors))
        if len(set(counts)) > 1 or log_quotients.ndim != 2 or errors.ndim != 2 or log_scales.ndim != 1:
            raise _damaged(f"steps, weights, logs, errors and levels have {counts} rows, which must be equal")
        if not bool(log_scales.isfinite().all()) or not math.isfinite(log_level) or not _all_positive(*weights):
            raise _damaged("its scales must be finite and its weights positive")
        return cls(units, steps, weights, log_quotients, errors, levels, level_errors, log_scales, log_level)

    def to_record(self) -> dict[str, Any]:
        """Return the attributes in JSON-compatible form, keyed by unit; nan becomes None. "scales" are logarithms."""

        def plain(values: Tensor) -> list[float | None]:
            return [value if math.isfinite(value) else None for value in values.tolist()]

        def columns(values: Tensor) -> dict[str, list[float | None]]:
            return dict(zip(self.units, map(plain, values.T), strict=True))

        return {
            "steps": list(self.steps),
            "weights": list(self.weights),
            "logs": columns(self.log_quotients),
            "errors": columns(self.errors),
            "levels": plain(self.levels),
            "level_errors": plain(self.level_errors),
            "level": self.log_level,
            "scales": dict(zip(self.units, self.log_scales.tolist(), strict=True)),
        }

    def appended(
        self,
        step: int,
        mapped: ProfileMap,
        measurement: Measurement,
        weight: float = 1.0,
        in_force: Mapping[str, float] = MappingProxyType({}),
    ) -> Evidence:
        """Return the evidence with one more measurement and unchanged scales.

        A unit is not compared at this step if a rate is 0, or if it has several tensors of which many do not affect the
        outputs yet (LoRA's A in the first step): such a joint rate says nothing about the rest of the training, and
        scales that followed it have made runs diverge. If many tensors of the base had rate 0, its joint rate is too
        small, and so is the scale; this is safe, so the unit is compared.

        Args:
            step: Optimizer step of the measurement.
            mapped: The rates that the units should have.
            measurement: Measured on the target.
            weight: Nominal learning rate at that step.
            in_force: `{canonical name: scale without the level}` of the tensors whose joint rate is compared for the
                level; without any, it is not compared.
        """
        units = list(mapped.measured_units.values())
        if in_force and mapped.base.joint_rates.get("global"):
            units.append(replace(mapped.everything, name="level", shares=in_force))
        joint = measurement.joint_rates(dict(enumerate(unit.shares for unit in units)))
        is_early = not self.steps or step < self.steps[0] + _WAIT_STEPS
        rows = torch.full((2, len(self.units) + 1), math.nan, dtype=torch.float64)  # quotients and errors
        for column, unit in enumerate(units):
            rate, error = joint[column]
            wanted = mapped.base.interpolated(unit.rates, step).item()
            too_early = is_early and _has_many_zero_rates(unit, mapped, measurement)
            if _all_positive(wanted, rate) and not too_early:
                rows[:, column] = torch.tensor([math.log(wanted) - math.log(rate), error / rate], dtype=torch.float64)
        return replace(
            self,
            steps=(*self.steps, step),
            weights=(*self.weights, weight),
            log_quotients=torch.cat([self.log_quotients, rows[:1, :-1]]),
            errors=torch.cat([self.errors, rows[1:, :-1]]),
            levels=torch.cat([self.levels, rows[0, -1:]]),
            level_errors=torch.cat([self.level_errors, rows[1, -1:]]),
        )

    def at_limit(self, max_scale: float) -> list[str]:
        """Return the names of the units whose scale is `max_scale` or its inverse."""
        limit = math.log(max_scale)
        return [unit for unit, log in zip(self.units, self.log_scales.tolist(), strict=True) if abs(log) >= limit > 0]

    def estimated(
        self,
        mapped: ProfileMap,
        *,
        prior: Tensor | None = None,
        pool: str = "kind",
        beta: float | None = None,
        max_scale: float = math.inf,
        max_change: float = math.inf,
    ) -> Evidence:
        """Return a copy with updated scales.

        Args:
            mapped: What is matched.
            prior: Logarithm of each unit's scale without evidence, float64 [U]; None: 0, a scale of 1.
            pool: Which units share an average of log-scales: all units of one "kind", or each "unit" alone.
            beta: How log-scales are averaged over measurements. None: by `random_effects_mean`, followed by James-Stein
                shrinkage (see the comment in the code). A number: decay of a bias-corrected running average; 1 is the
                plain mean, 0.9 the value of the paper, 0 the latest measurement.
            max_scale: Largest scale, and the inverse of the smallest.
            max_change: Largest factor by which a scale changes from one measurement to the next. The first change of a
                unit of one tensor is not limited (LoRA with a Gaussian A needs 20 to 40); the first change of a unit of
                several tensors is.
        """
        if not self.steps:
            return self
        columns = list(columns_of(mapped, pool).values())
        if prior is None:
            prior = torch.zeros(len(self.units), dtype=torch.float64)
        if beta is None:
            means, variances = self.averaged(columns, torch.ones(len(self.steps), dtype=torch.float64))
            priors = torch.stack([prior[index].mean() for index in columns])
            moves = means - priors
            # The positive-part James-Stein shrinkage towards the prior, mu * max(0, 1 - v / mu^2) for a move mu with
            # variance v: a scale that differs from its prior by less than its standard error stays there, one far from
            # it moves almost all the way. nan_to_num: a mean of nan (nothing compared) or no move gives the prior.
            means = priors + (moves * (1 - variances / moves.square()).clamp(min=0)).nan_to_num(0.0)
        else:
            by_step = self._means(columns)
            means = torch.stack([_running_average(column[column.isfinite()], beta) for column in by_step.T])
        limit, change = math.log(max_scale), math.log(max_change)
        is_joint = [unit.is_joint for unit in mapped.measured_units.values()]
        log_scales = self.log_scales.clone()
        for index, mean in zip(columns, means.tolist(), strict=True):
            old = self.log_scales[index]
            new = torch.full_like(old, mean)
            compared_before = bool(self.log_quotients[:-1, index].isfinite().any())
            # Only the first comparison of units of one tensor may exceed `max_change`.
            if compared_before or any(is_joint[column] for column in index):
                new = new.clamp(old - change, old + change)
            log_scales[index] = new.clamp(-limit, limit)
        return replace(self, log_scales=log_scales)

    def mean_log_scales(self, mapped: ProfileMap, pool: str) -> dict[str, tuple[float, float]]:
        """Estimate one log-scale per kind or unit for a whole training, with measurements weighted by learning rate.

        `estimated` uses no weights, because the scales during a warm-up should fit the warm-up.

        Args:
            mapped: What is matched.
            pool: "kind" or "unit"; see `estimated`.

        Returns:
            `{kind or unit: (log-scale, its standard error)}` of those with at least one quotient.
        """
        columns = columns_of(mapped, pool)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        means, variances = self.averaged(list(columns.values()), weights)
        estimates = zip(columns, means.tolist(), variances.sqrt().tolist(), strict=True)
        return {name: (mean, error) for name, mean, error in estimates if math.isfinite(error)}

    def averaged(self, columns: list[list[int]], weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return means over units and measurements, and their variances, [K] each.

        The mean over n units has the variance 2 e^2 / n. The factor 2 is there because the errors of the base, which
        its profile does not hold, are taken to equal the errors of the target. An unknown error is replaced by the root
        mean square of the known ones.
        """
        counts = torch.stack([self.log_quotients[:, index].isfinite().sum(1) for index in columns], 1)
        squares = torch.stack([self.errors[:, index].square().nanmean(1) for index in columns], 1).nan_to_num()
        variances = 2 * squares / counts.clamp(min=1)
        return random_effects_mean(self._means(columns), variances, weights)

    def _means(self, columns: list[list[int]]) -> Tensor:
        """Return means over the units of each kind, [T, K]; nan if no unit was compared."""
        return torch.stack([self.log_quotients[:, index].nanmean(1) for index in columns], 1)


def random_effects_mean(values: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Average repeated measurements that scatter more than their stated errors (DerSimonian and Laird, 1986).

    The model of K quantities, each measured up to T times:

        y[t, k] = mu[k] + sampling error of variance v[t, k] + scatter of variance tau^2

    with one tau^2 for all quantities, estimated by the method of moments: Q is the weighted scatter around the weighted
    means m, with expectation F (tau^2 + vbar), where vbar is the weighted mean of v.

        m[k]   = sum_t w y / sum_t w                       Q = sum_tk w (y - m)^2
        F      = sum_tk w - sum_k (sum_t w^2 / sum_t w)    (for weights of 1: T K - K degrees of freedom)
        tau^2  = max(0, Q / F - vbar)                      (0 if every quantity was measured once: F = 0)
        p      = w / (v + tau^2)
        mu[k]  = sum_t p y / sum_t p
        Var mu = sum_t p^2 (v + tau^2) / (sum_t p)^2

    DerSimonian and Laird use one quantity and w = 1 / v.

    Args:
        values: y, float64 [T, K]; nan if not measured.
        variances: v, [T, K].
        weights: w > 0, [T].

    Returns:
        mu and Var mu, float64 [K]; nan and infinity for a quantity without a measurement.
    """
    w = values.isfinite() * weights.unsqueeze(1)  # [T, K], 0 if not measured
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


def columns_of(mapped: ProfileMap, pool: str) -> dict[str, list[int]]:
    """Return `{kind or unit: columns}`, the columns (units) that are averaged and share one scale."""
    columns: dict[str, list[int]] = {}
    for column, unit in enumerate(mapped.measured_units.values()):
        columns.setdefault(unit.kind if pool == "kind" else unit.name, []).append(column)
    return columns


def _has_many_zero_rates(unit: Unit, mapped: ProfileMap, measurement: Measurement) -> bool:
    """Whether at least `_MANY_ZERO_RATES` of the matrices of a unit have rate 0.

    Biases and norms are counted only in a unit without matrices: the bias of attention keys never affects the outputs,
    and many biases would hide that half of the matrices have rate 0.
    """
    counted = [name for name in unit.shares if len(mapped.shapes[name]) > 1] or list(unit.shares)
    return sum(measurement.rates[name] == 0 for name in counted) >= _MANY_ZERO_RATES * len(counted)


def _running_average(values: Tensor, beta: float) -> Tensor:
    return average_weights(len(values), beta) @ values if len(values) else values.new_zeros(())


def _numbers(values: Iterable[Any]) -> Tensor:
    """Return the numbers of a record as float64; None becomes nan."""
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _table(columns: Mapping[str, Any], units: tuple[str, ...]) -> Tensor:
    """Return the columns of a record as float64 [T, U]."""
    rows = [[math.nan if value is None else value for value in columns[unit]] for unit in units]
    return torch.tensor(rows, dtype=torch.float64).transpose(0, 1)


def _damaged(reason: str) -> RateProfileError:
    return RateProfileError(
        f"the record of the matching in the checkpoint's profile is damaged: {reason}. Resume from another checkpoint."
    )


def _all_positive(*numbers: float) -> bool:
    return all(math.isfinite(number) and number > 0 for number in numbers)
