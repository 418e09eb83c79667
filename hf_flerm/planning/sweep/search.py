"""Where the loss is lowest: a search over a grid of learning rates, and the minimum between its points.

Points of the grid are whole numbers, and 0 is the middle. Nothing here trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Protocol

REACH = 2  # points on each side of the middle that are tried in any case
LIMIT = 6  # points on each side of the middle up to which the grid is extended


SPACING = math.sqrt(10)  # factor between neighbors of the coarse grid


@dataclass(frozen=True)
class Grid:
    """Which learning rate each point is.

    Attributes:
        middle: The learning rate at point 0.
        refine: How often the coarse spacing is halved.
    """

    middle: float
    refine: int

    @property
    def factor(self) -> float:
        """The factor between the learning rates of neighbors."""
        return math.pow(SPACING, 0.5**self.refine)

    def learning_rate(self, point: int) -> float:
        """Return the learning rate at a point, with six digits, so that it can be written in a file name."""
        return float(f"{self.middle * self.factor**point:.6g}")


class Loss(Protocol):
    """The loss of a training: inf if it diverged, or if it was stopped early because it could not win."""

    def __call__(self, point: int, seed: int, *, must_end: bool) -> float:
        """Return the loss at a point of the grid with a seed; with `must_end`, the training is not stopped early."""


def lowest_point(loss: Loss, seeds: Sequence[int], refine: int) -> int:
    """Return the point of the grid at which the mean loss over seeds is lowest.

    The grid is tried from the middle outwards with the first seed. Then the search moves to the lower neighbor until
    both neighbors of its point are higher, at the coarse spacing and at each finer one, and at last with all seeds.

    Args:
        loss: The loss at a point.
        seeds: Seeds of the trainings, one or more.
        refine: How often the spacing is halved. Points of the coarse grid are multiples of 2^refine.

    Raises:
        ValueError: If no training ends with a finite loss.
    """
    stride = 2**refine
    found: dict[int, float] = {}
    for point in sorted(range(-REACH * stride, REACH * stride + 1, stride), key=lambda point: (abs(point), -point)):
        best = min(found, key=found.__getitem__, default=point)
        # The neighbors of the best point are needed to the end, because the minimum is read between them.
        found[point] = loss(point, seeds[0], must_end=abs(point - best) <= stride)
    best = min(found, key=lambda point: (found[point], point))  # the lowest learning rate, if all have diverged
    while stride:
        best = _settled(loss, best, stride, seeds[:1], LIMIT * 2**refine)
        stride //= 2
    return best if len(seeds) == 1 else _settled(loss, best, 1, seeds, LIMIT * 2**refine)


def minimum(lower: float, middle: float, higher: float, worst: float) -> float:
    """Return where a parabola through the losses at -1, 0 and 1 is lowest: between -1/2 and 1/2.

    Args:
        lower: Loss at -1.
        middle: Loss at 0, no higher than the others.
        higher: Loss at 1.
        worst: What a loss that is not finite counts as: the highest finite one.
    """
    lower, higher = (loss if math.isfinite(loss) else worst for loss in (lower, higher))
    bend = lower - 2 * middle + higher
    return (lower - higher) / (2 * bend) if bend > 0 else 0.0


def _settled(loss: Loss, point: int, stride: int, seeds: Sequence[int], limit: int) -> int:
    """Move from a point to its lower neighbor until there is none, and return the last point."""
    while True:
        near = [each for each in (point, point - stride, point + stride) if abs(each) <= limit]
        means = {each: mean(loss(each, seed, must_end=True) for seed in seeds) for each in near}
        lowest = min(near, key=means.__getitem__)  # of equal ones the point itself
        if not math.isfinite(means[lowest]):
            lowest = min(near)  # too high a learning rate diverges, too low a one does not
            if lowest == point:
                raise ValueError(
                    "every training diverged, at all learning rates of the grid. Give a lower one as around, or look "
                    "for what else makes the loss infinite or nan."
                )
        if lowest == point:
            return point
        point = lowest
