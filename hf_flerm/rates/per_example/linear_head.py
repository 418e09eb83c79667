"""Skip the vocabulary: probe a model whose output is one last linear map without ever building that output.

Where the output is h V^T + b (h [N, T, d], V [K, d]), the gradient that omega sends into h is omega V, a Gaussian with
covariance V^T V at every position. Drawing it from that d x d matrix gives the same distribution as drawing the K
numbers of omega, and needs neither logits nor omega. A trained head adds columns for what its own update does to the
output: (omega V, omega U_V, omega . U_b) is jointly Gaussian with the Gram matrix of the columns [V, U_V, U_b].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from ...model.isolation import replaced_forward
from ..outputs import OutputValues

_PIECES = 4  # of a block's columns; more save more of the symmetric half, in smaller products


class LinearHead:
    """The last linear map of a model, and how omega reaches its input and its own tensors.

    Attributes:
        names: Names of its measured tensors, by attribute.

    Args:
        module: The map.
        updates: Unit updates of its measured tensors: of `{"weight": (name, U), "bias": (name, U)}` those it has.
    """

    def __init__(self, module: nn.Linear, updates: Mapping[str, tuple[str, Tensor]]) -> None:
        self.module = module
        self.names = {attribute: name for attribute, (name, _) in updates.items()}
        blocks = {"hidden": module.weight.detach()}
        blocks |= {attribute: update.reshape(len(module.weight), -1) for attribute, (_, update) in updates.items()}
        dtype = torch.promote_types(module.weight.dtype, torch.float32)
        blocks = {key: block.to(dtype) for key, block in blocks.items()}
        # Blocks of equal size keep the Gram matrix well conditioned whatever the unit of the update.
        tiny = torch.finfo(dtype).tiny
        self._scales = {key: block.norm().clamp_min(tiny) for key, block in blocks.items()}
        self._widths = {key: block.shape[1] for key, block in blocks.items()}
        sizes = torch.cat([self._scales[key].expand(width) for key, width in self._widths.items()])
        with torch.autocast(module.weight.device.type, enabled=False):
            self._root = _square_root(_gram(list(blocks.values())) / sizes / sizes.unsqueeze(1))
        self._made_of = self._fingerprint()

    def is_current(self) -> bool:
        """Tell whether this may be used in another measurement: nothing of the map is trained, or has changed."""
        return not self.names and self._made_of == self._fingerprint()

    def _fingerprint(self) -> tuple[int, int, float]:
        weight = self.module.weight.detach()
        return weight.data_ptr(), weight._version, float(weight.sum(dtype=torch.float32))

    @staticmethod
    def pays(module: nn.Linear, attributes: int) -> bool:
        """Tell whether the map is wide enough that skipping it saves work.

        Args:
            module: The map.
            attributes: How many of its tensors are measured.

        Returns:
            Whether K exceeds the number of columns that are drawn instead.
        """
        return module.out_features > module.in_features * (1 + attributes)

    def draw(self, hidden: OutputValues, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw what omega sends into the head's input and into its tensors.

        Args:
            hidden: The head's input h, [N, ..., d], where its output would be.
            generator: Source of randomness.

        Returns:
            omega V, the gradient of phi with respect to h, shaped like h and 0 where an output does not count; and
            the head's own part of D phi_n for each of its measured tensors, [N] each.
        """
        h = hidden.values.detach()
        shape = (*h.shape[:-1], len(self._root))
        noise = torch.randn(shape, generator=generator, device=generator.device, dtype=self._root.dtype).to(h.device)
        with torch.autocast(h.device.type, enabled=False):
            drawn = ((noise * hidden.weight.to(noise)) @ self._root.T).split(list(self._widths.values()), -1)
        draws = {key: part * self._scales[key] for key, part in zip(self._widths, drawn, strict=True)}
        derivatives = {
            name: (draws[attribute] * h if attribute == "weight" else draws[attribute]).flatten(1).sum(1)
            for attribute, name in self.names.items()
        }
        return draws["hidden"].to(h.dtype), derivatives


@contextmanager
def bypassed(module: nn.Module) -> Iterator[list[Tensor]]:
    """Make a module hand on its input in place of its output.

    Args:
        module: Any module with one input.

    Yields:
        The inputs that it handed on.
    """
    handed_on: list[Tensor] = []

    def hand_on(hidden: Tensor) -> Tensor:
        handed_on.append(hidden)
        return hidden

    with replaced_forward(module, hand_on):
        yield handed_on


def is_cast(output: Tensor, source: Tensor) -> bool:
    """Tell whether a tensor is another one, or that one in another precision and nothing else.

    Args:
        output: The tensor.
        source: The other one.

    Returns:
        Whether it is: by identity, or by what autograd has recorded.
    """
    if output is source:
        return True
    node = output.grad_fn
    if output.dtype == source.dtype or node is None or source.grad_fn is None or node.name() != "ToCopyBackward0":
        return False
    return node.next_functions[0][0] is source.grad_fn


def find_linear_head(model: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    """Find the `nn.Linear` whose output is, untouched, the output of the model.

    Args:
        model: The model.
        forward: Runs it and returns its output.

    Returns:
        Its name in `named_modules()`, or None: whatever is done to its output afterwards (a soft-cap, a softmax) makes
        other numbers of it, or another version of the same tensor. A mere change of precision is looked through.
    """
    last: tuple[str, Tensor, int] | None = None

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal last
            last = (name, output, output._version)

        return hook

    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module._parameters.keys() == {"weight", "bias"}  # no weight_norm, no pruning
    }
    handles = [module.register_forward_hook(watch(name)) for name, module in linears.items()]
    try:
        with torch.no_grad():
            output = forward()
        if last is None:
            return None
        name, own, version = last
        cast = output.dtype != own.dtype and output.shape == own.shape and torch.equal(output, own.to(output.dtype))
        return name if own._version == version and (own is output or cast) else None
    finally:
        for handle in handles:
            handle.remove()


def _gram(blocks: Sequence[Tensor]) -> Tensor:
    """C^T C of the columns C of all blocks: what lies below the diagonal is not computed, nothing is copied."""
    pieces = [piece for block in blocks for piece in block.split(max(block.shape[1] // _PIECES, 1), 1)]
    starts = [0, *accumulate(piece.shape[1] for piece in pieces)]
    gram = blocks[0].new_empty(starts[-1], starts[-1])
    for i, left in enumerate(pieces):
        for j, right in enumerate(pieces[: i + 1]):
            product = left.T @ right
            gram[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = product
            gram[starts[j] : starts[j + 1], starts[i] : starts[i + 1]] = product.T
    return gram


def _square_root(gram: Tensor) -> Tensor:
    """A matrix R with R R^T = gram, for a positive semidefinite matrix that may be singular."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(gram)
    if not bool(failed):
        return root
    values, vectors = torch.linalg.eigh(gram.double())
    root = (vectors * values.clamp_min(0).sqrt()).to(gram.dtype)
    return root
