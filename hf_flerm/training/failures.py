"""Handling of failed measurements: training continues, with one warning; measuring stops after three in a row."""

from __future__ import annotations

from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils import logging

logger = logging.get_logger(__name__)

# One failure may be due to one batch. After three in a row, the next measurement is expected to fail, too.
_MOST_IN_A_ROW = 3


class Failures:
    """Counts failed measurements, and warns of each kind of problem once.

    Attributes:
        given_up: Whether to stop measuring in this run.
        latest: The latest exception as text, as the object would keep tensors alive. Empty if no measurement failed.
    """

    def __init__(self) -> None:
        self.latest = ""
        self.given_up = False
        self._in_a_row = 0
        self._reported: set[str] = set()

    def add(self, step: int, error: Exception) -> None:
        """Report a measurement that failed.

        Args:
            step: The optimizer step that was to be measured.
            error: The exception.
        """
        self.latest = repr(error)
        if should_reduce_batch_size(error):
            self.given_up = True
            logger.warning(
                f"out of memory in the measurement at step {step}, even with one example per batch. FLeRM stops "
                f"measuring; training continues. Set snapshot_device='cpu' to save memory. {error}"
            )
            return
        self._in_a_row += 1
        self.given_up = self._in_a_row >= _MOST_IN_A_ROW
        if self.given_up:
            logger.warning(f"{self._in_a_row} measurements failed in a row. FLeRM stops measuring. {error!r}")
        elif "failure" not in self._reported:
            self._reported.add("failure")
            logger.warning(
                f"the measurement at step {step} failed; training is not affected. FLeRM tries again at the next step: "
                f"{error!r}",
                exc_info=error,
            )

    def clear(self) -> None:
        """Note that a measurement succeeded."""
        self._in_a_row = 0

    def warn_once(self, topic: str, message: str) -> None:
        """Warn, unless the message is empty or there was a warning on this topic before."""
        if message and topic not in self._reported:
            self._reported.add(topic)
            logger.warning(message)
