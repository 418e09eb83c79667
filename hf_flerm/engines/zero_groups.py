"""A param group for every tensor: ZeRO steps one flat partition for each group, at one learning rate."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer


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
