"""ZeRO steps one flat partition for each param group: to match, every tensor needs a group of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .zero import check_deepspeed, is_deepspeed


def split_for_zero(optimizer: Any) -> None:
    """Give every tensor a param group with the options of the one that it is in, if DeepSpeed trains.

    The order of the tensors stays. Schedulers and checkpoints see these groups, as they do not without DeepSpeed: there
    scales need none (`StepScales`). A second call changes nothing.

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
    if all(len(group["params"]) <= 1 for group in optimizer.param_groups):
        return
    optimizer.param_groups[:] = [
        {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
        | {"params": [tensor]}
        for group in optimizer.param_groups
        for tensor in group["params"]
    ]
