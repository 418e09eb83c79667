"""ZeRO-3: DeepSpeed partitions every weight, and gathers those of a module for as long as the module runs.

A partitioned parameter stays the same object: only its data come and go. Its attributes (`ds_*`, `_z3_optimizer`) lead
to everything else, so that DeepSpeed is never imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .engine import MasterWeights
from .processes import any_process
from .zero import DeepSpeed, Partitions

# Attributes of modules in which DeepSpeed counts the backward passes that are still to come.
_BACKWARD_COUNTS = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class ZeRO3(DeepSpeed):
    """Weights in partitions, gathered module by module."""

    sharded = True
    forward_mode = False  # functorch crashes in DeepSpeed's hooks

    @classmethod
    def runs(cls, model: nn.Module) -> bool:
        """Tell whether any weight is partitioned."""
        return any(map(_is_partitioned, model.parameters()))

    def shape(self, parameter: Any) -> torch.Size:
        """Return the shape that DeepSpeed has noted: between uses the data are empty."""
        shape: torch.Size = parameter.ds_shape if _is_partitioned(parameter) else parameter.shape
        return shape

    def release(self) -> None:
        """Partition all weights again, and have DeepSpeed forget the order in which modules ran.

        DeepSpeed records this order (its trace) to gather weights ahead, and would take a probe's order for the
        training's.
        """
        offload = self._offload()
        coordinator = offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():  # to invalidate it twice is an error
            coordinator._invalidate_trace()
        offload.release_backward_leftovers()
        offload.empty_partition_cache()

    @contextmanager
    def gathered(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Gather the weights of some modules, and call the modules without DeepSpeed's hooks.

        The hooks would partition the weights again after each call, and note the call in the trace.
        """
        parts = dict.fromkeys(part for module in modules for part in module.modules())
        parameters = dict.fromkeys(parameter for part in parts for parameter in part.parameters(recurse=False))
        partitioned: list[Any] = list(filter(_is_partitioned, parameters))
        if not partitioned:
            yield
            return
        missing = [parameter for parameter in partitioned if parameter.ds_status.name == "NOT_AVAILABLE"]
        with ExitStack() as stack:
            if missing:
                missing[0].all_gather(param_list=missing)
                stack.callback(missing[0].partition, param_list=missing)
            # DeepSpeed may have put an autograd function of its own there, which cannot be differentiated twice.
            stack.callback(setattr, nn.functional, "linear", nn.functional.linear)
            nn.functional.linear = torch._C._nn.linear
            for state in map(vars, parts):
                for kind in _HOOKS:
                    stack.callback(state.__setitem__, kind, state[kind])
                    others = {key: hook for key, hook in state[kind].items() if not _is_of_deepspeed(hook)}
                    state[kind] = type(state[kind])(others)
            yield

    @contextmanager
    def repeatable_backward(self) -> Iterator[None]:
        """Put DeepSpeed's counts of backward passes back, so that the next pass finds those of the first."""
        modules = [vars(module) for module in self.model.modules()]
        counts = [{key: state[key] for key in _BACKWARD_COUNTS if key in state} for state in modules]
        try:
            yield
        finally:
            for state, own in zip(modules, counts, strict=True):
                state.update(own)

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Decide together: a process that runs the model alone would wait for the others forever."""
        return any_process(flags)

    def _partitions(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> MasterWeights:
        return _Partitioned(optimizer, parameters)

    def _offload(self) -> Any:
        """What gathers and partitions the weights of the model."""
        partitioned: Iterator[Any] = (p for p in self.model.parameters() if _is_partitioned(p))
        return next(partitioned)._z3_optimizer.parameter_offload


class _Partitioned(Partitions):
    """Of each tensor every process steps an equal part of its flattened numbers, the last one padded."""

    def shape(self, name: str) -> torch.Size:
        parameter: Any = self.parameters[name]
        shape: torch.Size = parameter.ds_shape
        return shape

    def local(self, name: str) -> Tensor:
        parameter: Any = self.parameters[name]
        group, start, length = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        part: Tensor = self._optimizer.fp32_partitioned_groups_flat[group].data.narrow(0, start, length)
        return part

    def gather(self, name: str, part: Tensor) -> Tensor:
        parameter = self.parameters[name]
        whole: Tensor = self._optimizer._fp32_state_allgather(parameter, part.to(parameter.device))
        return whole

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Copy the partitions into the model's, as DeepSpeed does at the end of its own step."""
        self._optimizer.checkpoint_event_prologue()  # frees gathered weights, which would be used again as they are
        try:
            yield
        finally:
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self._optimizer.checkpoint_event_epilogue()

    @contextmanager
    def in_param_groups(self) -> Iterator[None]:
        """DeepSpeed empties the param groups outside of its steps."""
        self._optimizer._set_fp32_optimizer_param_groups()
        try:
            yield
        finally:
            self._optimizer._clear_fp32_optimizer_param_groups()


def _is_partitioned(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_tensor")


def _is_of_deepspeed(hook: Any) -> bool:
    return str(hook.__module__).startswith("deepspeed.")
