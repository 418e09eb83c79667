"""A small real training that may be killed; a module of its own, for a server of processes that has imported it."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_flerm import FLeRMConfig
from tests.shared.training import MODELS, make_trainer

STEPS = 5
FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.truncate", "os.chmod"}
DROPOUT = 0.2


def train(folder: Path, base: Path | None, resume: str | None = None, operations: int | None = None) -> None:
    """Train with a checkpoint after every step.

    Args:
        folder: The output folder.
        base: The folder of a profile to match; None to record.
        resume: The checkpoint to go on from.
        operations: After so many operations on files below the folder the process kills itself; None: never.
    """
    torch.set_num_threads(1)
    gc.freeze()  # what the server has imported: see tests/conftest.py
    logging.set_verbosity_error()
    config = FLeRMConfig() if base is None else FLeRMConfig(mode="match", profile=str(base))
    model = MODELS["full" if base is None else "lora"](DROPOUT)
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS}
    trainer = make_trainer(folder, model, config, alone=base is None, **options)
    if operations is not None:
        _kill_after(operations, str(folder))
    trainer.train(resume_from_checkpoint=resume)


def whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was finished: the trainer's state is written last."""
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    while last is not None and not _is_whole(Path(last)):
        number = int(last.rpartition("-")[2])
        last = str(folder / f"checkpoint-{number - 1}") if number > 1 else None
    return last


def _is_whole(checkpoint: Path) -> bool:
    state = checkpoint / "trainer_state.json"
    return state.is_file() and state.read_text().endswith("}\n")


def _kill_after(operations: int, folder: str) -> None:
    count = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_OPERATIONS and str(arguments[0]).startswith(folder) and next(count) >= operations:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
