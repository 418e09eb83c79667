"""`FLeRMRun`: one training that is recorded or matched, step by step; it knows of no Trainer."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from transformers.utils import logging

from .config import FLeRMConfig
from .distributed import Pool, check_engine, check_same
from .mapping import joint_groups, map_profile
from .matching import Evidence
from .measurement import UNUSED, Measurement
from .names import means_by_kind, preview, tensor_kinds, trainable_parameters
from .optimizer import StepScales, learning_rates, raw_optimizer
from .optimizer_table import check_optimizer, weight_decays
from .outputs import Outputs
from .probe_data import ProbeData
from .probes import RateProbe
from .provenance import base_identity, check_units, measuring_settings
from .rate_profile import PROFILE_NAME, RateProfile, RateProfileError, check_names
from .updates import Snapshot
from .zero import stepping

logger = logging.get_logger(__name__)
_EVIDENCE = "matching"
_FAILURES_IN_A_ROW = 3


class FLeRMRun:
    """Measures the updates of a training when they are due, and in `match` mode sets the scales.

    A measurement is due if the schedule has asked for one since the last that was made: what could not be measured (the
    learning rate was 0, the step was skipped, a probe failed) is made up for at the next step, and a training that goes
    on from a checkpoint asks for no more than that. A probe that runs out of memory is tried again with half the
    examples at a time. Whatever fails leaves the training as it would have been without it.

    Attributes:
        scales: `{canonical name: factor on the learning rate}`, all 1 when recording.
        evidence: What was measured of the scales so far; None when recording.
        last_measurement: The latest measurement, in this session.
        seconds: Wall time that measuring has taken in this session.

    Args:
        model: What is trained.
        optimizer: What steps, as Accelerate has prepared it.
        config: What to measure, when, and what to do with it.
        probe_data: The examples to probe with.
        provenance: Where the rates come from, for the profile's metadata.
        base: The profile to match, in `match` mode.
        resumed: The profile of the checkpoint that training goes on from.

    Raises:
        RateProfileError: If base, checkpoint and model do not belong together.
        ValueError: If the optimizer cannot be followed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: FLeRMConfig,
        probe_data: ProbeData,
        *,
        provenance: Mapping[str, Any],
        base: RateProfile | None = None,
        resumed: RateProfile | None = None,
    ) -> None:
        check_engine(model, config.estimator)
        self.last_measurement: Measurement | None = None
        self.seconds = 0.0
        self._config = config
        self._optimizer = raw_optimizer(optimizer)
        self._probe_data = probe_data
        self._parameters = trainable_parameters(model)
        self._kinds = tensor_kinds(model)
        self._logged_as = self._kinds if config.log_by == "kind" else {name: name for name in self._kinds}
        self._stepping = stepping(model, optimizer, self._parameters)
        learning_rates(self._optimizer, self._stepping.held)
        check_optimizer(self._optimizer, config.mode)
        outputs = Outputs(config.output, config.positions, config.metric)
        self._probe = RateProbe(
            model, estimator=config.estimator, probes_per_batch=config.probes_per_batch, outputs=outputs
        )
        self._groups = joint_groups(model, self._parameters)
        self._profile = self._begun(provenance, resumed)
        self._before: Snapshot | Exception | None = None
        self._step = 0
        self._logs: dict[str, float] = {}
        self._failures = 0
        self._off = False
        self._reported: set[str] = set()
        self._saved: tuple[Path, RateProfile] | None = None
        self._step_scales: StepScales | None = None
        self.scales = dict.fromkeys(self._parameters, 1.0)
        self.evidence: Evidence | None = None
        asked: list[Mapping[str, float]] = [group for groups in self._groups.values() for group in groups.values()]
        if base is not None:
            self._match(base, model, resumed.metadata.get(_EVIDENCE) if resumed is not None else None)
            asked += [unit.shares for unit in self._mapped.measured_units.values()]
        check_same("the profile", self.profile, base)
        self._pool = Pool(self._parameters, config.estimator, asked)

    @property
    def profile(self) -> RateProfile:
        """The rates so far, with what a resumed run needs to know of its scales."""
        if self.evidence is None or not self.evidence.steps:
            return self._profile
        metadata = {**self._profile.metadata, _EVIDENCE: {**self._base, **self.evidence.record()}}
        return RateProfile(self._profile.steps, self._profile.rates, metadata, self._profile.joint_rates)

    def before_step(self, step: int) -> None:
        """Keep the weights from before an update, if a measurement is due.

        Args:
            step: Optimizer steps that were made before.
        """
        self._before = None  # a step that was cut short has left its own
        self._step = step
        if not self._off and self._due(step):
            try:
                self._before = self._stepping.snapshot(self._config.snapshot_device)
            except Exception as error:  # which all processes hear of when they put together what they measured
                self._before = error

    def after_step(self) -> None:
        """Measure the update that was just made, if its step was kept; in `match` mode redo it at the new scales."""
        if self._before is None:
            return
        before, self._before = self._before, None
        start = time.perf_counter()
        try:
            self._measure(before)
        except Exception as error:
            self._failed(error)
        finally:
            self.seconds += time.perf_counter() - start
            self._logs["flerm/seconds"] = self.seconds

    def take_logs(self) -> dict[str, float]:
        """Hand over what was measured since the last call, by kind of tensor or by tensor (`FLeRMConfig.log_by`).

        Returns:
            `{metric: value}`.
        """
        logs, self._logs = self._logs, {}
        return logs

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the profile so far into a folder; if that fails it warns, once, and training goes on.

        Args:
            directory: The folder; made if it is not there.
        """
        file = Path(directory, PROFILE_NAME)
        if self._saved is not None and self._saved[0] == file and self._saved[1] is self._profile and file.is_file():
            return
        try:
            self.profile.save_pretrained(directory)
            self._saved = file, self._profile
        except (OSError, RateProfileError) as error:
            self._warn_once("save", f"the profile so far could not be written and will be tried at every save: {error}")

    def close(self) -> None:
        """Let go of the optimizer and of all weights; the profile stays."""
        self._before = None
        if self._step_scales is not None:
            self._step_scales.remove()
            self._step_scales = None

    def report_unmatched(self) -> None:
        """Warn of what kept its learning rate because base and target never both had a positive rate."""
        if self.evidence is None:
            return
        seen = self.evidence.logs.isfinite().any(0).tolist()
        left = [unit for unit, known in zip(self.evidence.units, seen, strict=True) if not known]
        if self._config.unmatched == "nominal":
            left += self._mapped.unmatched
        if left:
            logger.warning(
                f"the learning rates of {preview(left)} were not scaled: they have no rate, or only 0, in the profile "
                "or in this run."
            )

    def _begun(self, provenance: Mapping[str, Any], resumed: RateProfile | None) -> RateProfile:
        """An empty profile, or the checkpoint's under this run's provenance."""
        settings = measuring_settings(self._config, self._probe_data)
        metadata = {**provenance, "flerm": settings, "kinds": {name: self._kinds[name] for name in self._parameters}}
        if resumed is None:
            return RateProfile(
                [],
                {name: [] for name in self._parameters},
                metadata,
                {granularity: {path: [] for path in groups} for granularity, groups in self._groups.items()},
            )
        check_names(resumed.rates, self._parameters, "the checkpoint's profile", "the model")
        check_units(resumed, self._config, "the checkpoint's profile")
        recorded = resumed.metadata.get("flerm", {})
        changed = [key for key, value in settings.items() if recorded.get(key, value) != value]
        if changed:
            was, now = ({key: values[key] for key in changed} for values in (recorded, settings))
            logger.warning(f"the profile was measured with {was} up to the checkpoint, and is with {now} from here on.")
        return RateProfile(resumed.steps, resumed.rates, metadata, resumed.joint_rates)

    def _match(self, base: RateProfile, model: nn.Module, record: Mapping[str, Any] | None) -> None:
        check_units(base, self._config, "the profile")
        if not len(base.steps):
            raise RateProfileError("the profile holds no step: its run ended before its first measurement.")
        self._mapped = map_profile(
            base,
            model,
            granularity=self._config.granularity,
            depth=self._config.depth,
            unmatched=self._config.unmatched,
        )
        self._base = base_identity(base)
        if record is not None and record.get("base") != self._base["base"]:
            logger.warning("the checkpoint was matched to another profile: its scales are forgotten.")
            record = None
        self.evidence = Evidence.recorded(record, self._mapped)
        self._stepping.check_apart()
        self._step_scales = StepScales(self._optimizer, self._stepping.held)
        self._set_scales(self.evidence, self._step_scales)

    def _due(self, step: int) -> bool:
        asked = self._config.last_asked(step)
        measured = self._profile.steps[-1:].tolist()
        return asked is not None and (not measured or asked > measured[0])

    def _measure(self, before: Snapshot | Exception) -> None:
        nominal = learning_rates(self._optimizer, self._stepping.held)
        used = {name: rate * self.scales[name] for name, rate in nominal.items()}
        if not any(used.values()):
            return  # warm-up: the next step will do
        decays = {n: nominal[n] * d for n, d in weight_decays(self._optimizer, self._stepping.stepped()).items()}
        measurement = self._pool.measurement(lambda: self._probed(before, used, decays))
        if measurement is None or isinstance(before, Exception):
            return
        broken = [name for name, rate in measurement.rates.items() if not math.isfinite(rate)]
        if broken:
            raise ValueError(f"the measured rates of {preview(broken)} are not finite.")
        self._report_unused(measurement)
        self._failures = 0
        self.last_measurement = measurement
        self._profile = self._profile.appended(self._step, measurement.rates, self._joint_rates(measurement))
        self._log("rate", measurement.rates)
        self._log("relative_error", measurement.relative_errors)
        self._logs["flerm/rate/total"] = measurement.total
        if self.evidence is not None and self._step_scales is not None:
            old = self.scales
            self.evidence = self.evidence.appended(
                self._step, self._mapped, measurement, max(nominal.values())
            ).estimated(
                self._mapped,
                pool=self._config.pool,
                beta=self._config.beta,
                max_scale=self._config.max_scale,
                max_change=self._config.max_change,
            )
            self._report_held(self.evidence)
            self._set_scales(self.evidence, self._step_scales)
            self._log("scale", self.scales)
            ratios = {name: scale / old[name] for name, scale in self.scales.items() if scale != old[name]}
            before.rescale(ratios, decays)

    def _probed(
        self, before: Snapshot | Exception, used: Mapping[str, float], decays: Mapping[str, float]
    ) -> Measurement | None:
        """Probe, with fewer examples at a time if memory does not suffice; None if the step was skipped."""
        device = next(iter(self._parameters.values())).device
        moved = isinstance(before, Snapshot) and before.moved()
        failed, moved = self._stepping.agree([isinstance(before, Exception), moved])
        if isinstance(before, Exception):
            raise before
        if failed or not moved:
            return None
        with before.put_back(used, decays) as updates:
            while True:
                batches, generator = self._probe_data.drawn(self._step, device)
                try:
                    return self._probe.measure(updates, batches, generator, target_error=self._probe_data.target_error)
                except Exception as error:
                    if not should_reduce_batch_size(error) or not self._probe_data.halve():
                        raise
                clear_device_cache(garbage_collection=True)

    def _failed(self, error: Exception) -> None:
        if should_reduce_batch_size(error):
            self._off = True
            logger.warning(
                f"memory does not suffice for a measurement at step {self._step}, with one example at a time either: "
                f"nothing more is measured, training goes on. snapshot_device='cpu' needs less. {error}"
            )
            return
        self._failures += 1
        self._off = self._failures >= _FAILURES_IN_A_ROW
        if self._off:
            logger.warning(f"{self._failures} measurements failed in a row: nothing more is measured. {error!r}")
        elif "failure" not in self._reported:
            self._reported.add("failure")
            logger.warning(
                f"a measurement failed at step {self._step}; training goes on as it would have without it, "
                f"and it is tried again at the next step: {error!r}",
                exc_info=error,
            )

    def _report_unused(self, measurement: Measurement) -> None:
        """Warn once of tensors that take no part in the outputs, so that a rate of 0 is no riddle."""
        unused = [name for name, estimator in measurement.estimators.items() if estimator == UNUSED]
        if unused and self.last_measurement is None:
            logger.warning(f"{preview(unused)} took no part in the outputs of the first measurement: their rate is 0.")

    def _report_held(self, evidence: Evidence) -> None:
        """Warn once of scales that would have gone further than they may."""
        held = evidence.held(self._config.max_scale)
        if held:
            self._warn_once(
                "held",
                f"the learning-rate scales of {preview(held)} are held at max_scale = {self._config.max_scale:g}: "
                "base and target may not be comparable, or the learning rate is far off.",
            )

    def _log(self, what: str, values: Mapping[str, float]) -> None:
        self._logs.update(means_by_kind(f"flerm/{what}", values, self._logged_as))

    def _warn_once(self, about: str, message: str) -> None:
        if about not in self._reported:
            self._reported.add(about)
            logger.warning(message)

    def _joint_rates(self, measurement: Measurement) -> dict[str, dict[str, float]]:
        """Joint rates by module, by block and of everything."""
        found = {}
        for granularity, groups in self._groups.items():
            joint = measurement.joint_rates(groups)
            found[granularity] = {path: rate for path, (rate, _) in joint.items()}
        return found

    def _set_scales(self, evidence: Evidence, step_scales: StepScales) -> None:
        logs = dict(zip(evidence.units, evidence.scales.tolist(), strict=True))
        self.scales = step_scales.scales = self._mapped.tensor_scales(logs)
