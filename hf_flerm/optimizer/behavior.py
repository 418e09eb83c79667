"""Properties of optimizer classes: whether the update is linear in the learning rate, and how weight decay is applied.

To add an optimizer, put a line into `TABLE`: `("package", "Class"): Behavior(...)`, and a case into
`tests/optimizer/test_behavior.py`, which compares every line with the actual step of the optimizer. A class that is not
in the table has the entry of its nearest base class; without one, its update is taken to be linear, with weight decay
in the gradient.
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
    """Adafactor with `scale_parameter` multiplies its learning rate, and so its weight decay, by the weights' RMS."""
    if not group["scale_parameter"]:
        return 1.0
    return max(float(group["eps"][1]), float(optimizer.state[parameter]["RMS"]))


def _per_initial_rate(optimizer: Any, group: Group, parameter: Tensor) -> float:
    """lion-pytorch's `decoupled_weight_decay` divides weight decay by the initial learning rate."""
    return 1.0 / float(optimizer._init_lr) if optimizer.decoupled_wd else 1.0


def _each_alone(group: Group) -> Sequence[int]:
    return range(len(group["params"]))


def _lora_fa_pairs(group: Group) -> Sequence[int]:
    """LoRA-FA pairs the tensors with "lora" in their names, in order, and steps only the second of a pair (B)."""
    scale_index = list(_each_alone(group))
    lora = [index for index, name in enumerate(group["names"]) if "lora" in name]
    for a, b in zip(lora[::2], lora[1::2], strict=False):
        scale_index[a] = b
    return scale_index


@dataclass(frozen=True)
class Behavior:
    """Properties of an optimizer class; some depend on the options of a param group.

    Attributes:
        decay_is_decoupled: Whether weight decay subtracts `lr * weight_decay * weights` in addition to the update
            (AdamW). Otherwise it is added to the gradient and enters the optimizer's state (SGD, Adam).
        decay_factor: A further factor on decoupled weight decay.
        nonlinear: Why the update is not linear in the learning rate; empty if it is.
        nonlinear_if: Whether `nonlinear` applies to a param group.
        is_recordable: Whether update / learning rate has a meaning although the update is not linear.
        why_single_rate: Why tensors cannot have different learning rates; empty if they can.
        scale_index: For each tensor of a param group, the index of the tensor whose scale it has. Tensors with the same
            index stay together, in order, when a group is split.
        alternative: What to train with instead.
    """

    decay_is_decoupled: Callable[[Group], bool] = _never
    decay_factor: Callable[[Optimizer, Group, Tensor], float] = _one
    nonlinear: str = ""
    nonlinear_if: Callable[[Group], bool] = _always
    is_recordable: bool = True
    why_single_rate: str = ""
    scale_index: Callable[[Group], Sequence[int]] = _each_alone
    alternative: str = "AdamW, Lion, Muon or SGD"


_COUPLED_DECAY = Behavior()
_DECOUPLED_DECAY = Behavior(decay_is_decoupled=_always)
_OPTIONALLY_DECOUPLED = Behavior(decay_is_decoupled=_if_decoupled)
_SCHEDULE_FREE = Behavior(
    nonlinear="each step also moves the weights toward an average that depends on earlier learning rates, and the "
    "average weighs steps by the learning rates of all tensors of a group"
)

_ANY = ""  # package

# By package and class; `Paged...`, `...8bit` and `...32bit` are the same optimizer.
TABLE: dict[tuple[str, str], Behavior] = {
    ("torch", "ASGD"): Behavior(
        nonlinear="a step uses the learning rate of the previous step, divided by a power of it", is_recordable=False
    ),
    ("torch", "Adadelta"): _COUPLED_DECAY,
    ("torch", "Adafactor"): Behavior(
        decay_is_decoupled=_always,
        nonlinear="its learning rate is only an upper bound of 1 / sqrt(step)",
        alternative="transformers' Adafactor with relative_step=False",
    ),
    ("torch", "Adagrad"): _COUPLED_DECAY,
    ("torch", "Adam"): _OPTIONALLY_DECOUPLED,
    ("torch", "AdamW"): _DECOUPLED_DECAY,
    ("torch", "Adamax"): _COUPLED_DECAY,
    ("torch", "LBFGS"): Behavior(nonlinear="one step makes several dependent updates", is_recordable=False),
    ("torch", "Muon"): _DECOUPLED_DECAY,
    ("torch", "NAdam"): _OPTIONALLY_DECOUPLED,
    ("torch", "RAdam"): _OPTIONALLY_DECOUPLED,
    ("torch", "RMSprop"): _COUPLED_DECAY,
    ("torch", "Rprop"): Behavior(
        nonlinear="it uses the learning rate only in its first step and then adapts the step sizes itself",
        is_recordable=False,
    ),
    ("torch", "SGD"): _COUPLED_DECAY,
    ("torch", "SparseAdam"): _COUPLED_DECAY,
    ("torch", "ZeroRedundancyOptimizer"): Behavior(
        why_single_rate="each process steps only some of the tensors but has the param groups of all",
        alternative="FSDP2 or DeepSpeed",
    ),
    ("transformers", "Adafactor"): Behavior(
        decay_is_decoupled=_always,
        decay_factor=_rms_of_the_weights,
        nonlinear="with beta1 its average holds updates that were scaled by earlier learning rates",
        nonlinear_if=_if_first_moment,
        alternative="Adafactor with beta1=None",
    ),
    ("bitsandbytes", "AdEMAMix"): _DECOUPLED_DECAY,
    ("bitsandbytes", "Adagrad"): _COUPLED_DECAY,
    ("bitsandbytes", "Adam"): _DECOUPLED_DECAY,  # unlike torch's
    ("bitsandbytes", "AdamW"): _DECOUPLED_DECAY,
    ("bitsandbytes", "LAMB"): _DECOUPLED_DECAY,
    ("bitsandbytes", "LARS"): _COUPLED_DECAY,
    ("bitsandbytes", "Lion"): _DECOUPLED_DECAY,
    ("bitsandbytes", "PytorchLARS"): _COUPLED_DECAY,
    ("bitsandbytes", "RMSprop"): _COUPLED_DECAY,
    ("bitsandbytes", "SGD"): _COUPLED_DECAY,
    ("lion_pytorch", "Lion"): Behavior(decay_is_decoupled=_always, decay_factor=_per_initial_rate),
    ("peft", "LoraFAOptimizer"): Behavior(decay_is_decoupled=_always, scale_index=_lora_fa_pairs),
    ("prodigyopt", "Prodigy"): Behavior(why_single_rate="it uses one step size for all tensors"),
    ("schedulefree", "AdamWScheduleFree"): _SCHEDULE_FREE,
    ("schedulefree", "RAdamScheduleFree"): _SCHEDULE_FREE,
    ("schedulefree", "SGDScheduleFree"): _SCHEDULE_FREE,
    # Keller Jordan's, which people copy: Muon, or AdamW where a group says use_muon=False.
    (_ANY, "MuonWithAuxAdam"): _DECOUPLED_DECAY,
    (_ANY, "SingleDeviceMuonWithAuxAdam"): _DECOUPLED_DECAY,
    (_ANY, "Lookahead"): Behavior(
        nonlinear="every few steps it moves the weights back toward an earlier point",
        alternative="the optimizer that it wraps",
    ),
}


def behavior(optimizer: Optimizer) -> Behavior:
    """Return the entry of an optimizer's class, or of its nearest base class in the table."""
    cls: Any = type(optimizer)  # hashable, although mypy types it otherwise
    return _of_class(cls)


def is_known(optimizer: Optimizer) -> bool:
    """Return whether the class of an optimizer itself is in the table."""
    return any(key in TABLE for key in _keys(type(optimizer)))


def check_optimizer(optimizer: Optimizer, mode: str) -> None:
    """Refuse an optimizer whose update is not linear in the learning rate; an unknown class is accepted.

    Args:
        optimizer: The optimizer whose `step` is called.
        mode: "record" accepts every optimizer whose update / learning rate has a meaning; "match" needs an update that
            is linear in the learning rate, and different learning rates for different tensors.

    Raises:
        ValueError: If the optimizer does not work in this mode.
    """
    for each in dict.fromkeys((optimizer, *stepping_optimizers(optimizer))):
        traits, name = behavior(each), type(each).__name__
        if traits.nonlinear and any(map(traits.nonlinear_if, each.param_groups)):
            reason = f"the update of {name} is not linear in its learning rate: {traits.nonlinear}."
            if not traits.is_recordable:
                raise ValueError(
                    f"{reason} A rate per unit learning rate is not defined for it. Train with {traits.alternative}."
                )
            if mode == "match":
                raise ValueError(
                    f"{reason} A tensor's own learning rate would not scale its update. Match with "
                    f"{traits.alternative}; {name} can be recorded."
                )
        if traits.why_single_rate and mode == "match":
            raise ValueError(
                f"{name} cannot use a different learning rate for each tensor: {traits.why_single_rate}. Match with "
                f"{traits.alternative}; {name} can be recorded."
            )


def weight_decays(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the fraction of the weights that decoupled weight decay removes in a step, per unit learning rate.

    Args:
        optimizer: The optimizer whose `step` was called.
        parameters: `{canonical name: tensor in its param groups}` of the stepped tensors; a tensor without a gradient
            does not decay.

    Returns:
        `{canonical name: fraction}`; 0 if weight decay is part of the update, or the class is not in the table.
    """
    groups = groups_by_tensor(optimizer)
    decays = dict.fromkeys(parameters, 0.0)
    for name, parameter in parameters.items():
        stepping, group = groups[id(parameter)]
        traits = behavior(stepping)
        if group.get("weight_decay") and traits.decay_is_decoupled(group):
            decays[name] = float(group["weight_decay"]) * traits.decay_factor(stepping, group, parameter)
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
    """Return the options that keep decoupled weight decay unchanged when the learning rate of a group is scaled.

    Args:
        optimizer: The optimizer of the group.
        group: A param group.
        scale: The factor on its learning rate.

    Returns:
        The options to change and their values; empty if nothing has to change.
    """
    if scale in (0.0, 1.0) or not group.get("weight_decay") or not behavior(optimizer).decay_is_decoupled(group):
        return {}
    return {"weight_decay": group["weight_decay"] / scale}


def without_precision(name: str) -> str:
    """Return the name of an optimizer class without how its state is stored: `PagedAdamW8bit` is AdamW."""
    return re.sub(r"^Paged|(8|32)bit$", "", name)


@cache
def _of_class(cls: type[Optimizer]) -> Behavior:
    return next((TABLE[key] for base in cls.__mro__ for key in _keys(base) if key in TABLE), _COUPLED_DECAY)


def _keys(cls: type) -> list[tuple[str, str]]:
    """The keys in `TABLE` that a class may have."""
    name = without_precision(cls.__name__)
    return [(cls.__module__.partition(".")[0], name), (_ANY, name)]
