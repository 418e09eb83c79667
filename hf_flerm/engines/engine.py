"""What the package asks of a training engine, and the answers where every process has the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

_REMEDY = "Train with DDP, or with FSDP2 where the model does not fit (fsdp_version: 2), or measure in one process."
_REFUSED = {
    DistributedType.MEGATRON_LM: "Megatron-LM has a model of its own",
    DistributedType.XLA: "XLA does not run hooks as they are set",
}


def accelerate_state() -> Mapping[str, Any]:
    """Return what Accelerate was told of this training, without initializing `AcceleratorState` if it was told nothing.

    Returns:
        `{attribute of AcceleratorState: value}`; empty before an `Accelerator` is made.
    """
    state: Mapping[str, Any] = AcceleratorState._shared_state
    return state


class Engine:
    """The plain engine: every process has the whole model, alone or replicated by DDP.

    Each method names what other engines change. Where an engine is `sharded`, running the model gathers weights, which
    is a collective call: all processes must make the same forward and backward passes in the same order.

    Attributes:
        model: The model.
        sharded: Whether a process holds only a part of each weight.
        forward_mode: Whether modules can be differentiated by forward-mode autodiff (`torch.func.jvp`).

    Args:
        model: The model as its own class, not wrapped.
    """

    sharded = False
    forward_mode = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    def runs(cls, model: nn.Module) -> bool:
        """Tell whether this engine holds the weights of a model."""
        return True

    # --- what is refused ---

    def check(self, estimator: str) -> None:
        """Raise unless the updates of this training can be measured.

        Args:
            estimator: As for `measure_rates`.

        Raises:
            ValueError: With the reason, and what to use instead.
        """
        state = accelerate_state()
        kind, parallelism = state.get("distributed_type"), state.get("parallelism_config")
        reason = _REFUSED.get(kind) if isinstance(kind, DistributedType) else None
        if kind == DistributedType.FSDP and getattr(state.get("fsdp_plugin"), "fsdp_version", 1) != 2:
            reason = "FSDP1 flattens the weights of a layer into one"
        sizes = {"tp": getattr(self.model, "tp_size", 1) or 1}  # Transformers shards a model by itself as well
        for axis in ("tp", "cp", "sp"):
            if getattr(parallelism, f"{axis}_enabled", False) or sizes.get(axis, 1) > 1:
                reason = f"{axis}_size > 1: processes that share their examples are not told from those that do not"
        if reason:
            raise ValueError(f"function-space learning rates cannot be followed here: {reason}. {_REMEDY}")
        if estimator == "exact" and self.sharded:
            raise ValueError("estimator 'exact' needs whole weights, and these are sharded. Use 'per_example'.")

    def check_loop(self, wrapped: nn.Module) -> None:
        """Raise unless a custom training loop steps where it calls `optimizer.step()`, on all processes together.

        Args:
            wrapped: The model as the loop calls it, wrapped or not.

        Raises:
            ValueError: With the reason, and what to use instead.
        """
        if getattr(getattr(wrapped, "_join_config", None), "enable", False):
            raise ValueError(
                "processes that have run out of batches take no part in measurements: train without "
                "join_uneven_inputs (or torch's Join), and let Accelerate give all as many batches (even_batches=True)."
            )

    # --- a weight, a module ---

    def shape(self, parameter: Tensor) -> torch.Size:
        """Return the shape that a parameter has when it is whole."""
        return parameter.shape

    def device(self, parameter: Tensor) -> torch.device:
        """Return the device on which a parameter is used; shards may be offloaded to another one."""
        return parameter.device

    def own_type(self, module: nn.Module) -> type[nn.Module]:
        """Return the class that a module was made of; an engine may have replaced it by a subclass."""
        return type(module)

    # --- around forward and backward passes ---

    def release(self) -> None:
        """Free all gathered weights, so that the model has its sharded parameters again."""

    @contextmanager
    def released_after(self) -> Iterator[None]:
        """Context manager: free all gathered weights at the end of the block, also if it raises."""
        try:
            yield
        finally:
            self.release()

    def gathered(self, modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """Context manager: gather the weights of some modules, so that they can be called apart from the model.

        Args:
            modules: Modules of the model.
        """
        return nullcontext()

    def gathered_leaves(self) -> AbstractContextManager[Mapping[nn.Parameter, nn.Parameter]]:
        """Context manager: note which gathered parameter stands in for which sharded one in forward passes.

        Autograd sees only the gathered ones.

        Yields:
            `{sharded parameter: gathered parameter}`, filled during forward passes. A parameter that is not in it is
            itself the leaf.
        """
        return nullcontext({})

    def repeatable_backward(self) -> AbstractContextManager[None]:
        """Context manager: a backward pass in the block is not the last one through its graph."""
        return nullcontext()

    # --- processes, optimizer ---

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Decide together where processes must run the model in step: a flag is set if any process has set it.

        Args:
            flags: As many on every process.

        Returns:
            The same flags where every process has the whole model and measures independently.
        """
        return list(flags)

    def prepare_optimizer(self, optimizer: Any) -> None:
        """Change an optimizer so that it can step every tensor at a learning rate of its own, before it is wrapped.

        Nothing is to be done where `StepScales` can split param groups for the time of a step.

        Args:
            optimizer: As a trainer has made it.
        """

    def master_weights(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> MasterWeights:
        """Find the weights that an optimizer steps.

        Args:
            optimizer: As Accelerate has prepared it.
            parameters: `{canonical name: parameter}` of all that is trained.

        Returns:
            The master weights.

        Raises:
            ValueError: If the engine steps in a way that cannot be followed.
        """
        return MasterWeights(parameters)


class MasterWeights:
    """The weights that an optimizer steps: here the model's own parameters.

    Elsewhere a process steps its shard of each parameter, or a float32 copy of a part of it from which the model's
    weights are then rounded. Everything is keyed by canonical name.

    Attributes:
        parameters: `{canonical name: parameter of the model}` of all that is trained.
        in_optimizer: `{canonical name: tensor in the optimizer's param groups}`. Several names may share a tensor.
        is_seen_by_hooks: Whether the update is all that happens between the pre- and post-hooks of `optimizer.step`.
        gathers_together: Whether `gather` is a collective call though processes run the model independently: then all
            updates must be gathered before the first probe.

    Args:
        parameters: `{canonical name: parameter}`.
    """

    is_seen_by_hooks = True
    gathers_together = False

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.in_optimizer: Mapping[str, Tensor] = parameters

    # --- one tensor ---

    def shape(self, name: str) -> torch.Size:
        """Return the shape of the whole tensor."""
        return self.parameters[name].shape

    def local(self, name: str) -> Tensor:
        """Return the part that this process steps, without a graph; writing into it changes the weights."""
        return self.parameters[name].data

    def gather(self, name: str, part: Tensor) -> Tensor:
        """Put the parts of a tensor on all processes together.

        Args:
            name: Of which tensor.
            part: Shaped like `local(name)`: the weights there, or their change.

        Returns:
            The whole tensor.
        """
        return part

    def exchange(self, name: str, part: Tensor) -> Tensor:
        """Give `local(name)` other values.

        Args:
            name: Of which tensor.
            part: The values. The caller must not use this tensor afterwards: the parameter may have taken it over.

        Returns:
            The previous values, on the device of `part`.
        """
        parameter = self.parameters[name]
        if part.device != parameter.device:
            return exchange_by_copy(parameter.data, part)
        previous, parameter.data = parameter.data, part  # by reference: no copy, no memory, and no bit can change
        return previous

    def writing(self) -> AbstractContextManager[None]:
        """Context manager: what is written into `local` tensors in the block becomes the model's weights at its end."""
        return nullcontext()

    # --- the optimizer's step ---

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        """Decide together where processes gather updates together: a flag is set if any process has set it."""
        return list(flags)

    def stepped(self) -> dict[str, Tensor]:
        """Return the tensors in the optimizer that its latest step updated: those with a gradient.

        Returns:
            `{canonical name: tensor in the optimizer's param groups}`.
        """
        return {name: tensor for name, tensor in self.in_optimizer.items() if tensor.grad is not None}

    def in_param_groups(self) -> AbstractContextManager[None]:
        """Context manager: the optimizer's param groups hold the tensors of `in_optimizer` during the block."""
        return nullcontext()

    def check_own_learning_rates(self) -> None:
        """Raise unless every tensor can be stepped at a learning rate of its own.

        Raises:
            ValueError: With the tensors that cannot, and what to use instead.
        """


def exchange_by_copy(own: Tensor, part: Tensor) -> Tensor:
    """Write values into a tensor.

    Args:
        own: Where to write.
        part: The values, on any device.

    Returns:
        A copy of the previous values, on the device of `part`.
    """
    previous = own.to(part.device, copy=True)
    own.copy_(part)
    return previous
