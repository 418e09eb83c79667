"""What the console shows of a measurement: a few numbers beside the loss, and not an entry for each kind of tensor.

A `Trainer` passes one dict of logs to all its callbacks in turn: the trackers', the user's, and the console's. The
callbacks here change the `flerm/` entries of this dict on its way. All entries are in `state.log_history`.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

_LINE = (
    "flerm/rate/total",
    "flerm/smallest_scale",
    "flerm/largest_scale",
    "flerm/seconds",
    "flerm/measurements",
    "flerm/share_of_time",
)


def line_of(entries: dict[str, float]) -> dict[str, float]:
    """Return the entries that the console shows."""
    return {key: value for key, value in entries.items() if key in _LINE}


def show_all_but_on_console(trainer: Trainer, callback: TrainerCallback) -> None:
    """Put a callback first in a trainer, and make all callbacks but the console's see all `flerm/` entries.

    Args:
        trainer: The trainer. Callbacks that are added later see all entries, too.
        callback: Writes the entries to the log history and those of the line to the logs; see `FLeRMCallback.on_log`.
    """
    callbacks = trainer.callback_handler.callbacks
    shown: list[TrainerCallback] = [callback, _AllEntries()]
    for other in callbacks:
        is_console = isinstance(other, (PrinterCallback, ProgressCallback))
        shown += [_LineOnly(), other, _AllEntries()] if is_console else [other]
    callbacks[:] = shown


class _AllEntries(TrainerCallback):
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take over all entries from the log history."""
        latest = state.log_history[-1] if state.log_history else {}
        kwargs["logs"].update({key: value for key, value in latest.items() if key.startswith("flerm/")})


class _LineOnly(TrainerCallback):
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take out the entries that are not in the line."""
        for key in [key for key in kwargs["logs"] if key.startswith("flerm/") and key not in _LINE]:
            del kwargs["logs"][key]
