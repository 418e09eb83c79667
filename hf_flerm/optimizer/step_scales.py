"""One learning rate per tensor in an optimizer that somebody else made, without a trace in its schedule or logs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain, count, islice
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..model.names import preview
from .behavior import undo_scale

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


class StepScales:
    """Multiplies learning rates inside `optimizer.step` and nowhere else.

    Just before a step the tensors are regrouped by scale, just after it the optimizer has its own groups again:
    schedulers, logs and checkpoints see the nominal learning rate and the groups that they know. Weight decay that is
    apart from the update (`optimizer_table`) stays what it is at the nominal learning rate.

    Attributes:
        scales: `{canonical name: factor}`; to be replaced, not changed in place. 1 for a tensor that is not there.

    Args:
        optimizer: The optimizer that steps.
        parameters: `{canonical name: parameter}` of all that is trained.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        self.scales: Mapping[str, float] = {}
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._optimizer = optimizer
        self._whole: list[dict[str, Any]] | None = None
        self._stepped: list[dict[str, Any]] = []
        self._partition: _Partition | None = None
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
        whole = self._optimizer.param_groups
        groups = [group for group in whole if group["params"]]
        if self._partition is None or not self._partition.fits(groups, self.scales):
            self._partition = _Partition(self._optimizer, groups, self.scales, self._names)
        self._whole, self._stepped = whole, groups
        self._optimizer.param_groups = self._partition.parts(groups)

    def _join(self) -> None:
        if self._whole is not None and self._partition is not None:
            self._partition.take_over(self._stepped)
            self._optimizer.param_groups = self._whole
        self._whole = None


class _Partition:
    """Tensors that step alike, put together: a fused step over hundreds of groups is slow.

    It is made anew only when scales, groups, options or tensors are no longer the same; learning rates may change.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        groups: Sequence[dict[str, Any]],
        scales: Mapping[str, float],
        names: Mapping[int, str],
    ) -> None:
        self._scales = scales
        self._seen = _Seen(groups)
        self._parts: list[dict[str, Any]] = []
        self._members: list[tuple[float, list[int]]] = []  # of each part: its scale, and the groups in it
        self._alike: list[tuple[int, int]] = []  # a group, and the first group of a part that it is in
        found: dict[tuple[Any, ...], int] = {}
        for index, group in enumerate(groups):
            options = {key: value for key, value in group.items() if key not in ("params", GROUP_KEY)}
            signature = tuple(value if isinstance(value, Hashable) else id(value) for value in options.values())
            for parameter in group["params"]:
                scale = scales.get(names.get(id(parameter), ""), 1.0)
                alike = (scale, *options, *signature)
                if alike not in found:
                    found[alike] = len(self._parts)
                    self._parts.append({**options, **undo_scale(optimizer, group, scale), "params": []})
                    self._members.append((scale, []))
                self._parts[found[alike]]["params"].append(parameter)
                _, members = self._members[found[alike]]
                if not members or members[-1] != index:
                    members.append(index)
                    self._alike.append((index, members[0]))
        self._before = _Seen(self._parts)

    def fits(self, groups: Sequence[dict[str, Any]], scales: Mapping[str, float]) -> bool:
        if scales is not self._scales or not self._seen.hold(groups):
            return False
        rates = [group["lr"] for group in groups]
        return all(rates[index] == rates[first] for index, first in self._alike)

    def parts(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        for part, (scale, members) in zip(self._parts, self._members, strict=True):
            rate = groups[members[0]]["lr"]
            part["lr"] = rate if scale == 1.0 else rate * scale
        self._before = _Seen(self._parts)
        return list(self._parts)

    def take_over(self, groups: Sequence[dict[str, Any]]) -> None:
        """Give the groups what the optimizer has written into their parts: some count steps or keep averages there."""
        if self._before.hold(self._parts):
            return
        for part, (_, members) in zip(self._parts, self._members, strict=True):
            for index in members:
                groups[index].update({key: value for key, value in part.items() if key not in _OWN_TO_A_PART})


class _Seen:
    """What groups held but for their learning rates: options that are equal, and the very tensors."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._readers = [_reader(tuple(key for key in group if key not in ("lr", "params"))) for group in groups]
        self._sizes = _sizes(groups)
        self._options = [read(group) for read, group in zip(self._readers, groups, strict=True)]
        self._tensors = [tensor for group in groups for tensor in group["params"]]

    def hold(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Tell whether the groups still hold that."""
        if _sizes(groups) != self._sizes:
            return False
        try:
            options = [read(group) for read, group in zip(self._readers, groups, strict=True)]
        except KeyError:
            return False
        tensors = chain.from_iterable(group["params"] for group in groups)
        return all(map(is_, tensors, self._tensors)) and options == self._options


def _sizes(groups: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(len(group), len(group["params"])) for group in groups]


@cache
def _reader(keys: tuple[str, ...]) -> Callable[[Any], Any]:
    return itemgetter(*keys) if keys else lambda group: ()


def _schedulers(scheduler: Any) -> Iterator[Any]:
    if scheduler is not None:
        yield scheduler
        for part in getattr(scheduler, "_schedulers", ()):
            yield from _schedulers(part)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
