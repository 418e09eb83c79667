"""A learning rate without a base: short trainings of copies, at learning rates that approach the one that is wanted.

Each training (`curvature.Look`) gives h / m, which rises with the learning rate and is `AT_BEST` at the best one. The
search looks again at the learning rate that it finds, until the two agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..choices import Decision
from .curvature import AT_BEST, CLEARLY_HIGH, CLEARLY_LOW, CurvatureProbe, Look
from .trial import Trial

STEPS_OF_A_LOOK = 64  # training steps of each copy
# d log(h / m) / d log(learning rate) around the best learning rate of the runs in examples/studies: 1 where h and m are
# those of one quadratic, more because a higher learning rate also flattens the signal.
_SLOPE = 1.2
# Largest moves of the learning rate between two looks; upwards, the careful one. From scratch, h / m is about AT_BEST
# in a wide range above the best learning rate, too, as training flattens the loss until its steps fit: the search comes
# from below.
_LARGEST_MOVE, _CAREFUL_MOVE = 16.0, 4.0
_FAR_BELOW = -math.log(50.0)  # log(h / m / AT_BEST) below which a move upwards need not be careful
# A learning rate is too high if a lower one has left the loss lower by more than this share of its decrease.
_WORSE = 0.1
_AGREES = 1.25  # a learning rate that differs by less from the one looked at needs no look of its own
# Standard deviation of the logarithm of an answer around the optimum of a sweep; see `examples/studies`.
_METHOD_ERROR = 0.3
_NOISY = 0.7  # standard error of log(h / m) above which noise exceeds the signal
_LEAST = 3  # measured steps below which an answer is doubtful
_UNKNOWN = 10.0  # standard error of log(h / m) that stands for "not known"
_FAR = 3.0  # a kind of tensor whose steps should be so much longer or shorter than all others is named


def search(look: Callable[[float], Look], start: float, looks: int) -> list[Look]:
    """Look at learning rates until one agrees with what it shows, or `looks` are spent.

    Args:
        look: Trains a copy at a learning rate.
        start: The first learning rate.
        looks: Largest number of looks.
    """
    found = [look(start)] if looks else []
    while found and len(found) < looks:
        rate, last = wanted_rate(found), found[-1].learning_rate
        if abs(math.log(rate / last)) < math.log(_AGREES):
            if any(one.learning_rate < last / 2 for one in found):
                break
            rate = last / _CAREFUL_MOVE  # h / m may agree above the best learning rate, too: the loss will tell
        found.append(look(rate))
    return found


def wanted_rate(looks: Sequence[Look]) -> float:
    """Return the learning rate at which h / m would be `AT_BEST`, by interpolation or extrapolation in logarithms.

    Each look says by its excess, log(h / m / AT_BEST), how far it is: below 0, the learning rate is too low. Losses say
    more: a learning rate is too high if a lower one has left a clearly lower loss after as many steps.
    """
    excesses = [math.inf if _is_beaten(one, looks) else one.excess for one in looks]
    points = sorted(zip((math.log(one.learning_rate) for one in looks), excesses, strict=True))
    below = max((point for point in points if point[1] <= 0), default=None)
    above = min((point for point in points if point[1] > 0), default=None)
    if below is None or above is None or below[0] >= above[0]:
        # Of looks that say only "too high" or "too low", the outermost; of two that contradict each other, the nearer.
        rate, excess = min((point for point in (below, above) if point is not None), key=lambda point: abs(point[1]))
        up = _LARGEST_MOVE if excess < _FAR_BELOW else _CAREFUL_MOVE
        return math.exp(rate + min(max(-excess / _SLOPE, -math.log(_LARGEST_MOVE)), math.log(up)))
    low, high = max(below[1], CLEARLY_LOW), min(above[1], CLEARLY_HIGH)
    return math.exp(below[0] - low / (high - low) * (above[0] - below[0]))


def _is_beaten(look: Look, looks: Sequence[Look]) -> bool:
    """Whether a lower learning rate has left a clearly lower loss, as far as both have trained."""
    for other in looks:
        common = min(len(look.losses), len(other.losses))
        if other.learning_rate < look.learning_rate and common > 1:
            decrease = other.losses[0] - other.losses[common - 1]
            if look.losses[common - 1] - other.losses[common - 1] > _WORSE * decrease > 0:
                return True
    return False


@dataclass(frozen=True)
class Plan:
    """The result of `plan`: a learning rate. `str()` gives it, its reason and its range.

    Attributes:
        looks: The short trainings, in order.
    """

    looks: tuple[Look, ...]

    @property
    def wanted(self) -> float:
        """The learning rate at which curvature / signal would be that of the best one; see `wanted_rate`."""
        return wanted_rate(self.looks)

    @property
    def learning_rate(self) -> float:
        """The learning rate for all tensors."""
        return self.wanted

    @property
    def last(self) -> Look:
        """The look whose learning rate is nearest to the wanted one."""
        return min(self.looks, key=lambda look: abs(math.log(look.learning_rate / self.wanted)))

    @property
    def error(self) -> float:
        """Standard error of the logarithm of the wanted learning rate, the method's included."""
        # Half of what was extrapolated: to another learning rate, and to the end of the warm-up.
        distances = math.log(self.last.learning_rate / self.wanted) / 2, math.log(self.last.warmup) / 2
        return math.hypot(_METHOD_ERROR, min(self.last.error, _UNKNOWN) / _SLOPE, *distances)

    @property
    def range(self) -> tuple[float, float]:
        """The 68 % range of the learning rate, (low, high)."""
        return self.wanted * math.exp(-self.error), self.wanted * math.exp(self.error)

    @property
    def doubts(self) -> list[str]:
        """Why signal and curvature are not to be trusted; empty if nothing speaks against them."""
        if not self.looks:
            return ["no training was looked at"]
        last = self.last
        found = []
        if last.has_diverged:
            found.append("the loss did not fall in any training near it")
        elif last.signal.sum() > 0 >= last.curvature.sum():
            found.append("the loss curves downwards along the updates, so longer steps would always be better")
        elif last.error > _NOISY:
            more = math.ceil((min(last.error, _UNKNOWN) / _NOISY) ** 2)
            found.append(f"noise exceeds the signal: it would take about {more} times as many examples or steps")
        if len(last.signal) < _LEAST:
            found.append(f"only {len(last.signal)} steps were measured: give more steps")
        if abs(math.log(self.wanted / last.learning_rate)) > math.log(2 * _AGREES):
            found.append(f"the search ended far from it, at {last.learning_rate:.3g}: start there, or allow more looks")
        return found

    @property
    def decision(self) -> Decision:
        """What to do: use "one" learning rate for all tensors."""
        return "one"

    @property
    def reason(self) -> str:
        """The reason for the learning rate, in one sentence."""
        last = self.last
        if last.is_too_high:
            state = "the loss does not fall"
        elif abs(last.excess) < math.log(2 * _AGREES):
            state = f"steps are about as long as the curvature of the loss allows ({last.ratio:.2g}; best {AT_BEST})"
        else:
            length = "longer" if last.excess < 0 else "shorter"
            state = f"steps should be {length} (curvature / signal {last.ratio:.2g}; best {AT_BEST})"
        return f"At {last.learning_rate:.3g}, {state}."

    @property
    def by_kind(self) -> dict[str, float]:
        """`{kind of tensor: how much longer its steps should be than all others}`, those of at least 3 or 1/3."""
        found = self.last.by_kind if self.looks else {}
        return {kind: factor for kind, factor in found.items() if abs(math.log(factor)) > math.log(_FAR)}

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as values that JSON can hold."""
        return {
            "decision": self.decision,
            "reason": self.reason,
            "learning_rate": self.learning_rate,
            "range": list(self.range),
            **self._looks_to_dict(),
        }

    def _looks_to_dict(self) -> dict[str, Any]:
        return {
            "doubts": self.doubts,
            "by_kind": self.by_kind,
            "looks": [
                {
                    "learning_rate": look.learning_rate,
                    "ratio": _finite(look.ratio),
                    "error": _finite(look.error),
                    "steps": look.steps,
                }
                for look in self.looks
            ],
        }

    def __str__(self) -> str:
        low, high = self.range
        use = "Use" if not self.doubts else "Do not rely on"
        lines = [f"{use} {self.learning_rate:.3g} for all tensors.", self.reason]
        lines += [f"68 % range of the learning rate: {low:.3g} to {high:.3g}.", *self._about_looks()]
        return "\n".join(lines)

    def _about_looks(self) -> Iterator[str]:
        yield from (f"Signal and curvature are not to be trusted: {doubt}." for doubt in self.doubts)
        if not self.looks:
            return
        yield from (f"{kind}: steps {factor:.2g} times as long would suit it." for kind, factor in self.by_kind.items())
        yield ""
        yield f"Signal and curvature in {sum(look.steps for look in self.looks)} training steps of copies of the model:"
        for look in self.looks:
            yield f"  at {look.learning_rate:.3g}: curvature / signal {look.ratio:.2g}"


def looks_of(trial: Trial, start: float, steps: int, looks: int) -> tuple[Look, ...]:
    """Search the learning rate of a training.

    Args:
        trial: The training.
        start: The first learning rate.
        steps: Training steps of each copy.
        looks: Largest number of copies; 0: none.

    Raises:
        ValueError: If the learning rate to start from is not above 0 and finite, or nothing can be measured there.
    """
    if not 0 < start < math.inf:
        raise ValueError(f"the learning rate is {start}; the search starts there, so it must be above 0 and finite.")

    def look(learning_rate: float) -> Look:
        probe = CurvatureProbe(steps)
        copied = trial.run(learning_rate, probe)
        found = probe.look(learning_rate, copied.state.global_step)
        _check(found)
        return found

    return tuple(search(look, start, looks))


def _check(look: Look) -> None:
    """Raise ValueError if a look says nothing about its learning rate."""
    if look.losses and not math.isfinite(look.losses[0]):
        raise ValueError(
            f"the loss is {look.losses[0]} before the first step, so no learning rate can help: look at the weights, "
            "the data and the precision."
        )
    if not len(look.signal):
        raise ValueError(
            f"nothing could be measured at learning rate {look.learning_rate:.3g}: training ended after {look.steps} "
            "steps. Leave out the callback that stops it, give more steps, or more data; in a warm-up, the first step "
            "does nothing."
        )
    if not (look.signal.any() or look.curvature.any()):
        raise ValueError(
            f"the weights do not change at learning rate {look.learning_rate:.3g}: it is too small for their "
            "precision. Start from a higher one, or keep the weights in float32."
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
