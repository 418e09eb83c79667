"""A param group for every tensor: ZeRO steps each param group as one flat partition with one learning rate."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer


def group_per_tensor(optimizer: Optimizer) -> None:
    """Split param groups so that each holds one tensor and keeps its options; a second call changes nothing."""
    groups = optimizer.param_groups
    if any(len(group["params"]) > 1 for group in groups):
        groups[:] = [
            # A learning rate may be a tensor, which a scheduler changes in place: groups must not share it.
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
            | {"params": [tensor]}
            for group in groups
            for tensor in group["params"]
        ]
