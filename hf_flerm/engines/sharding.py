"""Weights that lie in parts on several processes (FSDP2, ZeRO-3): one whole tensor is gathered at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from . import zero3


def shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here; writing into it changes the tensor.

    Args:
        tensor: Sharded or whole.

    Returns:
        A plain tensor without a graph.
    """
    if zero3.is_partitioned(tensor):
        return zero3.partition(tensor)
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.data


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """Put the parts of a tensor together; a collective call if it is sharded.

    Args:
        part: What lies here of it.
        like: A tensor that is sharded in the same way, or whole.

    Returns:
        The whole tensor.
    """
    if zero3.is_partitioned(like):
        return zero3.put_together(part, like)
    if not isinstance(like, DTensor):
        return part
    whole = DTensor.from_local(
        part.to(like.device_mesh.device_type),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return whole.full_tensor()


def runs_on(parameter: Tensor) -> torch.device:
    """Where a tensor is when it is used: shards may lie on the CPU in the meantime.

    Args:
        parameter: Sharded or whole.

    Returns:
        The device.
    """
    if not isinstance(parameter, DTensor) or parameter.device_mesh.device_type == parameter.device.type:
        return parameter.device
    return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())


def is_sharded(model: nn.Module) -> bool:
    """Tell whether any weight of a model lies in shards.

    Args:
        model: The model.

    Returns:
        Whether one does.
    """
    return any(in_parts(parameter) for parameter in model.parameters())


def in_parts(tensor: Tensor) -> bool:
    """Tell whether a weight lies in shards.

    Args:
        tensor: The weight.

    Returns:
        Whether it does.
    """
    return isinstance(tensor, DTensor) or zero3.is_partitioned(tensor)


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a weight, wherever it lies.

    Args:
        tensor: Sharded or whole.

    Returns:
        Its shape when it is put together.
    """
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def reshard(model: nn.Module) -> None:
    """Let go of all gathered weights: FSDP2 keeps the root's after a forward pass without a backward pass.

    Args:
        model: The model; nothing happens if it is not in shards.
    """
    zero3.release(model)
    for _, module in _units(model):
        module.reshard()


@contextmanager
def gathered_leaves(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Follow which gathered parameter stands in for which sharded one in a forward pass: autograd sees only these.

    Args:
        model: The model.

    Yields:
        `{sharded parameter: gathered one}`, filled as the pass goes on.
    """
    sharded = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    leaves: dict[nn.Parameter, nn.Parameter] = {}

    def note(prefix: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object) -> None:
            for name, parameter in module.named_parameters(prefix=prefix):
                if name in sharded and not isinstance(parameter, DTensor):
                    leaves.setdefault(sharded[name], parameter)  # a tangent calls a module again

        return hook

    handles = [module.register_forward_pre_hook(note(path)) for path, module in _units(model)]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def own_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module, which FSDP2 replaces by one of its own.

    Args:
        module: The module.

    Returns:
        The class that it was made of.
    """
    return next(c for c in type(module).__mro__ if issubclass(c, nn.Module) and not issubclass(c, FSDPModule))


def _units(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that FSDP2 gathers and shards as one."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, FSDPModule))
