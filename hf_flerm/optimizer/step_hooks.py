"""Hooks around the steps of an optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def runs_step_hooks(optimizer: Optimizer) -> bool:
    """Return whether an optimizer runs step hooks; False for a subclass that does not call `Optimizer.__init__`."""
    return bool(getattr(type(optimizer).step, "hooked", False)) and hasattr(optimizer, "_optimizer_step_post_hooks")


class StepHooks:
    """Calls two functions around every step of an optimizer, until it is removed.

    PyTorch wraps `step` of every optimizer class, so hooks run twice if `step` of a subclass calls `step` of its base
    class. These hooks act only on the outermost call.

    Args:
        optimizer: An optimizer that runs step hooks.
        begin: Called with the optimizer before a step. If the step raises, `end` is not called.
        end: Called with the optimizer after a step.
    """

    def __init__(
        self, optimizer: Optimizer, begin: Callable[[Optimizer], None], end: Callable[[Optimizer], None]
    ) -> None:
        self._begin = begin
        self._end = end
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
            self._begin(optimizer)

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if sys._getframe(1) is self._outermost:
            self._outermost = None
            self._end(optimizer)


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
