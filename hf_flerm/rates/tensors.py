"""What one measured tensor is: a parameter, and every other parameter that lies in its memory.

An update writes into memory. Where two parameters share it (a head tied by hand to the transposed embedding, PEFT's
`ensure_weight_tying`), the update of one moves the other, and D f is the derivative with both moved. The gradient of
one tensor is, likewise, the sum over all parameters in its memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..engines.engine import Engine

logger = logging.get_logger(__name__)

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class _Layout:
    """Where a parameter's numbers lie in a storage, in units of real numbers: entry i is at offset + i . strides."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    is_complex: bool

    @classmethod
    def of(cls, parameter: nn.Parameter) -> _Layout:
        real = as_real(parameter.detach())
        return cls(tuple(real.shape), real.stride(), int(real.storage_offset()), parameter.is_complex())

    @property
    def end(self) -> int:
        return self.offset + 1 + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))

    def entries(self, start: int, device: torch.device) -> Tensor:
        """Where the entries lie in a buffer that begins with number `start` of the storage, int64 [numel]."""
        numbers = torch.arange(self.end - start, device=device)
        return numbers.as_strided(self.sizes, self.strides, self.offset - start).flatten()


@dataclass(frozen=True)
class View:
    """A tensor shaped like one parameter (the source), as another one in the same memory (the target) sees it."""

    source: _Layout
    target: _Layout

    def __call__(self, values: Tensor) -> Tensor:
        """Write values where the source lies, read them where the target lies: 0 where the target holds other memory.

        Values that the source holds at one place (an expanded parameter's gradient) are added up.
        """
        real = as_real(values)
        start, end = self._extent
        buffer = real.new_zeros(end - start)
        buffer.index_add_(0, self.source.entries(start, real.device), real.flatten())
        seen = buffer[self.target.entries(start, real.device)].reshape(self.target.sizes)
        return torch.view_as_complex(seen) if self.target.is_complex else seen

    def reverse(self) -> View:
        """Return the source's view of the target."""
        return View(self.target, self.source)

    def is_empty(self) -> bool:
        """Tell whether no number lies in both: extents may meet without one, as those of two columns do."""
        start, end = self._extent
        taken = torch.zeros(end - start, dtype=torch.bool)
        taken[self.source.entries(start, taken.device)] = True
        return not bool(taken[self.target.entries(start, taken.device)].any())

    @property
    def _extent(self) -> tuple[int, int]:
        return min(self.source.offset, self.target.offset), max(self.source.end, self.target.end)


@dataclass(frozen=True)
class MeasuredTensor:
    """A parameter and the others that lie in its memory.

    Attributes:
        parameter: The parameter under whose name the tensor is measured.
        views: `{other parameter: its view of what is shaped like `parameter`}`.
    """

    parameter: nn.Parameter
    views: Mapping[nn.Parameter, View]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that an update moves."""
        return [self.parameter, *self.views]

    def seen_by(self, parameter: nn.Parameter, update: Tensor) -> Tensor:
        """Show an update of the tensor as one of `parameters` sees it."""
        view = self.views.get(parameter)
        return update if view is None else view(update)

    def part_of_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """Turn the gradient of one of `parameters` into its part of the tensor's gradient."""
        view = self.views.get(parameter)
        return gradient if view is None else view.reverse()(gradient)

    def moved_in(self, module: nn.Module, attribute: str) -> list[nn.Parameter]:
        """List the parameters below a module that an update moves.

        Args:
            module: The module.
            attribute: Name below it of one of `parameters`. What is found there while the module runs may be another
                object: FSDP2 gathers parameters, `torch.func.functional_call` replaces them. It counts as `parameter`.
        """
        path, _, name = attribute.rpartition(".")
        # By `get`: ZeRO-3 gathers a parameter whose slot is looked up by index or attribute in a forward pass.
        named: Any = module.get_submodule(path)._parameters.get(name)
        below = set(module.parameters()) if self.views else set()
        return list(dict.fromkeys([named, *(p for p in self.parameters if p in below)]))


class SharedMemory:
    """Which parameters of a model share memory.

    It is looked at once, at the start: while a step is measured, weights from before it lie in memory of their own.

    Args:
        model: The model.
        engine: The engine that holds its weights; shards share no memory.
    """

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        by_storage: dict[tuple[torch.device, int], list[Named]] = {}
        for name, parameter in () if engine.sharded else model.named_parameters():
            if parameter.numel() and not parameter.is_meta:
                key = parameter.device, parameter.untyped_storage().data_ptr()
                by_storage.setdefault(key, []).append((name, parameter))
        self._views: dict[nn.Parameter, dict[nn.Parameter, View]] = {}
        for sharing in by_storage.values():
            for (name, one), (other_name, other) in _meeting(sharing):
                if _real_dtype(one) != _real_dtype(other):
                    logger.warning_once(
                        f"{name} ({one.dtype}) and {other_name} ({other.dtype}) lie in the same memory in different "
                        "dtypes: the rate of each is measured as if its update did not move the other."
                    )
                    continue
                view = View(_Layout.of(one), _Layout.of(other))
                if not view.is_empty():
                    self._views.setdefault(one, {})[other] = view
                    self._views.setdefault(other, {})[one] = view.reverse()

    def tensor(self, parameter: nn.Parameter) -> MeasuredTensor:
        """Return a parameter with all that lie in its memory."""
        return MeasuredTensor(parameter, self._views.get(parameter, {}))


def _meeting(sharing: list[Named]) -> Iterator[tuple[Named, Named]]:
    """Pairs of parameters of one storage whose extents meet: of a flat buffer of many slices, none."""
    extents = []
    for name, parameter in sharing:
        layout, width = _Layout.of(parameter), _real_dtype(parameter).itemsize
        extents.append((layout.offset * width, layout.end * width, (name, parameter)))
    extents.sort(key=lambda extent: extent[:2])
    for i, (_, end, first) in enumerate(extents):
        for start, _, second in extents[i + 1 :]:
            if start >= end:
                break
            yield first, second


def _real_dtype(tensor: Tensor) -> torch.dtype:
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


def as_real(tensor: Tensor) -> Tensor:
    """A tensor of real numbers as it is, one of complex numbers as pairs of these, along a new last dimension."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def product_shapes(parameters: Mapping[str, Tensor], engine: Engine) -> dict[str, torch.Size]:
    """Return `{canonical name: shape of Z = U * G}` of whole parameters."""
    return {
        name: torch.Size((*engine.shape(parameter), 2)) if parameter.is_complex() else engine.shape(parameter)
        for name, parameter in parameters.items()
    }


def elementwise_products(update: Tensor, gradient: Tensor) -> Tensor:
    """Z = U * G, of real numbers; the sum of Z is the derivative of phi along U.

    For a complex parameter this is Re(conj(G) U), as autograd defines G.
    """
    return as_real(update) * as_real(gradient)
