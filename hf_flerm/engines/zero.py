"""DeepSpeed with whole weights: ZeRO-1 and ZeRO-2 step flat float32 partitions, and stage 0 the model's parameters.

The model's weights are copies of the partitions, rounded to the model's dtype. A partition holds one param group of the
optimizer, one tensor after the other; the part of a tensor in the partition of a process is called a fragment.

DeepSpeed is never imported: Accelerate's state and the attributes that DeepSpeed sets on parameters tell enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..model.names import preview
from .engine import Engine, MasterWeights, accelerate_state, exchange_by_copy
from .processes import any_process
from .zero_groups import group_per_tensor

_OFFLOADED = "weights or states lie on another device than the model's. Take the block out, or set its device to none"
_IN_GROUPS = "a group of processes has all weights beside its own partitions, which was never tried. Take it out"
_REFUSED_BLOCKS: Mapping[str, str] = MappingProxyType(
    {
        "optimizer": "DeepSpeed makes an optimizer of its own. Take the block out: the Trainer makes one from its "
        "arguments",
        "scheduler": "DeepSpeed moves the learning rate before a step is over. Take the block out: the Trainer makes a "
        "scheduler from its arguments",
        "zero_optimization.offload_optimizer": _OFFLOADED,
        "zero_optimization.offload_param": _OFFLOADED,
        "zero_optimization.zenflow": "weights are stepped later than the step. Take the block out",
        "zero_optimization.zero_hpz_partition_size": _IN_GROUPS,
        "zero_optimization.mics_shard_size": _IN_GROUPS,
        "tensor_parallel": "processes share their examples, and are not told from those that do not. Take it out",
    }
)
# The attributes of DeepSpeed's optimizers for each of its modes: the model's parameters by param group, and this
# process's partition of each group.
_PARTITIONS = {
    "bit16_groups": "single_partition_of_fp32_groups",
    "bf16_groups": "fp32_groups_flat_partition",
    "fp16_groups": "fp32_partitioned_groups_flat",
}


class DeepSpeed(Engine):
    """Any stage but ZeRO-3: every process has the whole model and runs it independently."""

    @classmethod
    def runs(cls, model: nn.Module) -> bool:
        """Tell whether Accelerate trains with DeepSpeed."""
        return bool(accelerate_state().get("distributed_type") == DistributedType.DEEPSPEED)

    def check(self, estimator: str) -> None:
        """Raise if the config has a block that makes steps impossible to follow."""
        super().check(estimator)
        if not DeepSpeed.runs(self.model):
            return  # DeepSpeed without Accelerate: there is no config to look at
        for path, reason in _REFUSED_BLOCKS.items():
            block: Any = AcceleratorState().deepspeed_plugin.deepspeed_config
            for key in path.split("."):
                block = block.get(key) or {}
            if _is_on(block):
                raise ValueError(
                    "function-space learning rates cannot be followed here: the config of DeepSpeed has "
                    f"{path!r}, so {reason}."
                )

    def check_loop(self, wrapped: nn.Module) -> None:
        """Raise: DeepSpeed's step is in the backward pass."""
        raise ValueError("DeepSpeed steps in accelerator.backward(), not in optimizer.step(): use FLeRMTrainer.")

    def prepare_optimizer(self, optimizer: Any) -> None:
        """Give every tensor a param group, and so a partition; schedulers and checkpoints see these groups."""
        while hasattr(optimizer, "accelerator_state") or not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer.optimizer
        group_per_tensor(optimizer)

    def master_weights(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> MasterWeights:
        """Find the partitions. Without ZeRO, in float32, there are none: the optimizer is a plain one of torch."""
        while hasattr(optimizer, "accelerator_state"):  # Accelerate's wrapper, which is a torch.optim.Optimizer as well
            optimizer = optimizer.optimizer
        if isinstance(optimizer, torch.optim.Optimizer):
            return _AllStepped(parameters)
        return self._partitions(optimizer, parameters)

    def _partitions(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> MasterWeights:
        return _Fragments(optimizer, parameters)


class _AllStepped(MasterWeights):
    """DeepSpeed makes a gradient of 0 where there is none, so that every tensor is stepped."""

    is_seen_by_hooks = False  # DeepSpeed steps one group after the other, and casts the weights afterwards

    is_seen_by_hooks = False  # DeepSpeed steps one group after the other, and casts the weights afterwards

    def stepped(self) -> dict[str, Tensor]:
        return dict(self.in_optimizer)


class Partitions(_AllStepped):
    """Flat float32 partitions of param groups, of which each process steps its own.

    Args:
        optimizer: DeepSpeed's, which wraps the one that steps.
        parameters: `{canonical name: parameter}`.

    Raises:
        ValueError: If a parameter is in no partition, or a partition does not hold the weights where they are expected.
    """

    def __init__(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self._optimizer = optimizer
        partitions = {
            id(parameter): partition
            for groups, own in _PARTITIONS.items()
            if hasattr(optimizer, own)
            for tensors, partition in zip(getattr(optimizer, groups), getattr(optimizer, own), strict=True)
            for parameter in tensors
        }
        missing = [name for name, parameter in parameters.items() if id(parameter) not in partitions]
        if missing:
            raise ValueError(
                f"{type(optimizer).__name__} of DeepSpeed has no float32 partition of the trainable parameters "
                f"{preview(missing)}. Use ZeRO-1 or ZeRO-2 (zero_stage), with float32 or bf16."
            )
        self.in_optimizer = {name: partitions[id(parameter)] for name, parameter in parameters.items()}

    def exchange(self, name: str, part: Tensor) -> Tensor:
        """Exchange by copy: DeepSpeed has the partition by reference in several places."""
        return exchange_by_copy(self.local(name), part)

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Decide together: updates are put together in collective calls."""
        return any_process(flags)

    def check_own_learning_rates(self) -> None:
        """Raise if tensors share a partition: it is one tensor of the optimizer."""
        counts = Counter(map(id, self.in_optimizer.values()))
        together = [name for name, partition in self.in_optimizer.items() if counts[id(partition)] > 1]
        if together:
            raise ValueError(
                f"ZeRO steps {preview(together)} at one learning rate: they share a param group. FLeRMTrainer gives "
                "every tensor a group of its own before DeepSpeed sees them, with an optimizer of torch: match with it."
            )


class _Fragments(Partitions):
    """ZeRO-1 and ZeRO-2: of each tensor a process steps one fragment, which may be empty."""

    gathers_together = True

    def __init__(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(optimizer, parameters)
        # With round_robin_gradients DeepSpeed reorders a partition without telling where the fragments are.
        misplaced = [name for name in parameters if not self._is_copied(name)]
        (found,) = any_process([bool(misplaced)])
        if found:
            raise ValueError(
                f"the partitions of ZeRO do not hold the weights of {preview(misplaced) or 'other processes'}. "
                "Set round_robin_gradients to false in the config of DeepSpeed."
            )

    def local(self, name: str) -> Tensor:
        mapping = self._mapping(name)
        if mapping is None:
            return torch.zeros(0, device=self.parameters[name].device)
        fragment: Tensor = mapping.hp_fragment.data
        return fragment

    def gather(self, name: str, part: Tensor) -> Tensor:
        # Every number of a tensor is in the fragment of one process alone: a sum puts them together.
        parameter: Any = self.parameters[name]
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if self._mapping(name) is not None:
            whole[self._place(name)] = part
        dist.all_reduce(whole, group=parameter._dp_group)
        return whole.to(parameter.dtype).view_as(parameter)

    @contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        finally:  # also after a failure: it is a collective call, and the other processes make it
            self._optimizer.update_lp_params()

    def _mapping(self, name: str) -> Any:
        """Where the fragment on this process lies in the tensor and in the partition; None if there is none here."""
        return getattr(self.parameters[name], "_hp_mapping", None)

    def _place(self, name: str) -> slice:
        """The place of the fragment in the flattened tensor."""
        address = self._mapping(name).lp_fragment_address
        return slice(address.start, address.start + address.numel)

    def _is_copied(self, name: str) -> bool:
        """Whether the model's weights are the fragment's numbers, rounded."""
        if self._mapping(name) is None:
            return True
        weights = self.parameters[name].detach().flatten()[self._place(name)]
        return torch.equal(weights, self.local(name).to(weights.dtype))


def _is_on(block: Any) -> bool:
    """Whether an entry of the config turns something on: a size above 1, or a block that does not say no."""
    if isinstance(block, int):
        return block > 1
    return bool(block) and block.get("device") != "none" and block.get("autotp_size") not in (0, 1)
