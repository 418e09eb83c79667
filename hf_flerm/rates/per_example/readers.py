"""How D phi_n is read off one output of a site, in the backward pass: from the gradient there and what was kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .tangents import Affine, Tangent, linear_adjoint, linear_tangent

Kept = Sequence[Tensor]
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Reader:
    """How the gates of one tensor are read off one output.

    Attributes:
        name: The tensor.
        dim: Dimension of the output along which the examples lie.
        factors: (g, kept) -> two tensors whose product, summed over an example and times `size`, is D phi_n.
        kept: What of the forward pass that needs.
        size: A number.
    """

    name: str
    dim: int
    factors: Callable[[Tensor, Kept], Factors]
    kept: list[Tensor]
    size: Tensor | float = 1.0

    def derivative(self, grad: Tensor, kept: Kept, num_examples: int) -> Tensor:
        """Read D phi_n.

        Args:
            grad: The gradient of phi in the output.
            kept: What was kept, as it came back.
            num_examples: N.

        Returns:
            [N], in float32 at least.
        """
        return _contract(*self.factors(grad, kept), self.dim, num_examples) * self.size


class Readers:
    """Makes readers for the calls of modules.

    Attributes:
        keep_tangents: Whether what one backward pass has computed is kept for the next.

    Args:
        updates: Unit update of each tensor; looked up each time one is needed.
        affine: What is known of the modules' tangents.
    """

    def __init__(self, updates: Mapping[str, Tensor], affine: Affine) -> None:
        self.keep_tangents = False
        self._updates = updates
        self._affine = affine

    def of_call(
        self,
        module: nn.Module,
        attribute: str,
        name: str,
        dim: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: Sequence[Any],
    ) -> dict[int, Reader]:
        """Make the readers of one tensor for one call of a module through which it acts.

        Args:
            module: The module.
            attribute: The tensor in it.
            name: The tensor's canonical name.
            dim: Dimension of the outputs along which the examples lie.
            args: What the module was called with.
            kwargs: What else.
            outputs: What it put out.

        Returns:
            A reader by index of the outputs.
        """
        kind = self._affine.engine.own_type(module)
        tangent = linear_tangent(kind, attribute)
        if tangent is None or kwargs or len(args) != 1 or not isinstance(outputs[0], Tensor):
            tangents = self._affine.tangents(module, attribute, self._updates[name], args, kwargs, outputs)
            return {i: Reader(name, dim, _with_kept, [value]) for i, value in enumerate(tangents)}
        if attribute == "bias":
            return {0: Reader(name, dim, partial(self._bias, name), [])}
        x, output = args[0].detach(), outputs[0]
        adjoint = linear_adjoint(kind, attribute)
        if adjoint is not None and output.shape[-1] < x.shape[-1]:
            with torch.no_grad():
                update, size = _sized(self._updates[name], output.dtype)
                return {0: Reader(name, dim, _with_kept, [tangent(module, update, x.to(output.dtype))], size)}
        size = 1.0 if output.dtype != torch.float16 else _size(self._updates[name])
        return {0: Reader(name, dim, partial(self._late, module, name, tangent, adjoint, []), [x], size)}

    def _bias(self, name: str, grad: Tensor, kept: Kept) -> Factors:
        return grad, self._updates[name]

    def _late(
        self,
        module: nn.Module,
        name: str,
        tangent: Tangent,
        adjoint: Tangent | None,
        moved: list[Tensor],
        grad: Tensor,
        kept: Kept,
    ) -> Factors:
        """From the input, which is no wider than the output or is kept by the graph anyway."""
        (x,) = kept
        if moved:
            return grad, moved[0]
        update, _ = _sized(self._updates[name], grad.dtype)
        if adjoint is not None and not self.keep_tangents:
            return adjoint(module, update, grad), x
        tangents = tangent(module, update, x.to(grad.dtype) if x.is_floating_point() else x)
        if self.keep_tangents:
            moved.append(tangents)
        return grad, tangents


def _with_kept(grad: Tensor, kept: Kept) -> Factors:
    return grad, kept[0]


def _size(update: Tensor) -> Tensor:
    return update.abs().amax().clamp_min(torch.finfo(update.dtype).tiny).float()


def _sized(update: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """An update as unit * size, where float16 could not hold it as it is."""
    if dtype != torch.float16:
        return update, 1.0
    size = _size(update)
    return update / size, size


def _contract(grad: Tensor, tangent: Tensor, dim: int, num_examples: int) -> Tensor:
    """Sum grad * tangent over everything but the examples.

    Args:
        grad: N * k entries along `dim`, the k of an example together.
        tangent: Broadcastable to `grad`.
        dim: Where the examples lie.
        num_examples: N.

    Returns:
        [N], in float32 at least.
    """
    tangent = tangent.reshape((1,) * (grad.ndim - tangent.ndim) + tangent.shape)
    if dim:
        grad, tangent = grad.movedim(dim, 0), tangent.movedim(dim, 0)
    repeated = [d for d in range(1, grad.ndim) if tangent.shape[d] == 1 != grad.shape[d]]
    if repeated:
        grad = grad.sum(repeated, keepdim=True)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    rows = grad.reshape(num_examples, 1, -1).to(dtype)
    if len(tangent) == len(grad):
        return (rows @ tangent.reshape(num_examples, -1, 1).to(dtype)).flatten()
    return (rows.reshape(num_examples, -1, tangent.numel()) @ tangent.flatten().to(dtype)).sum(1)
