"""FSDP2 (`fully_shard`): every parameter is a DTensor, of which each process holds a shard.

Before a module runs, FSDP2 gathers its parameters and registers the gathered ones, which are other `nn.Parameter`
objects, in the module; afterwards it registers the sharded ones again. The root's stay gathered after a forward pass
until a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .engine import Engine, MasterWeights, exchange_by_copy
from .processes import any_process


class FSDP2(Engine):
    """Weights in shards, gathered module by module."""

    sharded = True

    @classmethod
    def runs(cls, model: nn.Module) -> bool:
        """Tell whether any weight is in shards, gathered at the moment or not."""
        return any(isinstance(parameter, DTensor) for parameter in model.parameters()) or any(_units(model))

    def device(self, parameter: Tensor) -> torch.device:
        """Return the mesh's device: shards that are offloaded lie on the CPU between uses."""
        if not isinstance(parameter, DTensor) or parameter.device_mesh.device_type == parameter.device.type:
            return parameter.device
        return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())

    def own_type(self, module: nn.Module) -> type[nn.Module]:
        """Return the class from before `fully_shard`, which derives one of its own from it and `FSDPModule`."""
        return next(c for c in type(module).__mro__ if issubclass(c, nn.Module) and not issubclass(c, FSDPModule))

    def release(self) -> None:
        """Shard all modules again: the root is still gathered after a forward pass without a backward pass."""
        for _, module in _units(self.model):
            module.reshard()

    @contextmanager
    def gathered_leaves(self) -> Iterator[Mapping[nn.Parameter, nn.Parameter]]:
        """Note the gathered parameters in forward pre-hooks, which run after FSDP2's own."""
        sharded = {name: p for name, p in self.model.named_parameters() if isinstance(p, DTensor)}
        leaves: dict[nn.Parameter, nn.Parameter] = {}

        def note(prefix: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: object) -> None:
                for name, parameter in module.named_parameters(prefix=prefix):
                    if name in sharded and not isinstance(parameter, DTensor):
                        # The first one is the forward pass's. A module that is called again, to differentiate it by
                        # itself or by an activation checkpoint, may be given another, which is not in the graph.
                        leaves.setdefault(sharded[name], parameter)

            return hook

        handles = [module.register_forward_pre_hook(note(path)) for path, module in _units(self.model)]
        try:
            yield leaves
        finally:
            for handle in handles:
                handle.remove()

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Decide together: a process that runs the model alone would wait for the others forever."""
        return any_process(flags)

    def master_weights(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> MasterWeights:
        """Return the shards."""
        return Shards(parameters)


class Shards(MasterWeights):
    """The optimizer steps DTensors: each process its shard. A parameter that FSDP2 ignores is whole."""

    def local(self, name: str) -> Tensor:
        """Return the shard."""
        parameter = self.parameters[name]
        return parameter._local_tensor if isinstance(parameter, DTensor) else parameter.data

    def gather(self, name: str, part: Tensor) -> Tensor:
        """Put the shards together; a collective call."""
        like = self.parameters[name]
        if not isinstance(like, DTensor):
            return part
        sharded = DTensor.from_local(
            part.to(like.device_mesh.device_type),  # an offloaded shard is gathered on the mesh's device
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        return sharded.full_tensor()

    def exchange(self, name: str, part: Tensor) -> Tensor:
        """Exchange by copy: FSDP2 gathers from a flat buffer of which the shard is a view."""
        return exchange_by_copy(self.local(name), part)

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Decide together: to gather is a collective call."""
        return any_process(flags)


def _units(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules to which `fully_shard` was applied, each gathered and sharded as one."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, FSDPModule))
