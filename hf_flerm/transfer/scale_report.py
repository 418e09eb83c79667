"""What a matched run tells about its scales: a warning of large ones, and a summary at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from transformers.utils import logging

logger = logging.get_logger(__name__)

LARGE = 10.0  # a scale above this, or below 1 / this, is reported
_ROUND_OFF = 1e-9  # relative difference of scales that count as equal


class LargeScales:
    """Warns of scales above 10 or below 1/10, once for each kind of tensor."""

    def __init__(self) -> None:
        self._reported: set[str] = set()

    def warn(self, scales: Mapping[str, float], wanted: Mapping[str, float], measured: Mapping[str, float]) -> None:
        """Warn of the kinds whose scale has become large, with the rates that it comes from.

        Args:
            scales: `{kind of tensor: factor on the learning rate}`.
            wanted: `{kind: rate}` of the base; a kind may be missing.
            measured: `{kind: rate}` of this run; a kind may be missing.
        """
        large = {kind: scale for kind, scale in scales.items() if not 1 / LARGE <= scale <= LARGE}
        new = {kind: scale for kind, scale in sorted(large.items()) if kind not in self._reported}
        if not new:
            return
        self._reported |= new.keys()
        reasons = [
            f"- {kind}: {scale:.3g} (rate in the base {wanted.get(kind, math.nan):.3g}, "
            f"in this run {measured.get(kind, math.nan):.3g})"
            for kind, scale in new.items()
        ]
        logger.warning(
            f"learning-rate scales are above {LARGE:g} or below 1/{LARGE:g}:\n"
            + "\n".join(reasons)
            + "\nThis is expected if the initialization sets how far a tensor moves the outputs: another rank with "
            "LoRA's 'gaussian' initialization needs 20 to 40, and so may another initialization scale or optimizer; or "
            "if a published rule says so (muP at more than 10 times the width). If nothing like this differs, base and "
            "target may not be comparable; max_scale limits the scales."
        )


def decision_from(scales: Mapping[str, float]) -> str:
    """Say in words what scales do to the learning rate.

    Args:
        scales: `{canonical name: factor on the learning rate}`.
    """
    low, high = min(scales.values()), max(scales.values())
    if not math.isclose(low, high, rel_tol=_ROUND_OFF):
        return "different scales for different tensors"
    return "kept the learning rate" if math.isclose(low, 1.0, rel_tol=_ROUND_OFF) else "one scale for all tensors"


@dataclass(frozen=True)
class MatchSummary:
    """What matching did in one run. `str()` gives it in one line.

    Attributes:
        decision: The effect on the learning rates, in words.
        smallest: The smallest factor on a tensor's learning rate.
        largest: The largest.
        measurements: Number of measured steps.
        seconds: Wall time in seconds that measuring took.
        training_seconds: Wall time in seconds of the training, measuring included.
    """

    decision: str
    smallest: float
    largest: float
    measurements: int
    seconds: float
    training_seconds: float

    @property
    def share(self) -> float:
        """The share of the training time that measuring took."""
        return self.seconds / self.training_seconds

    def logs(self) -> dict[str, float]:
        """Return the entries for the last training log, which holds the run time; `flerm/seconds` is in all logs."""
        return {
            "flerm/smallest_scale": self.smallest,
            "flerm/largest_scale": self.largest,
            "flerm/measurements": float(self.measurements),
            "flerm/share_of_time": self.share,
        }

    def __str__(self) -> str:
        return (
            f"{self.decision} (scales from {self.smallest:.3g} to {self.largest:.3g}), from {self.measurements} "
            f"measurements, which took {self.seconds:.3g} s, {self.share:.1%} of the training."
        )
