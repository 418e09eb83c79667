"""ZeRO steps one flat partition for each param group: to match, every tensor needs a group of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .zero import check_deepspeed, is_deepspeed


def split_for_zero(optimizer: Any) -> None:
    """Give every tensor a param group of its own, if DeepSpeed trains.

    Schedulers and checkpoints see these groups. Without DeepSpeed they see those of the user: there `StepScales` splits
    groups only for the time of a step.

    Args:
        optimizer: An optimizer that DeepSpeed has not seen yet, bare or wrapped by Accelerate.

    Raises:
        ValueError: If DeepSpeed is configured in a way in which steps cannot be followed.
    """
    if not is_deepspeed():
        return
    check_deepspeed()
    while hasattr(optimizer, "accelerator_state"):
        optimizer = optimizer.optimizer
    group_per_tensor(optimizer)


def group_per_tensor(optimizer: Optimizer) -> None:
    """Give every tensor a param group with the options of the one that it is in; a second call changes nothing."""
    groups = optimizer.param_groups
    if any(len(group["params"]) > 1 for group in groups):
        groups[:] = [
            # A learning rate may be a tensor, which a scheduler fills in place: it must not be that of all groups.
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
            | {"params": [tensor]}
            for group in groups
            for tensor in group["params"]
        ]
