"""What happens when a measurement fails: one warning, training goes on, and after three in a row no more attempts."""

from __future__ import annotations

from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils import logging

logger = logging.get_logger(__name__)

# A failure may be the fault of one batch; after three in a row the next one will fail too.
_MOST_IN_A_ROW = 3


class Failures:
    """Counts measurements that failed, and warns of each kind of problem once.

    Attributes:
        given_up: Whether nothing more is to be measured.
        latest: The latest exception as text (itself, it would keep tensors alive); empty if no measurement has failed.
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
                f"memory does not suffice for a measurement at step {step}, with one example at a time either: "
                f"nothing more is measured, training goes on. snapshot_device='cpu' needs less. {error}"
            )
            return
        self._in_a_row += 1
        self.given_up = self._in_a_row >= _MOST_IN_A_ROW
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
        """Note that a measurement succeeded."""
        self._in_a_row = 0

    def warn_once(self, topic: str, message: str) -> None:
        """Warn unless a warning on this topic was given before or the message is empty."""
        if message and topic not in self._reported:
            self._reported.add(topic)
            logger.warning(message)
