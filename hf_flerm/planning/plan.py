"""`plan`: the learning rate that a target needs, from the profile of a base and a few training steps on a copy."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate import PartialState
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import FLeRMConfig
from ..model.isolation import kept_random_state, own_generators
from ..profile.rate_profile import RateProfile, RateProfileError
from ..training.callback import FLeRMCallback
from ..training.probe_data import OnCopies
from ..training.trainer import FLeRMTrainer
from ..transfer.evidence import Evidence
from ..transfer.mapping import ProfileMap, map_profile
from ..transfer.rules import RULES, Change, Rule, change_between

OptimizerFactory = Callable[[nn.Module], Optimizer]
_DENSE_UNTIL = 8  # steps that are all measured
_STANDARD_ERRORS = 2.0  # a factor within this many standard errors of 1 counts as 1
# A factor between 1 / 1.8 and 1.8 also counts as 1: even exact rates differ by so much from the optimum that sweeps
# find (examples/results/studies.md).
_METHOD_ERROR = 1.8


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
    def is_one(self) -> bool:
        """Whether it does not differ significantly from 1: by two standard errors and by the method's error (1.8)."""
        return abs(math.log(self.value)) <= max(_STANDARD_ERRORS * self.error, math.log(_METHOD_ERROR))

    @property
    def range(self) -> str:
        """The 68 % range in words."""
        low, high = self.value * math.exp(-self.error), self.value * math.exp(self.error)
        return f"68 % range {low:.3g} to {high:.3g}"

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.range})"


@dataclass(frozen=True)
class Plan:
    """The result of `plan`: the learning rate for a target. `str()` gives the advice as text.

    Attributes:
        base_learning_rate: The learning rate of the base.
        overall: Factor on it if all tensors have the same learning rate.
        multipliers: `{kind: factor}` on it if each kind of tensor has its own learning rate.
        change: How the target differs from the base.
        mapped: Which rates of the base correspond to which tensors of the target.
        steps: Training steps of the copy.
        evidence: The measurements behind `overall`.
    """

    base_learning_rate: float
    overall: Multiplier
    multipliers: dict[str, Multiplier]
    change: Change
    mapped: ProfileMap
    steps: int
    evidence: Evidence

    @property
    def learning_rate(self) -> float:
        """One learning rate for all tensors: the base's, times the overall factor if that differs from 1."""
        return self.base_learning_rate * (1.0 if self.overall.is_one else self.overall.value)

    @property
    def keeps(self) -> bool:
        """Whether the base's learning rate can be used unchanged: no factor differs significantly from 1."""
        return self.overall.is_one and all(multiplier.is_one for multiplier in self.multipliers.values())

    @property
    def regimes(self) -> dict[str, tuple[float, float]]:
        """`{size: (exponent, its standard error)}`: the learning rate is proportional to size^exponent.

        It is estimated from the overall factor, and empty unless exactly one of width, depth and rank changed.
        """
        ratios = self.change.ratios
        if len(ratios) != 1:
            return {}
        return {
            name: (math.log(self.overall.value) / math.log(ratio), self.overall.error / abs(math.log(ratio)))
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
            "base_learning_rate": self.base_learning_rate,
            "learning_rate": self.learning_rate,
            "keeps": self.keeps,
            "overall": asdict(self.overall),
            "multipliers": {kind: asdict(multiplier) for kind, multiplier in self.multipliers.items()},
            "regimes": {
                name: {"exponent": exponent, "error": error} for name, (exponent, error) in self.regimes.items()
            },
            "rules": [{"learning_rate": rate, "text": rule.text, "source": rule.source} for rule, rate in self.rules],
            "unmatched": list(self.mapped.unmatched),
            "unused": list(self.mapped.unused),
            "steps": self.steps,
        }

    def __str__(self) -> str:
        lines = [self._advice(), *self._dependence()]
        lines += ["", "Factors if each kind of tensor has its own learning rate:"]
        lines += [f"  {kind}: {multiplier}" for kind, multiplier in sorted(self.multipliers.items())]
        lines += ["", "What published rules say:"] if self.rules else []
        lines += [f"  {rate:.3g} by {rule.text} ({rule.source})" for rule, rate in self.rules]
        lines += ["", "Tensors of the base and of the target:", str(self.mapped)]
        lines += ["", f"Measured in {self.steps} training steps of a copy of the model."]
        return "\n".join(lines)

    def _advice(self) -> str:
        base = f"{self.base_learning_rate:.3g}"
        if not self.overall.is_one:
            return f"Use {self.learning_rate:.3g}: the base's learning rate, {base}, times {self.overall}."
        kept = f"Keep {base} (measured factor {self.overall.value:.3g}, {self.overall.range})."
        if self.keeps:
            return kept
        return f"{kept} Some kinds of tensor need a different learning rate; mode='match' gives each tensor its own."

    def _dependence(self) -> Iterator[str]:
        for size, (exponent, error) in self.regimes.items():
            if not self.overall.is_one:
                yield f"The learning rate is proportional to {size}^{exponent:.2f} here (standard error {error:.2f})."
                continue
            is_scaled = size == "rank" and math.isclose(self.change.scaling * self.change.rank, 1.0)
            reason = ", because alpha/r scales the update" if is_scaled else ""
            yield f"The learning rate does not depend on {size} here{reason} (exponent {exponent:.2f} ± {error:.2f})."


def plan(
    model: nn.Module,
    args: TrainingArguments,
    train_dataset: Dataset[Any],
    profile: RateProfile | str,
    *,
    steps: int = 32,
    granularity: str | None = None,
    optimizer: OptimizerFactory | None = None,
    data_collator: Any = None,
    probe_dataset: Dataset[Any] | None = None,
    config: FLeRMConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Plan:
    """Estimate the learning rate that a model needs, before it is trained.

    A copy of the model trains for a few steps at the base's learning rate, times one scale for all tensors, which is
    updated from the measurements. The factors for each kind of tensor are estimated from the same measurements. Later
    steps have more weight, because wide or strongly initialized networks are more sensitive at the start. The model,
    all random number generators and the disk are unchanged.

    Args:
        model: The target, as it will be trained.
        args: The training arguments of the target. Their learning rate is used only if the profile has none.
        train_dataset: The training set of the target.
        profile: Profile of the base: a `RateProfile`, a folder, a file, or a repository on the Hub.
        steps: Training steps of the copy; fewer if its training is shorter.
        granularity: What gets its own factor; see `map_profile`. None: "tensor" if base and target have tensors of the
            same names, else "module".
        optimizer: Function that creates the optimizer of a model, if `args.optim` does not name it.
        data_collator: Collate function of the training.
        probe_dataset: Examples to probe with. None: examples of the training set.
        config: Options of the measurement. None: the defaults. Output, positions and metric are the profile's if not
            set; if the base's output was a callable, pass it here.
        callbacks: Callbacks for the training of the copy.

    Raises:
        RateProfileError: If the profile does not fit the model, or holds no joint rates.
        ValueError: If `steps` is below 1, nothing could be measured in these steps, or several processes run.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be a whole number of at least 1.")
    if PartialState().num_processes > 1:
        raise ValueError(
            f"plan must run in a single process, and there are {PartialState().num_processes}: start it without a "
            "launcher."
        )
    base = RateProfile.from_pretrained(profile)
    mapped = _mapped(base, model, granularity)
    everything = map_profile(base, model, granularity="global")
    base_rate = base.about.learning_rate or args.learning_rate
    settings = replace(
        config or FLeRMConfig(),
        mode="match",
        profile=base,
        granularity="global",
        measure_steps=[step for step in range(steps) if _is_measured(step, steps)],
    )
    drawing = own_generators(train_dataset, data_collator, probe_dataset)
    with kept_random_state(args.device), drawing, tempfile.TemporaryDirectory() as scratch:
        replica = copy.deepcopy(model)
        collector = _Collector(mapped, steps)
        trainer = FLeRMTrainer(
            model=replica,
            args=_without_output(args, scratch, base_rate),
            train_dataset=train_dataset,
            data_collator=data_collator and OnCopies(data_collator),
            optimizers=(optimizer(replica) if optimizer else None, None),
            callbacks=[collector, *callbacks],
            probe_dataset=probe_dataset,
            flerm=settings,
        )
        trainer.remove_callback(PrinterCallback)
        collector.source = trainer.flerm_callback
        trainer.train()
    evidence = trainer.flerm_callback.evidence
    overall = _weighted_by_step(evidence).mean_log_scales(everything, "kind").get("")
    if overall is None:
        raise ValueError(
            f"nothing could be measured in {steps} steps: the learning rate is 0 (warm-up), or many tensors do not "
            "affect the outputs yet (LoRA's A while B is 0). Give more steps."
        )
    by_kind = _weighted_by_step(collector.by_kind).mean_log_scales(mapped, "kind")
    return Plan(
        float(base_rate),
        Multiplier(math.exp(overall[0]), overall[1]),
        {kind: Multiplier(math.exp(level), error) for kind, (level, error) in by_kind.items()},
        change_between(base, model),
        mapped,
        trainer.state.global_step,
        evidence,
    )


def _weighted_by_step(evidence: Evidence) -> Evidence:
    """Return the evidence with its weights (the learning rates) multiplied by step + 1."""
    weights = (weight * (step + 1) for step, weight in zip(evidence.steps, evidence.weights, strict=True))
    return replace(evidence, weights=tuple(weights))


class _Collector(TrainerCallback):
    """Collects evidence for each kind of tensor from a run with one scale for all; stops the run after `steps`."""

    def __init__(self, mapped: ProfileMap, steps: int) -> None:
        self.mapped, self.steps = mapped, steps
        self.by_kind = Evidence.empty(mapped)
        self.source: FLeRMCallback | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # FLeRMCallback runs before this callback: after a measured step its evidence has one more step.
        if self.source is not None and self.source.last_measurement is not None:
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


def _without_output(args: TrainingArguments, folder: str, learning_rate: float) -> TrainingArguments:
    """Return the arguments of a run that writes no files and reports nothing."""
    own = copy.copy(args)
    own.learning_rate = learning_rate
    for name, value in (
        ("output_dir", folder),
        ("save_strategy", "no"),
        ("eval_strategy", "no"),
        ("eval_on_start", False),
        ("logging_strategy", "no"),
        ("report_to", []),
        ("push_to_hub", False),
        ("load_best_model_at_end", False),
        ("disable_tqdm", True),
        ("resume_from_checkpoint", None),
    ):
        setattr(own, name, value)
    return own
