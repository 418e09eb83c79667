"""Context managers that change a model for a block and restore it afterwards, also if the block raises.

State is restored by reference or from a copy, never by arithmetic. Engines are not used here: with sharded weights, the
caller enters `Engine.released_after` inside `undisturbed`.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .name_text import preview

logger = logging.get_logger(__name__)

# (class, attribute, value during a probe). With `padding_idx` or `scale_grad_by_freq`, the gradient of an embedding is
# not the derivative of its output. On a CPU, bitsandbytes repacks 4-bit weights in place if no gradient is needed.
_PROBED_WITH: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.Embedding, "padding_idx", None),
    (nn.Embedding, "scale_grad_by_freq", False),
    (nn.Module, "support_avx512bf16_for_cpu", False),
)

# Attributes of every module: parameters, buffers, parts and hooks are put back by other means, or not changed at all.
_REGISTRIES = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set)

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# How far `own_generators` looks: the Trainer wraps a collator, which may hold another, which has a generator.
_LEVELS = 5
_SYSTEM = random.SystemRandom  # has no state
_CALLED = ("__call__", "__getitem__")
_SHORT = 16  # entries of a list or dict of settings; longer ones are data


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random states of Python, NumPy, torch's CPU generator and a device after a block."""
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
    """Put the random generators that objects draw from back after a block, and keep no generator that was made in it.

    A collator with a seed makes its generator at the first call: it makes another one after the block.

    Args:
        *holders: Objects that may draw random numbers: a data set, a collator. Generators are found in attributes, in
            those of classes, in what a function or a `partial` refers to, and in short lists and dicts there.
    """
    reached = list(_reached(holders))
    namespaces = [value.__dict__ for value in reached if isinstance(getattr(value, "__dict__", None), dict)]
    named = [
        {name: value for name, value in namespace.items() if value is None or isinstance(value, _GENERATORS)}
        for namespace in namespaces
    ]
    drawing = [value for value in reached if isinstance(value, _GENERATORS) and not isinstance(value, _SYSTEM)]
    states = [(generator, _random_state(generator)) for generator in drawing]
    try:
        yield
    finally:
        for namespace, own in zip(namespaces, named, strict=True):
            for name in [name for name, value in namespace.items() if isinstance(value, _GENERATORS)]:
                if name in own:
                    namespace[name] = own[name]
                else:
                    del namespace[name]
        for generator, state in states:
            _set_random_state(generator, state)


def _reached(holders: Sequence[object]) -> Iterator[Any]:
    """What objects refer to, level by level; long lists and dicts are data, and are left out."""
    level: list[Any] = list(holders)
    seen: dict[int, Any] = {}
    for _ in range(_LEVELS):
        level = [value for value in {id(value): value for value in level}.values() if id(value) not in seen]
        seen |= {id(value): value for value in level}
        yield from level
        level = [entry for value in level for entry in _references(value)]


def _references(value: Any) -> Iterator[Any]:
    if isinstance(value, (Tensor, np.ndarray, type, ModuleType)):
        return
    if isinstance(value, (list, tuple, dict)):
        if len(value) <= _SHORT:
            yield from value.values() if isinstance(value, dict) else value
        return
    if inspect.ismethod(value):
        yield from (value.__self__, value.__func__)
        return
    if isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    if inspect.isfunction(value):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                yield cell.cell_contents
        yield from (value.__defaults__, value.__kwdefaults__)
        known = (value.__globals__.get(name) for name in value.__code__.co_names)
        yield from (entry for entry in known if isinstance(entry, _GENERATORS))  # the rest is the program
    elif hasattr(value, "__dict__"):
        yield from vars(value).values()
        for kind in type(value).__mro__:
            called = (vars(kind).get(name) for name in _CALLED)
            yield from filter(inspect.isfunction, called)
            yield from (entry for entry in vars(kind).values() if isinstance(entry, _GENERATORS))


def _random_state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state()


def _set_random_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a block with the model in eval mode, uncompiled and without trainable parameters, and restore everything.

    Restored are modes, `requires_grad` flags, random states, buffers, other attributes of modules, and the parameters.

    Args:
        model: The model.
        device: The device whose random state is restored, besides those of Python, NumPy and torch's CPU generator.
    """
    modes = {module: module.training for module in model.modules()}
    # Of all parameters: a forward pass that switches adapters makes others trainable.
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(kept_random_state(device))
        stack.enter_context(_kept_parameters(model))
        if "torch._dynamo" in sys.modules:  # compiled code does not run hooks that were set after compilation
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modes:
            for kind, attribute, value in _PROBED_WITH:
                if attribute in vars(module) and isinstance(module, kind) and not _computes_with(module, attribute):
                    stack.callback(setattr, module, attribute, getattr(module, attribute))
                    setattr(module, attribute, value)
            stack.enter_context(_kept_state(module))
        try:
            model.eval()
            for parameter in flags:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for module, training in modes.items():
                vars(module)["training"] = training
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)


def _computes_with(module: nn.Module, attribute: str) -> bool:
    """Whether a subclass of `nn.Embedding` overrides `forward` and reads an attribute there.

    Learned position embeddings read `padding_idx` as the offset of the first position.
    """
    forward = inspect.unwrap(type(module).forward)
    has_own = isinstance(module, nn.Embedding) and forward is not nn.Embedding.forward
    return has_own and attribute in forward.__code__.co_names


@contextmanager
def _kept_parameters(model: nn.Module) -> Iterator[None]:
    """Restore the parameters of a module if other objects took their place during the block, and warn.

    This is a safety net: modules are differentiated with other tensors in place of their parameters, and a fault there
    would leave a model that cannot be trained. Buffers are restored without a warning (`_kept_state`), because forward
    passes replace these, too.
    """
    # By `items` and `get`: an engine may have put a dict there that gathers a parameter when it is looked up by index.
    kept = [(path, module, dict(module._parameters.items())) for path, module in model.named_modules()]
    try:
        yield
    finally:
        replaced = []
        for path, module, parameters in kept:
            now = module._parameters
            wrong = [name for name, own in parameters.items() if name not in now or now[name] is not own]
            # PEFT's DoRA puts a new Parameter over the same memory into a quantized layer whenever it runs.
            own_doing = [name for name in wrong if _is_same_weight(now.get(name), parameters[name])]
            for name in wrong:
                vars(module).pop(name, None)  # a plain attribute would shadow the parameter
            if wrong:
                added = {name: value for name, value in now.items() if name not in parameters}
                now.clear()  # and filled again, which keeps the order of `named_parameters`
                now.update(parameters | added)
            replaced += [f"{path}.{name}" if path else name for name in wrong if name not in own_doing]
        if replaced:
            logger.warning_once(
                f"measuring replaced the parameters {preview(replaced)} of {type(model).__name__} with other objects. "
                "They were restored and training is not affected, but the rates may be wrong. "
                "Please report this, with the model's class and its adapter."
            )


def _is_same_weight(now: nn.Parameter | None, before: nn.Parameter | None) -> bool:
    both = isinstance(now, nn.Parameter) and isinstance(before, nn.Parameter)
    return both and now.data_ptr() == before.data_ptr()  # type: ignore[union-attr]


@contextmanager
def _kept_state(module: nn.Module) -> Iterator[None]:
    """Restore what a forward pass may change in a module: its buffers and its other attributes.

    Rotary embeddings store the length of the longest input, recurrent models the state of the last batch, PEFT the
    active adapter. Attributes that the block adds stay: Transformers records there which hooks it has added.
    """
    attributes = {name: value for name, value in vars(module).items() if name not in _REGISTRIES}
    contents = [value for value in attributes.values() if type(value) in _CONTAINERS]
    copies = [copy.copy(value) for value in contents]
    plain = {name: value for name, value in attributes.items() if type(value) is Tensor}
    tensors = [value for value in (*module._buffers.values(), *plain.values()) if value is not None]
    clones = [(value, value._version, value.detach().clone()) for value in tensors]
    buffers = dict(module._buffers)
    try:
        yield
    finally:
        module._buffers.update(buffers)
        vars(module).update(attributes)
        for value, version, clone in clones:
            if value._version != version:
                value.detach().copy_(clone)
        for value, kept in zip(contents, copies, strict=True):
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(kept)


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Checkpoint activations in eval mode if training does: Transformers checkpoints only in training mode.

    The checkpoints are always non-reentrant, because reentrant ones do not support `torch.autograd.grad`.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                stack.enter_context(replaced_forward(module, partial(_checkpoint, module.forward)))
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward method of a module during a block."""
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
    """Set `requires_grad` of frozen parameters during a block."""
    parameters = list(parameters)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
