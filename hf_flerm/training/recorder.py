"""`Recorder`: the measurement of one optimizer step, from probe batches to a new row of the profile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from torch.optim import Optimizer
from transformers.utils import logging

from ..config import FLeRMConfig
from ..engines import engine_of
from ..engines.attempt import Attempt
from ..engines.processes import any_process
from ..model.isolation import undisturbed
from ..model.name_text import preview, without_prefix
from ..model.names import tensor_kinds
from ..optimizer.watch import StepUpdate
from ..profile.metadata import SETTINGS
from ..profile.rate_profile import RateProfile
from ..rates.measurement import UNUSED, Measurement
from ..rates.model_call import Batch, ModelCallError
from ..rates.outputs import MeasuredOutput
from ..rates.probe import RateProbe
from ..rates.process_sum import ProcessSum
from ..rates.tensors import product_shapes
from ..transfer.mapping import joint_groups
from .probe_data import ProbeData
from .provenance import empty_profile, provenance, resumed_profile, with_change

logger = logging.get_logger(__name__)

Shares = Mapping[str, float]  # {canonical name: share of its update}


class Recorder:
    """Measures optimizer steps and appends their rates to the profile.

    Attributes:
        profile: The rates so far.
        last_measurement: The latest measurement; None before the first.

    Args:
        model: The trained model, not wrapped.
        parameters: `{canonical name: parameter}` of all trained parameters.
        optimizer: The optimizer, unwrapped.
        groups: What steps which tensors; see `described_groups`.
        config: The options of the run.
        probe_data: Examples to probe with.
        arguments: Settings of the training for the profile's metadata; see `provenance`.

    Raises:
        ValueError: If the model lacks the output or, in mode 'match', cannot run on the probe data.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        groups: Sequence[Mapping[str, Any]],
        config: FLeRMConfig,
        probe_data: ProbeData,
        arguments: Mapping[str, Any] | None,
    ) -> None:
        self._model = model
        self._engine = engine = engine_of(model)
        self._device = engine.device(next(iter(parameters.values())))
        metric = config.metric or "euclidean"
        self._output = output = MeasuredOutput(config.output, config.positions or "attention_mask", metric)
        self._metric_is_open = config.metric is None  # then the first measurement chooses it
        if not engine.sharded:
            try:
                probe_data.check(partial(output.check, model, device=self._device))
            except ModelCallError as error:
                if config.mode == "match":
                    raise
                logger.warning(f"{error} Training continues, but FLeRM cannot measure anything.")
        research = config.research
        self._probe = RateProbe(
            model, estimator=research.estimator, probes_per_batch=research.probes_per_batch, output=output
        )
        self._probe_data = probe_data
        self._joint = joint_groups(model, parameters)  # {granularity: {path: {canonical name: share}}}
        self._sum_over_processes = ProcessSum(product_shapes(parameters, engine), research.estimator)
        self._logged_as = _log_names(model, config.log_by)
        metadata = provenance(model, parameters, optimizer, groups, config, probe_data, arguments)
        self.profile = empty_profile(metadata, self._joint)
        self.last_measurement: Measurement | None = None

    def record(self, step: int, update: StepUpdate, matched: Iterable[Shares]) -> Measurement | None:
        """Measure an update and append its rates to the profile; a collective call.

        Args:
            step: The optimizer step that made the update.
            update: The update.
            matched: Further combinations of tensors whose joint rates are needed, to match; the same on every process.

        Returns:
            The measurement of all processes together; None if the step changed no weight, on any process.

        Raises:
            Exception: On every process, if the measurement failed on one; see `ProcessSum`.
        """
        if not any(update.learning_rates.values()):
            return None  # the start of a warm-up; then `Schedule` makes the next step due
        moved = update.moved()
        if self._metric_is_open:
            self._choose_metric(update.attempt)
        own = update.attempt.run(partial(self._probed, step, update)) if moved else None
        joint_shares = [shares for paths in self._joint.values() for shares in paths.values()]
        # A joint rate is per unit of the largest nominal learning rate, with the ratios of the nominal ones. In this
        # combination it is the change of the outputs in this step.
        made = {
            name: update.nominal_rate * rate / update.nominal_rates[name] if rate else 0.0
            for name, rate in update.learning_rates.items()
        }
        measurement = self._sum_over_processes(own, [*joint_shares, *matched, made], update.attempt.failure)
        if measurement is None:
            return None
        self._check(measurement)
        joint = {granularity: measurement.joint_rates(paths) for granularity, paths in self._joint.items()}
        joint_rates = {by: {path: rate for path, (rate, _) in rates.items()} for by, rates in joint.items()}
        change = measurement.joint_rates({"": made})[""][0]
        self.profile = with_change(self.profile.appended(step, measurement.rates, joint_rates), step, change)
        self.last_measurement = measurement
        return measurement

    def logs(self, measurement: Measurement) -> dict[str, float]:
        """Return the log entries of a measurement: rates, relative errors and the joint rate of the whole model."""
        return {
            **self.by_kind("rate", measurement.rates),
            **self.by_kind("relative_error", measurement.relative_errors),
            "flerm/rate/total": measurement.total,
        }

    def resume(self, profile: RateProfile, config: FLeRMConfig) -> None:
        """Continue from the profile of a checkpoint, in its metric unless this run's config names one.

        Raises:
            RateProfileError: If its tensors, output, positions or metric differ from this run's.
        """
        metric = profile.about.units.get("metric") or ("euclidean" if len(profile.steps) else None)
        if self._metric_is_open and metric is not None:
            self._set_metric(metric)
        self.profile = resumed_profile(profile, self.profile, config)

    def by_kind(self, what: str, by_tensor: Mapping[str, float]) -> dict[str, float]:
        """Average values over the tensors of each kind, by the geometric mean, for a log.

        Args:
            what: What the values are, for the names of the log entries.
            by_tensor: `{canonical name: value}`; values that are not positive are left out.

        Returns:
            `{flerm/what/kind: mean}`; one entry for each tensor if the run logs by tensor, none if by none.
        """
        logs: dict[str, list[float]] = {}
        for name, value in by_tensor.items():
            if value > 0 and name in self._logged_as:
                logs.setdefault(self._logged_as[name], []).append(math.log(value))
        return {f"flerm/{what}/{kind}": math.exp(sum(values) / len(values)) for kind, values in logs.items()}

    def _choose_metric(self, attempt: Attempt) -> None:
        """Choose the metric by the model's output for one example, the same on all processes; a collective call.

        Raises:
            Exception: On every process, if it failed on one; see `ProcessSum`. The next measurement tries again.
        """

        def default(batch: Batch) -> str:
            return self._output.default_metric(self._model, send_to_device(dict(batch), self._device))

        found = None
        self._engine.release()
        with undisturbed(self._model, self._device), self._engine.released_after():
            batch = attempt.run(self._probe_data.single)
            if batch is not None:  # on every process that runs the model together with this one
                found = attempt.run(partial(default, batch))
        failed, is_euclidean = any_process([found is None, found == "euclidean"])
        if failed:
            self._sum_over_processes(None, [], attempt.failure)
        self._set_metric("euclidean" if is_euclidean else "fisher")

    def _set_metric(self, metric: str) -> None:
        self._output.metric = metric
        self._metric_is_open = False
        metadata = {**self.profile.metadata, SETTINGS: {**self.profile.about.settings, "metric": metric}}
        self.profile = RateProfile(self.profile.steps, self.profile.rates, metadata, self.profile.joint_rates)

    def _probed(self, step: int, update: StepUpdate) -> Measurement:
        """Probe the model with the weights from before the step; if memory runs out, retry with half the batch size."""
        target_error = self._probe_data.target_error
        with update.unit_updates() as updates:
            while True:
                batches, generator = self._probe_data.drawn(step, self._device)
                try:
                    measurement = self._probe.measure(updates, batches, generator, target_error=target_error)
                    return replace(measurement, learning_rates=update.nominal_rates)
                except Exception as error:
                    # Each process retries on its own. With sharded weights this cannot help if one process alone runs
                    # out of memory in the middle of a forward pass: the others still wait for it in the all-gathers of
                    # that pass, which it does not make again. Research(probe_batch_size=1) needs least memory there.
                    if not should_reduce_batch_size(error) or not self._probe_data.halve():
                        raise
                clear_device_cache(garbage_collection=True)

    def _check(self, measurement: Measurement) -> None:
        """Raise ValueError if a rate is not finite; warn after the first measurement of tensors without effect."""
        broken = [name for name, rate in measurement.rates.items() if not math.isfinite(rate)]
        if broken:
            raise ValueError(f"the measured rates of {preview(broken)} are not finite.")
        unused = [name for name, estimator in measurement.estimators.items() if estimator == UNUSED]
        if unused and self.last_measurement is None:
            logger.warning(
                f"the outputs of the first measurement do not depend on {preview(unused)}: their rates are 0."
            )


def _log_names(model: nn.Module, log_by: str) -> dict[str, str]:
    """Return `{canonical name: name of its log entry}`, without PEFT's prefix; a name that is missing has no entry."""
    if log_by == "none":
        return {}
    kinds = tensor_kinds(model)
    return {name: without_prefix(kind if log_by == "kind" else name) for name, kind in kinds.items()}
