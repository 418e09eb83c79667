"""How a module's output moves along a change of one of its parameters: its tangent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from transformers.pytorch_utils import Conv1D

from ...engines.engine import Engine

Tangent = Callable[[Any, Tensor, Tensor], Tensor]

# Modules of one input that are linear in a parameter: the output with U in its place, and nothing else added.
_LINEAR: dict[tuple[type[nn.Module], str], Tangent] = {
    (nn.Linear, "weight"): lambda module, update, x: F.linear(x, update.to(x.dtype)),
    (nn.Linear, "bias"): lambda module, update, x: update,
    (Conv1D, "weight"): lambda module, update, x: x @ update.to(x.dtype),
    (Conv1D, "bias"): lambda module, update, x: update,
    (nn.Embedding, "weight"): lambda module, update, x: F.embedding(x, update),
    (nn.LayerNorm, "weight"): lambda module, update, x: F.layer_norm(
        x, module.normalized_shape, update.to(x.dtype), None, module.eps
    ),
    (nn.LayerNorm, "bias"): lambda module, update, x: update,
}
# The same maps from the other side: what takes a gradient of the output to the input.
_ADJOINT: dict[tuple[type[nn.Module], str], Tangent] = {
    (nn.Linear, "weight"): lambda module, update, grad: grad @ update.to(grad.dtype),
    (Conv1D, "weight"): lambda module, update, grad: grad @ update.to(grad.dtype).T,
}


class Affine:
    """Which parameters a module without parts is affine in, found out by trial: a plain call then gives the tangent.

    Args:
        engine: What holds the model's weights.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._known: dict[tuple[nn.Module, str], bool] = {}

    def tangents(
        self,
        module: nn.Module,
        attribute: str,
        update: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: Sequence[Any],
    ) -> list[Tensor]:
        """Differentiate a module's output along a change of one of its parameters.

        Args:
            module: The module.
            attribute: Name of the parameter in it.
            update: U, shaped like the parameter.
            args: What the module was called with.
            kwargs: What else.
            outputs: What it put out.

        Returns:
            The derivative of every output; 0 for what is no floating-point tensor.
        """
        key = (module, attribute)
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, nn.Module)]  # to DoRA's layers
        with self.engine.gathered([module, *given]):
            if self._known.get(key):
                return _difference(module, attribute, update, args, kwargs, outputs)
            derivative = _derivative(module, attribute, update, args, kwargs, self.engine)
            if key not in self._known and any(bool(d.any()) for d in derivative):
                self._known[key] = next(module.children(), None) is None and all(
                    torch.allclose(sign * d, value, rtol=1e-3, atol=1e-5 * float(d.abs().max()) if d.numel() else 0.0)
                    for sign in (1, -1)
                    for d, value in zip(
                        derivative, _difference(module, attribute, sign * update, args, kwargs, outputs), strict=True
                    )
                )
            return derivative


def linear_tangent(kind: type[nn.Module], attribute: str) -> Tangent | None:
    """The tangent (module, U, x) -> T of a module of one input that is linear in a parameter, if it is known.

    Args:
        kind: The module's own type.
        attribute: Name of the parameter in it.

    Returns:
        The function, or None.
    """
    return _LINEAR.get((kind, attribute))


def linear_adjoint(kind: type[nn.Module], attribute: str) -> Tangent | None:
    """The adjoint (module, U, g) -> d (g . T) / d x of such a module, where x is narrower than its output.

    Args:
        kind: The module's own type.
        attribute: Name of the parameter in it.

    Returns:
        The function, or None.
    """
    return _ADJOINT.get((kind, attribute))


def jvp(
    function: Callable[[Tensor], tuple[Tensor, ...]], primal: Tensor, tangent: Tensor, model: nn.Module, engine: Engine
) -> tuple[Tensor, ...]:
    """Differentiate a function along a direction: in forward mode, or by two backward passes where that is missing.

    Args:
        function: Tensor to tensors.
        primal: Where.
        tangent: Along what, shaped like `primal`.
        model: What the function runs.
        engine: What holds its weights.

    Returns:
        The derivative of each output.
    """
    primal, tangent = primal.detach(), tangent.to(primal.dtype)
    # The products of bitsandbytes drop forward-mode tangents without a word.
    drops_tangents = any(type(module).__module__.startswith("bitsandbytes.") for module in model.modules())
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second or forward-mode derivative
        if engine.forward_mode and not drops_tangents:
            try:
                with torch.no_grad():
                    forward: tuple[Tensor, ...] = torch.func.jvp(function, (primal,), (tangent,))[1]
                return forward
            except RuntimeError as error:
                if should_reduce_batch_size(error):
                    raise
        # What it saves is no activation checkpoint's: a recomputation may differentiate another way, or not at all.
        with torch.enable_grad(), saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            backward: tuple[Tensor, ...] = torch.autograd.functional.jvp(function, primal, tangent)[1]
        return backward


def _derivative(
    module: nn.Module, attribute: str, update: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], engine: Engine
) -> list[Tensor]:
    args, kwargs = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, (args, kwargs))

    def forward(parameter: Tensor) -> tuple[Tensor, ...]:
        return _tensors(torch.func.functional_call(module, {attribute: parameter}, args, kwargs))

    return list(jvp(forward, module.get_parameter(attribute), update, module, engine))


def _difference(
    module: nn.Module,
    attribute: str,
    update: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Sequence[Any],
) -> list[Tensor]:
    """f(W + U) - f(W), which is the derivative along U if f is affine. U is made of W's size, for round-off's sake."""
    own = module.get_parameter(attribute).detach()
    size, scale = (_largest(tensor) for tensor in (own, update))
    with torch.no_grad(), _replaced(module, attribute, own + update * (size / scale)):
        moved = _tensors(module.forward(*args, **kwargs))
        return [
            (end - start) * (scale / size).to(end.dtype) for end, start in zip(moved, _tensors(outputs), strict=True)
        ]


def _largest(tensor: Tensor) -> Tensor:
    """The largest magnitude of an entry; 1 where there is none."""
    largest = tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())
    return torch.where(largest > 0, largest, 1.0)


@contextmanager
def _replaced(module: nn.Module, attribute: str, value: Tensor) -> Iterator[None]:
    path, _, leaf = attribute.rpartition(".")
    parameters: dict[str, Any] = module.get_submodule(path)._parameters
    own = parameters[leaf]
    parameters[leaf] = value
    try:
        yield
    finally:
        parameters[leaf] = own


def _tensors(output: Any) -> tuple[Tensor, ...]:
    flat, _ = tree_flatten(output)
    return tuple(
        value if isinstance(value, Tensor) and value.is_floating_point() else torch.zeros(()) for value in flat
    )
