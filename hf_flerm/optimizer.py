"""One learning rate per tensor in an optimizer that somebody else made, without a trace in its schedule or logs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .names import preview

GROUP_KEY = "flerm_name"
_PER_GROUP_LISTS = ("base_lrs", "lr_lambdas", "_last_lr", "min_lrs", "_initial_lrs")


def raw_optimizer(optimizer: Any) -> Optimizer:
    """Unwrap what Accelerate puts around an optimizer.

    Args:
        optimizer: An optimizer or a wrapper with an `.optimizer`.

    Returns:
        The optimizer that steps.

    Raises:
        ValueError: If that is not a `torch.optim.Optimizer`.
    """
    while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "accelerator_state"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise ValueError(f"{type(optimizer).__name__} is not a torch optimizer; FLeRM cannot follow its steps.")
        optimizer = inner
    return optimizer


def learning_rates(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Read the learning rate of every tensor.

    Args:
        optimizer: The optimizer that steps.
        parameters: `{canonical name: parameter}` of all that is trained.

    Returns:
        `{name: nominal learning rate}`.

    Raises:
        ValueError: If a parameter is in no group.
    """
    by_id = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in by_id]
    if missing:
        raise ValueError(
            f"{type(optimizer).__name__} does not hold the trainable parameters {preview(missing)}. FLeRM needs an "
            "optimizer over the model's own parameters (layer-wise and fused-backward optimizers have none)."
        )
    return {name: by_id[id(parameter)] for name, parameter in parameters.items()}


def split_param_groups(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], scheduler: Any = None) -> None:
    """Give every tensor a param group of its own, in place; a second call changes nothing.

    The order of the parameters, and with it the optimizer state's, stays; so does every option of a group.

    Args:
        optimizer: The optimizer that steps.
        parameters: `{canonical name: parameter}` of all that is trained.
        scheduler: A learning-rate scheduler that exists already; what it keeps per group is spread too.

    Raises:
        ValueError: If a trainable parameter is in no group.
    """
    learning_rates(optimizer, parameters)
    if all(GROUP_KEY in group for group in optimizer.param_groups):
        return
    names = {id(parameter): name for name, parameter in parameters.items()}
    counts = [len(group["params"]) for group in optimizer.param_groups]
    optimizer.param_groups[:] = [
        {**group, "params": [parameter], GROUP_KEY: names.get(id(parameter), f"frozen.{index}")}
        for group in optimizer.param_groups
        for index, parameter in enumerate(group["params"])
    ]
    for part in _schedulers(scheduler):
        for attribute in _PER_GROUP_LISTS:
            values = getattr(part, attribute, None)
            if isinstance(values, list) and len(values) == len(counts):
                spread = [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
                setattr(part, attribute, spread)


class StepScales:
    """Multiplies learning rates around `optimizer.step` and takes the factors off again.

    Outside of a step the scheduler's own numbers stand in the groups, so every schedule, log and checkpoint is as it
    would be without.

    Args:
        optimizer: The optimizer that steps, split by `split_param_groups`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.scales: dict[str, float] = {}
        self._nominal: dict[str, Any] = {}
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._scale),
            optimizer.register_step_post_hook(self._unscale),
        ]

    def remove(self) -> None:
        """Take the hooks off the optimizer, and the factors too if a step was cut short."""
        self._restore()
        for handle in self._handles:
            handle.remove()

    def _scale(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._restore()
        for group in optimizer.param_groups:
            scale = self.scales.get(group.get(GROUP_KEY, ""), 1.0)
            if scale != 1.0:
                self._nominal[group[GROUP_KEY]] = _copy(group["lr"])
                _set_learning_rate(group, group["lr"] * scale)

    def _unscale(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._restore()

    def _restore(self) -> None:
        for group in self._optimizer.param_groups:
            if group.get(GROUP_KEY) in self._nominal:
                _set_learning_rate(group, self._nominal.pop(group[GROUP_KEY]))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _set_learning_rate(group: dict[str, Any], value: Any) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].copy_(value)
    else:
        group["lr"] = value


def _schedulers(scheduler: Any) -> Iterator[Any]:
    if scheduler is not None:
        yield scheduler
        for part in getattr(scheduler, "_schedulers", ()):
            yield from _schedulers(part)
