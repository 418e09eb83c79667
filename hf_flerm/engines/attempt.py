"""One measurement as far as this process gets with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


class Attempt:
    """Runs the parts of a measurement; an exception in one must not keep this process out of the collective calls.

    The other processes would wait in them forever. So the exception is kept, the remaining parts are left out, and the
    sum over processes (`rates/process_sum.py`) reports it on all of them.

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

    def any_process(self, flag: bool) -> bool:
        """Return whether a flag is set on any process that must run the model in step."""
        (found,) = self._agree([flag])
        return found
