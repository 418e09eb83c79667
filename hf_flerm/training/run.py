"""`FLeRMRun`: records or matches a training run, with any training loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.utils.data import Dataset
from transformers.utils import logging

from ..config import FLeRMConfig, check_config
from ..engines import engine_of
from ..model.name_text import preview
from ..model.names import trainable_parameters
from ..optimizer.behavior import check_optimizer
from ..optimizer.watch import StepUpdate, StepWatch
from ..profile.common import base_profile, common_profile
from ..profile.rate_profile import PROFILE_NAME, RateProfile, RateProfileError
from ..rates.measurement import Measurement
from ..rates.model_call import Batch
from ..transfer.evidence import Evidence
from ..transfer.match_summary import MatchSummary, decision_from
from .failures import Failures
from .probe_data import ProbeData
from .provenance import warn_of_differences, with_units_of
from .recorder import Recorder
from .scaler import Scaler
from .schedule import Schedule

logger = logging.get_logger(__name__)


class FLeRMRun:
    """Records the updates of a training run on a schedule; in `match` mode also sets the learning-rate scales.

    It coordinates a `Schedule` (when to measure), a `Recorder` (measures, and keeps the profile) and a `Scaler` (sets
    the scales). An update is the change of the weights between the pre- and post-step hooks of the optimizer, so
    changes made around the step (merged adapters, pruning, averages) do not count. A failed measurement does not affect
    training.

    `FLeRMCallback` uses a `FLeRMRun`. You can also use it in a custom loop, in plain PyTorch or with Accelerate:

        run = FLeRMRun(model, optimizer, FLeRMConfig(), dataloader)
        for batch in dataloader:
            loss = model(**batch).loss
            loss.backward()
            with run.step():
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.save("base")

    Probes run inside `optimizer.step`. If your loop uses `torch.autocast`, also wrap that call in it.

    Attributes:
        steps: Optimizer steps so far, counted by `step`; steps that a gradient scaler skips count, as in a `Trainer`.
        seconds: Wall time in seconds that measuring has taken since the run was created.

    Args:
        model: The trained model, bare or wrapped by Accelerate, DDP or `torch.compile`.
        optimizer: The optimizer, bare or wrapped by Accelerate; a list of several that step different tensors, whose
            steps all belong into `with run.step()`.
        config: The options; see `FLeRMConfig`.
        dataloader: The training data loader. Probes use its data set, collate function and batch size.
        probe_dataset: Examples to probe with. None: examples of the training set.
        collate_fn: Makes model inputs, a dict, from a list of examples. None: the collate function of the data loader.
        batch_size: Examples in a training batch on one process. None: the data loader's.
        gradient_accumulation_steps: Batches per optimizer step. None: the setting of Accelerate, else 1.
        arguments: Settings of the training for the profile's metadata. None: learning rate, batch and accumulation.

    Raises:
        RateProfileError: If the profile to match cannot be loaded, or does not belong to the model.
        ValueError: If engine or optimizer are not supported, or there is no data to probe with.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: FLeRMConfig,
        dataloader: Any,
        *,
        probe_dataset: Dataset[Any] | None = None,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        batch_size: int | None = None,
        gradient_accumulation_steps: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        base = base_profile(check_config(config).profile)
        if base is not None:
            config = with_units_of(base, config)
        self._config = config = replace(config, positions=config.positions or "attention_mask")
        self._wrapped = model
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        self._engine = engine_of(model)
        self._engine.check(config.research.estimator)
        self._model = model
        self._parameters = parameters = trainable_parameters(model)
        self._followed = _trainable_names(model)
        self._watch = StepWatch(self._engine, optimizer, parameters, config.snapshot_device)
        check_optimizer(self._watch.optimizer, config.mode)

        self.steps = 0
        self.seconds = 0.0
        self._created = time.perf_counter()
        self._step = 0
        self._was_due = False
        self._failures = Failures()
        self._logs: dict[str, float] = {}
        self._saved: tuple[Path, RateProfile] | None = None
        self._scaler: Scaler | None = None
        self._schedule = Schedule(config.measure_every, config.measure_steps)
        several = isinstance(optimizer, (list, tuple))
        self._accumulation = getattr(optimizer[0] if several else optimizer, "gradient_state", None)
        accumulation = gradient_accumulation_steps or getattr(self._accumulation, "num_steps", None) or 1
        probe_data = ProbeData(config, dataloader, probe_dataset, collate_fn, batch_size, accumulation)
        with ExitStack() as if_refused:
            if_refused.callback(self.close)  # else the scaler's hooks would stay in the optimizer
            if base is not None:
                self._watch.check_own_learning_rates()
                algorithms = {name: group["optimizer"] for group in self._watch.groups for name in group["names"]}
                self._scaler = Scaler(base, model, self._watch.optimizer, self._watch.in_optimizer, algorithms, config)
            self._recorder = Recorder(
                model,
                parameters,
                self._watch.optimizer,
                self._watch.groups,
                config,
                probe_data,
                arguments,
            )
            if base is not None:
                warn_of_differences(base, self._recorder.profile)
            # After the scaler's hooks, which restore the nominal learning rates.
            self._watch.start(self._measure_update)
            if_refused.pop_all()

    @property
    def profile(self) -> RateProfile:
        """The profile so far, with the evidence for the scales in its metadata, from which a resumed run continues."""
        recorded = self._recorder.profile
        return recorded if self._scaler is None else self._scaler.recorded(recorded)

    @property
    def last_measurement(self) -> Measurement | None:
        """The latest measurement since the run was created; None before the first."""
        return self._recorder.last_measurement

    @property
    def scales(self) -> dict[str, float]:
        """`{canonical name: factor on the learning rate}`, all 1 when recording."""
        return dict.fromkeys(self._parameters, 1.0) if self._scaler is None else self._scaler.scales

    @property
    def evidence(self) -> Evidence | None:
        """The evidence for the scales; None when recording."""
        return None if self._scaler is None else self._scaler.evidence

    @property
    def summary(self) -> MatchSummary | None:
        """What matching has done so far, for instance `print(run.summary)` after training; None when recording."""
        if self._scaler is None:
            return None
        scales = self.scales
        return MatchSummary(
            f"{decision_from(scales)}, as {self._scaler.strategy.reason}",
            min(scales.values()),
            max(scales.values()),
            len(self._recorder.profile.steps),
            self.seconds,
            time.perf_counter() - self._created,
        )

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context manager around `optimizer.step()`.

        While Accelerate accumulates gradients, `optimizer.step()` does nothing, and neither does this.

        Raises:
            ValueError: If DeepSpeed makes the step, or the processes may have different numbers of batches.
        """
        self._engine.check_loop(self._wrapped)
        if self._accumulation is not None and not self._accumulation.sync_gradients:
            yield
            return
        self.before_step(self.steps)
        yield
        self.after_step()
        self.steps += 1

    def before_step(self, step: int) -> None:
        """Prepare to measure the next update, if it is due.

        Args:
            step: Number of optimizer steps before it.
        """
        steps = self._recorder.profile.steps
        self._step = step
        last = int(steps[-1]) if len(steps) else None
        is_due = not self._failures.given_up and self._schedule.is_due(step, last)
        self._was_due |= is_due
        self._watch.begin(is_due)

    def after_step(self) -> None:
        """End the step that `before_step` has begun."""
        self._watch.end()

    def resume(self, profile: RateProfile, steps: int) -> None:
        """Continue from a checkpoint's profile and scales, from the next step.

        Args:
            profile: The profile of the checkpoint.
            steps: Number of optimizer steps up to the checkpoint.

        Raises:
            RateProfileError: If checkpoint and model do not belong together.
        """
        if len(profile.steps) and profile.steps[-1] >= steps:
            raise RateProfileError(
                f"the checkpoint's profile holds step {int(profile.steps[-1])}, but training goes on from step "
                f"{steps}: it belongs to another checkpoint."
            )
        self._recorder.resume(profile, self._config)
        self.steps = steps
        if self._scaler is not None:
            self._scaler.resume(profile)

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs to continue: numbers, text and tensors.

        `accelerator.register_for_checkpointing(run)` asks for it.
        """
        profile = self.profile
        return {
            "steps": self.steps,
            "profile": {name: getattr(profile, name) for name in ("steps", "rates", "metadata", "joint_rates")},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; see `resume`. A collective call.

        Raises:
            RateProfileError: If checkpoint and model do not belong together.
        """
        profile = common_profile("the checkpoint's profile", lambda: RateProfile(**state["profile"]))
        if profile is not None:
            self.resume(profile, state["steps"])

    def take_logs(self) -> dict[str, float]:
        """Return the log entries since the last call; see `FLeRMConfig.log_by`."""
        logs, self._logs = self._logs, {}
        return logs

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the profile so far into a folder, which is created if needed.

        If that fails it warns, once, and training goes on.
        """
        file = Path(directory, PROFILE_NAME)
        if self._saved == (file, self._recorder.profile) and file.is_file():
            return
        try:
            self.profile.save_pretrained(directory)
            self._saved = file, self._recorder.profile
        except (OSError, RateProfileError) as error:
            self._failures.warn_once(
                "save", f"the profile so far could not be written and will be tried at every save: {error}"
            )

    def close(self) -> None:
        """Release the optimizer and all weights, and stop measuring; the profile stays."""
        self._failures.given_up = True
        self._watch.close()
        if self._scaler is not None:
            self._scaler.remove()

    def report(self) -> None:
        """At the end of training, log the summary of a matched run; warn of unscaled tensors and an empty profile."""
        if self._scaler is not None:
            logger.info(f"matching has ended: {self.summary}")
            self._scaler.report_unmatched()
        if len(self._recorder.profile.steps):
            return
        reason = f"measure_steps={self._config.measure_steps} asks for none of its steps."
        if self._failures.latest:
            reason = f"every measurement failed, the last one with {self._failures.latest}"
        elif self.seconds:
            reason = "no scheduled step changed the weights: the learning rate was 0, or steps were skipped."
        elif self._was_due:
            reason = (
                f"no scheduled step reached {type(self._watch.optimizer).__name__}: steps were skipped, or another "
                "function was called in the place of its step()."
            )
        logger.warning(f"nothing was measured in this run, and its profile is empty: {reason}")

    def _measure_update(self) -> None:
        """Measure the latest update; report a failure."""
        start = time.perf_counter()
        update = None
        self._warn_of_unfrozen()
        try:
            update = self._watch.take_update(self.scales)
            self._measure(self._step, update)
        except Exception as error:
            self._failures.add(self._step, error)
        finally:
            if update is not None:
                update.attempt.failure = None  # its traceback would keep the tensors of the probe alive
            self.seconds += time.perf_counter() - start
            self._logs["flerm/seconds"] = self.seconds

    def _warn_of_unfrozen(self) -> None:
        """Warn of tensors that became trainable after training had begun: they have no place in the profile."""
        unfrozen = sorted(_trainable_names(self._model) - self._followed)
        if unfrozen:
            self._failures.warn_once(
                "unfrozen",
                f"{preview(unfrozen)} became trainable after training had begun: they are neither measured nor scaled. "
                "Make every tensor trainable that will be trained before training begins, and freeze the others after "
                "that. Of two adapters with the same parameter names only one can be trained.",
            )

    def _measure(self, step: int, update: StepUpdate) -> None:
        """Record an update (draw batches, probe, sum over processes, append to the profile), then set the scales."""
        matched = [] if self._scaler is None else self._scaler.combinations
        measurement = self._recorder.record(step, update, matched)
        if measurement is None:
            return
        self._failures.clear()
        self._logs |= self._recorder.logs(measurement)
        if self._scaler is not None:
            update.rescale(self._scaler.update(step, measurement, update.nominal_rate))
            self._failures.warn_once("limit", self._scaler.at_limit())
            scales = self.scales
            self._logs |= self._recorder.by_kind("scale", scales)
            self._logs |= {
                "flerm/smallest_scale": min(scales.values()),
                "flerm/largest_scale": max(scales.values()),
            }


def _trainable_names(model: nn.Module) -> frozenset[str]:
    """Names in `named_parameters()`, which two adapters do not share."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
