"""`FLeRMRun`: one training that is recorded or matched, step by step, whoever wrote its loop."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.utils.data import Dataset
from transformers.utils import logging

from ..config import FLeRMConfig, checked
from ..engines.processes import check_engine, check_loop
from ..engines.sharding import is_sharded, runs_on
from ..engines.zero import stepping
from ..model.names import means_by_kind, preview, tensor_kinds, trainable_parameters
from ..optimizer.behavior import check_optimizer, weight_decays
from ..optimizer.param_groups import learning_rates, raw_optimizer
from ..optimizer.step import Snapshot
from ..profile.common import common_profile
from ..profile.rate_profile import PROFILE_NAME, RateProfile, RateProfileError
from ..rates.measurement import UNUSED, Measurement
from ..rates.outputs import Batch, Outputs
from ..rates.probe import RateProbe
from ..rates.process_sum import ProcessSum
from ..transfer.evidence import Evidence
from ..transfer.mapping import joint_groups
from .failures import Failures
from .probe_data import ProbeData
from .provenance import begun_profile, continued_profile, provenance, warn_of_other_rate
from .scaling import Scaling

logger = logging.get_logger(__name__)


class FLeRMRun:
    """Measures the updates of a training when they are due, and in `match` mode sets the scales.

    A measurement is due if the schedule has asked for one since the last that was made: what could not be measured (the
    learning rate was 0, the step was skipped, a probe failed) is made up for at the next step, and a training that goes
    on from a checkpoint asks for no more than that. A probe that runs out of memory is tried again with half the
    examples at a time. Whatever fails leaves the training as it would have been without it.
    `FLeRMCallback` drives one of these. So does a loop of one's own, of plain PyTorch or with what Accelerate has
    prepared:

        run = FLeRMRun(model, optimizer, FLeRMConfig(), dataloader)
        for batch in dataloader:
            loss = model(**batch).loss
            loss.backward()
            with run.step():
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.save("base")

    Probes run where the `with` block ends: a loop that enters `torch.autocast` itself does so around it as well.

    Attributes:
        steps: Optimizer steps so far, counted by `step`; those that a gradient scaler skips count, as in a `Trainer`.
        last_measurement: The latest measurement, in this session.
        seconds: Wall time that measuring has taken in this session.

    Args:
        model: What is trained, as it is or wrapped by Accelerate, DDP or `torch.compile`.
        optimizer: What steps, as it is or wrapped by Accelerate.
        config: What to measure, when, and what to do with it.
        dataloader: The training set's: probes take their examples, collation and batch size from it.
        probe_dataset: Examples to probe with. None: the training set's.
        collate_fn: Makes model inputs, a dict, of a list of examples. None: the data loader's own.
        batch_size: Examples in a training batch on one process. None: the data loader's.
        gradient_accumulation_steps: Batches per optimizer step. None: what Accelerate was told, else 1.
        arguments: The training's settings, for the profile's metadata. None: learning rate, batch and accumulation.

    Raises:
        RateProfileError: If the profile to match cannot be loaded, or does not belong to the model.
        ValueError: If the optimizer cannot be followed, or there is nothing to probe with.
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
        check_engine(model, config.estimator)
        self._wrapped = model
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        self.steps = 0
        self.last_measurement: Measurement | None = None
        self.seconds = 0.0
        self._config = config = replace(checked(config), positions=config.positions or "attention_mask")
        self._optimizer = raw_optimizer(optimizer)
        self._accumulation = getattr(optimizer, "gradient_state", None)
        self._parameters = trainable_parameters(model)
        self._logged_as = tensor_kinds(model) if config.log_by == "kind" else {name: name for name in self._parameters}
        self._stepping = stepping(model, optimizer, self._parameters)
        with self._stepping.in_groups():
            learning_rates(self._optimizer, self._stepping.held)
        check_optimizer(self._optimizer, config.mode)
        accumulation = gradient_accumulation_steps or getattr(self._accumulation, "num_steps", None) or 1
        self._probe_data = ProbeData(config, dataloader, probe_dataset, collate_fn, batch_size, accumulation)
        outputs = Outputs(config.output, config.positions or "attention_mask", config.metric)
        probes = config.probes_per_batch
        self._probe = RateProbe(model, estimator=config.estimator, probes_per_batch=probes, outputs=outputs)
        if self._probe_data.example is not None and not is_sharded(model):
            outputs.check(model, self._probe_data.example, runs_on(next(iter(self._parameters.values()))))
        self._groups = joint_groups(model, self._parameters)
        described = provenance(model, self._parameters, self._optimizer, config, self._probe_data, arguments)
        self._profile = begun_profile(described, self._groups)
        self._before: Snapshot | Exception | None = None
        self._step = 0
        self._logs: dict[str, float] = {}
        self._failures = Failures()
        self._saved: tuple[Path, RateProfile] | None = None
        asked: list[Mapping[str, float]] = [group for groups in self._groups.values() for group in groups.values()]
        source = config.profile
        base = common_profile("the profile", lambda: None if source is None else RateProfile.from_pretrained(source))
        self._scaling: Scaling | None = None
        if base is not None:
            self._stepping.check_apart()
            warn_of_other_rate(base, described)
            self._scaling = Scaling(base, model, self._optimizer, self._stepping.held, config)
            asked += self._scaling.shares
        self._pool = ProcessSum(self._parameters, config.estimator, asked)

    @property
    def profile(self) -> RateProfile:
        """The rates so far, with what a resumed run needs to know of its scales."""
        return self._profile if self._scaling is None else self._scaling.recorded(self._profile)

    @property
    def scales(self) -> dict[str, float]:
        """`{canonical name: factor on the learning rate}`, all 1 when recording."""
        return dict.fromkeys(self._parameters, 1.0) if self._scaling is None else self._scaling.scales

    @property
    def evidence(self) -> Evidence | None:
        """What was measured of the scales so far; None when recording."""
        return None if self._scaling is None else self._scaling.evidence

    @contextmanager
    def step(self) -> Iterator[None]:
        """Follow the optimizer step of a block, if there is one: Accelerate makes none while gradients accumulate.

        Schedulers step after the block, not in it.

        Yields:
            Nothing.

        Raises:
            ValueError: If learning rates change in it, gradients do not outlive it, or DeepSpeed or Join takes part.
        """
        check_loop(self._wrapped)
        if self._accumulation is not None and not self._accumulation.sync_gradients:
            yield
            return
        self.before_step(self.steps)
        rates = self._rates()
        yield
        if self._before is not None and not self._stepping.stepped():
            raise ValueError("there is no gradient after `with run.step()`: call zero_grad() after the block.")
        if self._before is not None and rates != self._rates():
            raise ValueError(
                "learning rates changed inside `with run.step()`, so that of the update is not known: "
                "call scheduler.step() after the block."
            )
        self.after_step()
        self.steps += 1

    def resume(self, profile: RateProfile, steps: int) -> None:
        """Go on with a checkpoint's profile and scales, from the next step.

        Args:
            profile: The checkpoint's.
            steps: Optimizer steps that were made up to it.

        Raises:
            RateProfileError: If checkpoint and model do not belong together.
        """
        if len(profile.steps) and profile.steps[-1] >= steps:
            raise RateProfileError(
                f"the checkpoint's profile holds step {int(profile.steps[-1])}, but training goes on from step "
                f"{steps}: it belongs to another checkpoint."
            )
        self._profile = continued_profile(profile, self._profile, self._config)
        self.steps = steps
        if self._scaling is not None:
            self._scaling.resume(profile)

    def state_dict(self) -> dict[str, Any]:
        """Tell what a training that goes on later needs: `accelerator.register_for_checkpointing(run)` asks for it.

        Returns:
            Numbers, text and tensors.
        """
        profile = self.profile
        return {
            "steps": self.steps,
            "profile": {name: getattr(profile, name) for name in ("steps", "rates", "metadata", "joint_rates")},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` told; see `resume`. A collective call.

        Args:
            state: That.

        Raises:
            RateProfileError: If checkpoint and model do not belong together.
        """
        profile = common_profile("the checkpoint's profile", lambda: RateProfile(**state["profile"]))
        if profile is not None:
            self.resume(profile, state["steps"])

    def before_step(self, step: int) -> None:
        """Keep the weights from before an update, if a measurement is due.

        Args:
            step: Optimizer steps that were made before.
        """
        self._before = None  # a step that was cut short has left its own
        self._step = step
        if not self._failures.given_up and self._due(step):
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
            self._failures.add(self._step, error)
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
        if self._saved == (file, self._profile) and file.is_file():
            return
        try:
            self.profile.save_pretrained(directory)
            self._saved = file, self._profile
        except (OSError, RateProfileError) as error:
            self._failures.warn_once(
                "save", f"the profile so far could not be written and will be tried at every save: {error}"
            )

    def close(self) -> None:
        """Let go of the optimizer and of all weights, and measure no more; the profile stays."""
        self._before = None
        self._failures.given_up = True
        if self._scaling is not None:
            self._scaling.remove()

    def report_unmatched(self) -> None:
        """Warn of what kept its learning rate because base and target never both had a positive rate."""
        if self._scaling is not None:
            self._scaling.report_unmatched()

    def _rates(self) -> list[float]:
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def _due(self, step: int) -> bool:
        asked = self._config.last_asked(step)
        measured = self._profile.steps[-1:].tolist()
        return asked is not None and (not measured or asked > measured[0])

    def _measure(self, before: Snapshot | Exception) -> None:
        with self._stepping.in_groups():
            nominal = learning_rates(self._optimizer, self._stepping.held)
            used = {name: nominal[name] * scale for name, scale in self.scales.items()}
            if not any(used.values()):
                return  # warm-up: the next step will do
            decays = {n: nominal[n] * d for n, d in weight_decays(self._optimizer, self._stepping.stepped()).items()}
        measurement = self._pool.measurement(lambda: self._probed(before, used, decays))
        if measurement is None or isinstance(before, Exception):
            return
        broken = [name for name, rate in measurement.rates.items() if not math.isfinite(rate)]
        if broken:
            raise ValueError(f"the measured rates of {preview(broken)} are not finite.")
        unused = [name for name, estimator in measurement.estimators.items() if estimator == UNUSED]
        if unused and self.last_measurement is None:
            logger.warning(f"{preview(unused)} took no part in the outputs of the first measurement: their rate is 0.")
        self._failures.clear()
        self.last_measurement = measurement
        joint = {granularity: measurement.joint_rates(groups) for granularity, groups in self._groups.items()}
        joint_rates = {granularity: {path: rate for path, (rate, _) in of.items()} for granularity, of in joint.items()}
        self._profile = self._profile.appended(self._step, measurement.rates, joint_rates)
        self._log("rate", measurement.rates)
        self._log("relative_error", measurement.relative_errors)
        self._logs["flerm/rate/total"] = measurement.total
        if self._scaling is not None:
            ratios = self._scaling.update(self._step, measurement, max(nominal.values()))
            self._failures.warn_once("held", self._scaling.held())
            self._log("scale", self.scales)
            before.rescale(ratios, decays)

    def _probed(
        self, before: Snapshot | Exception, used: Mapping[str, float], decays: Mapping[str, float]
    ) -> Measurement | None:
        """Probe, with fewer examples at a time if memory does not suffice; None if the step was skipped."""
        device = runs_on(next(iter(self._parameters.values())))
        moved = isinstance(before, Snapshot) and before.moved()
        failed, moved = self._stepping.agree([isinstance(before, Exception), moved])
        if isinstance(before, Exception):
            raise before
        if failed or not moved:
            return None
        with before.put_back(used, decays) as updates:
            return self._probe_data.probed(
                self._step, device, partial(self._probe.measure, updates, target_error=self._probe_data.target_error)
            )

    def _log(self, what: str, values: Mapping[str, float]) -> None:
        self._logs.update(means_by_kind(f"flerm/{what}", values, self._logged_as))
