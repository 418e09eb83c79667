"""The interface of a training engine, with the answers for an engine whose processes each hold the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

_REMEDY = "Use DDP, FSDP2 (fsdp_version: 2) if the model does not fit on one device, or a single process."
# Distributed types of Accelerate without an engine here. A type that is neither here nor handled by an engine in
# `_ENGINES` is taken to be plain, so without `fsdp2.py` and `zero.py` their types would have to be added.
_REFUSED = {
    DistributedType.MEGATRON_LM: "Megatron-LM replaces the model with its own",
    DistributedType.XLA: "XLA does not run hooks when modules are called",
}


def accelerate_state() -> Mapping[str, Any]:
    """Return the state of Accelerate for this training, without initializing `AcceleratorState` if there is none.

    Returns:
        `{attribute of AcceleratorState: value}`; empty before an `Accelerator` is created.
    """
    state: Mapping[str, Any] = AcceleratorState._shared_state
    return state


class Engine:
    """The plain engine: every process holds the whole model, as the only process or as one of DDP's replicas.

    Each method is a point in which other engines differ. In a `sharded` engine, a forward or backward pass gathers
    weights, which is a collective call: all processes must make the same passes in the same order.

    Attributes:
        model: The model.
        sharded: Whether a process holds only a part of each weight.
        forward_mode: Whether forward-mode differentiation (`torch.func.jvp`) works on the engine's modules.

    Args:
        model: The model as its own class, not wrapped.
    """

    sharded = False
    forward_mode = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    def runs(cls, model: nn.Module) -> bool:
        """Return whether this engine holds the weights of a model."""
        return True

    # --- checks ---

    def check(self, estimator: str) -> None:
        """Check that updates can be measured with this engine.

        Args:
            estimator: The estimator of the rates, as for `measure_rates`.

        Raises:
            ValueError: If the engine is not supported, or the estimator needs whole weights and they are sharded.
        """
        state = accelerate_state()
        kind, parallelism = state.get("distributed_type"), state.get("parallelism_config")
        reason = _REFUSED.get(kind) if isinstance(kind, DistributedType) else None
        if kind == DistributedType.FSDP and getattr(state.get("fsdp_plugin"), "fsdp_version", 1) != 2:
            reason = "FSDP1 flattens all weights of a layer into a single tensor"
        sizes = {"tp": getattr(self.model, "tp_size", 1) or 1}  # Transformers can shard a model without Accelerate
        for axis in ("tp", "cp", "sp"):
            if getattr(parallelism, f"{axis}_enabled", False) or sizes.get(axis, 1) > 1:
                reason = f"{axis}_size > 1: FLeRM cannot tell which processes share examples"
        if reason:
            raise ValueError(f"function-space learning rates cannot be measured here: {reason}. {_REMEDY}")
        if estimator == "exact" and self.sharded:
            raise ValueError("estimator 'exact' needs whole weights, and these are sharded. Use 'per_example'.")

    def check_loop(self, wrapped: nn.Module) -> None:
        """Check that the updates of a custom training loop happen in `optimizer.step()`, on all processes together.

        Args:
            wrapped: The model that the loop calls, with its wrappers.

        Raises:
            ValueError: If the update is not made in `optimizer.step()`, or processes may have different numbers of
                batches.
        """
        if getattr(getattr(wrapped, "_join_config", None), "enable", False):
            raise ValueError(
                "processes that have run out of batches take no part in measurements: train without "
                "join_uneven_inputs (or torch's Join), and let Accelerate give every process the same number of "
                "batches (even_batches=True)."
            )

    # --- a weight, a module ---

    def shape(self, parameter: Tensor) -> torch.Size:
        """Return the shape of the whole parameter."""
        return parameter.shape

    def device(self, parameter: Tensor) -> torch.device:
        """Return the device on which the model uses a parameter; its shard may be offloaded to another one."""
        return parameter.device

    def own_type(self, module: nn.Module) -> type[nn.Module]:
        """Return the original class of a module; an engine may change `module.__class__` to its own subclass."""
        return type(module)

    # --- around forward and backward passes ---

    def release(self) -> None:
        """Free all gathered weights: every parameter is a shard again."""

    @contextmanager
    def released_after(self) -> Iterator[None]:
        """Context manager: free all gathered weights at the end of the block, also if it raises."""
        try:
            yield
        finally:
            self.release()

    def gathered(self, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """Context manager: gather the weights of some modules, so that they can be called on their own.

        Args:
            modules: Modules of the model.
        """
        return nullcontext()

    def gathered_leaves(self) -> AbstractContextManager[Mapping[nn.Parameter, nn.Parameter]]:
        """Context manager: record which gathered parameter replaces which sharded parameter in a forward pass.

        The gathered parameter is the leaf of autograd's graph, not the sharded one.

        Yields:
            `{sharded parameter: gathered parameter}`, filled during forward passes. A parameter without an entry is
            itself the leaf.
        """
        return nullcontext({})

    def repeatable_backward(self) -> AbstractContextManager[None]:
        """Context manager: after a backward pass in the block, the same graph can go through another one."""
        return nullcontext()

    # --- processes, optimizer ---

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Combine flags over the processes that run the model together: a flag is set if any of them has set it.

        `MasterWeights.agree` does the same for processes that gather updates together.

        Args:
            flags: The same number of flags on every process.

        Returns:
            The combined flags. They are unchanged here, as every process holds the whole model and measures on its own.
        """
        return list(flags)

    def prepare_optimizer(self, optimizer: Any) -> None:
        """Change the param groups of an optimizer so that each tensor can have its own learning rate.

        Called before the engine wraps the optimizer. Most engines change nothing: `StepScales` splits the groups during
        each step.

        Args:
            optimizer: The torch optimizer.
        """

    def master_weights(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> MasterWeights:
        """Find the weights that an optimizer steps.

        Args:
            optimizer: The optimizer after `Accelerator.prepare`.
            parameters: `{canonical name: parameter}` of all trained parameters.

        Raises:
            ValueError: If the weights that the optimizer steps cannot be found.
        """
        return MasterWeights(parameters)


class MasterWeights:
    """The weights that an optimizer steps.

    In the plain engine they are the model's parameters. In other engines a process steps its shard of each parameter,
    or a float32 copy of a part of it, which the engine then rounds into the model's dtype. All names are canonical.

    Attributes:
        parameters: `{canonical name: parameter of the model}` of all trained parameters.
        in_optimizer: `{canonical name: tensor in the optimizer's param groups}`. Several names may share a tensor.
        hooks_enclose_update: Whether the hooks around `optimizer.step` enclose exactly the update.
        gather_is_collective: Whether `gather` is a collective call although each process runs the model on its own. If
            so, all updates must be gathered before the first probe.

    Args:
        parameters: `{canonical name: parameter}`.
    """

    hooks_enclose_update = True
    gather_is_collective = False

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.in_optimizer: Mapping[str, Tensor] = parameters

    # --- one tensor ---

    def shape(self, name: str) -> torch.Size:
        """Return the shape of the whole tensor."""
        return self.parameters[name].shape

    def local(self, name: str) -> Tensor:
        """Return the part that this process steps, detached; writing into it changes the weights."""
        return self.parameters[name].data

    def gather(self, name: str, part: Tensor) -> Tensor:
        """Combine the parts of a tensor from all processes into the whole tensor.

        Args:
            name: Canonical name of the tensor.
            part: The part on this process, of weights or of their change; shaped like `local(name)`.

        Returns:
            The whole tensor.
        """
        return part

    def exchange(self, name: str, part: Tensor) -> Tensor:
        """Replace the values of `local(name)`.

        Args:
            name: Canonical name of the tensor.
            part: The new values. The parameter may take over this tensor, so the caller must not use it afterwards.

        Returns:
            The previous values, on the device of `part`.
        """
        parameter = self.parameters[name]
        if part.device != parameter.device:
            return exchange_by_copy(parameter.data, part)
        previous, parameter.data = parameter.data, part  # swap the storage: no copy, and no bit changes
        return previous

    def writing(self) -> AbstractContextManager[None]:
        """Context manager: at the end, copy what the block wrote into `local` tensors into the model's weights."""
        return nullcontext()

    # --- the optimizer's step ---

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Combine flags over the processes that gather updates together: a flag is set if any of them has set it.

        They are unchanged here, as `gather` needs no other process; `Engine.agree` is for running the model.
        """
        return list(flags)

    def stepped(self) -> dict[str, Tensor]:
        """Return the tensors of the optimizer that have a gradient, so that its latest step updated them.

        Returns:
            `{canonical name: tensor in the optimizer's param groups}`.
        """
        return {name: tensor for name, tensor in self.in_optimizer.items() if tensor.grad is not None}

    def in_param_groups(self) -> AbstractContextManager[None]:
        """Context manager: inside the block the optimizer's param groups hold the tensors of `in_optimizer`."""
        return nullcontext()

    def check_own_learning_rates(self) -> None:
        """Check that every tensor can have its own learning rate.

        Raises:
            ValueError: If some tensors cannot.
        """


def exchange_by_copy(own: Tensor, part: Tensor) -> Tensor:
    """Write values into a tensor.

    Args:
        own: The tensor to overwrite.
        part: The values, on any device.

    Returns:
        A copy of the previous values, on the device of `part`.
    """
    previous = own.to(part.device, copy=True)
    own.copy_(part)
    return previous
