"""`FLeRMCallback`: a `FLeRMRun` driven by the events of a `Trainer`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..config import FLeRMConfig, check_config
from ..engines.processes import are_several
from ..profile.common import base_profile, common_profile
from ..profile.rate_profile import PROFILE_NAME, RateProfile, RateProfileError
from ..rates.measurement import Measurement
from ..transfer.evidence import Evidence
from .console import line_of, show_all_but_on_console
from .provenance import with_units_of
from .run import FLeRMRun
from .trl_tasks import trl_task

logger = logging.get_logger(__name__)


class FLeRMCallback(TrainerCallback):
    """Records function-space learning rates on any `Trainer`, or matches them to a profile.

    At a measured step it copies the weights, lets the optimizer step, gives the model its old weights for the probes,
    and then the new ones. Weights are swapped, so no bit changes. In `match` mode the measured step is then redone with
    the new scales.

    Rates are per unit of the learning rate in the optimizer's param groups. Decoupled weight decay (AdamW, Lion, Muon)
    is not part of the rates and is not scaled, so matching does not change weight decay. Weight decay that is added to
    the gradient (SGD, Adam) is part of the update, and so is any decay of optimizer classes that are not in
    `hf_flerm.optimizer.behavior.TABLE`. An optimizer in the table whose update is not linear in the learning rate is
    refused before the first step. An optimizer that is not in the table is taken to be linear.

    A run that resumes from a checkpoint continues its profile and its scales. `FLeRMTrainer` reads them from the
    checkpoint it is given; the callback alone reads them from `checkpoint-N` in the output folder.

    Args:
        config: The options; see `FLeRMConfig`.
        probe_dataset: Examples to probe with. None: examples of the training set.

    Raises:
        RateProfileError: If the profile to match cannot be loaded. Several processes load it when training begins, and
            then raise the error together.
        ValueError: If `config` is not an `FLeRMConfig`.
    """

    def __init__(self, config: FLeRMConfig, probe_dataset: Dataset[Any] | None = None) -> None:
        self.config = check_config(config)
        self.probe_dataset = probe_dataset
        self.base: RateProfile | None = None
        if config.profile is not None and not are_several():  # several processes load it together later
            self.base = RateProfile.from_pretrained(config.profile)
        self._resume_from: Path | None = None
        self._run: FLeRMRun | None = None

    @property
    def run(self) -> FLeRMRun:
        """The run of the current or latest call of `train`.

        Raises:
            RateProfileError: If training has not begun.
        """
        if self._run is None:
            raise RateProfileError("nothing is recorded yet: call train() first.")
        return self._run

    @property
    def has_begun(self) -> bool:
        """Whether training has begun, so that there is a profile."""
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
        """The evidence for the scales, in `match` mode.

        Raises:
            RateProfileError: In `record` mode.
        """
        if self.run.evidence is None:
            raise RateProfileError("mode 'record' has no evidence for scales; use mode='match'.")
        return self.run.evidence

    @property
    def last_measurement(self) -> Measurement | None:
        """The latest measurement of this run."""
        return self._run.last_measurement if self._run is not None else None

    @property
    def seconds(self) -> float:
        """Wall time in seconds that measuring has taken in this run."""
        return self._run.seconds if self._run is not None else 0.0

    def add_to(self, trainer: Trainer) -> None:
        """Add this callback to a trainer that exists, so that trackers get an entry for each kind of tensor.

        With `callbacks=[FLeRMCallback(...)]`, `Trainer` calls the trackers of `report_to` before this callback, so they
        get none of its entries. `FLeRMTrainer` and `FLeRMMixin` call this method.

        Args:
            trainer: The trainer. Its console shows the joint rate, the range of the scales and the time.
        """
        show_all_but_on_console(trainer, self)

    def resume_from(self, checkpoint: str | os.PathLike[str]) -> None:
        """Continue the profile of a checkpoint when training begins.

        Args:
            checkpoint: A `checkpoint-N` folder.
        """
        self._resume_from = Path(checkpoint)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the profile so far into a folder, if training has begun.

        If that fails, for instance because the disk is full, it warns and training goes on; the next save tries again.
        """
        if self._run is not None:
            self._run.save(directory)

    def close(self) -> None:
        """Release the optimizer and all weights; call it if an exception has ended the training."""
        if self._run is not None:
            self._run.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Create the run, which checks model, optimizer, data and profile, and resume it from a checkpoint."""
        self.close()
        resumed = self._resumed(args, state)
        model, dataloader = kwargs["model"], kwargs.get("train_dataloader")
        task = trl_task(args, model, dataloader, kwargs.get("processing_class"))
        base = self.base or base_profile(self.config.profile)
        # A matched run measures the positions of its base, which the task's do not override.
        config = self.config if base is None else with_units_of(base, self.config)
        positions = config.positions or (None if callable(config.output) else task.positions)
        run = FLeRMRun(
            model,
            kwargs["optimizer"],
            replace(config, profile=base, positions=positions),
            dataloader,
            probe_dataset=self.probe_dataset,
            collate_fn=task.collate_fn,
            batch_size=(args.auto_find_batch_size and state.train_batch_size) or args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            arguments=args.to_dict()
            | {"max_steps": state.max_steps, "warmup_steps": args.get_warmup_steps(state.max_steps)},
        )
        if resumed is not None:
            try:
                run.resume(resumed, state.global_step)
            except BaseException:
                run.close()
                raise
        self._run = run

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Announce an optimizer step to the run."""
        self.run.before_step(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report to the run that the optimizer has stepped."""
        self.run.after_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the profile before the rest of a checkpoint, so that every complete checkpoint has one.

        Not in a hyperparameter search: a callback does not know the folder of a trial.
        """
        if control.should_save and args.should_save and not state.is_hyper_param_search:
            self.save(_checkpoint(args, state))

    on_epoch_end = on_step_end

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the measurements since the last log to a training log; evaluation logs are not changed.

        The log history gets all entries. Callbacks after this one see the few that the console shows; see `add_to`.
        The last log, which has the run time, also gets the summary of a matched run: transformers shows warnings but no
        messages of the level INFO, unless told otherwise, whereas everybody sees this log.
        """
        logs = kwargs.get("logs") or {}
        if self._run is None or not logs.keys() & {"loss", "train_runtime"}:
            return
        measured = self._run.take_logs()
        if "train_runtime" in logs and self._run.summary is not None:
            measured |= self._run.summary.logs()
        logs.update(line_of(measured))
        if state.log_history:
            state.log_history[-1].update(measured)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the profile into a checkpoint that `on_step_end` did not know about."""
        folder = _checkpoint(args, state)
        if args.should_save and folder.is_dir():
            self.save(folder)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the profile into the output folder, which is pushed to the Hub."""
        if args.should_save:
            self.save(str(args.output_dir))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the profile into the output folder and release the optimizer."""
        if args.should_save:
            self.save(str(args.output_dir))
        self.run.close()
        self.run.report()

    def _resumed(self, args: TrainingArguments, state: TrainerState) -> RateProfile | None:
        """Read the profile of the checkpoint that training resumes from; None if it has none."""
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
