"""Processes that train together: what they agree on and sum, and the engines in which rates cannot be followed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast, get_int_from_env, reduce
from torch import Tensor, nn

from .sharding import is_sharded

_INSTEAD = "Train with DDP, or with FSDP2 where the model does not fit (fsdp_version: 2), or measure in one process."
_REFUSED = {
    DistributedType.MEGATRON_LM: "Megatron-LM has a model of its own",
    DistributedType.XLA: "XLA does not run hooks as they are set",
}

Agree = Callable[[Sequence[bool]], list[bool]]


def anywhere(flags: Sequence[bool]) -> list[bool]:
    """Tell which flags are set on any process; a collective call.

    Args:
        flags: As many on every process.

    Returns:
        The same on every process.
    """
    if PartialState().num_processes == 1 or not flags:
        return list(flags)
    values: Tensor = reduce(torch.tensor(flags, dtype=torch.uint8, device=PartialState().device), "max")
    return [bool(value) for value in values.tolist()]


def agreement(model: nn.Module) -> Agree:
    """How processes decide together: for a model in shards all run it in step, so a flag is set where any has set it.

    Args:
        model: The model.

    Returns:
        What makes flags of flags; it changes nothing where each process has the whole model and goes its own way.
    """
    return anywhere if is_sharded(model) else list


def check_engine(model: nn.Module, estimator: str) -> None:
    """Refuse what updates cannot be followed in.

    Args:
        model: What is trained.
        estimator: As for `measure_rates`.

    Raises:
        ValueError: With the reason, and what to use instead.
    """
    state = AcceleratorState._shared_state
    engine, parallelism = state.get("distributed_type"), state.get("parallelism_config")
    reason = _REFUSED.get(engine) if isinstance(engine, DistributedType) else None
    if engine == DistributedType.FSDP and getattr(state.get("fsdp_plugin"), "fsdp_version", 1) != 2:
        reason = "FSDP1 flattens the weights of a layer into one"
    for kind in ("tp", "cp", "sp"):
        if getattr(parallelism, f"{kind}_enabled", False) or (kind == "tp" and (getattr(model, "tp_size", 1) or 1) > 1):
            reason = f"{kind}_size > 1: processes that share their examples are not told from those that do not"
    if reason:
        raise ValueError(f"function-space learning rates cannot be followed here: {reason}. {_INSTEAD}")
    if estimator == "exact" and is_sharded(model):
        raise ValueError("estimator 'exact' needs whole weights, and these are sharded. Use 'per_example'.")


def check_loop(model: nn.Module) -> None:
    """Refuse a step of a loop of one's own that processes do not make and measure together.

    Args:
        model: What is trained, wrapped as it is.

    Raises:
        ValueError: If DeepSpeed steps, or processes may run out of batches one before the other.
    """
    if AcceleratorState._shared_state.get("distributed_type") == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed steps in accelerator.backward(), not in optimizer.step(): use FLeRMTrainer.")
    if getattr(getattr(model, "_join_config", None), "enable", False):
        raise ValueError(
            "processes that have run out of batches take no part in measurements: train without join_uneven_inputs (or "
            "torch's Join), and let Accelerate give all as many batches (even_batches=True)."
        )


def are_several() -> bool:
    """Tell whether this process was started as one of several, also before they have found each other.

    Returns:
        Whether it was.
    """
    count: int = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    return count > 1


def broadcast_bytes(content: bytes) -> bytes:
    """What the first process has."""
    state = PartialState()
    numbers = torch.frombuffer(bytearray(content + b"."), dtype=torch.uint8).to(state.device)
    size = int(broadcast(torch.tensor([len(numbers)], device=state.device)))
    told: Tensor = broadcast(numbers if state.is_main_process else numbers.new_zeros(size))
    return told.cpu().numpy().tobytes()[:-1]
