"""Temporary states of a model, each put back by reference and also when the block raises."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..engines.sharding import reshard

# What modules are given for the time of a probe. Autograd leaves an embedding's padding row out of its gradient and may
# divide by frequencies, though outputs do not; bitsandbytes repacks 4-bit weights in place for a product that has no
# gradient.
_PROBED_WITH: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.Embedding, "padding_idx", None),
    (nn.Embedding, "scale_grad_by_freq", False),
    (nn.Module, "support_avx512bf16_for_cpu", False),
)

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Put the random streams of Python, NumPy, torch's CPU and a device back after a block.

    Args:
        device: The device.

    Yields:
        Nothing.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [] if device.type in ("cpu", "meta") else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def own_generators(*holders: object) -> Iterator[None]:
    """Let objects draw by copies of their random generators for a block, and leave no generator that is made in it.

    Args:
        *holders: Objects that may have some: a data set, a collator with a seed, or one in another collator.

    Yields:
        Nothing.
    """
    outer = [vars(holder) for holder in holders if hasattr(holder, "__dict__")]
    inner = [getattr(value, "__dict__", None) for attributes in outer for value in attributes.values()]
    found = [attributes for attributes in (*outer, *inner) if isinstance(attributes, dict)]
    before = [
        {name: value for name, value in attributes.items() if value is None or isinstance(value, _GENERATORS)}
        for attributes in found
    ]
    for attributes, own in zip(found, before, strict=True):
        attributes.update(copy.deepcopy(own))
    try:
        yield
    finally:
        for attributes, own in zip(found, before, strict=True):
            generators = {name for name, value in attributes.items() if isinstance(value, _GENERATORS)}
            attributes.update({name: own[name] for name in generators & own.keys()})


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a block in eval mode with nothing trainable, uncompiled, and leave no trace of it.

    Args:
        model: The model whose modes and `requires_grad` flags are put back.
        device: The device whose random stream is put back, beside those of Python, NumPy and torch's CPU.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(kept_random_state(device))
        if "torch._dynamo" in sys.modules:  # what is compiled does not see hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modes:
            for kind, attribute, value in _PROBED_WITH:
                if attribute in vars(module) and isinstance(module, kind):
                    stack.callback(setattr, module, attribute, getattr(module, attribute))
                    setattr(module, attribute, value)
            stack.enter_context(_kept_state(module))
        try:
            model.eval()
            for parameter in frozen:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            reshard(model)
            for module, training in modes.items():
                vars(module)["training"] = training
            for parameter in frozen:
                parameter.requires_grad_(True)


@contextmanager
def _kept_state(module: nn.Module) -> Iterator[None]:
    """Put back a module's buffers and the numbers beside them: rotary embeddings note the longest input seen there."""
    buffers = {
        name: (value, None if value is None else (value._version, value.clone()))
        for name, value in module._buffers.items()
    }
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}
    try:
        yield
    finally:
        for name, (value, kept) in buffers.items():
            module._buffers[name] = value
            if value is not None and kept is not None and value._version != kept[0]:
                value.copy_(kept[1])
        vars(module).update(numbers)


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Checkpoint the layers for a block that are checkpointed in training: Transformers does not in eval mode.

    Args:
        model: The model. Its layers are checkpointed without re-entering autograd, whichever way training does it.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                stack.enter_context(replaced_forward(module, partial(_checkpoint, module.forward)))
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward for a block.

    Args:
        module: The module.
        forward: What runs in its forward's place.

    Yields:
        Nothing.
    """
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _checkpoint(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


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
