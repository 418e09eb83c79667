"""`Recorder`: the measurement of one optimizer step, from probe batches to a new row of the profile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging

from ..model.names import means_by_kind, preview
from ..optimizer.step_update import StepUpdate
from ..profile.rate_profile import RateProfile
from ..rates.measurement import UNUSED, Measurement
from ..rates.probe import RateProbe
from ..rates.process_sum import ProcessSum
from .failures import Attempt
from .probe_data import ProbeData

logger = logging.get_logger(__name__)

Shares = Mapping[str, float]  # {canonical name: share of its update}


class Recorder:
    """Measures optimizer steps and keeps their rates.

    Attributes:
        profile: The rates so far.
        last_measurement: The latest measurement; None before the first.

    Args:
        profile: The profile to append to.
        probe: Measures on the model.
        probe_data: Examples to probe with.
        device: Where the model runs.
        shapes: `{canonical name: shape of Z = U * G}` of all that is trained.
        joint_groups: Tensors whose joint rates are recorded: `{granularity: {path: shares}}`.
        matched_groups: Further tensors whose joint rates will be asked of measurements.
        logged_as: `{canonical name: name in the logs}`.
    """

    def __init__(
        self,
        profile: RateProfile,
        probe: RateProbe,
        probe_data: ProbeData,
        device: torch.device,
        shapes: Mapping[str, torch.Size],
        joint_groups: Mapping[str, Mapping[str, Shares]],
        matched_groups: Iterable[Shares],
        logged_as: Mapping[str, str],
    ) -> None:
        self.profile = profile
        self.last_measurement: Measurement | None = None
        self._probe = probe
        self._probe_data = probe_data
        self._device = device
        self._joint_groups = joint_groups
        self._logged_as = logged_as
        groups = [shares for paths in joint_groups.values() for shares in paths.values()]
        self._sum_over_processes = ProcessSum(shapes, probe.estimator, [*groups, *matched_groups])

    def record(self, step: int, update: StepUpdate | None, attempt: Attempt) -> Measurement | None:
        """Measure the update of one optimizer step and append its rates to the profile; a collective call.

        Args:
            step: The optimizer step.
            update: What it did to the weights; None if `attempt` has failed before.
            attempt: Keeps this process in the collective calls if something fails here.

        Returns:
            The measurement of all processes together; None if the step moved nothing, on any of them.

        Raises:
            Exception: On every process, if the measurement failed on one; see `ProcessSum`.
        """
        own = None
        if update is not None and attempt.run(update.moved):
            own = attempt.run(partial(self._probed, step, update))
        measurement = self._sum_over_processes(own, attempt.failure)
        if measurement is None:
            return None
        self._check(measurement)
        joint = {granularity: measurement.joint_rates(paths) for granularity, paths in self._joint_groups.items()}
        joint_rates = {by: {path: rate for path, (rate, _) in rates.items()} for by, rates in joint.items()}
        self.profile = self.profile.appended(step, measurement.rates, joint_rates)
        self.last_measurement = measurement
        return measurement

    def logs(self, measurement: Measurement) -> dict[str, float]:
        """Return the log entries of a measurement: rates, their relative errors and the joint rate of everything."""
        return {
            **self.by_kind("rate", measurement.rates),
            **self.by_kind("relative_error", measurement.relative_errors),
            "flerm/rate/total": measurement.total,
        }

    def by_kind(self, what: str, by_tensor: Mapping[str, float]) -> dict[str, float]:
        """Return log entries `flerm/what/...` of values by canonical name, averaged over the tensors of a kind."""
        return means_by_kind(f"flerm/{what}", by_tensor, self._logged_as)

    def _probed(self, step: int, update: StepUpdate) -> Measurement:
        """Probe the model as it was before the step; where memory runs out, again with half the examples at a time."""
        with update.unit_updates() as updates:
            while True:
                batches, generator = self._probe_data.drawn(step, self._device)
                try:
                    return self._probe.measure(updates, batches, generator, target_error=self._probe_data.target_error)
                except Exception as error:
                    if not should_reduce_batch_size(error) or not self._probe_data.halve():
                        raise
                clear_device_cache(garbage_collection=True)

    def _check(self, measurement: Measurement) -> None:
        broken = [name for name, rate in measurement.rates.items() if not math.isfinite(rate)]
        if broken:
            raise ValueError(f"the measured rates of {preview(broken)} are not finite.")
        unused = [name for name, estimator in measurement.estimators.items() if estimator == UNUSED]
        if unused and self.last_measurement is None:
            logger.warning(f"{preview(unused)} took no part in the outputs of the first measurement: their rate is 0.")
