"""`FLeRMCallback`: when to snapshot, measure, match, log and save; the only room that knows the Trainer's events."""

from __future__ import annotations

import math
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .config import FLeRMConfig
from .mapping import joint_groups, map_profile
from .matching import Evidence
from .measurement import UNUSED, Measurement
from .names import means_by_kind, preview, tensor_kinds, trainable_parameters
from .optimizer import StepScales, learning_rates, raw_optimizer
from .optimizer_table import check_optimizer, weight_decays
from .outputs import Outputs
from .probe_data import ProbeData
from .probes import RateProbe
from .provenance import provenance
from .rate_profile import PROFILE_NAME, RateProfile, RateProfileError, check_names
from .updates import Snapshot

logger = logging.get_logger(__name__)
_EVIDENCE = "matching"


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

    Attributes:
        scales: `{canonical name: factor on the learning rate}`, all 1 when recording.
        last_measurement: The latest measurement.
        seconds: Wall time that measuring has taken in this training.

    Args:
        config: What to measure, when, and what to do with it.
        probe_dataset: Examples to probe with. None: the training set's, drawn by the callback's own generator.

    Raises:
        RateProfileError: If the profile to match cannot be loaded.
    """

    def __init__(self, config: FLeRMConfig, probe_dataset: Dataset[Any] | None = None) -> None:
        self.config = config
        self.probe_dataset = probe_dataset
        self.base = RateProfile.from_pretrained(config.profile) if config.profile is not None else None
        self.last_measurement: Measurement | None = None
        self.scales: dict[str, float] = {}
        self.seconds = 0.0
        self._failure_reported = False
        self._held_reported = False
        self._owed = False
        self._resume_from: Path | None = None
        self._recorded: RateProfile | None = None
        self._pending_logs: dict[str, float] = {}
        self._before: Snapshot | None = None
        self._step_scales: StepScales | None = None

    @property
    def rate_profile(self) -> RateProfile:
        """The rates that this run has measured so far.

        Raises:
            RateProfileError: If training has not begun.
        """
        if self._recorded is None:
            raise RateProfileError("nothing is recorded yet: call train() first.")
        return self._recorded

    @property
    def evidence(self) -> Evidence:
        """What was measured of the scales so far, in `match` mode."""
        return self._evidence

    def resume_from(self, checkpoint: str | os.PathLike[str]) -> None:
        """Continue the profile of a checkpoint when training begins.

        Args:
            checkpoint: A `checkpoint-N` folder.
        """
        self._resume_from = Path(checkpoint)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the profile so far beside a checkpoint; nothing if training has not begun.

        A profile that has become too large for its file is no reason to end a training: it warns.

        Args:
            directory: The folder.
        """
        try:
            if self._recorded is not None:
                self._recorded.save_pretrained(directory)
        except RateProfileError as error:
            logger.warning(f"{directory} has no profile of the steps so far: {error}")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything that can be wrong, before the first step."""
        model: nn.Module = kwargs["model"]
        self._model = model
        self._parameters = trainable_parameters(model)
        self._kinds = tensor_kinds(model)
        self._optimizer = raw_optimizer(kwargs["optimizer"])
        learning_rates(self._optimizer, self._parameters)
        check_optimizer(self._optimizer, self.config.mode)
        self._probe_data = ProbeData(self.config, args, kwargs.get("train_dataloader"), self.probe_dataset)
        outputs = Outputs(self.config.output, self.config.positions, self.config.metric)
        self._probe = RateProbe(
            model,
            estimator=self.config.estimator,
            probes_per_batch=self.config.probes_per_batch,
            outputs=outputs,
        )
        self._groups = joint_groups(model, self._parameters)
        self._recorded = self._resumed(args, state) or RateProfile(
            [],
            {name: [] for name in self._parameters},
            self._provenance(args),
            {granularity: {path: [] for path in groups} for granularity, groups in self._groups.items()},
        )
        self._before = None
        self._pending_logs = {}
        self._held_reported = False
        self._owed = False
        self._failure_reported = False
        self.last_measurement = None
        self.seconds = 0.0
        if self._step_scales is not None:
            self._step_scales.remove()
            self._step_scales = None
        self.scales = dict.fromkeys(self._parameters, 1.0)
        if self.base is not None:
            self._check_base(self.base)
            self._mapped = map_profile(
                self.base,
                model,
                granularity=self.config.granularity,
                depth=self.config.depth,
                unmatched=self.config.unmatched,
            )
            self._evidence = Evidence.recorded(self._recorded.metadata.get(_EVIDENCE), self._mapped)
            self._step_scales = StepScales(self._optimizer, self._parameters)
            self._set_scales(self._step_scales)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the weights from before the update, if it will be measured."""
        if self.config.measures_at(state.global_step) or self._owed:
            self._before = None  # a step that was cut short has left its own
            self._before = Snapshot(self._parameters, self.config.snapshot_device)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the update that was just made; a probe that fails leaves the training as it was."""
        if self._before is None:
            return
        before, self._before = self._before, None
        start = time.perf_counter()
        try:
            self._measure(before, state.global_step)
        except Exception as error:
            if not self._failure_reported:
                self._failure_reported = True
                logger.warning(
                    f"a measurement failed at step {state.global_step}; training goes on as it would have without it, "
                    f"and further failures are not reported: {error!r}",
                    exc_info=True,
                )
        finally:
            self.seconds += time.perf_counter() - start
            self._pending_logs["flerm/seconds"] = self.seconds

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add what was measured since the last log of training (not of an evaluation), by tensor kind."""
        logs = kwargs.get("logs") or {}
        if not self._pending_logs or not logs.keys() & {"loss", "train_runtime"}:
            return
        logs.update(self._pending_logs)
        if state.log_history:
            state.log_history[-1].update(self._pending_logs)
        self._pending_logs = {}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the profile into the checkpoint; `FLeRMTrainer` has done so already."""
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir():
            self.save(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the profile into the output folder and let go of the optimizer."""
        if args.should_save:
            self.save(str(args.output_dir))
        if self._step_scales is not None:
            self._step_scales.remove()
            self._step_scales = None
        if self.base is not None:
            self._report_unmatched()

    def _report_unmatched(self) -> None:
        """Warn of what kept its learning rate because base and target never both had a positive rate."""
        seen = self._evidence.logs.isfinite().any(0).tolist()
        left = [unit for unit, known in zip(self._evidence.units, seen, strict=True) if not known]
        if self.config.unmatched == "nominal":
            left += self._mapped.unmatched
        if left:
            logger.warning(
                f"the learning rates of {preview(left)} were not scaled: they have no rate, or only 0, in the profile "
                "or in this run."
            )

    def _measure(self, before: Snapshot, step: int) -> None:
        nominal = learning_rates(self._optimizer, self._parameters)
        used = {name: rate * self.scales[name] for name, rate in nominal.items()}
        self._owed = not any(used.values()) or not before.moved()
        if self._owed:
            return  # warm-up at learning rate 0, or a step that was skipped: the next one will do
        random_numbers = random.Random(f"{self.config.seed} {step}")
        device = next(iter(self._parameters.values())).device
        generator = torch.Generator(device).manual_seed(random_numbers.getrandbits(63))
        decays = {n: nominal[n] * decay for n, decay in weight_decays(self._optimizer, self._parameters).items()}
        with before.put_back(used, decays) as updates:
            batches = self._probe_data.batches(random_numbers)
            target_error = self.config.target_error if self.config.probes == "auto" else None
            measurement = self._probe.measure(updates, batches, generator, target_error=target_error)
        broken = [name for name, rate in measurement.rates.items() if not math.isfinite(rate)]
        if broken:
            raise ValueError(f"the measured rates of {preview(broken)} are not finite.")
        self._report_unused(measurement)
        self.last_measurement = measurement
        self._recorded = self.rate_profile.appended(step, measurement.rates, self._joint_rates(measurement))
        self._pending_logs.update(means_by_kind("flerm/rate", measurement.rates, self._kinds))
        self._pending_logs["flerm/rate/total"] = measurement.total
        if self.base is not None and self._step_scales is not None:
            old = self.scales
            weight = max(nominal.values())
            self._evidence = self._evidence.appended(step, self._mapped, measurement, weight).estimated(
                self._mapped,
                pool=self.config.pool,
                beta=self.config.beta,
                max_scale=self.config.max_scale,
                max_change=self.config.max_change,
            )
            self._recorded.metadata[_EVIDENCE] = self._evidence.record()
            self._report_held()
            self._set_scales(self._step_scales)
            self._pending_logs.update(means_by_kind("flerm/scale", self.scales, self._kinds))
            ratios = {name: scale / old[name] for name, scale in self.scales.items() if scale != old[name]}
            before.rescale(ratios, decays)

    def _report_unused(self, measurement: Measurement) -> None:
        """Warn once of tensors that take no part in the outputs, so that a rate of 0 is no riddle."""
        unused = [name for name, estimator in measurement.estimators.items() if estimator == UNUSED]
        if unused and self.last_measurement is None:
            logger.warning(f"{preview(unused)} took no part in the outputs of the first measurement: their rate is 0.")

    def _report_held(self) -> None:
        """Warn once of scales that would have gone further than they may."""
        held = self._evidence.held(self.config.max_scale)
        if held and not self._held_reported:
            self._held_reported = True
            logger.warning(
                f"the learning-rate scales of {preview(held)} are held at max_scale = {self.config.max_scale:g}: "
                "base and target may not be comparable, or the learning rate is far off."
            )

    def _joint_rates(self, measurement: Measurement) -> dict[str, dict[str, float]]:
        """Joint rates by module, by block and of everything."""
        found = {}
        for granularity, groups in self._groups.items():
            joint = measurement.joint_rates({path: dict.fromkeys(names, 1.0) for path, names in groups.items()})
            found[granularity] = {path: rate for path, (rate, _) in joint.items()}
        return found

    def _set_scales(self, step_scales: StepScales) -> None:
        logs = dict(zip(self._evidence.units, self._evidence.scales.tolist(), strict=True))
        self.scales = step_scales.scales = self._mapped.tensor_scales(logs)

    def _check_base(self, base: RateProfile) -> None:
        recorded = base.metadata.get("flerm", {})
        for name, value in self._function().items():
            if recorded.get(name, value) != value:
                raise RateProfileError(
                    f"the profile was recorded with {name}={recorded[name]!r}, this run has {value!r}: "
                    "their rates cannot be compared. Use the profile's."
                )
        if not len(base.steps):
            raise RateProfileError("the profile holds no step: its run ended before its first measurement.")

    def _resumed(self, args: TrainingArguments, state: TrainerState) -> RateProfile | None:
        """The profile of the checkpoint that training goes on from."""
        folder = self._resume_from or Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        self._resume_from = None
        if state.global_step == 0 or not (folder / PROFILE_NAME).is_file():
            return None
        profile = RateProfile.from_pretrained(folder)
        check_names(profile.rates, self._parameters, "the checkpoint's profile", "the model")
        return profile

    def _function(self) -> dict[str, str]:
        output = self.config.output
        return {
            "output": "callable" if callable(output) else output or "logits",
            "positions": self.config.positions,
            "metric": self.config.metric,
        }

    def _provenance(self, args: TrainingArguments) -> dict[str, Any]:
        settings = {
            "mode": self.config.mode,
            "estimator": self.config.estimator,
            **self._function(),
            "probes": self._probe_data.num_batches,
            "probes_per_batch": self.config.probes_per_batch,
            "probe_batch_size": self._probe_data.batch_size,
            "seed": self.config.seed,
        }
        kinds = {name: self._kinds[name] for name in self._parameters}
        return {
            **provenance(self._model, self._parameters, self._optimizer, args),
            "flerm": settings,
            "kinds": kinds,
            "dataset_fingerprint": self._probe_data.fingerprint,
        }
