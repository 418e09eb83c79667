"""The tangent of a module: the derivative of its outputs along an update of a tensor in it.

Symbols: y are the outputs of a module, W a tensor that it or a submodule holds, U the update of W.
T = lim_{s -> 0} (y(W + s U) - y(W)) / s, shaped like y.

`layers.py` knows T of common layers in closed form. Everything else is differentiated here: by a forward-mode
derivative (JVP) of the module alone, or, if a trial has shown the module to be affine in W, by y(W + U) - y(W), which
is equal and twice as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ...engines.engine import Engine

Updates = Mapping[nn.Parameter, Tensor]


class ModuleTangents:
    """Computes tangents of modules. Caches in which parameters a module is affine.

    Args:
        engine: The engine that holds the model's weights.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._affine: dict[tuple[nn.Module, str], bool] = {}

    def of_call(
        self,
        module: nn.Module,
        attribute: str,
        updates: Updates,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: Sequence[Any],
    ) -> list[Tensor]:
        """Differentiate the outputs of one call of a module along an update of one tensor.

        Args:
            module: The module.
            attribute: Name of the tensor below it.
            updates: `{parameter: U}` for each parameter in the module that changes with the tensor.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
            outputs: The flat outputs of the call.

        Returns:
            T of each output; 0 for an output that is not a tensor of real or complex numbers.
        """
        key = (module, attribute)
        # DoRA passes a layer as an argument, whose weights the JVP needs as well.
        arguments = [value for value in tree_leaves((args, kwargs)) if isinstance(value, nn.Module)]
        with self.engine.gathered([module, *arguments]):
            if self._affine.get(key):
                return _difference(module, updates, args, kwargs, outputs)
            tangents = _derivative(module, updates, args, kwargs, self.engine)
            if key not in self._affine and any(bool(t.any()) for t in tangents):
                self._affine[key] = _is_affine(module, updates, args, kwargs, outputs, tangents)
            return tangents


@contextmanager
def replaced_parameters(module: nn.Module, values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Context manager: replace parameters of a module and its submodules by tensors.

    Each (owner, name) is replaced once, however many paths lead to the owner, and restored by reference.

    Args:
        module: The module.
        values: `{parameter: tensor}`; the tensors may carry tangents of forward-mode differentiation.
    """
    places: list[tuple[dict[str, Any], str, nn.Parameter]] = [
        (part._parameters, name, held)
        for part in module.modules()  # each submodule once
        for name, held in part._parameters.items()
        if held is not None and held in values
    ]
    try:
        for owner, name, held in places:
            owner[name] = values[held]
        yield
    finally:
        for owner, name, held in places:
            owner[name] = held


def jvp(
    function: Callable[..., tuple[Tensor, ...]],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    model: nn.Module,
    engine: Engine,
) -> tuple[Tensor, ...]:
    """Compute a JVP: in forward mode if it is supported, else by two backward passes.

    Args:
        function: Maps tensors shaped like `primals` to tensors.
        primals: The point at which to differentiate.
        tangents: The direction, one tensor for each primal.
        model: The module that the function runs.
        engine: The engine that holds its weights.

    Returns:
        The derivative of each output.
    """
    primals = tuple(primal.detach() for primal in primals)
    tangents = tuple(tangent.to(primal.dtype) for primal, tangent in zip(primals, tangents, strict=True))
    # The matrix products of bitsandbytes drop forward-mode tangents silently.
    drops_tangents = any(type(module).__module__.startswith("bitsandbytes.") for module in model.modules())
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second or forward-mode derivative
        if engine.forward_mode and not drops_tangents:
            try:
                with torch.no_grad():
                    forward: tuple[Tensor, ...] = torch.func.jvp(function, primals, tangents)[1]
                return forward
            except RuntimeError as error:
                if should_reduce_batch_size(error):
                    raise
        # Identity hooks keep an activation checkpoint around the model from counting the tensors that are saved here:
        # its recomputation may differentiate in another way, or not at all.
        with torch.enable_grad(), saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            backward: tuple[Tensor, ...] = torch.autograd.functional.jvp(function, primals, tangents)[1]
        return backward


def _derivative(
    module: nn.Module, updates: Updates, args: tuple[Any, ...], kwargs: dict[str, Any], engine: Engine
) -> list[Tensor]:
    """T of each output by one JVP of the module."""
    args, kwargs = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, (args, kwargs))

    def forward(*values: Tensor) -> tuple[Tensor, ...]:
        with replaced_parameters(module, dict(zip(updates, values, strict=True))):
            return _tensors(module(*args, **kwargs))

    return list(jvp(forward, list(updates), list(updates.values()), module, engine))


def _difference(
    module: nn.Module, updates: Updates, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Sequence[Any]
) -> list[Tensor]:
    """(y(W + c U) - y(W)) / c, the tangent if y is affine in W; c makes c U as large as W, to reduce round-off."""
    weights, directions = ([tensor.detach() for tensor in tensors] for tensors in (updates, updates.values()))
    size, scale = (_largest_or_one(tensors) for tensors in (weights, directions))
    with torch.no_grad():
        changed = [weight + direction * (size / scale) for weight, direction in zip(weights, directions, strict=True)]
        with replaced_parameters(module, dict(zip(updates, changed, strict=True))):
            after = _tensors(module.forward(*args, **kwargs))
        return [
            (end - start) * (scale / size).to(end.dtype) for end, start in zip(after, _tensors(outputs), strict=True)
        ]


def _is_affine(
    module: nn.Module,
    updates: Updates,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Sequence[Any],
    tangents: Sequence[Tensor],
) -> bool:
    """Whether finite differences along U and -U, as large as W, equal the tangents; False for one with submodules.

    A submodule may have a nonlinearity that these inputs do not activate and others do. The tolerances are those of
    float32 products; a real nonlinearity differs by far more at a step as large as W.
    """
    if next(module.children(), None) is not None:
        return False
    for sign in (1, -1):
        signed = {parameter: sign * update for parameter, update in updates.items()}
        differences = _difference(module, signed, args, kwargs, outputs)
        for tangent, difference in zip(tangents, differences, strict=True):
            atol = 1e-5 * float(tangent.abs().max()) if tangent.numel() else 0.0
            if not torch.allclose(sign * tangent, difference, rtol=1e-3, atol=atol):
                return False
    return True


def _largest_or_one(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude of an entry; 1 if all entries are 0 or there is none."""
    largest = torch.stack([t.abs().amax() if t.numel() else t.new_zeros(()).abs() for t in tensors]).amax()
    return torch.where(largest > 0, largest, 1.0)


def _tensors(output: Any) -> tuple[Tensor, ...]:
    """Return the flat outputs of a module, with 0 in place of values that are not real or complex tensors."""
    flat, _ = tree_flatten(output)
    return tuple(value if is_differentiable(value) else torch.zeros(()) for value in flat)


def is_differentiable(value: Any) -> bool:
    """Whether a value is a tensor of real or complex numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
