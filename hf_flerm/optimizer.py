"""One learning rate per tensor in an optimizer that somebody else made, without a trace in its schedule or logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .names import preview

GROUP_KEY = "flerm_name"
NAMES_KEY = "flerm_names"


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
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in groups]
    if missing:
        raise ValueError(
            f"{type(optimizer).__name__} does not hold the trainable parameters {preview(missing)}. FLeRM needs an "
            "optimizer over the model's own parameters (layer-wise and fused-backward optimizers have none)."
        )
    without = [name for name, parameter in parameters.items() if groups[id(parameter)].get("lr") is None]
    if without:
        raise ValueError(
            f"{type(optimizer).__name__} has no learning rate for {preview(without)}: it sets its own steps. "
            "Give it one (for Adafactor: relative_step=False and lr)."
        )
    return {name: float(groups[id(parameter)]["lr"]) for name, parameter in parameters.items()}


def split_param_groups(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give every tensor a param group of its own, in place; a second call changes nothing.

    The order of the parameters stays, and so does every option of a group. Checkpoints keep the groups that there were:
    `state_dict()` puts them together again and `load_state_dict()` takes them apart, so that a plain `Trainer` reads
    what was saved and the other way round. To be called before a learning-rate scheduler is made: these count groups.

    Args:
        optimizer: The optimizer that steps.
        parameters: `{canonical name: parameter}` of all that is trained.

    Raises:
        ValueError: If a trainable parameter is in no group, or has no learning rate.
    """
    learning_rates(optimizer, parameters)
    if all(GROUP_KEY in group for group in optimizer.param_groups):
        return
    names = {id(parameter): name for name, parameter in parameters.items()}
    counts = [len(group["params"]) for group in optimizer.param_groups]
    frozen = (f"frozen.{index}" for index in count())
    optimizer.param_groups[:] = [
        {
            **{key: _copy(value) for key, value in group.items()},
            "params": [parameter],
            GROUP_KEY: names[id(parameter)] if id(parameter) in names else next(frozen),
        }
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    optimizer.register_state_dict_post_hook(partial(_join, counts=counts))
    optimizer.register_load_state_dict_pre_hook(partial(_part, counts=counts))


def _join(optimizer: Optimizer, state_dict: dict[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    """A state dict with the groups that there were before the split; each keeps its tensors' names."""
    split = iter(state_dict["param_groups"])
    joined = []
    for size in counts:
        parts = list(islice(split, size))
        if not parts:
            # A group without parameters has left no part to take its options from.
            joined.append({**optimizer.defaults, "params": [], NAMES_KEY: []})
            continue
        options = {key: value for key, value in parts[0].items() if key != GROUP_KEY}
        params = [index for part in parts for index in part["params"]]
        joined.append({**options, "params": params, NAMES_KEY: [part[GROUP_KEY] for part in parts]})
    return {**state_dict, "param_groups": joined}


def _part(optimizer: Optimizer, state_dict: dict[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    """A state dict with a group for every tensor, from one with the groups that there were."""
    groups = state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != list(counts):
        return state_dict
    own = [group[GROUP_KEY] for group in optimizer.param_groups]
    saved = [name for group in groups for name in group.get(NAMES_KEY, ())]
    if saved and saved != own:
        raise ValueError(
            "the optimizer's checkpoint belongs to tensors in another order: it has "
            f"{preview(set(saved) - set(own)) if set(saved) != set(own) else saved}, this optimizer {own}. "
            "Resume with the model that was saved."
        )
    parted = [
        {key: _copy(value) for key, value in group.items() if key != NAMES_KEY} | {"params": [index]}
        for group in groups
        for index in group["params"]
    ]
    named = [{**group, GROUP_KEY: name} for group, name in zip(parted, own, strict=True)]
    return {**state_dict, "param_groups": named}


class StepScales:
    """Multiplies learning rates inside `optimizer.step` and nowhere else.

    Just before a step the groups are parted by scale, just after it the optimizer has its own groups again: schedulers,
    logs and checkpoints see the nominal learning rate and the groups that they know.

    Args:
        optimizer: The optimizer that steps.
        parameters: `{canonical name: parameter}` of all that is trained.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        self.scales: dict[str, float] = {}
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._optimizer = optimizer
        self._parted: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._part()),
            optimizer.register_step_post_hook(lambda *_: self._join()),
        ]

    def remove(self) -> None:
        """Take the hooks off the optimizer, and put its groups together if a step was cut short."""
        self._join()
        for handle in self._handles:
            handle.remove()

    def _part(self) -> None:
        self._join()
        for group in self._optimizer.param_groups:
            by_scale: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_scale.setdefault(self.scales.get(self._names.get(id(parameter), ""), 1.0), []).append(parameter)
            parts = [
                {**group, "params": parameters, "lr": group["lr"] if scale == 1.0 else group["lr"] * scale}
                for scale, parameters in by_scale.items()
            ]
            self._parted.append((group, parts or [{**group}]))
        self._optimizer.param_groups = [part for _, parts in self._parted for part in parts]

    def _join(self) -> None:
        if not self._parted:
            return
        for group, (part, *_) in self._parted:
            # Some optimizers count steps or keep averages in their groups.
            group.update({key: value for key, value in part.items() if key not in ("params", "lr")})
        self._optimizer.param_groups = [group for group, _ in self._parted]
        self._parted = []


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
