"""A measured tensor: a parameter together with the other parameters that share its memory.

An update writes into memory. If two parameters share memory (a head tied by hand to the transposed embedding, PEFT's
`ensure_weight_tying`), the update of one changes the other, and D f is the derivative with both changed. Likewise, the
gradient of a tensor is the sum over all parameters in its memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..engines.engine import Engine
from ..model.storage import by_storage

logger = logging.get_logger(__name__)

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class _Layout:
    """Where a parameter's elements lie in its storage: element i is at offset + i . strides.

    Positions are counted in real numbers: a complex element is two of them, along a last dimension of size 2.
    """

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
        """Return the elements' positions in a buffer that begins at position `start` of the storage, int64 [numel]."""
        numbers = torch.arange(self.end - start, device=device)
        return numbers.as_strided(self.sizes, self.strides, self.offset - start).flatten()


@dataclass(frozen=True)
class MemoryMap:
    """Maps a tensor shaped like one parameter (source) to one shaped like another in the same memory (target)."""

    source: _Layout
    target: _Layout

    def __call__(self, values: Tensor) -> Tensor:
        """Scatter values into memory as the source, and gather them as the target.

        Elements of the target outside the source are 0. Values that the source has at one position of memory (the
        gradient of an expanded parameter) are summed.
        """
        real = as_real(values)
        start, end = self._extent
        buffer = real.new_zeros(end - start)
        buffer.index_add_(0, self.source.entries(start, real.device), real.flatten())
        gathered = buffer[self.target.entries(start, real.device)].reshape(self.target.sizes)
        return torch.view_as_complex(gathered) if self.target.is_complex else gathered

    def reverse(self) -> MemoryMap:
        """Return the map from the target to the source."""
        return MemoryMap(self.target, self.source)

    def is_empty(self) -> bool:
        """Whether source and target share no element; the ranges of two columns overlap without one, for instance."""
        start, end = self._extent
        taken = torch.zeros(end - start, dtype=torch.bool)
        taken[self.source.entries(start, taken.device)] = True
        return not bool(taken[self.target.entries(start, taken.device)].any())

    @property
    def _extent(self) -> tuple[int, int]:
        return min(self.source.offset, self.target.offset), max(self.source.end, self.target.end)


@dataclass(frozen=True)
class TensorAliases:
    """A parameter and the others that share its memory.

    Attributes:
        parameter: The parameter under whose name the tensor is measured.
        maps: `{other parameter: map from a tensor shaped like `parameter` to one shaped like the other}`.
    """

    parameter: nn.Parameter
    maps: Mapping[nn.Parameter, MemoryMap]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters that an update changes."""
        return [self.parameter, *self.maps]

    def change_of(self, parameter: nn.Parameter, update: Tensor) -> Tensor:
        """Return the change of one of `parameters` that an update of the tensor causes."""
        to_other = self.maps.get(parameter)
        return update if to_other is None else to_other(update)

    def gradient_part(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """Return what the gradient of one of `parameters` adds to the gradient of the tensor."""
        to_other = self.maps.get(parameter)
        return gradient if to_other is None else to_other.reverse()(gradient)

    def changed_in(self, module: nn.Module, attribute: str) -> list[nn.Parameter]:
        """List the parameters below a module that an update changes.

        Args:
            module: The module.
            attribute: Name below it of one of `parameters`. While the module runs, another object may be there: an engine
                gathers parameters, `torch.func.functional_call` replaces them. It is treated like `parameter`.
        """
        path, _, name = attribute.rpartition(".")
        # By `get`: ZeRO-3 gathers a parameter whose slot is looked up by index or attribute in a forward pass.
        named: Any = module.get_submodule(path)._parameters.get(name)
        below = set(module.parameters()) if self.maps else set()
        return list(dict.fromkeys([named, *(p for p in self.parameters if p in below)]))


class OverlappingMemory:
    """Which parameters of a model have memory in common, all of it or a part (see also `model.storage.shared_memory`).

    Computed once, at the start: during a measurement the weights from before the step lie in other memory.

    Args:
        model: The model.
        engine: The engine that holds its weights; shards share no memory.
    """

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        self._maps: dict[nn.Parameter, dict[nn.Parameter, MemoryMap]] = {}
        for parameters in by_storage(() if engine.sharded else model.named_parameters()):
            for (name, one), (other_name, other) in _overlapping(parameters):
                if _real_dtype(one) != _real_dtype(other):
                    logger.warning_once(
                        f"{name} ({one.dtype}) and {other_name} ({other.dtype}) lie in the same memory in different "
                        "dtypes: the rate of each is measured as if its update did not change the other."
                    )
                    continue
                to_other = MemoryMap(_Layout.of(one), _Layout.of(other))
                if not to_other.is_empty():
                    self._maps.setdefault(one, {})[other] = to_other
                    self._maps.setdefault(other, {})[one] = to_other.reverse()

    def tensor(self, parameter: nn.Parameter) -> TensorAliases:
        """Return a parameter together with those that share its memory."""
        return TensorAliases(parameter, self._maps.get(parameter, {}))


def _overlapping(parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[Named, Named]]:
    """Yield pairs of parameters of one storage whose address ranges overlap; slices of a flat buffer have none."""
    extents = []
    for name, parameter in parameters.items():
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
    """Return a real tensor unchanged, a complex one as pairs of real numbers along a new last dimension."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def product_shapes(parameters: Mapping[str, Tensor], engine: Engine) -> dict[str, torch.Size]:
    """Return `{canonical name: shape of Z = U * G}` of whole parameters, gathered if they are sharded."""
    return {
        name: torch.Size((*engine.shape(parameter), 2)) if parameter.is_complex() else engine.shape(parameter)
        for name, parameter in parameters.items()
    }


def elementwise_products(update: Tensor, gradient: Tensor) -> Tensor:
    """Z = U * G, of real numbers; the sum of Z is the derivative of phi along U.

    For a complex parameter this is Re(conj(G) U), as autograd defines G.
    """
    return as_real(update) * as_real(gradient)
