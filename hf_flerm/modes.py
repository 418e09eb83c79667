"""Temporary states of a model, each put back by reference and also when the block raises."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a block in eval mode with nothing trainable, and leave no trace of it.

    Args:
        model: The model whose modes and `requires_grad` flags are put back.
        device: The device whose random stream is put back, beside those of Python, NumPy and torch's CPU.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator()
    devices = [device] if accelerator is not None and device.type == accelerator.type else []
    with torch.random.fork_rng(devices, device_type=accelerator.type if devices and accelerator else "cuda"):
        try:
            model.eval()
            for parameter in frozen:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for module, training in modes.items():
                module.training = training
            for parameter in frozen:
                parameter.requires_grad_(True)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let some parameters require a gradient for a block.

    Args:
        parameters: Parameters that do not require one outside of it.

    Yields:
        Nothing.
    """
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
