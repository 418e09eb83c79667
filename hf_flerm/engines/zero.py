"""DeepSpeed: it steps flat float32 partitions of the weights (ZeRO), and the model's weights are copies of them.

Nothing of DeepSpeed is imported: what is needed of it is handed over by a training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..model.names import preview
from ..optimizer.step import NO_DECAY, Snapshot, Stepping, decayed
from .processes import anywhere
from .zero3 import is_partitioned, rewritten

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
# Of each optimizer of DeepSpeed's: where the model's tensors are by group, and the partition that it steps of a group.
_PARTITIONS = {
    "bit16_groups": "single_partition_of_fp32_groups",
    "bf16_groups": "fp32_groups_flat_partition",
    "fp16_groups": "fp32_partitioned_groups_flat",
}


def is_deepspeed() -> bool:
    """Tell whether Accelerate trains with DeepSpeed."""
    return bool(AcceleratorState._shared_state.get("distributed_type") == DistributedType.DEEPSPEED)


def check_deepspeed() -> None:
    """Refuse what DeepSpeed is told to do, if it trains, where its steps cannot be followed.

    Raises:
        ValueError: With the reason, and what to use instead.
    """
    if not is_deepspeed():
        return
    config = AcceleratorState().deepspeed_plugin.deepspeed_config
    refused = "function-space learning rates cannot be followed here: "
    for path, reason in _REFUSED_BLOCKS.items():
        block: Any = config
        for key in path.split("."):
            block = block.get(key) or {}
        if _asks(block):
            raise ValueError(f"{refused}the config of DeepSpeed has {path!r}, so {reason}.")


def _asks(block: Any) -> bool:
    """Whether an entry of a config asks for something, and is not there to say no."""
    if isinstance(block, int):
        return block > 1
    return bool(block) and block.get("device") != "none" and block.get("autotp_size") not in (0, 1)


def stepping(model: nn.Module, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> Stepping:
    """How the weights of a model are stepped.

    Args:
        model: What is trained.
        optimizer: What steps, as Accelerate has prepared it.
        parameters: `{canonical name: parameter}` of all that is trained.

    Returns:
        What to take updates from.

    Raises:
        ValueError: If DeepSpeed steps in a way that cannot be followed.
    """
    if not is_deepspeed():
        return Stepping(model, parameters)
    check_deepspeed()
    while hasattr(optimizer, "accelerator_state"):
        optimizer = optimizer.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        return _UnderDeepSpeed(model, parameters)
    partitioned = any(map(is_partitioned, parameters.values()))
    return (_Zero3 if partitioned else _Zero)(model, parameters, optimizer)


class _UnderDeepSpeed(Stepping):
    """The model's own tensors, of which DeepSpeed lets every one step: it makes gradients of 0 where there are none."""

    is_seen_by_hooks = False  # DeepSpeed steps one group after the other, and casts the weights afterwards

    def stepped(self) -> dict[str, Tensor]:
        return dict(self.held)


class _Zero(_UnderDeepSpeed):
    """Flat partitions, one for each param group; every process steps its own."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        super().__init__(model, parameters)
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
        self.held = {name: partitions[id(parameter)] for name, parameter in parameters.items()}
        self.agree = anywhere
        strange = [name for name, parameter in parameters.items() if not _is_copy(parameter)]
        (found,) = anywhere([bool(strange)])
        if found:
            raise ValueError(
                f"the partitions of ZeRO do not hold the weights of {preview(strange) or 'other processes'}. "
                "Set round_robin_gradients to false in the config of DeepSpeed."
            )

    def snapshot(self, device: str | None) -> Snapshot:
        return _ZeroSnapshot(self._parameters, device, self._optimizer)

    def check_apart(self) -> None:
        shared = Counter(map(id, self.held.values()))
        together = [name for name, partition in self.held.items() if shared[id(partition)] > 1]
        if together:
            raise ValueError(
                f"ZeRO steps {preview(together)} at one learning rate: they share a param group. FLeRMTrainer gives "
                "every tensor a group of its own before DeepSpeed sees them, with an optimizer of torch: match with it."
            )


class _Zero3(_Zero):
    """Flat partitions too; the model's weights are gathered from copies of them, one module at a time.

    Outside its steps the optimizer's groups are empty.
    """

    def snapshot(self, device: str | None) -> Snapshot:
        return _Zero3Snapshot(self._parameters, device, self._optimizer)

    @contextmanager
    def in_groups(self) -> Iterator[None]:
        self._optimizer._set_fp32_optimizer_param_groups()
        try:
            yield
        finally:
            self._optimizer._clear_fp32_optimizer_param_groups()


class _Zero3Snapshot(Snapshot):
    """The partitions from before a step."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: str | None, optimizer: Any) -> None:
        super().__init__(parameters, device)
        self._optimizer = optimizer

    def rescale(self, ratios: Mapping[str, float], decays: Mapping[str, float] = NO_DECAY) -> None:
        with rewritten(self._optimizer):
            super().rescale(ratios, decays)

    def _swap(self) -> None:
        with rewritten(self._optimizer):
            super()._swap()


class _ZeroSnapshot(Snapshot):
    """The partitions from before a step: of each tensor the fragment that lies here, in float32."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: str | None, optimizer: Any) -> None:
        super().__init__(parameters, device)
        self._optimizer = optimizer

    @contextmanager
    def put_back(
        self, learning_rates: Mapping[str, float], decays: Mapping[str, float] = NO_DECAY
    ) -> Iterator[Mapping[str, Tensor]]:
        """As `Snapshot` does; the updates are put together first, so that each process may probe as it will."""
        updates = {name: self._update(name, learning_rates[name], decays.get(name, 0.0)) for name in self._parameters}
        try:
            self._swap()
            yield updates
        finally:
            self._swap()

    def rescale(self, ratios: Mapping[str, float], decays: Mapping[str, float] = NO_DECAY) -> None:
        super().rescale(ratios, decays)
        self._optimizer.update_lp_params()

    def _part(self, parameter: nn.Parameter) -> Tensor:
        return _fragment(parameter)

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            own = _fragment(parameter)
            other, self._buffer[name] = self._buffer[name], own.to(self._device or own.device, copy=True)
            own.copy_(other)
        self._optimizer.update_lp_params()

    def _update(self, name: str, learning_rate: float, decay: float) -> Tensor:
        """The unit update of a whole tensor, like its weights; a collective call."""
        parameter = self._parameters[name]
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        mapping = _mapping(parameter)
        if mapping is not None and learning_rate:
            address, after = mapping.lp_fragment_address, _fragment(parameter)
            moved = torch.sub(after, decayed(self._buffer[name].to(after.device), decay)).div_(learning_rate)
            whole[address.start : address.start + address.numel] = moved
        dist.all_reduce(whole, group=parameter._dp_group)  # type: ignore[attr-defined]
        return whole.to(parameter.dtype).view_as(parameter)


def _mapping(parameter: nn.Parameter) -> Any:
    """Which part of a tensor is which part of a partition of this process; None if there is none here."""
    return getattr(parameter, "_hp_mapping", None)


def _fragment(parameter: nn.Parameter) -> Tensor:
    """The float32 numbers here that a tensor's are copies of; writing into them changes the partition."""
    mapping = _mapping(parameter)
    if mapping is None:
        return torch.zeros(0, device=parameter.device)
    fragment: Tensor = mapping.hp_fragment.data
    return fragment


def _is_copy(parameter: nn.Parameter) -> bool:
    """Whether a tensor has the numbers that its partition has."""
    mapping = _mapping(parameter)
    if mapping is None:
        return True
    address = mapping.lp_fragment_address
    own = parameter.detach().flatten()[address.start : address.start + address.numel]
    return torch.equal(own, _fragment(parameter).to(own.dtype))
