"""Skip the vocabulary: probe a model whose output is one last linear map without ever building that output.

Axes: n an example of N, t a position of T, i one of d input features, k one of K outputs (the vocabulary), K >> d.

Where the output is f = h V^T + b (h [N, T, d], V [K, d], b [K]), the gradient of phi in h is omega V [N, T, d]: at
every position a Gaussian with covariance V^T V [d, d]. Drawing it from that matrix gives the same distribution as
drawing the K numbers of omega, and needs neither logits nor omega. A measured head has updates U_V [K, d] and U_b [K]
of its own, and D phi_n = sum_t h . (omega U_V) + omega . U_b. Then (omega V, omega U_V, omega . U_b) [2 d + 1] is
drawn at once, with the covariance C^T C of the columns C = [V, U_V, U_b] [K, 2 d + 1]:

    (omega V, omega U_V, omega . U_b) = noise R^T,  noise ~ N(0, 1),  R R^T = C^T C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from ...model.isolation import replaced_forward
from ..outputs import OutputValues

# C^T C is made of products of pieces, a quarter of a block's columns each: the half above the diagonal is then a copy
# of the other. More pieces save more of it (at most half of the work), in smaller and slower products.
_PIECES = 4


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
        # V, U_V and U_b differ by orders of magnitude (weights against weights per learning rate). Divided by their
        # norms, they leave a Gram matrix that is as well conditioned as each of them.
        tiny = torch.finfo(dtype).tiny
        self._scales = {key: block.norm().clamp_min(tiny) for key, block in blocks.items()}
        self._widths = {key: block.shape[1] for key, block in blocks.items()}
        sizes = torch.cat([self._scales[key].expand(width) for key, width in self._widths.items()])
        with torch.autocast(module.weight.device.type, enabled=False):
            self._root = _square_root(_gram(list(blocks.values())) / sizes / sizes.unsqueeze(1))
        self._made_of = self._fingerprint()

    def is_current(self) -> bool:
        """Tell whether this may be used in another measurement: the head is not measured and has not changed."""
        return not self.names and self._made_of == self._fingerprint()

    def _fingerprint(self) -> tuple[int, int, float]:
        weight = self.module.weight.detach()
        return weight.data_ptr(), weight._version, float(weight.sum(dtype=torch.float32))

    @staticmethod
    def pays(module: nn.Linear, attributes: int) -> bool:
        """Tell whether skipping a head saves work: whether K exceeds the number of columns that are drawn instead.

        Args:
            module: The head.
            attributes: How many of its tensors are measured.
        """
        return module.out_features > module.in_features * (1 + attributes)

    def draw(self, hidden: OutputValues, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw what omega sends into the head's input and into its tensors.

        Args:
            hidden: The head's input h, [N, ..., d], where its output would be.
            generator: Source of randomness.

        Returns:
            omega V, the gradient of phi in h, shaped like h and 0 where an output does not count; and D phi_n of the
            head's measured tensors, [N] each.
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
    """Context manager: a module of one input returns that input in place of its output.

    Yields:
        The inputs, in the order of the calls.
    """
    inputs: list[Tensor] = []

    def return_input(hidden: Tensor) -> Tensor:
        inputs.append(hidden)
        return hidden

    with replaced_forward(module, return_input):
        yield inputs


def is_cast(output: Tensor, source: Tensor) -> bool:
    """Tell whether `output` is `source` itself, or `source` in another precision, by what autograd has recorded."""
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
    last: tuple[str, Tensor, int] | None = None  # name, output and version of the linear layer that was called last

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
        name, of_layer, version = last
        cast = (
            output.dtype != of_layer.dtype
            and output.shape == of_layer.shape
            and torch.equal(output, of_layer.to(output.dtype))
        )
        return name if of_layer._version == version and (of_layer is output or cast) else None
    finally:
        for handle in handles:
            handle.remove()


def _gram(blocks: Sequence[Tensor]) -> Tensor:
    """C^T C of the columns C of all blocks, one half computed and the other copied; C itself is never put together."""
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
    """A matrix R with R R^T = gram, for a positive semidefinite matrix that may be singular.

    It is singular where columns are dependent: an update of rank 1, two equal columns. Cholesky then fails, and
    eigenvalues that round-off has made negative count as 0.
    """
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(gram)
    if not bool(failed):
        return root
    values, vectors = torch.linalg.eigh(gram.double())
    root = (vectors * values.clamp_min(0).sqrt()).to(gram.dtype)
    return root
