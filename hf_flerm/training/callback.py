"""`FLeRMCallback`: a training by a `Trainer`, followed by `FLeRMRun`; the only room that knows the Trainer's events."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..config import FLeRMConfig, check_config
from ..engines.processes import are_several
from ..profile.common import common_profile
from ..profile.rate_profile import PROFILE_NAME, RateProfile, RateProfileError
from ..rates.measurement import Measurement
from ..transfer.evidence import Evidence
from .run import FLeRMRun
from .trl_tasks import trl_task

logger = logging.get_logger(__name__)


class FLeRMCallback(TrainerCallback):
    """Records function-space learning rates on any `Trainer`, or matches them to a profile.

    At a measured step it keeps the weights from before the update, lets the optimizer step, puts the old weights back
    for the probes (by reference, so bit for bit), and then the new ones. In `match` mode the step at which scales are
    computed is redone at these scales.

    Rates are per unit of the optimizer's own learning rate. Where weight decay is decoupled (AdamW, Lion, Muon), its
    part of a step is left out of the rates, and not scaled with the learning rate: a matched tensor decays as it would
    have. Where it goes through the gradient (SGD, Adam), and for an optimizer class that is not known
    (`optimizer_table.TABLE`), it is part of the update. A class whose update is known not to be linear in the learning
    rate is refused before the first step; one that is not known is taken to be linear.

    A training that goes on from a checkpoint goes on with its profile and scales: `FLeRMTrainer` finds them in the
    checkpoint it is given, the callback alone in the output folder's `checkpoint-N`.

    Args:
        config: What to measure, when, and what to do with it.
        probe_dataset: Examples to probe with. None: the training set's, drawn by the callback's own generator.

    Raises:
        RateProfileError: If the profile to match cannot be loaded; on several processes when training begins, on all.
        ValueError: If `config` is no `FLeRMConfig`.
    """

    def __init__(self, config: FLeRMConfig, probe_dataset: Dataset[Any] | None = None) -> None:
        self.config = check_config(config)
        self.probe_dataset = probe_dataset
        self.base: RateProfile | None = None
        if config.profile is not None and not are_several():  # several read it together when training begins
            self.base = RateProfile.from_pretrained(config.profile)
        self._resume_from: Path | None = None
        self._run: FLeRMRun | None = None

    @property
    def run(self) -> FLeRMRun:
        """The training that goes on, or the latest.

        Raises:
            RateProfileError: If training has not begun.
        """
        if self._run is None:
            raise RateProfileError("nothing is recorded yet: call train() first.")
        return self._run

    @property
    def has_begun(self) -> bool:
        """Whether there is a training, and so a profile."""
        return self._run is not None

    @property
    def rate_profile(self) -> RateProfile:
        """The rates that this run has measured so far."""
        return self.run.profile

    @property
    def scales(self) -> dict[str, float]:
        """`{canonical name: factor on the learning rate}`, all 1 when recording; empty before training."""
        return self._run.scales if self._run is not None else {}

    @property
    def evidence(self) -> Evidence:
        """What was measured of the scales so far, in `match` mode.

        Raises:
            RateProfileError: In `record` mode.
        """
        if self.run.evidence is None:
            raise RateProfileError("a run that records has no evidence of scales: mode='match' has.")
        return self.run.evidence

    @property
    def last_measurement(self) -> Measurement | None:
        """The latest measurement of this training."""
        return self._run.last_measurement if self._run is not None else None

    @property
    def seconds(self) -> float:
        """Wall time that measuring has taken in this training."""
        return self._run.seconds if self._run is not None else 0.0

    def resume_from(self, checkpoint: str | os.PathLike[str]) -> None:
        """Continue the profile of a checkpoint when training begins.

        Args:
            checkpoint: A `checkpoint-N` folder.
        """
        self._resume_from = Path(checkpoint)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the profile so far beside a checkpoint; nothing if training has not begun.

        A disk that is full is no reason to end a training: it warns, and the next save tries again.

        Args:
            directory: The folder.
        """
        if self._run is not None:
            self._run.save(directory)

    def close(self) -> None:
        """Let go of optimizer and weights, also when training was cut short by an exception."""
        if self._run is not None:
            self._run.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything that can be wrong, before the first step."""
        self.close()
        resumed = self._resumed(args, state)
        model, dataloader = kwargs["model"], kwargs.get("train_dataloader")
        task = trl_task(args, model, dataloader, kwargs.get("processing_class"))
        positions = self.config.positions or (None if callable(self.config.output) else task.positions)
        run = FLeRMRun(
            model,
            kwargs["optimizer"],
            replace(self.config, profile=self.base or self.config.profile, positions=positions),
            dataloader,
            probe_dataset=self.probe_dataset,
            collate_fn=task.collate_fn,
            batch_size=(args.auto_find_batch_size and state.train_batch_size) or args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            arguments=args.to_dict(),
        )
        if resumed is not None:
            try:
                run.resume(resumed, state.global_step)
            except RateProfileError:
                run.close()
                raise
        self._run = run

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the weights from before the update, if it will be measured."""
        self.run.before_step(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the update that was just made."""
        self.run.after_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the profile before the rest of a checkpoint, so that one with a trainer state has it.

        Trials of a search have folders of their own, which only `FLeRMTrainer` is told.
        """
        if control.should_save and args.should_save and not state.is_hyper_param_search:
            self.save(_checkpoint(args, state))

    on_epoch_end = on_step_end

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add what was measured since the last log of training (not of an evaluation), by tensor kind."""
        logs = kwargs.get("logs") or {}
        if self._run is None or not logs.keys() & {"loss", "train_runtime"}:
            return
        measured = self._run.take_logs()
        logs.update(measured)
        if state.log_history:
            state.log_history[-1].update(measured)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the profile into a checkpoint that nothing had announced."""
        folder = _checkpoint(args, state)
        if args.should_save and folder.is_dir():
            self.save(folder)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the profile into the output folder, which is what is pushed."""
        if args.should_save:
            self.save(str(args.output_dir))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the profile into the output folder and let go of the optimizer."""
        if args.should_save:
            self.save(str(args.output_dir))
        self.run.close()
        self.run.report_unmatched()
        if not len(self.rate_profile.steps):
            reason = f"measure_steps={self.config.measure_steps} asks for none of the {state.global_step} steps"
            if self.seconds:
                reason = "every measurement failed, as warned before, or found that the step had moved nothing"
            logger.warning(f"nothing was measured: {reason}. The profile is empty.")

    def _resumed(self, args: TrainingArguments, state: TrainerState) -> RateProfile | None:
        """The profile of the checkpoint that training goes on from."""
        folder = self._resume_from or _checkpoint(args, state)
        self._resume_from = None
        if state.global_step == 0:
            return None
        profile = common_profile(
            "the checkpoint's profile",
            lambda: RateProfile.from_pretrained(folder) if (folder / PROFILE_NAME).is_file() else None,
        )
        if profile is None:
            logger.warning(f"there is no {PROFILE_NAME} in {folder}: rates are measured from step {state.global_step}.")
        return profile


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
