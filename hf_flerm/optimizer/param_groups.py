"""Find the param group of a tensor, the optimizer that steps it, and its learning rate."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..model.name_text import preview

Group = dict[str, Any]
_SKIPPED_ATTRIBUTES = ("param_groups", "state", "defaults")  # in which no inner optimizer is looked for


class SeveralOptimizers(Optimizer):
    """The optimizers of a loop that calls the `step` of each itself. It has no step of its own and runs no hooks.

    Args:
        optimizers: The optimizers, unwrapped.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        self.defaults = {}

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """The param groups of all of them."""
        return [group for each in self.optimizers for group in each.param_groups]


def raw_optimizer(optimizer: Any) -> Optimizer:
    """Unwrap an optimizer that Accelerate or DeepSpeed has wrapped.

    Args:
        optimizer: An optimizer, a wrapper that has one as `.optimizer`, or a list of those.

    Raises:
        ValueError: If there is no `torch.optim.Optimizer` inside.
    """
    if isinstance(optimizer, (list, tuple)):
        return SeveralOptimizers([raw_optimizer(each) for each in optimizer])
    while not isinstance(optimizer, Optimizer) or hasattr(optimizer, "accelerator_state"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise ValueError(f"{type(optimizer).__name__} is not a torch optimizer; FLeRM cannot measure its steps.")
        optimizer = inner
    return optimizer


def stepping_optimizers(optimizer: Optimizer) -> dict[Optimizer, set[int]]:
    """Find the optimizers that step tensors themselves.

    An optimizer may delegate its step to inner optimizers, which it has as attributes, or in lists or dicts there: a
    wrapper around Muon and AdamW, Lookahead, SAM. A tensor is stepped by the innermost optimizer that holds it.

    Args:
        optimizer: The optimizer whose `step` is called.

    Returns:
        `{optimizer: ids of the tensors that it steps itself}`; optimizers that step none are left out.
    """
    return _stepping(optimizer, {id(optimizer)})


def groups_by_tensor(optimizer: Optimizer) -> dict[int, tuple[Optimizer, Group]]:
    """Return `{id of a tensor: (the optimizer that steps it, its param group there)}`."""
    return {
        id(tensor): (stepping, group)
        for stepping, own in stepping_optimizers(optimizer).items()
        for group in stepping.param_groups
        for tensor in group["params"]
        if id(tensor) in own
    }


def learning_rates(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Read the nominal learning rate of every tensor.

    Args:
        optimizer: The optimizer whose `step` is called.
        parameters: `{canonical name: tensor in its param groups}` of all trained parameters.

    Returns:
        `{canonical name: learning rate}`.

    Raises:
        ValueError: If a parameter is in no group, or its group has no learning rate.
    """
    groups = {tensor: group for tensor, (_, group) in groups_by_tensor(optimizer).items()}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in groups]
    if missing:
        raise ValueError(
            f"{type(optimizer).__name__} does not hold the trainable parameters {preview(missing)}. FLeRM needs an "
            "optimizer whose param groups hold the model's parameters; those of layer-wise and fused-backward "
            "optimizers do not. Freeze tensors that are not to be trained (requires_grad_(False)). If a loop has "
            "several optimizers, give FLeRMRun the list of them. A Trainer keeps the optimizer of its first train(): "
            "make a new Trainer after you have activated another adapter."
        )
    without = [name for name, parameter in parameters.items() if groups[id(parameter)].get("lr") is None]
    if without:
        raise ValueError(
            f"{type(optimizer).__name__} has no learning rate for {preview(without)}: it chooses its step sizes "
            "itself. Set a learning rate (for Adafactor: relative_step=False and lr)."
        )
    return {name: float(groups[id(parameter)]["lr"]) for name, parameter in parameters.items()}


def algorithm(optimizer: Optimizer, group: Group) -> str:
    """Return the name of the algorithm that steps a param group: "Muon", "AdamW".

    It is the name of the optimizer's class, without the marks of bitsandbytes (`PagedAdamW8bit` is AdamW). Classes for
    Muon with AdamW for the rest tell the two apart by `use_muon` in their param groups.

    Args:
        optimizer: The optimizer that steps the group; see `stepping_optimizers`.
        group: The group.
    """
    if "use_muon" in group:
        return "Muon" if group["use_muon"] else "AdamW"
    name = re.sub(r"^Paged|(8|32)bit$", "", type(optimizer).__name__)
    adjustment = group.get("adjust_lr_fn")  # of torch's Muon; "match_rms_adamw" makes its steps as large as AdamW's
    return name if adjustment in (None, "original") else f"{name} ({adjustment})"


def described_groups(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> list[Group]:
    """Describe what steps which tensors, for the metadata of a profile.

    Args:
        optimizer: The optimizer whose `step` is called.
        parameters: `{canonical name: tensor in its param groups}` of all trained parameters.

    Returns:
        `{"optimizer": algorithm, "learning_rate": before any schedule, "weight_decay": ..., "names": [...]}` for each
        different combination of the first three.
    """
    groups = groups_by_tensor(optimizer)
    names: dict[tuple[str, float, float], list[str]] = {}
    for name, parameter in parameters.items():
        stepping, group = groups[id(parameter)]
        rate = float(group["initial_lr"] if "initial_lr" in group else group["lr"])
        decay = float(group.get("weight_decay") or 0.0)
        names.setdefault((algorithm(stepping, group), rate, decay), []).append(name)
    keys = ("optimizer", "learning_rate", "weight_decay")
    return [dict(zip(keys, key, strict=True)) | {"names": found} for key, found in names.items()]


def _stepping(optimizer: Any, seen: set[int]) -> dict[Optimizer, set[int]]:
    found: dict[Optimizer, set[int]] = {}
    for inner in _inside(vars(optimizer), seen):
        found |= _stepping(inner, seen)
    if isinstance(optimizer, Optimizer):
        delegated = set().union(*found.values())
        own = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]} - delegated
        if own:
            found[optimizer] = own
    return found


def _inside(value: Any, seen: set[int]) -> Iterator[Any]:
    """The optimizers in attributes, lists, tuples and dicts, each once: an inner one may refer to its owner."""
    contents: Iterable[Any] = ()
    if isinstance(value, dict):
        contents = (entry for key, entry in value.items() if not (isinstance(key, str) and key in _SKIPPED_ATTRIBUTES))
    elif isinstance(value, (list, tuple)):
        contents = value
    elif not (hasattr(value, "param_groups") and hasattr(value, "__dict__")):
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if hasattr(value, "param_groups"):
        yield value
    for entry in contents:
        yield from _inside(entry, seen)
