"""What is known of optimizer classes: are updates linear in the learning rate, and where does weight decay enter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

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


def _size_of_the_weights(optimizer: Optimizer, group: Group, parameter: Tensor) -> float:
    """Adafactor with `scale_parameter`: its learning rate, and with it its decay, is relative to the weights."""
    if not group["scale_parameter"]:
        return 1.0
    return max(float(group["eps"][1]), float(optimizer.state[parameter]["RMS"]))


def _per_initial_rate(optimizer: Any, group: Group, parameter: Tensor) -> float:
    """lion-pytorch's `decoupled_weight_decay`: the decay is meant for its initial learning rate."""
    return 1.0 / float(optimizer._init_lr) if optimizer.decoupled_wd else 1.0


@dataclass(frozen=True)
class Behavior:
    """How the step of an optimizer class depends on the learning rate and the weight decay of a param group.

    Attributes:
        decay_is_apart: Whether `weight_decay` takes `lr * weight_decay * weights` beside the update (AdamW), and does
            not go through the gradient into the optimizer's state (SGD, Adam).
        decay_factor: What else this part is multiplied by.
        nonlinear: Why the update is not linear in the learning rate; empty if it is.
        nonlinear_if: In which groups it is not.
        has_unit: Whether update / learning rate can be measured nevertheless.
        instead: What to use to match.
    """

    decay_is_apart: Callable[[Group], bool] = _never
    decay_factor: Callable[[Optimizer, Group, Tensor], float] = _one
    nonlinear: str = ""
    nonlinear_if: Callable[[Group], bool] = _always
    has_unit: bool = True
    instead: str = "AdamW, Lion, Muon or SGD"


_COUPLED = Behavior()
_APART = Behavior(decay_is_apart=_always)
_OPTION = Behavior(decay_is_apart=_if_decoupled)
_SCHEDULE_FREE = Behavior(
    nonlinear="every step also moves the weights by part of the way that earlier steps' learning rates have made, and "
    "its average weighs steps by the learning rates of all tensors of a group"
)

# By the package and the class; `Paged...` and `...8bit` are the same optimizer. A class that is not here counts as its
# nearest base that is.
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
    ("transformers", "Adafactor"): Behavior(
        decay_is_apart=_always,
        decay_factor=_size_of_the_weights,
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
    ("prodigyopt", "Prodigy"): Behavior(nonlinear="it sets one step size for all tensors and refuses several"),
    ("schedulefree", "AdamWScheduleFree"): _SCHEDULE_FREE,
    ("schedulefree", "RAdamScheduleFree"): _SCHEDULE_FREE,
    ("schedulefree", "SGDScheduleFree"): _SCHEDULE_FREE,
}


def check_optimizer(optimizer: Optimizer, mode: str) -> None:
    """Refuse an optimizer whose update is not linear in the learning rate; one that is not known is let through.

    Args:
        optimizer: The optimizer that steps.
        mode: `record`, which takes every optimizer whose update has a unit, or `match`.

    Raises:
        ValueError: If it is refused, with its name, the reason and what to do.
    """
    behavior = _behavior(optimizer)
    if not behavior.nonlinear or not any(map(behavior.nonlinear_if, optimizer.param_groups)):
        return
    reason = f"the update of {type(optimizer).__name__} is not linear in its learning rate: {behavior.nonlinear}."
    if not behavior.has_unit:
        raise ValueError(f"{reason} It has no rate per unit learning rate. Train with {behavior.instead}.")
    if mode == "match":
        raise ValueError(
            f"{reason} Learning rates for single tensors would not scale their updates. Match with {behavior.instead}; "
            "this one can be recorded."
        )


def weight_decays(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """What weight decay that is apart from the update takes from the weights in a step, per unit learning rate.

    Args:
        optimizer: The optimizer that has stepped.
        parameters: `{canonical name: parameter}` of what it has stepped; without a gradient nothing decays.

    Returns:
        `{name: fraction of the weights}`; 0 where nothing decays apart from the update, or the class is not known.
    """
    behavior = _behavior(optimizer)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    decays = dict.fromkeys(parameters, 0.0)
    for name, parameter in parameters.items():
        group = groups[id(parameter)]
        if group.get("weight_decay") and behavior.decay_is_apart(group):
            decays[name] = float(group["weight_decay"]) * behavior.decay_factor(optimizer, group, parameter)
    return decays


def undo_scale(optimizer: Optimizer, group: Group, scale: float) -> dict[str, Any]:
    """The options of a group that keep its weight decay what it was when its learning rate is scaled.

    Args:
        optimizer: The optimizer that steps.
        group: A param group.
        scale: What its learning rate will be multiplied by.

    Returns:
        Options to be changed; none if the decay does not change with the learning rate alone.
    """
    if scale in (0.0, 1.0) or not group.get("weight_decay") or not _behavior(optimizer).decay_is_apart(group):
        return {}
    return {"weight_decay": group["weight_decay"] / scale}


def _behavior(optimizer: Optimizer) -> Behavior:
    for cls in type(optimizer).__mro__:
        key = (cls.__module__.partition(".")[0], re.sub(r"^Paged|(8|32)bit$", "", cls.__name__))
        if key in TABLE:
            return TABLE[key]
    return _COUPLED
