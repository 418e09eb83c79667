"""`plan`: which learning rate a target wants, from a base's profile and a few steps on a copy; nothing is saved."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
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
_DENSE_UNTIL = 8
_NOISE = 2.0  # standard errors within which a multiplier may be 1
_FACTOR = 1.8  # up to which rates miss what sweeps want however well they are measured (examples/results/studies.md)


@dataclass(frozen=True)
class Multiplier:
    """A factor on a learning rate.

    Attributes:
        value: The factor.
        error: Standard error of its logarithm: 0.1 is about 10 %.
    """

    value: float
    error: float

    @property
    def is_one(self) -> bool:
        """Whether it is 1 within its noise, or within what the method itself cannot tell from 1."""
        return abs(math.log(self.value)) <= max(_NOISE * self.error, math.log(_FACTOR))

    def __str__(self) -> str:
        return f"{self.value:.3g} (x/÷ {math.exp(self.error):.2f})"


@dataclass(frozen=True)
class Plan:
    """What to train a target with; `str()` of it is the advice in words.

    Attributes:
        base_learning_rate: The base's.
        overall: What to multiply it by if all tensors have one learning rate.
        multipliers: `{kind: factor}` if each kind of tensor has its own.
        change: How the target differs from the base.
        mapped: Which of the base's rates stand for which tensors.
        steps: Steps that were trained on the copy.
        evidence: What they told of the one factor for all.
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
        """One learning rate for all tensors; the base's if nothing speaks against it."""
        return self.base_learning_rate * (1.0 if self.overall.is_one else self.overall.value)

    @property
    def keeps(self) -> bool:
        """Whether the base's learning rate will do: every multiplier is 1 within its noise."""
        return self.overall.is_one and all(multiplier.is_one for multiplier in self.multipliers.values())

    @property
    def regimes(self) -> dict[str, tuple[float, float]]:
        """`{size that changed: (exponent of the learning rate in it, standard error)}`; where one alone changed."""
        ratios = self.change.ratios
        if len(ratios) != 1:
            return {}
        return {
            name: (math.log(self.overall.value) / math.log(ratio), self.overall.error / abs(math.log(ratio)))
            for name, ratio in ratios.items()
        }

    @property
    def rules(self) -> list[tuple[Rule, float]]:
        """What the field's rules say that have something to say: the rule, and its learning rate."""
        found = [rule for rule in RULES if rule.applies(self.change)]
        return [(rule, self.base_learning_rate * rule.factor(self.change)) for rule in found]

    def to_dict(self) -> dict[str, Any]:
        """Lay out all of it for programs.

        Returns:
            What JSON can hold; errors are standard errors, of logarithms where they are of multipliers.
        """
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
        lines = [f"Learning rate for all tensors: {self.learning_rate:.3g}, the base's times {self.overall}."]
        if self.overall.is_one:
            lines = [
                f"Learning rate for all tensors: the base's, {self.learning_rate:.3g}; the factor that was measured, "
                f"{self.overall}, is 1 within its noise or the method's."
            ]
        if self.keeps:
            lines = [f"Keep your learning rate, {self.base_learning_rate:.3g}: no multiplier is beyond its noise."]
        for name, (exponent, error) in self.regimes.items():
            regime = f"{name}-invariant" if self.overall.is_one else f"{name}^{exponent:.2f}"
            lines.append(f"It goes as {regime} (exponent {exponent:.2f} ± {error:.2f}).")
        lines += ["", "Multipliers, if each kind of tensor has its own:"]
        lines += [f"  {multiplier!s:>20}  {kind}" for kind, multiplier in sorted(self.multipliers.items())]
        lines += ["", "The rules of the field:"] if self.rules else []
        lines += [f"  {rate:.3g}  {rule.text} ({rule.source})" for rule, rate in self.rules]
        lines += ["", "What stands for what:", str(self.mapped), "", f"From {self.steps} steps on a copy."]
        return "\n".join(lines)


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
    """Find the learning rate that a model wants, before it is trained.

    A copy of the model trains for a few steps, from the base's learning rate, with one scale for all tensors; what it
    would take for each kind is estimated from the same measurements. The later ones count more: at its start a wide or
    strongly initialized network is more sensitive than it remains. Model, random numbers and disk stay as they are.

    Args:
        model: The target, as it will be trained.
        args: The arguments that it will be trained with; their learning rate counts only if the profile has none.
        train_dataset: What it will be trained on.
        profile: The base's: a profile, a folder, a file or a repository.
        steps: How many steps the copy trains; fewer if its training is shorter.
        granularity: As for `FLeRMConfig`; None: `tensor` if base and target have tensors of the same names, else
            `module`.
        optimizer: Makes the optimizer for a model, where `args.optim` does not say it.
        data_collator: As for `Trainer`.
        probe_dataset: As for `FLeRMTrainer`.
        config: Estimator, probes and what is measured; None: the defaults, and output, positions and metric as the
            profile has them.
        callbacks: As for `Trainer`, of the copy's training.

    Returns:
        The plan.

    Raises:
        RateProfileError: If the profile is no use for this model, or lacks the joint rates that this needs.
        ValueError: If there is no step, nothing could be measured in these steps, or several processes run.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be a whole number of at least 1.")
    if PartialState().num_processes > 1:
        raise ValueError(f"plan runs in one process, this is one of {PartialState().num_processes}: call it alone.")
    base = RateProfile.from_pretrained(profile)
    mapped = _mapped(base, model, granularity)
    everything = map_profile(base, model, granularity="global")
    base_rate = base.about.learning_rate or args.learning_rate
    settings = replace(
        config or FLeRMConfig(**base.about.config_units),
        mode="match",
        profile=base,
        granularity="global",
        measure_steps=[step for step in range(steps) if _is_measured(step, steps)],
    )
    drawing = own_generators(train_dataset, data_collator, probe_dataset)
    with kept_random_state(args.device), drawing, tempfile.TemporaryDirectory() as scratch:
        replica = copy.deepcopy(model)
        follower = _Follower(mapped, steps)
        trainer = FLeRMTrainer(
            model=replica,
            args=_quiet(args, scratch, base_rate),
            train_dataset=train_dataset,
            data_collator=data_collator and OnCopies(data_collator),
            optimizers=(optimizer(replica) if optimizer else None, None),
            callbacks=[follower, *callbacks],
            probe_dataset=probe_dataset,
            flerm=settings,
        )
        trainer.remove_callback(PrinterCallback)
        follower.source = trainer.flerm_callback
        trainer.train()
    evidence = trainer.flerm_callback.evidence
    overall = _growing(evidence).levels(everything, "kind").get("")
    if overall is None:
        raise ValueError(f"nothing could be measured in {steps} steps: is the learning rate 0 for so long?")
    by_kind = _growing(follower.by_kind).levels(mapped, "kind")
    return Plan(
        float(base_rate),
        Multiplier(math.exp(overall[0]), overall[1]),
        {kind: Multiplier(math.exp(level), error) for kind, (level, error) in by_kind.items()},
        change_between(base, model),
        mapped,
        trainer.state.global_step,
        evidence,
    )


def _growing(evidence: Evidence) -> Evidence:
    """The same with weights that grow with the step, beside the learning rate that they are."""
    weights = (weight * (step + 1) for step, weight in zip(evidence.steps, evidence.weights, strict=True))
    return replace(evidence, weights=tuple(weights))


class _Follower(TrainerCallback):
    """Collects, from a run with one scale, the evidence for a scale of every kind; stops the run in time."""

    def __init__(self, mapped: ProfileMap, steps: int) -> None:
        self.mapped, self.steps = mapped, steps
        self.by_kind = Evidence.recorded(None, mapped)
        self.source: FLeRMCallback | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
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
    """Every step at first, then less and less often, and the last."""
    return step < _DENSE_UNTIL or step == steps - 1 or step % max(1, 2 ** int(math.log2(step)) // 4) == 0


def _quiet(args: TrainingArguments, folder: str, learning_rate: float) -> TrainingArguments:
    """The arguments of a run that writes and reports nothing."""
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
