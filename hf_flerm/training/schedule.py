"""The optimizer steps at which a run measures."""

from __future__ import annotations

from collections.abc import Sequence

# Rates change most in the first steps, and a run may be short.
EARLY_STEPS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


class Schedule:
    """The optimizer steps at which a run measures; 0 is the first update.

    Args:
        every: The multiples of this number of steps are also measured, if `steps` is None.
        steps: Explicit steps, increasing. None: `EARLY_STEPS` and all multiples of `every`.
    """

    def __init__(self, every: int, steps: Sequence[int] | None = None) -> None:
        self._every = every
        self._steps = steps

    def is_due(self, step: int, last_measured: int | None) -> bool:
        """Return whether to measure a step.

        If a scheduled measurement failed or could not be made (learning rate 0 in a warm-up, a skipped step), the next
        step is due. A resumed run does not repeat measurements.

        Args:
            step: The coming optimizer step.
            last_measured: The step of the latest measurement; None if there is none.
        """
        wanted = self._latest(step)
        return wanted is not None and (last_measured is None or wanted > last_measured)

    def _latest(self, step: int) -> int | None:
        """The latest scheduled step up to `step`."""
        steps = self._steps
        if steps is None:
            steps = (*EARLY_STEPS, step - step % self._every)
        return max((scheduled for scheduled in steps if scheduled <= step), default=None)
