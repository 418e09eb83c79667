"""ZeRO-3: DeepSpeed partitions every weight, and gathers the weights of a module while the module runs.

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

# Attributes of modules in which DeepSpeed counts the backward passes that it still expects.
_BACKWARD_COUNTS = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class ZeRO3(DeepSpeed):
    """ZeRO-3: each process holds a part of every weight; weights are gathered module by module."""

    sharded = True
    forward_mode = False  # `torch.func` transforms crash in DeepSpeed's hooks

    @classmethod
    def runs(cls, model: nn.Module) -> bool:
        """Return whether any weight is partitioned."""
        return any(map(_is_partitioned, model.parameters()))

    def shape(self, parameter: Any) -> torch.Size:
        """Return the shape that DeepSpeed recorded; `.data` is empty while a parameter is partitioned."""
        shape: torch.Size = parameter.ds_shape if _is_partitioned(parameter) else parameter.shape
        return shape

    def release(self) -> None:
        """Partition all weights again and reset DeepSpeed's trace, the order in which it saw modules run.

        DeepSpeed prefetches weights in the order of the trace. A probe runs modules in another order than training, so
        its trace must not remain.
        """
        offload = self._parameter_offload()
        coordinator = offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():  # invalidating it twice raises
            coordinator._invalidate_trace()
        offload.release_backward_leftovers()
        offload.empty_partition_cache()

    @contextmanager
    def gathered(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Gather the weights of some modules and remove DeepSpeed's hooks from them during the block.

        The hooks would partition the weights again after each call, and add the call to the trace.
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
                stack.callback(missing[0].partition, param_list=missing)  # only what was gathered here
            # DeepSpeed may have replaced `F.linear` with its own autograd function, which cannot be differentiated
            # twice. Its replacement is restored after the block.
            stack.callback(setattr, nn.functional, "linear", nn.functional.linear)
            nn.functional.linear = torch._C._nn.linear
            for state in map(vars, parts):
                for kind in _HOOKS:  # restored with DeepSpeed's hooks after the block
                    stack.callback(state.__setitem__, kind, state[kind])
                    others = {key: hook for key, hook in state[kind].items() if not _is_of_deepspeed(hook)}
                    state[kind] = type(state[kind])(others)
            yield

    @contextmanager
    def repeatable_backward(self) -> Iterator[None]:
        """Restore DeepSpeed's counts of backward passes, so that another pass starts with the same values."""
        modules = [vars(module) for module in self.model.modules()]
        counts = [{key: state[key] for key in _BACKWARD_COUNTS if key in state} for state in modules]
        try:
            yield
        finally:
            for state, own in zip(modules, counts, strict=True):
                state.update(own)

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Combine flags: a process that ran the model alone would wait forever for the others to gather."""
        return any_process(flags)

    def _partitions(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> MasterWeights:
        return _Partitioned(optimizer, parameters)

    def _parameter_offload(self) -> Any:
        """The DeepSpeed object that gathers and partitions the weights of the model."""
        partitioned: Iterator[Any] = (p for p in self.model.parameters() if _is_partitioned(p))
        return next(partitioned)._z3_optimizer.parameter_offload


class _Partitioned(Partitions):
    """ZeRO-3: each process steps an equal part of each flattened tensor; the last part is padded."""

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
        """Copy the float32 partitions into the model's weights, as DeepSpeed does at the end of a step."""
        self._optimizer.checkpoint_event_prologue()  # frees gathered weights, which would otherwise be used unchanged
        try:
            yield
        finally:
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self._optimizer.checkpoint_event_epilogue()

    @contextmanager
    def in_param_groups(self) -> Iterator[None]:
        """Fill the param groups during the block: DeepSpeed empties them between steps."""
        self._optimizer._set_fp32_optimizer_param_groups()
        try:
            yield
        finally:
            self._optimizer._clear_fp32_optimizer_param_groups()


def _is_partitioned(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_tensor")


def _is_of_deepspeed(hook: Any) -> bool:
    return str(hook.__module__).startswith("deepspeed.")
