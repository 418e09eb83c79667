"""Per-example derivatives without weight gradients: one zero gate per example and tensor, f(W + gate_n U).

A site is a module whose forward is really called and through which a tensor acts. A hook there adds gate_n * T to the
module's output, T being the output's derivative along the update U (its tangent). The gradient of phi with respect
to gate_n, at gate = 0, is D phi_n. Gates of one tensor at several sites (tied weights) add up.

Axes: n an example of N, t a position, i/o input/output features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers.pytorch_utils import Conv1D

Tangent = Callable[[nn.Module, Tensor, tuple[Any, ...]], Tensor]


def _bias(module: nn.Module, update: Tensor, args: tuple[Any, ...]) -> Tensor:
    return update


# Modules that are linear in a tensor: type -> attribute -> the output with U in the tensor's place, nothing else added.
_TANGENTS: dict[type[nn.Module], dict[str, Tangent]] = {
    nn.Linear: {"weight": lambda module, update, args: F.linear(args[0], update), "bias": _bias},
    Conv1D: {"weight": lambda module, update, args: args[0] @ update, "bias": _bias},
    nn.Embedding: {"weight": lambda module, update, args: F.embedding(args[0], update)},
}


@dataclass(frozen=True)
class Site:
    """Where a tensor acts.

    Attributes:
        module: Name of the module in `named_modules()` of the model.
        attribute: Name of the parameter inside that module.
    """

    module: str
    attribute: str

    def enclosing(self) -> Site | None:
        """The same tensor seen from the module that holds this one; None from the model itself."""
        if not self.module:
            return None
        parent, _, child = self.module.rpartition(".")
        return Site(parent, f"{child}.{self.attribute}")


class _Gate(torch.autograd.Function):
    """The output itself; backward reads off the gates' gradients."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gates: Tensor, *tangents: Tensor) -> Tensor:
        ctx.num_examples = gates.shape[1]
        ctx.save_for_backward(*tangents)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        derivatives = [_contract(grad, tangent, ctx.num_examples) for tangent in ctx.saved_tensors]
        return (grad if ctx.needs_input_grad[0] else None, torch.stack(derivatives), *[None] * len(derivatives))


def _contract(grad: Tensor, tangent: Tensor, num_examples: int) -> Tensor:
    """Sum grad * tangent over everything but the examples.

    Args:
        grad: [N * k, ...], the k rows of an example together.
        tangent: Broadcastable to `grad` from the right.
        num_examples: N.

    Returns:
        D phi_n, [N], in float32 at least.
    """
    tangent = tangent.reshape((1,) * (grad.ndim - tangent.ndim) + tangent.shape)
    repeated = [d for d in range(1, grad.ndim) if tangent.shape[d] == 1 != grad.shape[d]]
    if repeated:
        grad = grad.sum(repeated, keepdim=True)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    rows = grad.reshape(num_examples, 1, -1).to(dtype)
    if len(tangent) == len(grad):
        return (rows @ tangent.reshape(num_examples, -1, 1).to(dtype)).flatten()
    return (rows.reshape(num_examples, -1, tangent.numel()) @ tangent.flatten().to(dtype)).sum(1)


def itself(output: Tensor) -> Tensor:
    """Hand out a module's output as it is."""
    return output


class Gates(AbstractContextManager["Gates"]):
    """Gates on the sites of some tensors, for as long as the context lasts.

    Attributes:
        precision: The machine epsilon of the coarsest output that was gated, 0 before any was.
        broadcast: Tensors whose site puts out one row for all examples; it is given a row for each.
        failures: Tensors whose site could not be differentiated, and why. They have no gate there.
        layouts: For each site's module the rows per example of what it put out, call by call; 0 if these were none.

    Args:
        model: The model.
        sites: Where each tensor acts.
        updates: Unit update of each tensor, by the same names.
        num_examples: N of the batch that will go through.
        hand_out: `torch.clone` for a model that writes into its modules' outputs in place.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Sequence[Site]],
        updates: Mapping[str, Tensor],
        num_examples: int,
        *,
        hand_out: Callable[[Tensor], Tensor] = itself,
    ) -> None:
        self._num_examples = num_examples
        self._hand_out = hand_out
        self._updates = updates
        self._tensors: dict[nn.Module, list[tuple[str, str]]] = {}
        self._leaves: dict[nn.Module, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._measuring = False
        self.precision = 0.0
        self.broadcast: set[str] = set()
        self.failures: dict[str, Exception] = {}
        self.layouts: dict[str, tuple[int, ...]] = {}
        self._paths: dict[nn.Module, str] = {}
        for name, places in sites.items():
            for site in places:
                module = model.get_submodule(site.module)
                self._tensors.setdefault(module, []).append((name, site.attribute))
                self._paths[module] = site.module
        for module, tensors in self._tensors.items():
            update = updates[tensors[0][0]]
            dtype = torch.promote_types(update.dtype, torch.float32)
            self._leaves[module] = torch.zeros(
                len(tensors), num_examples, dtype=dtype, device=update.device, requires_grad=True
            )

    def __enter__(self) -> Gates:
        for module in self._tensors:
            self._handles.append(module.register_forward_hook(self._hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def checked(self) -> Gates:
        """Hand on these gates, if all sites could be differentiated.

        Returns:
            These gates.

        Raises:
            Exception: The first failure.
        """
        for error in self.failures.values():
            raise error
        return self

    @property
    def leaves(self) -> list[Tensor]:
        """The gates, one [tensors of the site, N] for each module with a site: what to differentiate phi by."""
        return list(self._leaves.values())

    def derivatives(self, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Add up the gates' gradients by tensor.

        Args:
            gradients: d phi / d gate for each of `leaves`; None for a module that phi does not depend on.

        Returns:
            `{name: D phi_n}`, each [N].
        """
        totals: dict[str, Tensor] = {}
        for (module, tensors), gradient in zip(self._tensors.items(), gradients, strict=True):
            gradient = torch.zeros_like(self._leaves[module]) if gradient is None else gradient
            for (name, _), row in zip(tensors, gradient, strict=True):
                totals[name] = totals[name] + row if name in totals else row
        return totals

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._measuring:
            return output
        tensors = self._tensors[module]
        outputs, spec = tree_flatten(output)
        tangents = []
        self._measuring = True
        try:
            for name, attribute in tensors:
                try:
                    tangents.append(_tangents(module, attribute, self._updates[name], args, kwargs))
                except RuntimeError as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    self.failures[name] = error
                    tangents.append([torch.zeros((), device=self._updates[name].device)] * len(outputs))
        finally:
            self._measuring = False
        for i, value in enumerate(outputs):
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
                outputs[i] = self._gate(module, value, [tangent[i] for tangent in tangents])
        return tree_unflatten(outputs, spec)

    def _gate(self, module: nn.Module, output: Tensor, tangents: Sequence[Tensor]) -> Tensor:
        rows, rest = divmod(output.shape[0], self._num_examples)
        path = self._paths[module]
        self.layouts[path] = (*self.layouts.get(path, ()), 0 if rest else rows)
        if rest:
            if output.shape[0] != 1:
                return output
            # One row that is broadcast over the examples later on (position embeddings): broadcast it here.
            output = output.expand(self._num_examples, *output.shape[1:])
            self.broadcast.update(name for name, _ in self._tensors[module])
        self.precision = max(self.precision, torch.finfo(output.dtype).eps)
        return self._hand_out(_Gate.apply(output, self._leaves[module], *tangents))


def _tangents(
    module: nn.Module, attribute: str, update: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """The derivative of every tensor in the module's output along `update` of one of its parameters."""
    linear = _TANGENTS.get(type(module), {}).get(attribute)
    if linear is not None and not kwargs:
        with torch.no_grad():
            return [linear(module, update, args)]
    args, kwargs = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, (args, kwargs))

    def forward(parameter: Tensor) -> tuple[Tensor, ...]:
        flat, _ = tree_flatten(torch.func.functional_call(module, {attribute: parameter}, args, kwargs))
        return tuple(value if isinstance(value, Tensor) else torch.zeros(()) for value in flat)

    return list(jvp(forward, module.get_parameter(attribute), update))


def jvp(function: Callable[[Tensor], tuple[Tensor, ...]], primal: Tensor, tangent: Tensor) -> tuple[Tensor, ...]:
    """Differentiate a function along a direction: in forward mode, or by two backward passes where that is missing.

    Args:
        function: Tensor to tensors.
        primal: Where.
        tangent: Along what, shaped like `primal`.

    Returns:
        The derivative of each output.
    """
    primal = primal.detach()
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second or forward-mode derivative
        try:
            with torch.no_grad():
                tangents: tuple[Tensor, ...] = torch.func.jvp(function, (primal,), (tangent,))[1]
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            with torch.enable_grad():
                tangents = torch.autograd.functional.jvp(function, primal, tangent)[1]
        return tangents
