"""Collective calls over all processes of a training. With one process each returns its argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, get_int_from_env, reduce
from torch import Tensor


def any_process(flags: Sequence[bool]) -> list[bool]:
    """Return which flags are set on any process; a collective call.

    Args:
        flags: The same number of flags on every process.
    """
    if PartialState().num_processes == 1 or not flags:
        return list(flags)
    values: Tensor = reduce(torch.tensor(flags, dtype=torch.uint8, device=PartialState().device), "max")
    return [bool(value) for value in values.tolist()]


def sum_over_processes(numbers: Tensor) -> Tensor:
    """Sum a tensor over all processes; a collective call.

    Args:
        numbers: Tensor on the CPU, of the same shape on every process.

    Returns:
        The sum, on the CPU; the same bits on every process.
    """
    summed: Tensor = reduce(numbers.to(PartialState().device), "sum").cpu()
    return summed


def broadcast_bytes(content: bytes) -> bytes:
    """Return the content that the first process has; a collective call."""
    state = PartialState()
    # One byte is added and removed again, because `torch.frombuffer` refuses an empty buffer.
    numbers = torch.frombuffer(bytearray(content + b"."), dtype=torch.uint8).to(state.device)
    size = int(broadcast(torch.tensor([len(numbers)], device=state.device)))
    received: Tensor = broadcast(numbers if state.is_main_process else numbers.new_zeros(size))
    return received.cpu().numpy().tobytes()[:-1]


def are_several() -> bool:
    """Return whether a launcher started several processes; it works before they are connected."""
    count: int = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    return count > 1
