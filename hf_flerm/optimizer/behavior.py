"""What is known of optimizer classes: whether updates are linear in the learning rate, and where weight decay enters.

To add an optimizer, put a line into `TABLE`: `("package", "Class"): Behavior(...)`, and a case into
`tests/optimizer/test_behavior.py`, which compares every line with what the optimizer does. A class that is not in the
table counts as its nearest base class that is, and else as linear with weight decay inside the update.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .param_groups import groups_by_tensor, learning_rates, stepping_optimizers

Group = Mapping[str, Any]


def _always(group: Group) -> bool:
    return True


def _never(group: Group) -> bool:
    return False


def _if_decoupled(group: Group) -> bool:
    return bool(group["decoupled_weight_decay"])


def _if_first_moment(group: Group) -> bool:
    return group["beta1"] is not None


def _one(optimizer: Optimizer, group: Group, parameter: Tensor) -> float:
    return 1.0


def _rms_of_the_weights(optimizer: Optimizer, group: Group, parameter: Tensor) -> float:
    """Adafactor with `scale_parameter`: its learning rate, and with it its decay, is relative to the weights."""
    if not group["scale_parameter"]:
        return 1.0
    return max(float(group["eps"][1]), float(optimizer.state[parameter]["RMS"]))


def _per_initial_rate(optimizer: Any, group: Group, parameter: Tensor) -> float:
    """lion-pytorch's `decoupled_weight_decay`: the decay is meant for its initial learning rate."""
    return 1.0 / float(optimizer._init_lr) if optimizer.decoupled_wd else 1.0


def _each_alone(group: Group) -> Sequence[int]:
    return range(len(group["params"]))


def _lora_fa_pairs(group: Group) -> Sequence[int]:
    """LoRA-FA takes the tensors with "lora" in their names as pairs, in order, and steps the second of each: B."""
    steps_with = list(_each_alone(group))
    lora = [index for index, name in enumerate(group["names"]) if "lora" in name]
    for a, b in zip(lora[::2], lora[1::2], strict=False):
        steps_with[a] = b
    return steps_with


@dataclass(frozen=True)
class Behavior:
    """How the step of an optimizer class depends on the options of a param group.

    Attributes:
        decay_is_apart: Whether weight decay is decoupled: it takes `lr * weight_decay * weights` beside the update
            (AdamW), instead of going through the gradient into the optimizer's state (SGD, Adam).
        decay_factor: A further factor on decoupled weight decay.
        nonlinear: Why the update is not linear in the learning rate; empty if it is.
        nonlinear_if: Tells the groups in which it is not.
        has_unit: Whether update / learning rate can be measured although the update is not linear.
        single_rate: Why tensors cannot have learning rates of their own; empty if they can.
        steps_with: Of each tensor of a group, the position of the tensor whose scale it takes. Tensors of one position
            stay together, in order, when a group is split.
        instead: What to use to match.
    """

    decay_is_apart: Callable[[Group], bool] = _never
    decay_factor: Callable[[Optimizer, Group, Tensor], float] = _one
    nonlinear: str = ""
    nonlinear_if: Callable[[Group], bool] = _always
    has_unit: bool = True
    single_rate: str = ""
    steps_with: Callable[[Group], Sequence[int]] = _each_alone
    instead: str = "AdamW, Lion, Muon or SGD"


_COUPLED = Behavior()
_APART = Behavior(decay_is_apart=_always)
_OPTION = Behavior(decay_is_apart=_if_decoupled)
_SCHEDULE_FREE = Behavior(
    nonlinear="every step also moves the weights by part of the way that earlier steps' learning rates have made, and "
    "its average weighs steps by the learning rates of all tensors of a group"
)

_ANY = ""  # package

# By package and class; `Paged...`, `...8bit` and `...32bit` are the same optimizer.
TABLE: dict[tuple[str, str], Behavior] = {
    ("torch", "ASGD"): Behavior(
        nonlinear="a step is made at the learning rate of the step before, divided by a power of it", has_unit=False
    ),
    ("torch", "Adadelta"): _COUPLED,
    ("torch", "Adafactor"): Behavior(
        decay_is_apart=_always,
        nonlinear="its learning rate is only an upper bound of 1 / sqrt(step)",
        instead="transformers' Adafactor with relative_step=False",
    ),
    ("torch", "Adagrad"): _COUPLED,
    ("torch", "Adam"): _OPTION,
    ("torch", "AdamW"): _APART,
    ("torch", "Adamax"): _COUPLED,
    ("torch", "LBFGS"): Behavior(nonlinear="one step is several that depend on each other", has_unit=False),
    ("torch", "Muon"): _APART,
    ("torch", "NAdam"): _OPTION,
    ("torch", "RAdam"): _OPTION,
    ("torch", "RMSprop"): _COUPLED,
    ("torch", "Rprop"): Behavior(
        nonlinear="it takes the learning rate for its first step only and then adapts its own", has_unit=False
    ),
    ("torch", "SGD"): _COUPLED,
    ("torch", "SparseAdam"): _COUPLED,
    ("torch", "ZeroRedundancyOptimizer"): Behavior(
        single_rate="every process steps a part of the tensors, with the groups of all", instead="FSDP2 or DeepSpeed"
    ),
    ("transformers", "Adafactor"): Behavior(
        decay_is_apart=_always,
        decay_factor=_rms_of_the_weights,
        nonlinear="with beta1 its average holds updates that earlier steps' learning rates are in already",
        nonlinear_if=_if_first_moment,
        instead="it with beta1=None",
    ),
    ("bitsandbytes", "AdEMAMix"): _APART,
    ("bitsandbytes", "Adagrad"): _COUPLED,
    ("bitsandbytes", "Adam"): _APART,  # unlike torch's
    ("bitsandbytes", "AdamW"): _APART,
    ("bitsandbytes", "LAMB"): _APART,
    ("bitsandbytes", "LARS"): _COUPLED,
    ("bitsandbytes", "Lion"): _APART,
    ("bitsandbytes", "PytorchLARS"): _COUPLED,
    ("bitsandbytes", "RMSprop"): _COUPLED,
    ("bitsandbytes", "SGD"): _COUPLED,
    ("lion_pytorch", "Lion"): Behavior(decay_is_apart=_always, decay_factor=_per_initial_rate),
    ("peft", "LoraFAOptimizer"): Behavior(decay_is_apart=_always, steps_with=_lora_fa_pairs),
    ("prodigyopt", "Prodigy"): Behavior(single_rate="it sets one step size for all of them, and refuses several"),
    ("schedulefree", "AdamWScheduleFree"): _SCHEDULE_FREE,
    ("schedulefree", "RAdamScheduleFree"): _SCHEDULE_FREE,
    ("schedulefree", "SGDScheduleFree"): _SCHEDULE_FREE,
    (_ANY, "Lookahead"): Behavior(
        nonlinear="every few steps it also takes back a part of the way that the steps before have made",
        instead="the optimizer that it wraps",
    ),
}


def behavior(optimizer: Optimizer) -> Behavior:
    """Look up the class of an optimizer, or its nearest base class that is known."""
    cls: Any = type(optimizer)  # which is hashable, whatever mypy makes of it
    return _of_class(cls)


def is_known(optimizer: Optimizer) -> bool:
    """Return whether the class of an optimizer itself is in the table."""
    return any(key in TABLE for key in _keys(type(optimizer)))


def check_optimizer(optimizer: Optimizer, mode: str) -> None:
    """Refuse an optimizer whose update is not linear in the learning rate; one that is not known is let through.

    Args:
        optimizer: The optimizer whose `step` is called.
        mode: `record`, which takes every optimizer whose update has a unit, or `match`.

    Raises:
        ValueError: With its name, the reason and what to use instead.
    """
    for each in dict.fromkeys((optimizer, *stepping_optimizers(optimizer))):
        known, name = behavior(each), type(each).__name__
        if known.nonlinear and any(map(known.nonlinear_if, each.param_groups)):
            reason = f"the update of {name} is not linear in its learning rate: {known.nonlinear}."
            if not known.has_unit:
                raise ValueError(f"{reason} It has no rate per unit learning rate. Train with {known.instead}.")
            if mode == "match":
                raise ValueError(
                    f"{reason} Learning rates for single tensors would not scale their updates. Match with "
                    f"{known.instead}; this one can be recorded."
                )
        if known.single_rate and mode == "match":
            raise ValueError(
                f"{name} cannot step tensors at learning rates of their own: {known.single_rate}. Match with "
                f"{known.instead}; this one can be recorded."
            )


def weight_decays(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the fraction of the weights that decoupled weight decay takes in a step, per unit learning rate.

    Args:
        optimizer: The optimizer whose `step` was called.
        parameters: `{canonical name: tensor in its param groups}` of what it has stepped; without a gradient nothing
            decays.

    Returns:
        `{canonical name: fraction}`; 0 where weight decay is part of the update, or the class is not known.
    """
    groups = groups_by_tensor(optimizer)
    decays = dict.fromkeys(parameters, 0.0)
    for name, parameter in parameters.items():
        stepping, group = groups[id(parameter)]
        known = behavior(stepping)
        if group.get("weight_decay") and known.decay_is_apart(group):
            decays[name] = float(group["weight_decay"]) * known.decay_factor(stepping, group, parameter)
    return decays


def decayed_fractions(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the fraction of the weights that decoupled weight decay takes in a step at the nominal learning rates.

    Tensors over the same memory decay once for each of them.

    Args:
        optimizer: As for `weight_decays`.
        parameters: As for `weight_decays`.

    Returns:
        `{canonical name: fraction}`.
    """
    rates, per_rate = learning_rates(optimizer, parameters), weight_decays(optimizer, parameters)
    fractions = {name: rates[name] * per_rate[name] for name in parameters}
    by_memory: dict[tuple[int, int], dict[int, str]] = {}
    for name, tensor in parameters.items():
        # By id, since ZeRO has several names for one tensor. Views that overlap in part are left as they are.
        by_memory.setdefault((tensor.data_ptr(), tensor.numel()), {})[id(tensor)] = name
    for (address, _), names in by_memory.items():
        if address and len(names) > 1:
            kept = math.prod(1.0 - fractions[name] for name in names.values())
            fractions |= dict.fromkeys(names.values(), 1.0 - kept)
    return fractions


def undo_scale(optimizer: Optimizer, group: Group, scale: float) -> dict[str, Any]:
    """Return the options that keep decoupled weight decay as it is when a group's learning rate is multiplied.

    Args:
        optimizer: The optimizer of the group.
        group: A param group.
        scale: The factor on its learning rate.

    Returns:
        Options to be changed; none if weight decay does not depend on the learning rate alone.
    """
    if scale in (0.0, 1.0) or not group.get("weight_decay") or not behavior(optimizer).decay_is_apart(group):
        return {}
    return {"weight_decay": group["weight_decay"] / scale}


@cache
def _of_class(cls: type[Optimizer]) -> Behavior:
    return next((TABLE[key] for base in cls.__mro__ for key in _keys(base) if key in TABLE), _COUPLED)


def _keys(cls: type) -> list[tuple[str, str]]:
    """The keys in `TABLE` that a class may have."""
    name = re.sub(r"^Paged|(8|32)bit$", "", cls.__name__)
    return [(cls.__module__.partition(".")[0], name), (_ANY, name)]
