"""What happens when a measurement fails: every process hears of it, the user is told once, training goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils import logging

logger = logging.get_logger(__name__)
Result = TypeVar("Result")

# A failure may be the fault of one batch; after three in a row the next one will fail too.
_MOST_IN_A_ROW = 3


class Attempt:
    """One measurement as far as this process gets with it.

    A part that fails must not keep this process out of the collective calls that follow: the others would wait forever.
    So the exception is kept, the remaining parts are left out, and the sum over processes reports it to all.

    Attributes:
        failure: The exception of the part that failed; None so far.

    Args:
        agree: Maps flags to flags that are the same on all processes that must run the model in step.
    """

    def __init__(self, agree: Callable[[Sequence[bool]], list[bool]]) -> None:
        self.failure: Exception | None = None
        self._agree = agree

    def run(self, part: Callable[[], Result]) -> Result | None:
        """Run the next part of the measurement.

        Args:
            part: Runs it.

        Returns:
            Its result; None if it failed or is left out, here or on a process that must run the model in step.
        """
        result = None
        if self.failure is None:
            try:
                result = part()
            except Exception as error:
                self.failure = error
        (failed,) = self._agree([self.failure is not None])
        return None if failed else result


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
