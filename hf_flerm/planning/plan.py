"""`plan`: the learning rate that a target needs, from the profile of a base and a few training steps on a copy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, overload

from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..choices import Decision
from ..config import FLeRMConfig
from ..profile.rate_profile import RateProfile, RateProfileError
from ..training.callback import FLeRMCallback
from ..transfer.evidence import Evidence
from ..transfer.mapping import ProfileMap, map_profile
from ..transfer.rules import RULES, Change, Rule, change_between
from ..transfer.strategy import Strategy, choose_strategy, is_balanced, shrunk
from .checks import warn_if_trained
from .fixed_point import STEPS_OF_A_LOOK, Plan, looks_of
from .trial import OptimizerFactory, Trial

logger = logging.get_logger(__name__)
_STEPS_AT_THE_BASE = 32  # of the copy, with a profile
_DENSE_UNTIL = 8  # steps that are all measured
# Standard deviation of the logarithm of a measured factor around the one that sweeps find, apart from the sampling
# error, over the axes of examples/studies. It decides whether a factor is told from 1.
_METHOD_ERROR = 0.4
# The same where neither size, adapter nor optimizer changed: there the learning rate is right as it is more often, and
# a change of the initialization, which nothing but the rates tells of, has been misjudged by a factor of 4.
_UNCHANGED_ERROR = 0.7
# The same of an advised factor on models outside the axes that everything was chosen on: it was set after the twelve
# axes of examples/studies/unseen.py, where the stated 68 % range now covers 21 of 36 runs; on the 31 axes, 9 in 10.
_ADVICE_ERROR = 0.6
# Standard deviation of the logarithm of the factors that sweeps find when the depth changes, rounded.
_DEPTH_SPREAD = 1.0
# A learning rate that differs by less than this factor is not worth a change.
_WORTH = 1.2


@dataclass(frozen=True)
class Multiplier:
    """A factor on a learning rate. `str()` gives the factor and its 68 % range (one standard error on each side).

    Attributes:
        value: The factor.
        error: Standard error of its natural logarithm; 0.1 is about 10 %.
    """

    value: float
    error: float

    @property
    def bounds(self) -> tuple[float, float]:
        """The 68 % range, (low, high)."""
        return self.value * math.exp(-self.error), self.value * math.exp(self.error)

    def __str__(self) -> str:
        return "{:.3g} (68 % range {:.3g} to {:.3g})".format(self.value, *self.bounds)


def estimate(
    overall: Evidence, everything: ProfileMap, by_kind: Evidence, mapped: ProfileMap
) -> tuple[Multiplier | None, dict[str, Multiplier]]:
    """Estimate the factors on the base's learning rate from measurements.

    Later steps have more weight, because wide or strongly initialized networks are more sensitive at the start.

    Args:
        overall: Measurements of the update of all tensors together.
        everything: The map for `overall`, with one unit.
        by_kind: Measurements of each unit of `mapped`.
        mapped: Which rates of the base correspond to which tensors of the target.

    Returns:
        The factor for all tensors together, None if it could not be measured; and `{kind: factor}`.
    """

    def factors(evidence: Evidence, of: ProfileMap) -> dict[str, Multiplier]:
        weights = (weight * (step + 1) for step, weight in zip(evidence.steps, evidence.weights, strict=True))
        found = replace(evidence, weights=tuple(weights)).mean_log_scales(of, "kind")
        return {kind: Multiplier(math.exp(level), error) for kind, (level, error) in found.items()}

    return factors(overall, everything).get(""), factors(by_kind, mapped)


def advise(measured: Multiplier, change: Change, policy: str) -> Multiplier:
    """Turn the measured factor on the base's learning rate into advice.

    A measured factor is only as good as the method. What is done about it depends on the change, as `strategy` does:

        width    the geometric mean of muP's 1 / width and the measured factor
        depth    the measured factor, shrunk towards 1 in proportion to its error (the posterior mean of a Gaussian)
        else     1 unless the measured factor exceeds its error, and hardly shrunk if it does so clearly (`shrunk`)

    Args:
        measured: The measured factor for all tensors together; its error is that of sampling.
        change: How the target differs from the base.
        policy: What a matched run does, one of `hf_flerm.choices.Policy`.

    Returns:
        The advised factor. Its error includes the method's.
    """
    method = _UNCHANGED_ERROR if change.is_none else _METHOD_ERROR
    log, variance = math.log(measured.value), measured.error**2 + method**2
    if policy == "hold" and change.width != 1.0:
        advised = (log - math.log(change.width)) / 2
    elif policy == "follow":
        advised = log / (1 + variance / _DEPTH_SPREAD**2)
    else:
        advised = shrunk(log, variance)
    return Multiplier(math.exp(advised), math.hypot(measured.error, _ADVICE_ERROR))


@dataclass(frozen=True)
class PlanFromBase(Plan):
    """The result of `plan` with the profile of a base. `str()` gives the decision, its reason and all numbers.

    Attributes:
        looks: Short trainings around the base's learning rate.
        base_learning_rate: The learning rate of the base; of several, the largest.
        overall: Measured factor on it if all tensors have the same learning rate; `advised` is what to make of it.
        multipliers: `{kind: factor}` on it if each kind of tensor has its own learning rate.
        change: How the target differs from the base.
        strategy: What `mode="match"` does without options.
        is_balanced: Whether the kinds of tensors are in balance; see `strategy.is_balanced`.
        mapped: Which rates of the base correspond to which tensors of the target.
        steps: Training steps of the copy whose rates were measured.
        evidence: The measurements behind `overall`.
    """

    base_learning_rate: float
    overall: Multiplier
    multipliers: dict[str, Multiplier]
    change: Change
    strategy: Strategy
    is_balanced: bool
    mapped: ProfileMap
    steps: int
    evidence: Evidence

    @property
    def advised(self) -> Multiplier:
        """The factor on the base's learning rate that is advised for all tensors.

        It is what signal and curvature say; if they are not to be trusted (`doubts`), what the rates say (`advise`).
        """
        if self.doubts:
            return advise(self.overall, self.change, self.strategy.policy)
        return Multiplier(self.wanted / self.base_learning_rate, self.error)

    @property
    def decision(self) -> Decision:
        """What to do: "keep" the base's learning rate, use "one" other for all tensors, or "match".

        It is "match" where a matched run gives tensors different learning rates: where a rule does, where tensors
        follow their own rates, and where kinds of tensors are out of balance.
        """
        priors = set(self.strategy.prior.values())
        if (
            self.strategy.policy == "follow"
            or len(priors) > 1
            or (self.strategy.policy == "gate" and not self.is_balanced)
        ):
            return "match"
        return "keep" if self._may_be_kept else "one"

    @property
    def _may_be_kept(self) -> bool:
        """Whether the base's learning rate is in the 68 % range, or differs from the answer by less than `_WORTH`."""
        low, high = self.advised.bounds
        close = abs(math.log(self.advised.value)) <= math.log(_WORTH)
        return close or (not self.doubts and low <= 1 <= high)

    @property
    def learning_rate(self) -> float:
        """One learning rate for all tensors; the base's, if it need not change."""
        return self.base_learning_rate * (1.0 if self._may_be_kept else self.advised.value)

    @property
    def range(self) -> tuple[float, float]:
        """The 68 % range of the one learning rate for all tensors, (low, high), the method's error included."""
        low, high = self.advised.bounds
        return self.base_learning_rate * low, self.base_learning_rate * high

    @property
    def reason(self) -> str:
        """The reason for the decision, in one sentence."""
        if self.decision == "match":
            because = self.strategy.reason[0].upper() + self.strategy.reason[1:]
            if self.strategy.policy == "gate":
                because = "The kinds of tensors are out of balance with one another"
            return f"{because}; without matching, {self.learning_rate:.3g} for all tensors is best."
        if not self.doubts:
            return super().reason
        measured = f"the measured factor on the base's learning rate is {self.overall.value:.3g}"
        if self.change.is_none and self.decision == "keep":
            return f"Neither size, adapter nor optimizer changed ({measured})."
        if self.decision == "keep":
            return f"{measured[0].upper()}{measured[1:]}, which does not differ from 1 by more than its error."
        factor = self.overall.value
        times = f"{1 / factor:.3g} times as much as" if factor < 1 else f"only {1 / factor:.3g} times as much as"
        return (
            f"At the base's learning rate, {self.base_learning_rate:.3g}, updates would change the outputs {times} in "
            "the base run."
        )

    @property
    def keeps(self) -> bool:
        """Whether the base's learning rate can be used unchanged for all tensors."""
        return self.decision == "keep"

    @property
    def regimes(self) -> dict[str, tuple[float, float]]:
        """`{size: (exponent, its standard error)}`: the learning rate is proportional to size^exponent.

        It is estimated from the advised factor, and empty unless exactly one of width, depth and rank changed.
        """
        ratios = self.change.ratios
        if len(ratios) != 1:
            return {}
        return {
            name: (math.log(self.advised.value) / math.log(ratio), self.advised.error / abs(math.log(ratio)))
            for name, ratio in ratios.items()
        }

    @property
    def rules(self) -> list[tuple[Rule, float]]:
        """The published rules for this change, each with the learning rate that it predicts."""
        applicable = [rule for rule in RULES if rule.applies(self.change)]
        return [(rule, self.base_learning_rate * rule.factor(self.change)) for rule in applicable]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as values that JSON can hold; `error` is the standard error of a multiplier's logarithm."""
        return {
            "decision": self.decision,
            "reason": self.reason,
            "learning_rate": self.learning_rate,
            "range": list(self.range),
            "base_learning_rate": self.base_learning_rate,
            "keeps": self.keeps,
            "advised": asdict(self.advised),
            "overall": asdict(self.overall),
            "multipliers": {kind: asdict(multiplier) for kind, multiplier in self.multipliers.items()},
            "regimes": {
                name: {"exponent": exponent, "error": error} for name, (exponent, error) in self.regimes.items()
            },
            "rules": [{"learning_rate": rate, "text": rule.text, "source": rule.source} for rule, rate in self.rules],
            "unmatched": list(self.mapped.unmatched),
            "unused": list(self.mapped.unused),
            "steps": self.steps,
            **self._looks_to_dict(),
        }

    def __str__(self) -> str:
        low, high = self.range
        lines = [self._decision(), self.reason]
        lines += [f"68 % range of the learning rate for all tensors: {low:.3g} to {high:.3g}."]
        lines += [f"A published rule says {rate:.3g}: {rule.text} ({rule.source})." for rule, rate in self.rules]
        lines += self._dependence()
        lines += ["", "Factors if each kind of tensor has its own learning rate:"]
        lines += [f"  {kind}: {multiplier}" for kind, multiplier in sorted(self.multipliers.items())]
        lines += ["", "Tensors of the base and of the target:", str(self.mapped)]
        lines += ["", f"Rates were measured in {self.steps} training steps of a copy of the model."]
        lines += self._about_looks()
        return "\n".join(lines)

    def _decision(self) -> str:
        several = self.mapped.base.about.learning_rate_texts
        if self.decision == "match":
            return f"Match: one number cannot do it, kinds differ by {self._spread:.2g}x."
        if self.decision == "keep":
            return f"Keep {' and '.join(several) if len(several) > 1 else f'{self.base_learning_rate:.3g}'}."
        if len(several) > 1:
            return f"Multiply the base's learning rates, {' and '.join(several)}, by {self.advised.value:.3g}."
        return f"Use {self.learning_rate:.3g} for all tensors."

    @property
    def _spread(self) -> float:
        """The largest learning rate that a kind of tensor needs, divided by the smallest."""
        priors = self.strategy.prior.values()
        factors = [multiplier.value for multiplier in self.multipliers.values()]
        wanted = priors if self.strategy.policy == "hold" and priors else factors
        return max(wanted) / min(wanted) if wanted else 1.0

    def _dependence(self) -> Iterator[str]:
        for size, (exponent, error) in self.regimes.items():
            if self.learning_rate != self.base_learning_rate:
                yield f"The learning rate is proportional to {size}^{exponent:.2f} here (standard error {error:.2f})."
                continue
            is_scaled = size == "rank" and math.isclose(self.change.scaling * self.change.rank, 1.0)
            reason = ", because alpha/r scales the update" if is_scaled else ""
            yield f"The learning rate does not depend on {size} here{reason} (exponent {exponent:.2f} ± {error:.2f})."


@overload
def plan(
    model: nn.Module | Trainer,
    args: TrainingArguments | None = None,
    train_dataset: Dataset[Any] | None = None,
    profile: None = None,
    *,
    steps: int | None = None,
    looks: int = 6,
    granularity: str | None = None,
    optimizer: OptimizerFactory | None = None,
    data_collator: Any = None,
    probe_dataset: Dataset[Any] | None = None,
    config: FLeRMConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Plan: ...


@overload
def plan(
    model: nn.Module | Trainer,
    args: TrainingArguments | None = None,
    train_dataset: Dataset[Any] | None = None,
    *,
    profile: RateProfile | str,
    steps: int | None = None,
    looks: int = 6,
    granularity: str | None = None,
    optimizer: OptimizerFactory | None = None,
    data_collator: Any = None,
    probe_dataset: Dataset[Any] | None = None,
    config: FLeRMConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PlanFromBase: ...


@overload
def plan(
    model: nn.Module | Trainer,
    args: TrainingArguments | None,
    train_dataset: Dataset[Any] | None,
    profile: RateProfile | str,
    *,
    steps: int | None = None,
    looks: int = 6,
    granularity: str | None = None,
    optimizer: OptimizerFactory | None = None,
    data_collator: Any = None,
    probe_dataset: Dataset[Any] | None = None,
    config: FLeRMConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PlanFromBase: ...


def plan(
    model: nn.Module | Trainer,
    args: TrainingArguments | None = None,
    train_dataset: Dataset[Any] | None = None,
    profile: RateProfile | str | None = None,
    *,
    steps: int | None = None,
    looks: int = 6,
    granularity: str | None = None,
    optimizer: OptimizerFactory | None = None,
    data_collator: Any = None,
    probe_dataset: Dataset[Any] | None = None,
    config: FLeRMConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Plan:
    """Estimate the learning rate that a model needs, before it is trained.

    Without a profile, copies of the model train for a few dozen steps at learning rates that approach the one at which
    the curvature of the loss along the updates is what it is at the best one; see `hf_flerm.planning.curvature`.

    With the profile of a base, one more copy trains for a few steps at the base's learning rate, times one scale for
    all tensors, which is updated from the measured rates. The search starts at what the rates say. The factors for each
    kind of tensor are estimated from the same measurements. A warning says in which settings the training differs from
    the base's.

    The model, its trainer, all random number generators and the disk are unchanged.

    Args:
        model: The target, as it will be trained; or the trainer that will train it, of any class that is derived from
            `Trainer` (TRL's, too). A trainer brings everything that a training needs: `args`, `train_dataset`,
            `optimizer` and `data_collator` cannot be given with it.
        args: The training arguments of the target. Without a profile, the search starts at their learning rate; with
            one, it is used only if the profile has none.
        train_dataset: The training set of the target.
        profile: Profile of the base: a `RateProfile`, a folder, a file, or a repository on the Hub. None: no base.
        steps: Training steps of a copy; fewer if its training is shorter. None: 32 to measure rates, 64 for signal and
            curvature.
        looks: The largest number of learning rates at which signal and curvature are looked at. 0, with a profile: the
            learning rate is what the rates say, which is less certain.
        granularity: With a profile: what gets its own factor; see `map_profile`. None: "tensor" if base and target have
            tensors of the same names, else "module".
        optimizer: Function that creates the optimizer of a model, if `args.optim` does not name it. The optimizer gets
            the learning rate of the copy.
        data_collator: Collate function of the training.
        probe_dataset: With a profile: examples to probe with. None: those of the trainer's `FLeRMCallback`, else of the
            training set.
        config: With a profile: options of the measurement. None: those of the trainer's `FLeRMCallback`, else the
            defaults, with output, positions and metric of the profile.
        callbacks: Further callbacks for the training of the copies.

    Raises:
        RateProfileError: If the profile does not fit the model, or holds no joint rates.
        TypeError: If a trainer is given and something that it brings, too; or a model without args; or an option that
            needs a profile without one.
        ValueError: If `steps` or `looks` is below 1, the training set holds texts that nothing tokenizes, nothing could
            be measured in these steps, or several processes run.
    """
    for name, number, least in (("steps", steps, 1), ("looks", looks, 0 if profile is not None else 1)):
        if number is not None and number < least:
            raise ValueError(f"{name} is {number}; it must be a whole number of at least {least}.")
    trial = Trial.of(model, args, train_dataset, optimizer=optimizer, data_collator=data_collator)
    trial = trial.with_callbacks(callbacks)
    if profile is not None:
        base = RateProfile.from_pretrained(profile)
        measured = _plan_from(base, trial, steps or _STEPS_AT_THE_BASE, granularity, probe_dataset, config)
        start = measured.base_learning_rate * measured.advised.value
        try:
            seen = looks_of(trial, start, steps or STEPS_OF_A_LOOK, looks)
        except Exception as error:  # of a trainer that makes its batches by itself (GRPO), for example
            logger.warning(f"signal and curvature could not be measured ({error!r:.200}): the rates alone decide.")
            seen = ()
        return replace(measured, looks=seen)
    of_a_base = {"granularity": granularity, "probe_dataset": probe_dataset, "config": config}
    if given := [name for name, value in of_a_base.items() if value is not None]:
        raise TypeError(f"plan takes {', '.join(given)} only with the profile of a base: give one, or leave them out.")
    return Plan(looks_of(trial, trial.args.learning_rate, steps or STEPS_OF_A_LOOK, looks))


def _plan_from(
    base: RateProfile,
    trial: Trial,
    steps: int,
    granularity: str | None,
    probe_dataset: Dataset[Any] | None,
    config: FLeRMConfig | None,
) -> PlanFromBase:
    """Plan from the rates in the profile of a base, without looks; see `plan`."""
    target = trial.model
    mapped = _mapped(base, target, granularity)
    everything = map_profile(base, target, granularity="global")
    warn_if_trained(target, trial.trainer.state.global_step if trial.trainer is not None else 0)
    base_rate = float(base.about.learning_rate or trial.args.learning_rate)
    own = trial.own_callback
    settings = replace(
        config or replace(own.config if own else FLeRMConfig(), **base.about.config_units),
        mode="match",
        profile=base,
        granularity="global",
        measure_steps=[step for step in range(steps) if _is_measured(step, steps)],
    )
    flerm = FLeRMCallback(settings, own.probe_dataset if own and probe_dataset is None else probe_dataset)
    collector = _Collector(flerm, mapped, steps)
    try:
        copied = trial.run(base_rate, flerm, collector)
    finally:
        flerm.close()
    overall, by_kind = estimate(flerm.evidence, everything, collector.by_kind, mapped)
    if overall is None:
        raise ValueError(
            f"nothing could be measured in {steps} steps: the learning rate is 0 (warm-up), or many tensors do not "
            "affect the outputs yet (LoRA's A while B is 0). Give more steps."
        )
    algorithms = flerm.rate_profile.about.algorithms
    strategy = choose_strategy(base, target, algorithms)
    return PlanFromBase(
        looks=(),
        base_learning_rate=base_rate,
        overall=overall,
        multipliers=by_kind,
        change=change_between(base, target, algorithms),
        strategy=strategy,
        is_balanced=is_balanced(collector.by_kind, mapped, strategy),
        mapped=mapped,
        steps=copied.state.global_step,
        evidence=flerm.evidence,
    )


class _Collector(TrainerCallback):
    """Collects evidence for each kind of tensor from a run with one scale for all; stops the run after `steps`."""

    def __init__(self, source: FLeRMCallback, mapped: ProfileMap, steps: int) -> None:
        self.source, self.mapped, self.steps = source, mapped, steps
        self.by_kind = Evidence.empty(mapped)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # FLeRMCallback runs before this callback: after a measured step its evidence has one more step.
        if self.source.last_measurement is not None:
            steps, weights = self.source.evidence.steps, self.source.evidence.weights
            if steps[-1:] != self.by_kind.steps[-1:]:
                self.by_kind = self.by_kind.appended(steps[-1], self.mapped, self.source.last_measurement, weights[-1])
        if state.global_step >= self.steps:
            control.should_training_stop = True


def _mapped(base: RateProfile, model: nn.Module, granularity: str | None) -> ProfileMap:
    if granularity is not None:
        return map_profile(base, model, granularity=granularity, unmatched="global")
    try:
        return map_profile(base, model)
    except RateProfileError:
        return map_profile(base, model, granularity="module", unmatched="global")


def _is_measured(step: int, steps: int) -> bool:
    """All of the first 8 steps, then every 2nd from step 8, every 4th from 16, every 8th from 32, ...; and the last."""
    return step < _DENSE_UNTIL or step == steps - 1 or step % max(1, 2 ** int(math.log2(step)) // 4) == 0
