"""A learning rate for every tensor in an optimizer that somebody else made, without a trace in its schedule or logs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers.utils import logging

from ..model.names import preview
from ..model.storage import shared_memory
from .behavior import behavior, decayed_fractions, is_known, undo_scale
from .param_groups import Group, stepping_optimizers
from .step import decayed
from .step_hooks import FollowedSteps, runs_step_hooks

logger = logging.get_logger(__name__)

# Options that are a list or tuple for a whole group. A class need not name them among its defaults.
_OPTIONS = ("betas", "eps", "etas", "step_sizes", "ns_coefficients")


class StepScales:
    """Multiplies learning rates inside `optimizer.step` and nowhere else.

    Just before a step every param group is split by scale, and just after it the optimizer has its own groups again:
    schedulers, callbacks, logs and checkpoints see the nominal learning rates and the groups that they know. A group
    whose scales are all 1 is not split. Decoupled weight decay stays what it is at the nominal learning rate.

    Where an optimizer hands its step on to others, the groups of these are split. An optimizer that is not in the table
    of `behavior` may not read the learning rates of its param groups in `step`, which shows in the first step that has
    gradients. Then the movement of the tensors is multiplied after every step instead, which needs a copy of their
    weights.

    Attributes:
        tied: `{canonical name: the first name over the same memory}` of all but the first; see `shared_memory`.

    Args:
        optimizer: The optimizer whose `step` is called.
        parameters: `{canonical name: tensor in its param groups}` of all that is trained.

    Raises:
        ValueError: If an optimizer does not call step hooks, or two tensors share a part of their memory.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        self.tied = shared_memory(parameters)
        self._scales: dict[str, float] = {}
        self._factors: dict[int, float] = {}  # by id, of tensors whose learning rate is multiplied
        self._optimizer = optimizer
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._parameters = parameters
        self._moved: set[str] = set()  # names of tensors whose movement is multiplied
        self._before: dict[str, Tensor] = {}
        self._had_gradient: set[int] = set()

        stepping = stepping_optimizers(optimizer) or {optimizer: set()}  # outside of steps ZeRO-3's groups are empty
        hooked = [each for each in stepping if runs_step_hooks(each)]
        if len(hooked) < len(stepping) and not runs_step_hooks(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} does not call the step hooks of torch.optim.Optimizer, so its learning "
                "rates cannot be scaled. Let its __init__ call super().__init__(params, defaults), or match with "
                "AdamW, Lion, Muon or SGD."
            )
        # Ids of the tensors that were not yet seen to be stepped at the learning rate of a group.
        self._unread = set() if [*stepping] == [optimizer] and is_known(optimizer) else set(self._names)
        handed_on = set().union(*(own for each, own in stepping.items() if each is not optimizer))
        self._groups = {each: _SplitGroups(each, handed_on if each is optimizer else set()) for each in hooked}
        self._outermost = [optimizer] if runs_step_hooks(optimizer) else hooked
        self._steps = [
            FollowedSteps(each, self._begin, self._end) for each in dict.fromkeys((*self._outermost, *hooked))
        ]

    @property
    def scales(self) -> dict[str, float]:
        """`{canonical name: factor}`, 1 for a tensor that is not there; to be replaced, not changed in place.

        Tensors over the same memory are one to an optimizer step: they get the geometric mean of their scales.
        """
        return self._scales

    @scales.setter
    def scales(self, scales: Mapping[str, float]) -> None:
        self._scales = dict(scales)
        self.tied = shared_memory(self._parameters)  # a step may untie them: bitsandbytes makes them contiguous
        for first in set(self.tied.values()):
            names = [first, *(name for name, other in self.tied.items() if other == first)]
            factors = [scales.get(name, 1.0) for name in names]
            if len(set(factors)) > 1:
                mean = math.exp(sum(map(math.log, factors)) / len(factors)) if all(factors) else 0.0
                self._scales |= dict.fromkeys(names, mean)
        self._set_factors()

    def remove(self) -> None:
        """Remove the hooks; if a step was cut short, give the optimizer its own groups again."""
        for groups in self._groups.values():
            groups.remove()
        for steps in self._steps:
            steps.remove()
        self._before = {}

    def _set_factors(self) -> None:
        by_id = {key: self._scales.get(name, 1.0) for key, name in self._names.items() if name not in self._moved}
        self._factors = {key: scale for key, scale in by_id.items() if scale != 1.0}

    def _begin(self, optimizer: Optimizer) -> None:
        if optimizer in self._outermost and (self._unread or self._moved):
            held = self._held(optimizer)
            self._had_gradient = {key for key in held & self._names.keys() if self._tensor(key).grad is not None}
            self._before = {
                name: self._parameters[name].detach().clone()
                for key, name in self._names.items()
                if key in held
                and (key in self._unread or name in self._moved)
                and self._scales.get(name, 1.0) != 1.0
                and name not in self.tied
            }
        if optimizer in self._groups:
            self._groups[optimizer].split(self._factors, self._unread)

    def _end(self, optimizer: Optimizer) -> None:
        if optimizer in self._groups:
            self._unread -= self._groups[optimizer].join()
        if optimizer in self._outermost and (self._unread or self._moved):
            self._find_unread(optimizer)
            self._scale_movements()
            self._before = {}

    def _find_unread(self, outermost: Optimizer) -> None:
        """Find the tensors that a step has updated without reading their learning rates from a group."""
        held = self._held(outermost)
        found = set(filter(self._was_stepped, self._unread & held))
        if found:
            names = {self._names[key] for key in found}
            self._unread -= found
            self._moved |= names
            self._set_factors()
            logger.warning(
                f"the step of {type(outermost).__name__} does not read the learning rates of {preview(names)} from its "
                "param groups: their movement is scaled after every step instead, which needs a copy of their weights."
            )

    def _scale_movements(self) -> None:
        moved = {name: tensor for name, tensor in self._parameters.items() if name in self._moved}
        stepped = {name: tensor for name, tensor in moved.items() if self._was_stepped(id(tensor))}
        decays = decayed_fractions(self._optimizer, stepped) if stepped else {}
        with torch.no_grad():
            for name in stepped.keys() & self._before.keys():
                tensor = stepped[name]
                start = decayed(self._before[name], decays[name])
                tensor.copy_(start + (tensor - start) * self._scales[name])

    def _was_stepped(self, key: int) -> bool:
        """Whether a tensor had a gradient before the step or has one after it: a step may take gradients away."""
        return key in self._had_gradient or self._tensor(key).grad is not None

    def _held(self, outermost: Optimizer) -> set[int]:
        """Ids of the tensors that are in the param groups now: ZeRO steps one group after the other."""
        inner = self._groups if outermost is self._optimizer else ()
        return {id(tensor) for each in (outermost, *inner) for group in each.param_groups for tensor in group["params"]}

    def _tensor(self, key: int) -> Tensor:
        return self._parameters[self._names[key]]


class _SplitGroups:
    """The param groups of one optimizer, split by scale for the time of a step.

    The list itself is changed, not replaced: an optimizer may share it with others, or have it behind a property.
    Groups are split anew for every step: 400 tensors with 8 scales take 0.1 ms, where it took 0.15 ms to check whether
    the groups of the step before still fit.

    Args:
        optimizer: The optimizer.
        handed_on: Ids of tensors in its groups that other optimizers step.
    """

    def __init__(self, optimizer: Optimizer, handed_on: Set[int]) -> None:
        self._optimizer = optimizer
        self._handed_on = handed_on
        self._steps_with = behavior(optimizer).steps_with
        self._groups: list[Group] = []
        self._whole: list[Group] = []
        self._parts: list[_Part] = []
        # After a step that has raised, whoever saves or loads a checkpoint must find the groups as they were.
        self._handles = [
            optimizer.register_state_dict_pre_hook(self._before_state),
            optimizer.register_load_state_dict_pre_hook(self._before_state),
        ]

    def remove(self) -> None:
        """Put the groups together, and watch the optimizer's state no more."""
        self.join()
        for handle in self._handles:
            handle.remove()

    def _before_state(self, *_: Any) -> None:
        self.join()

    def split(self, factors: Mapping[int, float], unread: Set[int]) -> None:
        """Split the groups; those with a tensor in `unread` note whether their learning rates are read.

        Args:
            factors: `{id of a tensor: factor on its learning rate}`, 1 for a tensor that is not there.
            unread: Ids of tensors.
        """
        self.join()
        if self._handed_on:
            factors = {key: factor for key, factor in factors.items() if key not in self._handed_on}
        self._groups = self._optimizer.param_groups
        self._whole = list(self._groups)
        split: list[Group] = []
        for group in self._whole:
            parts = self._parts_of(group, factors, unread)
            self._parts += parts
            split += [part.options for part in parts] or [group]
        self._groups[:] = split

    def join(self) -> set[int]:
        """Put the groups together; return the ids of the tensors whose learning rates were read."""
        read: set[int] = set()
        for part in self._parts:
            self._give_back(part)
            if isinstance(part.options, _Watched) and part.options.is_read:
                read |= {id(part.group["params"][index]) for index in part.indices}
        if self._whole:
            self._groups[:] = self._whole
        self._groups, self._whole, self._parts = [], [], []
        return read - self._handed_on

    def _parts_of(self, group: Group, factors: Mapping[int, float], unread: Set[int]) -> list[_Part]:
        """The parts of a group; none if it is stepped as it is."""
        keys = list(map(id, group["params"]))
        is_watched = bool(unread) and not unread.isdisjoint(keys)
        if not is_watched and factors.keys().isdisjoint(keys):
            return []
        scales = [factors.get(key, 1.0) for key in keys]
        by_scale: dict[float, list[int]] = {}
        for index, source in enumerate(self._steps_with(group)):
            by_scale.setdefault(scales[source], []).append(index)
        make = _Watched if is_watched else dict
        cut = set() if len(by_scale) == 1 else {key for key in group if self._is_by_tensor(key, group[key], len(keys))}
        return [
            _Part(group, indices, scale, undo_scale(self._optimizer, group, scale), cut, make)
            for scale, indices in by_scale.items()
        ]

    def _give_back(self, part: _Part) -> None:
        """Give a group what the step has written into a part of it: some optimizers keep counts or averages there."""
        for key, value in part.changed():
            may_be_cut = key in part.cut or (key not in part.given and len(part.indices) < len(part.group["params"]))
            if may_be_cut and self._is_by_tensor(key, value, len(part.indices)):
                part.put_back(key, value)
            else:
                part.group[key] = part.nominal(key, value)

    def _is_by_tensor(self, key: str, value: Any, count: int) -> bool:
        """Whether a value of a group has an entry for every tensor; what a class has a default for is an option."""
        return (
            isinstance(value, (list, tuple))
            and len(value) == count
            and key not in ("params", *_OPTIONS)
            and key not in self._optimizer.defaults
        )


class _Part:
    """The tensors of one scale in a param group.

    Attributes:
        group: The group.
        indices: The positions of the tensors in it.
        cut: Keys of the values that have an entry for every tensor of the group, such as names: cut as `params` is.
        given: What the param group that is stepped holds before the step.
        options: That param group.

    Args:
        group: See above.
        indices: See above.
        scale: The factor on the learning rate.
        undone: Further options that change with it; see `undo_scale`.
        cut: See above.
        make: Makes `options` of `given`.
    """

    def __init__(
        self,
        group: Group,
        indices: list[int],
        scale: float,
        undone: Group,
        cut: Set[str],
        make: Callable[[Group], Group],
    ) -> None:
        self.group = group
        self.indices = indices
        self.cut = cut
        self._scale = scale
        self._scaled = undone if scale == 1.0 else {"lr": group["lr"] * scale, **undone}
        self.given = {**group, **self._scaled}
        for key in ("params", *cut):
            self.given[key] = type(group[key])(group[key][index] for index in indices)
        self.options = make(self.given)

    def changed(self) -> Iterator[tuple[str, Any]]:
        """The options that the step has replaced or added, and all that are cut, which it may have changed in place."""
        for key, value in dict.items(self.options):
            if (value is not self.given.get(key, self) or key in self.cut) and key != "params":
                yield key, value

    def put_back(self, key: str, values: list[Any] | tuple[Any, ...]) -> None:
        """Put a value for each of these tensors where the group has one for each of all."""
        whole = self.group.get(key, ())
        entries = list(whole) or [None] * len(self.group["params"])
        for index, value in zip(self.indices, values, strict=True):
            entries[index] = value
        if isinstance(whole, list):
            whole[:] = entries  # others may hold the list
        else:
            self.group[key] = type(values)(entries)

    def nominal(self, key: str, value: Any) -> Any:
        """What an option that the step has replaced is without the scale."""
        if key not in self._scaled or not self._scale:
            return value
        return value / self._scale if key == "lr" else value * self._scale


class _Watched(dict[str, Any]):
    """A param group that notes whether its learning rate is read, alone or with everything.

    Attributes:
        is_read: Whether it was.
    """

    is_read = False

    def __getitem__(self, key: str) -> Any:
        self.is_read |= key == "lr"
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.is_read |= key == "lr"
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.is_read = True
        return super().__iter__()

    def keys(self) -> Any:
        self.is_read = True
        return super().keys()

    def values(self) -> Any:
        self.is_read = True
        return super().values()

    def items(self) -> Any:
        self.is_read = True
        return super().items()

    def copy(self) -> Any:
        self.is_read = True
        return super().copy()
