"""What goes wrong around a training's measurements: told once, and given up on after a while."""

from __future__ import annotations

from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils import logging

logger = logging.get_logger(__name__)
_IN_A_ROW = 3


class Failures:
    """Keeps count of measurements that failed, and of what the user was warned of.

    Attributes:
        given_up: Whether nothing more is to be measured.
    """

    def __init__(self) -> None:
        self.given_up = False
        self._in_a_row = 0
        self._reported: set[str] = set()

    def add(self, step: int, error: Exception) -> None:
        """Note and report a measurement that failed.

        Args:
            step: Its optimizer step.
            error: Why.
        """
        if should_reduce_batch_size(error):
            self.given_up = True
            logger.warning(
                f"memory does not suffice for a measurement at step {step}, with one example at a time either: "
                f"nothing more is measured, training goes on. snapshot_device='cpu' needs less. {error}"
            )
            return
        self._in_a_row += 1
        self.given_up = self._in_a_row >= _IN_A_ROW
        if self.given_up:
            logger.warning(f"{self._in_a_row} measurements failed in a row: nothing more is measured. {error!r}")
        elif "failure" not in self._reported:
            self._reported.add("failure")
            logger.warning(
                f"a measurement failed at step {step}; training goes on as it would have without it, "
                f"and it is tried again at the next step: {error!r}",
                exc_info=error,
            )

    def clear(self) -> None:
        """Note that a measurement was made."""
        self._in_a_row = 0

    def warn_once(self, about: str, message: str) -> None:
        """Warn, the first time.

        Args:
            about: What of.
            message: The warning; nothing happens if it is empty.
        """
        if message and about not in self._reported:
            self._reported.add(about)
            logger.warning(message)
