"""Scale the learning rate of each tensor in an existing optimizer, unseen by schedulers and logs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers.utils import logging

from ..model.name_text import preview
from ..model.storage import shared_memory
from .behavior import behavior, decayed_fractions, is_known, undo_scale
from .param_groups import Group, stepping_optimizers
from .step import decayed
from .step_hooks import StepHooks, runs_step_hooks

logger = logging.get_logger(__name__)

# Options that are a list or tuple for a whole group. A class need not name them among its defaults.
_OPTIONS = ("betas", "eps", "etas", "step_sizes", "ns_coefficients")


class StepScales:
    """Scales the learning rates of tensors, only during `optimizer.step`.

    Before a step each param group is split by scale, and after it the original groups are restored: schedulers,
    callbacks, logs and checkpoints see the nominal learning rates and the original groups. A group whose scales are all
    1 is not split. Decoupled weight decay is unchanged: a tensor decays as at its nominal learning rate.

    If an optimizer delegates its step to inner optimizers, their groups are split. An optimizer that is not in
    `behavior.TABLE` may ignore the learning rates of its param groups in `step`. If its first step with gradients does
    not read them, the change of each tensor is scaled after every step instead, which needs a copy of the weights.

    Attributes:
        tied: `{canonical name: first name with the same memory}` of each name but the first; see `shared_memory`.

    Args:
        optimizer: The optimizer whose `step` is called.
        parameters: `{canonical name: tensor in its param groups}` of all trained parameters.

    Raises:
        ValueError: If an optimizer does not call step hooks, or two tensors share a part of their memory.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        self.tied = shared_memory(parameters)
        self._scales: dict[str, float] = {}
        self._factors: dict[int, float] = {}  # by id, of the tensors whose learning rate is scaled during a step
        self._optimizer = optimizer
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._parameters = parameters
        self._moved: set[str] = set()  # names of the tensors whose change is scaled after a step
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
        # Ids of the tensors for which no step has read the learning rate of the param group yet. For a class in the
        # table that steps all its tensors itself it is empty: that these classes read it is tested.
        self._unread = set() if [*stepping] == [optimizer] and is_known(optimizer) else set(self._names)
        # Example: Lookahead around AdamW, with all tensors in the groups of both. Lookahead steps none itself, so only
        # AdamW is in `stepping` and only its groups are split. But the step of Lookahead is the outermost one, around
        # which tensors are copied; if it runs no hooks, AdamW's step is. A wrapper that also steps some tensors
        # itself has its groups split for these, and not for the delegated ones.
        delegated = set().union(*(own for each, own in stepping.items() if each is not optimizer))
        self._groups = {each: _SplitGroups(each, delegated if each is optimizer else set()) for each in hooked}
        self._outermost = [optimizer] if runs_step_hooks(optimizer) else hooked
        self._steps = [StepHooks(each, self._begin, self._end) for each in dict.fromkeys((*self._outermost, *hooked))]

    @property
    def scales(self) -> dict[str, float]:
        """`{canonical name: factor}`, 1 for a missing name. Assign a new dict; do not change it in place.

        Tensors that share memory get the geometric mean of their scales.
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
        """Remove the hooks; if a step was interrupted, restore the original param groups."""
        for groups in self._groups.values():
            groups.remove()
        for steps in self._steps:
            steps.remove()
        self._before = {}

    def _set_factors(self) -> None:
        by_id = {key: self._scales.get(name, 1.0) for key, name in self._names.items() if name not in self._moved}
        self._factors = {key: scale for key, scale in by_id.items() if scale != 1.0}

    def _begin(self, optimizer: Optimizer) -> None:
        """Before a step: copy the tensors whose change may be scaled after it, and split the param groups."""
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
        """After a step: restore the param groups, and scale the change of tensors whose learning rate was not read."""
        if optimizer in self._groups:
            self._unread -= self._groups[optimizer].join()
        if optimizer in self._outermost and (self._unread or self._moved):
            self._find_unread(optimizer)
            self._scale_movements()
            self._before = {}

    def _find_unread(self, outermost: Optimizer) -> None:
        """Find the tensors that a step has updated without reading their learning rates from a param group."""
        held = self._held(outermost)
        found = set(filter(self._was_stepped, self._unread & held))
        if found:
            names = {self._names[key] for key in found}
            self._unread -= found
            self._moved |= names
            self._set_factors()
            logger.warning(
                f"the step of {type(outermost).__name__} does not read the learning rates of {preview(names)} from its "
                "param groups: their change is scaled after every step instead, which needs a copy of their weights."
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
        """Ids of the tensors that are in the param groups now: ZeRO fills and steps one group at a time."""
        inner = self._groups if outermost is self._optimizer else ()
        return {id(tensor) for each in (outermost, *inner) for group in each.param_groups for tensor in group["params"]}

    def _tensor(self, key: int) -> Tensor:
        return self._parameters[self._names[key]]


class _SplitGroups:
    """The param groups of one optimizer, split by scale during a step.

    `param_groups` is changed in place: other objects may hold the list, or it may be a property. Groups are split anew
    in every step: for 400 tensors with 8 scales this takes 0.1 ms, less than the 0.15 ms of checking whether the
    previous split still fits.

    Args:
        optimizer: The optimizer.
        delegated: Ids of the tensors in its groups that inner optimizers step.
    """

    def __init__(self, optimizer: Optimizer, delegated: Set[int]) -> None:
        self._optimizer = optimizer
        self._delegated = delegated
        self._scale_index = behavior(optimizer).scale_index
        self._groups: list[Group] = []
        self._whole: list[Group] = []
        self._parts: list[_GroupPart] = []
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
        """Split the param groups by factor; a group with a tensor in `unread` records whether its rate is read.

        Args:
            factors: `{id of a tensor: factor on its learning rate}`, 1 for a missing id.
            unread: Ids of the tensors for which no step has read the learning rate yet.
        """
        self.join()
        if self._delegated:
            factors = {key: factor for key, factor in factors.items() if key not in self._delegated}
        self._groups = self._optimizer.param_groups
        self._whole = list(self._groups)
        split: list[Group] = []
        for group in self._whole:
            parts = self._parts_of(group, factors, unread)
            self._parts += parts
            split += [part.options for part in parts] or [group]
        self._groups[:] = split

    def join(self) -> set[int]:
        """Restore the original groups; return the ids of the tensors whose learning rates the step has read."""
        read: set[int] = set()
        for part in self._parts:
            self._give_back(part)
            if isinstance(part.options, _ReadTrackingGroup) and part.options.is_read:
                read |= {id(part.group["params"][index]) for index in part.indices}
        if self._whole:
            self._groups[:] = self._whole
        self._groups, self._whole, self._parts = [], [], []
        return read - self._delegated

    def _parts_of(self, group: Group, factors: Mapping[int, float], unread: Set[int]) -> list[_GroupPart]:
        """Split one group by scale; an empty list if the group needs no change."""
        keys = list(map(id, group["params"]))
        is_watched = bool(unread) and not unread.isdisjoint(keys)
        if not is_watched and factors.keys().isdisjoint(keys):
            return []
        scales = [factors.get(key, 1.0) for key in keys]
        by_scale: dict[float, list[int]] = {}
        # `source` is `index` itself but for LoRA-FA, where a pair A, B is stepped together with the scale of B.
        for index, source in enumerate(self._scale_index(group)):
            by_scale.setdefault(scales[source], []).append(index)
        make = _ReadTrackingGroup if is_watched else dict
        cut = set() if len(by_scale) == 1 else {key for key in group if self._is_by_tensor(key, group[key], len(keys))}
        return [
            _GroupPart(group, indices, scale, undo_scale(self._optimizer, group, scale), cut, make)
            for scale, indices in by_scale.items()
        ]

    def _give_back(self, part: _GroupPart) -> None:
        """Copy what the step wrote into a part to the original group: some optimizers keep counts or averages there."""
        for key, value in part.changed():
            may_be_cut = key in part.cut or (key not in part.given and len(part.indices) < len(part.group["params"]))
            if may_be_cut and self._is_by_tensor(key, value, len(part.indices)):
                part.put_back(key, value)
            else:
                part.group[key] = part.nominal(key, value)

    def _is_by_tensor(self, key: str, value: Any, count: int) -> bool:
        """Whether a value of a param group has one entry per tensor; a key with a default in the class is an option."""
        return (
            isinstance(value, (list, tuple))
            and len(value) == count
            and key not in ("params", *_OPTIONS)
            and key not in self._optimizer.defaults
        )


class _GroupPart:
    """The tensors of one scale in a param group.

    Attributes:
        given: The options of the part before the step.
        options: The param group that the optimizer steps.

    Args:
        group: The original param group; also an attribute, as `indices` and `cut` are.
        indices: Indices of the part's tensors in it.
        scale: The factor on the learning rate.
        undone: Further options that change with the scale; see `undo_scale`.
        cut: Keys of the values with one entry per tensor, such as "names"; they are split like `params`.
        make: Makes `options` from `given`.
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
        """The options that the step replaced or added, and all per-tensor values: it may change these in place."""
        for key, value in dict.items(self.options):
            if (value is not self.given.get(key, self) or key in self.cut) and key != "params":
                yield key, value

    def put_back(self, key: str, values: list[Any] | tuple[Any, ...]) -> None:
        """Write per-tensor values of this part into the per-tensor value of the original group."""
        whole = self.group.get(key, ())
        entries = list(whole) or [None] * len(self.group["params"])
        for index, value in zip(self.indices, values, strict=True):
            entries[index] = value
        if isinstance(whole, list):
            whole[:] = entries  # other objects may hold the list
        else:
            self.group[key] = type(values)(entries)

    def nominal(self, key: str, value: Any) -> Any:
        """The value of an option that the step replaced, without the scale."""
        if key not in self._scaled or not self._scale:
            return value
        return value / self._scale if key == "lr" else value * self._scale


class _ReadTrackingGroup(dict[str, Any]):
    """A param group that records whether its learning rate is read, alone or with all options.

    Attributes:
        is_read: Whether the learning rate was read.
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
