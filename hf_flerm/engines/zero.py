"""DeepSpeed with whole weights: ZeRO-1 and ZeRO-2 step flat float32 partitions, and stage 0 the model's parameters.

A partition concatenates the tensors of one param group; each process has a part of it. The model's weights are copies
of the partitions, rounded to the model's dtype. DeepSpeed calls the part of a tensor in the partition of one process a
fragment.

DeepSpeed is never imported: Accelerate's state and the attributes that DeepSpeed sets on parameters suffice.
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

from ..model.name_text import preview
from .engine import Engine, MasterWeights, accelerate_state, exchange_by_copy
from .processes import any_process
from .zero_groups import group_per_tensor

_OFFLOADED = "weights or optimizer states are offloaded to another device. Remove the block, or set its device to none"
_IN_GROUPS = "weights are also replicated within a group of processes, which is not tested. Remove it"
_REFUSED_BLOCKS: Mapping[str, str] = MappingProxyType(
    {
        "optimizer": "DeepSpeed creates its own optimizer. Remove the block: the Trainer creates one from its "
        "arguments",
        "scheduler": "DeepSpeed changes the learning rate before the step ends. Remove the block: the Trainer creates "
        "a scheduler from its arguments",
        "zero_optimization.offload_optimizer": _OFFLOADED,
        "zero_optimization.offload_param": _OFFLOADED,
        "zero_optimization.zenflow": "ZenFlow updates weights after the step has returned. Remove the block",
        "zero_optimization.zero_hpz_partition_size": _IN_GROUPS,
        "zero_optimization.mics_shard_size": _IN_GROUPS,
        "tensor_parallel": "FLeRM cannot tell which processes share examples. Remove it",
    }
)
# For each mode of DeepSpeed: the attribute of its optimizer with the model's parameters by param group, and the
# attribute with this process's partition of each group.
_PARTITIONS = {
    "bit16_groups": "single_partition_of_fp32_groups",
    "bf16_groups": "fp32_groups_flat_partition",
    "fp16_groups": "fp32_partitioned_groups_flat",
}


class DeepSpeed(Engine):
    """DeepSpeed stages 0 to 2: every process holds the whole model and runs it on its own."""

    @classmethod
    def runs(cls, model: nn.Module) -> bool:
        """Return whether Accelerate trains with DeepSpeed."""
        return bool(accelerate_state().get("distributed_type") == DistributedType.DEEPSPEED)

    def check(self, estimator: str) -> None:
        """Raise ValueError if the config of DeepSpeed has a block with which updates cannot be measured."""
        super().check(estimator)
        if not DeepSpeed.runs(self.model):
            return  # DeepSpeed without Accelerate: there is no config to look at
        for path, reason in _REFUSED_BLOCKS.items():
            block: Any = AcceleratorState().deepspeed_plugin.deepspeed_config
            for key in path.split("."):
                block = block.get(key) or {}
            if _is_on(block):
                raise ValueError(
                    "function-space learning rates cannot be measured here: the config of DeepSpeed has "
                    f"{path!r}, so {reason}."
                )

    def check_loop(self, wrapped: nn.Module) -> None:
        """Raise ValueError: DeepSpeed steps in the backward pass."""
        raise ValueError("DeepSpeed steps in accelerator.backward(), not in optimizer.step(): use FLeRMTrainer.")

    def prepare_optimizer(self, optimizer: Any) -> None:
        """Give every tensor its own param group and so its own partition; schedulers and checkpoints see the groups."""
        group_per_tensor(optimizer)

    def master_weights(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> MasterWeights:
        """Find the partitions; in float32 without ZeRO there are none, and the optimizer is a plain torch optimizer."""
        while hasattr(optimizer, "accelerator_state"):  # Accelerate's wrapper, which is a torch.optim.Optimizer as well
            optimizer = optimizer.optimizer
        if isinstance(optimizer, torch.optim.Optimizer):
            return _AllStepped(parameters)
        return self._partitions(optimizer, parameters)

    def _partitions(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> MasterWeights:
        return _Fragments(optimizer, parameters)


class _AllStepped(MasterWeights):
    """The parameters themselves. DeepSpeed steps every tensor: it fills a missing gradient with zeros."""

    hooks_enclose_update = False  # DeepSpeed steps one group after the other, and casts the weights afterwards

    def stepped(self) -> dict[str, Tensor]:
        return dict(self.in_optimizer)


class Partitions(_AllStepped):
    """The flat float32 partitions of ZeRO; each process steps its own.

    Args:
        optimizer: DeepSpeed's optimizer, which wraps the torch optimizer.
        parameters: `{canonical name: parameter}`.

    Raises:
        ValueError: If a parameter is in no partition, or its partition does not hold its weights.
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
        """Exchange by copy: DeepSpeed holds references to the partition in several places."""
        return exchange_by_copy(self.local(name), part)

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Combine flags: `gather` is a collective call."""
        return any_process(flags)

    def check_own_learning_rates(self) -> None:
        """Raise ValueError if tensors share a partition, because the optimizer steps a partition as one tensor."""
        counts = Counter(map(id, self.in_optimizer.values()))
        together = [name for name, partition in self.in_optimizer.items() if counts[id(partition)] > 1]
        if together:
            raise ValueError(
                f"ZeRO steps {preview(together)} with one learning rate because they share a param group. Use "
                "FLeRMTrainer with a torch optimizer: it gives every tensor its own group before DeepSpeed starts."
            )


class _Fragments(Partitions):
    """ZeRO-1 and ZeRO-2: each process steps one fragment of each tensor; the fragment may be empty."""

    gather_is_collective = True

    def __init__(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(optimizer, parameters)
        # With round_robin_gradients DeepSpeed reorders a partition, and its attributes do not say where fragments are.
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
        # Each element of a tensor is in the fragment of exactly one process, so a sum over processes gives the whole.
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
        finally:  # also after an exception: it is a collective call, in which the other processes wait
            self._optimizer.update_lp_params()

    def _mapping(self, name: str) -> Any:
        """Location of this process's fragment in the tensor and in the partition; None if it has none."""
        return getattr(self.parameters[name], "_hp_mapping", None)

    def _place(self, name: str) -> slice:
        """The place of the fragment in the flattened tensor."""
        address = self._mapping(name).lp_fragment_address
        return slice(address.start, address.start + address.numel)

    def _is_copied(self, name: str) -> bool:
        """Whether the model's weights equal the rounded fragment."""
        if self._mapping(name) is None:
            return True
        weights = self.parameters[name].detach().flatten()[self._place(name)]
        return torch.equal(weights, self.local(name).to(weights.dtype))


def _is_on(block: Any) -> bool:
    """Whether a config entry enables a feature: a size above 1, or a block that does not disable itself."""
    if isinstance(block, int):
        return block > 1
    return bool(block) and block.get("device") != "none" and block.get("autotp_size") not in (0, 1)
