"""What matching did in one run, in words. Without torch: summaries of files say it, too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_ROUND_OFF = 1e-9  # relative difference of scales that count as equal


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
