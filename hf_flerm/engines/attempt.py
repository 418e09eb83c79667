"""One measurement on this process, which may fail without stopping the other processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


class Attempt:
    """Runs the parts of a measurement in order. If one raises, it skips the others.

    This process then still joins the collective calls, in which the other processes would wait for it forever. The
    exception is kept in `failure`, and the sum over processes (`rates/process_sum.py`) raises it on every process.

    Attributes:
        failure: The exception of the part that failed; None if no part has failed.

    Args:
        agree: Combines flags over the processes that run the model together: a flag is set if any of them has set it.
    """

    def __init__(self, agree: Callable[[Sequence[bool]], list[bool]]) -> None:
        self.failure: Exception | None = None
        self._agree = agree

    def run(self, part: Callable[[], Result]) -> Result | None:
        """Run the next part of the measurement.

        Args:
            part: The function to call.

        Returns:
            The result of the part. None if it failed or was skipped, on this process or on one that runs the model
            together with it.
        """
        result = None
        if self.failure is None:
            try:
                result = part()
            except Exception as error:
                self.failure = error
        (failed,) = self._agree([self.failure is not None])
        return None if failed else result

    def any_process(self, flag: bool) -> bool:
        """Return whether a flag is set on any of the processes that run the model together."""
        (found,) = self._agree([flag])
        return found
