"""ZeRO-3: DeepSpeed has every weight in partitions, and puts a module's together for as long as the module runs.

Nothing of DeepSpeed is imported: what is needed of it hangs on the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

_COUNTS = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")  # of a module: backward passes that are to come
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def is_partitioned(tensor: Tensor) -> bool:
    """Tell whether a weight is in partitions.

    Args:
        tensor: Any tensor.

    Returns:
        Whether it is a parameter of ZeRO-3.
    """
    return hasattr(tensor, "ds_tensor")


def partition(parameter: Any) -> Tensor:
    """The float32 numbers here that a weight's are copies of.

    Args:
        parameter: A weight in partitions that is trained.

    Returns:
        A flat tensor, with padding at the end of the last process's; writing into it changes what is stepped.
    """
    optimizer = parameter._z3_optimizer
    group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    own: Tensor = optimizer.fp32_partitioned_groups_flat[group].data.narrow(0, start, length)
    return own


def put_together(part: Tensor, parameter: Any) -> Tensor:
    """Put the parts of a tensor together; a collective call.

    Args:
        part: What lies here of it.
        parameter: A weight that is in partitions in the same way.

    Returns:
        The whole tensor.
    """
    whole: Tensor = parameter._z3_optimizer._fp32_state_allgather(parameter, part.to(parameter.device))
    return whole


def release(model: nn.Module) -> None:
    """Let go of all weights that DeepSpeed has put together, and of its memory of the order in which modules run.

    It gathers ahead by that order, and would take a probe's for the training's.

    Args:
        model: The model; nothing happens if it is not in partitions.
    """
    offload = _offload(model)
    if offload is None:
        return
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    offload.release_backward_leftovers()
    offload.empty_partition_cache()


@contextmanager
def rewritten(optimizer: Any) -> Iterator[None]:
    """Give the model the weights that its float32 partitions hold after a block, as an optimizer step does.

    Args:
        optimizer: DeepSpeed's.

    Yields:
        Nothing.
    """
    optimizer.checkpoint_event_prologue()  # whole weights from before would be used again
    try:
        yield
    finally:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()


@contextmanager
def whole(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Have all weights of some modules whole for a block in which they are called by themselves, unknown to DeepSpeed.

    Args:
        modules: The modules; nothing happens if they have no weights in partitions.

    Yields:
        Nothing.
    """
    parts = dict.fromkeys(part for module in modules for part in module.modules())
    own = dict.fromkeys(parameter for part in parts for parameter in part.parameters(recurse=False))
    parameters: list[Any] = [parameter for parameter in own if is_partitioned(parameter)]
    missing = [parameter for parameter in parameters if parameter.ds_status.name == "NOT_AVAILABLE"]
    with ExitStack() as stack:
        if missing:
            missing[0].all_gather(param_list=missing)
            stack.callback(missing[0].partition, param_list=missing)
        if parameters:  # DeepSpeed may have put a product of its own there, which has no second derivative
            stack.callback(setattr, nn.functional, "linear", nn.functional.linear)
            nn.functional.linear = torch._C._nn.linear
        for state, kind in product(map(vars, parts) if parameters else (), _HOOKS):
            stack.callback(state.__setitem__, kind, state[kind])
            others = {key: hook for key, hook in state[kind].items() if not _is_deepspeeds(hook)}
            state[kind] = type(state[kind])(others)
        yield


@contextmanager
def repeatable(model: nn.Module) -> Iterator[None]:
    """Let a backward pass, in a block, be one of several through one graph: DeepSpeed counts on a single one.

    Args:
        model: The model; nothing happens if it is not in partitions.

    Yields:
        Nothing.
    """
    modules = [] if _offload(model) is None else [vars(module) for module in model.modules()]
    kept = [(module, {key: module[key] for key in _COUNTS if key in module}) for module in modules]
    try:
        yield
    finally:
        for module, counts in kept:
            module.update(counts)


def _is_deepspeeds(hook: Any) -> bool:
    return str(hook.__module__).startswith("deepspeed.")


def _offload(model: nn.Module) -> Any:
    """What gathers and releases the weights of a model; None if they are not in partitions."""
    partitioned: Iterator[Any] = (parameter for parameter in model.parameters() if is_partitioned(parameter))
    return next((parameter._z3_optimizer.parameter_offload for parameter in partitioned), None)
