"""FSDP2 (`fully_shard`): every parameter is a DTensor, of which each process holds a shard.

Before a module runs, FSDP2 gathers its parameters and registers the gathered ones, which are other `nn.Parameter`
objects, in the module; afterwards it registers the sharded ones again. The parameters of the root module stay gathered
from a forward pass until the backward pass.
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
    """FSDP2: each process holds a shard of every weight; weights are gathered module by module."""

    sharded = True

    @classmethod
    def runs(cls, model: nn.Module) -> bool:
        """Return whether any parameter is a DTensor, or any module has parameters that FSDP2 has gathered for now."""
        return any(isinstance(parameter, DTensor) for parameter in model.parameters()) or any(_units(model))

    def device(self, parameter: Tensor) -> torch.device:
        """Return the device of the mesh; a shard may be offloaded to the CPU between uses."""
        if not isinstance(parameter, DTensor) or parameter.device_mesh.device_type == parameter.device.type:
            return parameter.device
        return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())

    def own_type(self, module: nn.Module) -> type[nn.Module]:
        """Return the class before `fully_shard`, which makes a subclass of it and of `FSDPModule`."""
        return next(c for c in type(module).__mro__ if issubclass(c, nn.Module) and not issubclass(c, FSDPModule))

    def release(self) -> None:
        """Reshard all modules: after a forward pass without a backward pass, the root module is still gathered."""
        for _, module in _units(self.model):
            module.reshard()

    @contextmanager
    def gathered_leaves(self) -> Iterator[Mapping[nn.Parameter, nn.Parameter]]:
        """Record the gathered parameters in forward pre-hooks, which run after those of FSDP2."""
        sharded = {name: p for name, p in self.model.named_parameters() if isinstance(p, DTensor)}
        leaves: dict[nn.Parameter, nn.Parameter] = {}

        def recording(prefix: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: object) -> None:
                for name, parameter in module.named_parameters(prefix=prefix):
                    if name in sharded and not isinstance(parameter, DTensor):
                        # Keep the first parameter, which is in the graph of the forward pass. A second call of the
                        # module (to differentiate it alone, or by an activation checkpoint) may have another one.
                        leaves.setdefault(sharded[name], parameter)

            return hook

        handles = [module.register_forward_pre_hook(recording(path)) for path, module in _units(self.model)]
        try:
            yield leaves
        finally:
            for handle in handles:
                handle.remove()

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Combine flags: a process that ran the model alone would wait forever for the others to gather."""
        return any_process(flags)

    def master_weights(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> MasterWeights:
        """Return the sharded parameters."""
        return Shards(parameters)


class Shards(MasterWeights):
    """The shards of DTensors: each process steps its own. A parameter that FSDP2 ignores is stepped whole."""

    def local(self, name: str) -> Tensor:
        """Return the shard."""
        parameter = self.parameters[name]
        return parameter._local_tensor if isinstance(parameter, DTensor) else parameter.data

    def gather(self, name: str, part: Tensor) -> Tensor:
        """Gather the whole tensor from its shards; a collective call."""
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
        """Exchange by copy: the shard is a view of the flat buffer that FSDP2 gathers from."""
        return exchange_by_copy(self.local(name), part)

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Combine flags: `gather` is a collective call."""
        return any_process(flags)


def _units(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules to which `fully_shard` was applied, each gathered and sharded as one."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, FSDPModule))
