"""A reader computes D phi_n at one output of a site in the backward pass.

Axes: n an example of N, t a position, i input features, o output features. At an output y [n, t, o] of a site,
g = d phi / d y is the output gradient and T = d y / d W . U the tangent, and

    D phi_n = sum_to g[n, t, o] T[n, t, o],

a contraction over all dimensions but the examples. If y = W x, then T = U x, and D phi_n is also
sum_ti (U^T g)[n, t, i] x[n, t, i]. A reader saves from the forward pass the smaller tensor that one of the forms needs:

    T             if the output is narrower than the input (LoRA's A), or if no closed form of T is known
    x             otherwise: the graph keeps x anyway
    nothing       for a bias, whose tangent is U itself
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..tensors import TensorAliases, as_real
from .layers import BIAS, LayerTangent, layer_tangent
from .tangents import ModuleTangents, is_differentiable

Saved = Sequence[Tensor]
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Reader:
    """Computes D phi_n of one tensor from the gradient of one output.

    Attributes:
        name: The tensor.
        dim: Dimension of the output along which the examples lie.
        factors: (g, saved) -> two tensors whose product, summed over an example and times `scale`, is D phi_n.
        saved: Tensors of the forward pass that `factors` needs.
        scale: Factor divided out of U so that U fits into float16.
    """

    name: str
    dim: int
    factors: Callable[[Tensor, Saved], Factors]
    saved: list[Tensor]
    scale: Tensor | float = 1.0

    def derivative(self, grad: Tensor, saved: Saved, num_examples: int) -> Tensor:
        """Compute D phi_n.

        Args:
            grad: The output gradient g.
            saved: The saved tensors, as unpacked by autograd.
            num_examples: Number of examples N of the batch.

        Returns:
            [N], in float32 at least.
        """
        return _contract(*_as_real(*self.factors(grad, saved)), self.dim, num_examples) * self.scale

    def squared_terms(self, grad: Tensor, saved: Saved, num_examples: int) -> Tensor:
        """Return the sum of squared terms of D phi_n: its expected square if the terms did not cancel.

        Args:
            grad: The output gradient g.
            saved: The saved tensors, as unpacked by autograd.
            num_examples: Number of examples N of the batch.

        Returns:
            Float64 [N].
        """
        factors = _as_real(*self.factors(grad, saved))
        sizes = [_largest_magnitude(factor) for factor in factors]  # to keep the squares in the range of float32
        squares = [(factor.float() / size).square() for factor, size in zip(factors, sizes, strict=True)]
        unit = sizes[0].double() * sizes[1].double() * self.scale
        return _contract(squares[0], squares[1], self.dim, num_examples).double() * unit.square()


class Readers:
    """Makes readers for calls of modules.

    Attributes:
        keep_tangents: Whether to keep tangents for the next backward pass.

    Args:
        tensors: The measured tensors.
        updates: Unit update of each tensor; looked up whenever it is needed.
        tangents: Differentiates the modules without a closed form.
    """

    def __init__(
        self, tensors: Mapping[str, TensorAliases], updates: Mapping[str, Tensor], tangents: ModuleTangents
    ) -> None:
        self.keep_tangents = False
        self._tensors = tensors
        self._updates = updates
        self._tangents = tangents

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
        """Make the readers of one tensor for one call of the module of a site.

        Args:
            module: The module.
            attribute: Name of the tensor below it.
            name: The tensor's canonical name.
            dim: Dimension of the outputs along which the examples lie.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
            outputs: The flat outputs of the call.

        Returns:
            `{index of an output: reader}`.
        """
        layer = layer_tangent(self._tangents.engine.own_type(module), attribute)
        tensor = self._tensors[name]
        changed = tensor.changed_in(module, attribute)
        # No closed form: save T of every output, from a JVP of the module.
        if layer is None or len(changed) > 1 or kwargs or len(args) != 1 or not isinstance(outputs[0], Tensor):
            update = self._updates[name]
            updates = {parameter: tensor.change_of(parameter, update) for parameter in changed}
            tangents = self._tangents.of_call(module, attribute, updates, args, kwargs, outputs)
            return {i: Reader(name, dim, _with_saved, [tangent]) for i, tangent in enumerate(tangents)}
        (parameter,) = changed

        def update_here() -> Tensor:
            return tensor.change_of(parameter, self._updates[name])

        # A bias: T = U, nothing is saved.
        if layer is BIAS:
            return {0: Reader(name, dim, lambda grad, saved: (grad, update_here()), [])}
        x, output = args[0].detach(), outputs[0]
        # T is narrower than x: compute it now and save it.
        if layer.adjoint is not None and output.shape[-1] < x.shape[-1]:
            with torch.no_grad():
                update, scale = _scaled(update_here(), output.dtype)
                return {0: Reader(name, dim, _with_saved, [layer.tangent(module, update, x.to(output.dtype))], scale)}
        # Save x, and compute T or U^T g in the backward pass.
        scale = 1.0 if output.dtype != torch.float16 else _largest_magnitude(update_here())
        return {0: Reader(name, dim, partial(self._from_input, module, layer, update_here, []), [x], scale)}

    def _from_input(
        self,
        module: nn.Module,
        layer: LayerTangent,
        update_here: Callable[[], Tensor],
        tangents: list[Tensor],
        grad: Tensor,
        saved: Saved,
    ) -> Factors:
        """Factors of a reader that saved the input x. `tangents` caches T of an earlier backward pass."""
        (x,) = saved
        if tangents:
            return grad, tangents[0]
        update, _ = _scaled(update_here(), grad.dtype)
        if layer.adjoint is not None and not self.keep_tangents:
            return layer.adjoint(module, update, grad), x
        tangent = layer.tangent(module, update, x.to(grad.dtype) if is_differentiable(x) else x)
        if self.keep_tangents:
            tangents.append(tangent)
        return grad, tangent


def _with_saved(grad: Tensor, saved: Saved) -> Factors:
    return grad, saved[0]


def _largest_magnitude(update: Tensor) -> Tensor:
    """Return the largest magnitude of an entry, at least the smallest positive number (also without entries)."""
    largest = update.abs().amax() if update.numel() else update.new_zeros(()).abs()
    return largest.clamp_min(torch.finfo(update.dtype).tiny).float()


def _scaled(update: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """Return (update / scale, scale), so that float16 can hold the update; scale is 1 for other dtypes."""
    if dtype != torch.float16:
        return update, 1.0
    scale = _largest_magnitude(update)
    return update / scale, scale


def _as_real(grad: Tensor, tangent: Tensor) -> Factors:
    """Return two factors as real numbers: for complex ones d phi = Re(conj(g) T), the product of their real pairs."""
    return (as_real(grad), as_real(tangent.to(grad.dtype))) if grad.is_complex() else (grad, tangent)


def _contract(grad: Tensor, tangent: Tensor, dim: int, num_examples: int) -> Tensor:
    """Sum grad * tangent over all dimensions but the examples.

    Args:
        grad: N * k entries along `dim`, the k of an example together.
        tangent: Broadcastable to `grad`.
        dim: Dimension along which the examples lie.
        num_examples: Number of examples N of the batch.

    Returns:
        [N], in float32 at least.
    """
    tangent = tangent.reshape((1,) * (grad.ndim - tangent.ndim) + tangent.shape)
    if dim:
        grad, tangent = grad.movedim(dim, 0), tangent.movedim(dim, 0)
    # Where the tangent is broadcast (a bias over positions), sum g first: this avoids a product of full size.
    repeated = [d for d in range(1, grad.ndim) if tangent.shape[d] == 1 != grad.shape[d]]
    if repeated:
        grad = grad.sum(repeated, keepdim=True)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    rows = grad.reshape(num_examples, 1, -1).to(dtype)  # [N, 1, everything else]
    if len(tangent) == len(grad):
        return (rows @ tangent.reshape(num_examples, -1, 1).to(dtype)).flatten()
    # One tangent for all rows of all examples: [N, rows per example, tangent's size] @ [size].
    return (rows.reshape(num_examples, -1, tangent.numel()) @ tangent.flatten().to(dtype)).sum(1)
