"""One training of a sweep: on a copy, recorded, and stopped as soon as it has diverged or cannot win."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, Literal

from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.utils import logging

from ...config import FLeRMConfig
from ...model.isolation import kept_random_state, own_generators
from ...profile.rate_profile import RateProfile
from ...training.callback import FLeRMCallback
from ..copied_trainer import copied_trainer, quiet_arguments

End = Literal["complete", "stopped", "diverged"]
_WINDOWS = 10  # losses are averaged over a tenth of the steps
_LAST = 4  # without an evaluation set, the loss is that of the last quarter of the steps


@dataclass(frozen=True)
class SweepRun:
    """A training of a sweep.

    Attributes:
        learning_rate: Its learning rate.
        seed: Its seed.
        end: How it ended: "complete", "stopped" because it could not win, or "diverged".
        loss: The loss that the sweep minimizes; inf unless the run is complete.
        steps: Optimizer steps that it has taken.
        training_losses: The training loss of each of them.
    """

    learning_rate: float
    seed: int
    end: End
    loss: float
    steps: int
    training_losses: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class Recipe:
    """What all trainings of a sweep share.

    Attributes:
        trainer: The trainer whose copies train.
        config: How they are recorded.
        probe_dataset: Examples to probe with; None: those of the training set.
    """

    trainer: Trainer
    config: FLeRMConfig
    probe_dataset: Dataset[Any] | None

    def arguments(self, folder: str, learning_rate: float, seed: int) -> TrainingArguments:
        """Return the arguments of one training, which writes into `folder` only and reports to nobody."""
        args: Any = quiet_arguments(self.trainer.args, folder, learning_rate)
        args.seed = seed
        args.logging_strategy, args.logging_steps, args.logging_nan_inf_filter = "steps", 1, False
        args.prediction_loss_only = True
        return args  # type: ignore[no-any-return]

    def train(self, learning_rate: float, seed: int, best: SweepRun | None) -> tuple[SweepRun, RateProfile]:
        """Train a copy; everything else is as it was before.

        Args:
            learning_rate: The learning rate.
            seed: Seed of the training: of the order of the data and of dropout.
            best: A complete run with the same seed: this one is stopped if it cannot win against it. None: it is
                trained to the end, unless it diverges.

        Returns:
            The run and its profile.

        Raises:
            ValueError: If training or evaluation reports no loss.
        """
        original: Any = self.trainer
        drawing = own_generators(
            original, original.train_dataset, original.eval_dataset, original.data_collator, self.probe_dataset
        )
        with kept_random_state(original.args.device), drawing, tempfile.TemporaryDirectory() as scratch:
            flerm = FLeRMCallback(self.config, self.probe_dataset)
            copied = copied_trainer(original, self.arguments(scratch, learning_rate, seed), flerm)
            watch = _Watch(best, learning_rate, seed, original.args.disable_tqdm)
            copied.add_callback(watch)
            set_seed(seed)
            try:
                copied.train()
            finally:
                flerm.close()
                watch.bar.close()
            loss = math.inf if watch.end != "complete" else _loss(copied, watch.losses)
        run = SweepRun(
            learning_rate=learning_rate,
            seed=seed,
            end=watch.end if math.isfinite(loss) or watch.end == "stopped" else "diverged",
            loss=loss,
            steps=copied.state.global_step,
            training_losses=tuple(watch.losses),
        )
        return run, flerm.rate_profile


def cannot_win(losses: Sequence[float], best: Sequence[float]) -> bool:
    """Whether a run is so far behind the best one that it will not overtake it.

    It is, if it is behind by more than half of what the best run still gains from this step to its end: it would have
    to gain more than one and a half times as much in the same steps. Losses are compared at the same step, because a
    decaying learning rate lowers the loss of its own accord, and on the same examples, so that differences have little
    noise. A high learning rate can still overtake a much lower one while the schedule decays. So the sweep asks this
    only of learning rates that are not next to the best one, with a worse one in between: there a run that is behind
    could win only if the loss had two minima.

    Args:
        losses: Training losses of the run so far.
        best: Training losses of the best run, to its end.
    """
    window, step = max(1, len(best) // _WINDOWS), len(losses)
    if not window <= step <= len(best):
        return False
    own, then, end = mean(losses[-window:]), mean(best[step - window : step]), mean(best[-window:])
    return own - then > max(then - end, 0.0) / 2


def _loss(trainer: Trainer, training_losses: Sequence[float]) -> float:
    """The loss of a complete run: of the evaluation set, else of the last steps."""
    data: Any = trainer.eval_dataset
    if data is None:
        if not training_losses:
            raise ValueError(f"{type(trainer).__name__} logs no training loss, and there is no eval_dataset.")
        return mean(training_losses[-max(1, len(training_losses) // _LAST) :])
    metrics = trainer.evaluate()
    names = [f"eval_{name}_loss" for name in data] if isinstance(data, dict) else ["eval_loss"]
    if missing := [name for name in names if name not in metrics]:
        raise ValueError(
            f"the evaluation reports no {', '.join(missing)}, only {', '.join(metrics)}. Give an eval_dataset with "
            "labels, or none: then the training loss is minimized."
        )
    return mean(metrics[name] for name in names)


class _Watch(TrainerCallback):
    """Collects the training losses of a run, shows its progress, and stops it if it has diverged or cannot win."""

    def __init__(self, best: SweepRun | None, learning_rate: float, seed: int, is_silent: bool) -> None:
        self.best = best
        self.losses: list[float] = []
        self.end: End = "complete"
        self.bar: Any = logging.tqdm(
            desc=f"learning rate {learning_rate:g}, seed {seed}", unit="step", leave=False, disable=is_silent
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.reset(state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = kwargs["logs"].get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            self.end = "diverged"
        else:
            self.losses.append(loss)
            if self.best is not None and cannot_win(self.losses, self.best.training_losses):
                self.end = "stopped"
        control.should_training_stop |= self.end != "complete"
