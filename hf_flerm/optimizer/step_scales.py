"""One learning rate per tensor in an optimizer that somebody else made, without a trace in its schedule or logs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .behavior import undo_scale
from .param_groups import GROUP_KEY

_OWN_TO_A_PART = ("params", "lr", "weight_decay")


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
