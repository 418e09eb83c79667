"""`Scaler`: the learning-rate scales of one matched run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.utils import logging

from ..config import FLeRMConfig
from ..model.name_text import preview
from ..optimizer.step_scales import StepScales
from ..profile.file import serialize
from ..profile.metadata import MATCHING
from ..profile.rate_profile import RateProfile, RateProfileError
from ..rates.measurement import Measurement
from ..transfer.evidence import Evidence
from ..transfer.mapping import map_profile
from ..transfer.scale_report import LargeScales
from ..transfer.strategy import choose_strategy, log_prior, tensor_scales, with_scales
from .provenance import check_units, check_unscaled

logger = logging.get_logger(__name__)


class Scaler:
    """Turns measurements into learning-rate scales and applies them to the optimizer's steps.

    Attributes:
        evidence: The evidence for the scales so far.
        strategy: What is matched, chosen from what changed since the base.
        scales: `{canonical name: factor on the learning rate}`, as applied.
        without_level: The scales without the factor that all of them have in common.

    Args:
        base: The profile to match.
        model: The target.
        optimizer: The optimizer, unwrapped.
        in_optimizer: `{canonical name: tensor in the optimizer's param groups}` of all trained parameters.
        algorithms: `{canonical name: algorithm that steps it}`.
        config: The options of the run.

    Raises:
        RateProfileError: If base and model do not belong together, or the base was a matched run itself.
    """

    def __init__(
        self,
        base: RateProfile,
        model: nn.Module,
        optimizer: Optimizer,
        in_optimizer: Mapping[str, Tensor],
        algorithms: Mapping[str, str],
        config: FLeRMConfig,
    ) -> None:
        check_units(base, config, "the profile")
        check_unscaled(base, "the profile")
        if not len(base.steps):
            raise RateProfileError("the profile holds no step: its run ended before its first measurement.")
        self._config = config
        research = config.research
        follows = research.beta is not None or research.pool != "kind"  # options of this policy alone
        self.strategy = choose_strategy(
            base,
            model,
            algorithms,
            policy=research.policy or ("follow" if follows else None),
            granularity=config.granularity,
            rules=research.rules,
        )
        self._mapped = map_profile(
            base,
            model,
            granularity=self.strategy.granularity,
            depth=research.depth,
            unmatched=config.unmatched,
        )
        self._base = _identity(base)
        self._large_scales = LargeScales()
        self.evidence = self._without_evidence()
        self._step_scales = StepScales(optimizer, in_optimizer)
        self._set_scales()

    def resume(self, profile: RateProfile) -> None:
        """Continue with the scales of a checkpoint, if it was matched to the same base.

        Args:
            profile: The profile of the checkpoint.

        Raises:
            RateProfileError: If the stored evidence is damaged.
        """
        record = profile.about.matching
        if record is not None and record.get("base") != self._base["base"]:
            logger.warning("the checkpoint was matched to another profile; its scales are not used.")
            record = None
        self.evidence = self._without_evidence()
        if record is not None:
            self.evidence = Evidence.from_record(record, self._mapped)
        self._set_scales()

    def update(self, step: int, measurement: Measurement, learning_rate: float) -> dict[str, float]:
        """Add a measurement to the evidence and set the scales that follow from it.

        Args:
            step: The optimizer step that was measured.
            measurement: The measurement.
            learning_rate: The nominal learning rate of the step.

        Returns:
            `{canonical name: new scale / old scale}` of the scales that changed. For tensors that share memory, only
            the first is included, so that their step is redone once.
        """
        old, config, research = self.scales, self._config, self._config.research
        evidence = self.evidence.appended(step, self._mapped, measurement, learning_rate, self.without_level)
        self.evidence = with_scales(
            evidence,
            self._mapped,
            self.strategy,
            max_scale=config.max_scale,
            max_change=config.max_change,
            pool=research.pool,
            beta=research.beta,
        )
        self._set_scales()
        self._warn_of_large_scales(step, measurement)
        return {
            name: scale / old[name]
            for name, scale in self.scales.items()
            if scale != old[name] and name not in self._step_scales.tied
        }

    @property
    def combinations(self) -> list[Mapping[str, float]]:
        """The combinations of tensors whose joint rates `update` needs: `{canonical name: share of its update}`."""
        return [*(unit.shares for unit in self._mapped.measured_units.values()), self.without_level]

    def recorded(self, profile: RateProfile) -> RateProfile:
        """Return the profile with the evidence in its metadata, from which a resumed run continues."""
        if not self.evidence.steps:
            return profile
        reason = {"reason": self.strategy.reason}
        metadata = {**profile.metadata, MATCHING: {**self._base, **reason, **self.evidence.to_record()}}
        return RateProfile(profile.steps, profile.rates, metadata, profile.joint_rates)

    def at_limit(self) -> str:
        """Return a warning that names the scales that have reached `max_scale`; empty if none has."""
        at_limit = self.evidence.at_limit(self._config.max_scale)
        if not at_limit:
            return ""
        return (
            f"the learning-rate scales of {preview(at_limit)} have reached max_scale = {self._config.max_scale:g}: "
            "base and target may not be comparable, or the learning rate is far from optimal."
        )

    def report_unmatched(self) -> None:
        """Warn of tensors whose learning rate was not scaled, as base and target never both had a positive rate."""
        seen = self.evidence.log_quotients.isfinite().any(0).tolist()
        left = [unit for unit, known in zip(self.evidence.units, seen, strict=True) if not known]
        if self._config.unmatched == "nominal":
            left += self._mapped.unmatched
        if left:
            logger.warning(
                f"the learning rates of {preview(left)} were not scaled: they had no positive rate in the profile or "
                "in this run, or too many of the tensors that share their scale had none yet."
            )

    def remove(self) -> None:
        """Release the optimizer; the evidence stays."""
        self._step_scales.remove()

    def _warn_of_large_scales(self, step: int, measurement: Measurement) -> None:
        units = self._mapped.measured_units.values()
        kinds = {unit.name: unit.kind or "all tensors" for unit in units}
        measured = measurement.joint_rates({unit.name: unit.shares for unit in units})
        self._large_scales.warn(
            {
                kinds[name]: math.exp(log)
                for name, log in zip(self.evidence.units, self.evidence.log_scales.tolist(), strict=True)
            },
            {unit.kind or "all tensors": self._mapped.base.interpolated(unit.rates, step).item() for unit in units},
            {kinds[name]: rate for name, (rate, _) in measured.items()},
        )

    def _without_evidence(self) -> Evidence:
        empty = Evidence.empty(self._mapped)
        return replace(empty, log_scales=log_prior(self._mapped, self.strategy.prior))

    def _set_scales(self) -> None:
        self._step_scales.scales = tensor_scales(self.evidence, self._mapped, self.strategy)
        self.scales = self._step_scales.scales
        level = math.exp(self.evidence.log_level)
        self.without_level = {name: scale / level for name, scale in self.scales.items()}


def _identity(base: RateProfile) -> dict[str, str]:
    """SHA-256 of the rates of a profile and, if it was read from a repository, the commit."""
    table = base.table
    digest = hashlib.sha256(serialize(table.steps, table.rates, {}, table.joint_rates)).hexdigest()
    return {"base": digest} | ({"base_commit": base.commit_hash} if base.commit_hash else {})
