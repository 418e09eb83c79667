"""Hooks around the steps of an optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def runs_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether an optimizer runs step hooks: a subclass that does not call `Optimizer.__init__` has none."""
    return bool(getattr(type(optimizer).step, "hooked", False)) and hasattr(optimizer, "_optimizer_step_post_hooks")


class FollowedSteps:
    """Calls two functions around every step of an optimizer, until it is removed.

    Torch wraps `step` of every class that was ever instantiated, so hooks run once more where the step of a subclass
    calls that of its base class. Here only the outermost call counts.

    Attributes:
        begin: Called with the optimizer before a step. It is not followed by `end` if the step raises.
        end: Called with the optimizer after a step.

    Args:
        optimizer: An optimizer that runs step hooks.
        begin: See above.
        end: See above.
    """

    def __init__(
        self, optimizer: Optimizer, begin: Callable[[Optimizer], None], end: Callable[[Optimizer], None]
    ) -> None:
        self.begin = begin
        self.end = end
        self._outermost: FrameType | None = None  # the call of `step` that is running, or one that has raised
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._outermost = None

    def _before(self, optimizer: Optimizer, *_: Any) -> None:
        caller = sys._getframe(1)
        if not any(frame is self._outermost for frame in _callers(caller)):
            self._outermost = caller
            self.begin(optimizer)

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if sys._getframe(1) is self._outermost:
            self._outermost = None
            self.end(optimizer)


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
