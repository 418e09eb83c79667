"""Param groups of an optimizer that somebody else made: learning rates of tensors, and a group for every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..model.names import preview

GROUP_KEY = "flerm_name"
NAMES_KEY = "flerm_names"
_OWN_TO_A_PART = ("params", "lr", "weight_decay")
_PER_GROUP_LISTS = ("base_lrs", "lr_lambdas", "_last_lr", "min_lrs", "max_lrs", "_init_lrs")


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


def learning_rates(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
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


def split_param_groups(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[int]:
    """Give every tensor a param group of its own, in place; a second call changes nothing.

    The order of the parameters stays, and so does every option of a group. Checkpoints keep the groups that there were:
    `state_dict()` puts them together again and `load_state_dict()` takes them apart, so that a plain `Trainer` reads
    what was saved and the other way round (`joined_scheduler` does the same for a scheduler's state). To be called
    before a learning-rate scheduler is made: these count groups. An optimizer that loads its state by code of its own
    (bitsandbytes) would not take it apart: it keeps its groups, and scales apply to it all the same.

    Args:
        optimizer: The optimizer that steps.
        parameters: `{canonical name: parameter}` of all that is trained.

    Returns:
        The sizes of the groups that there were; empty if they were split before, or stay.

    Raises:
        ValueError: If a trainable parameter is in no group, or has no learning rate.
    """
    learning_rates(optimizer, parameters)
    own_loading = type(optimizer).load_state_dict is not Optimizer.load_state_dict
    if own_loading or all(GROUP_KEY in group for group in optimizer.param_groups):
        return []
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
    return counts


@contextmanager
def joined_scheduler(scheduler: Any, sizes: Sequence[int]) -> Iterator[None]:
    """Give a scheduler, for a block, the state that it would have over the groups from before a split.

    Args:
        scheduler: A scheduler over split groups, or None.
        sizes: What `split_param_groups` returned.

    Yields:
        Nothing.
    """
    starts = [sum(sizes[:index]) for index in range(len(sizes))]

    def change(length: int, changed: Callable[[list[Any]], list[Any]]) -> None:
        for part in _schedulers(scheduler) if sizes else ():
            for attribute in _PER_GROUP_LISTS:
                values = getattr(part, attribute, None)
                if isinstance(values, list) and len(values) == length:
                    setattr(part, attribute, changed(values))

    change(sum(sizes), lambda values: [values[min(start, len(values) - 1)] for start in starts])
    try:
        yield
    finally:
        change(len(sizes), lambda values: [v for v, size in zip(values, sizes, strict=True) for _ in range(size)])


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
    indices = [index for group in groups for index in group["params"]]
    saved = [name for group in groups for name in group.get(NAMES_KEY, ())] or own
    if set(saved) != set(own):
        raise ValueError(
            f"the optimizer's checkpoint belongs to other tensors: only it has {preview(set(saved) - set(own))}, only "
            f"this optimizer {preview(set(own) - set(saved))}. Resume with the model that was saved."
        )
    parted = {
        name: {key: _copy(value) for key, value in group.items() if key != NAMES_KEY} | {"params": [index]}
        for name, index, group in zip(saved, indices, (g for g in groups for _ in g["params"]), strict=True)
    }
    return {**state_dict, "param_groups": [{**parted[name], GROUP_KEY: name} for name in own]}


def _schedulers(scheduler: Any) -> Iterator[Any]:
    if scheduler is not None:
        yield scheduler
        for part in getattr(scheduler, "_schedulers", ()):
            yield from _schedulers(part)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
