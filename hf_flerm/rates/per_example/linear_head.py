"""Skip the last linear layer: probe a model that ends in a linear layer without computing its (wide) output.

Axes: n an example of N, t a position of T, i one of d input features, k one of K outputs (the vocabulary), K >> d.

If the output is f = h V^T + b (h [N, T, d], V [K, d], b [K]), the gradient of phi in h is omega V [N, T, d]: at
every position a Gaussian with covariance V^T V [d, d]. Sampling it with that covariance gives the same distribution as
sampling the K numbers of omega, and needs neither logits nor omega. A measured head also has updates U_V [K, d] and
U_b [K], with D phi_n = sum_t h . (omega U_V) + omega . U_b. Then (omega V, omega U_V, omega . U_b) [2 d + 1] is sampled
jointly, with the covariance C^T C of the columns C = [V, U_V, U_b] [K, 2 d + 1]:

    (omega V, omega U_V, omega . U_b) = noise R^T,  noise ~ N(0, 1),  R R^T = C^T C.

In a metric whose matrix depends on f (Fisher's), the covariance differs from position to position. Then `ChunkedHead`
computes f, omega and omega C for a few positions at a time: exact too, and N * T * K numbers never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.isolation import replaced_forward
from ..metrics import Metric
from ..outputs import OutputValues

# To compute C^T C, the columns of each block are split into this many pieces. Only products on and below the diagonal
# are computed; the others are their transposes. More pieces save more (up to half of the work), in slower products.
_PIECES = 4

# Outputs that `ChunkedHead` computes at a time: larger chunks leave the caches of a CPU, smaller ones make thin
# products.
_CHUNK = 2**21

Draw = tuple[Tensor, dict[str, Tensor]]  # the gradient of phi at the head's input; {name: D phi_n [N]}


class LinearHead:
    """The last linear layer of a model: samples what a probe sends to its input and to its measured parameters.

    Attributes:
        names: Names of its measured tensors, by attribute.

    Args:
        module: The layer.
        updates: Unit updates of its measured tensors: a subset of `{"weight": (name, U), "bias": (name, U)}`.
    """

    def __init__(self, module: nn.Linear, updates: Mapping[str, tuple[str, Tensor]]) -> None:
        self.module = module
        self.names = {attribute: name for attribute, (name, _) in updates.items()}
        blocks = _columns(module, updates)
        dtype = blocks["hidden"].dtype
        # V, U_V and U_b differ by orders of magnitude (weights, and weights per learning rate). Divided by their norms,
        # they give a Gram matrix that is as well conditioned as theirs.
        tiny = torch.finfo(dtype).tiny
        self._scales = {key: block.norm().clamp_min(tiny) for key, block in blocks.items()}
        self._widths = {key: block.shape[1] for key, block in blocks.items()}
        sizes = torch.cat([self._scales[key].expand(width) for key, width in self._widths.items()])
        with torch.autocast(module.weight.device.type, enabled=False):
            self._root = _square_root(_gram(list(blocks.values())) / sizes / sizes.unsqueeze(1))
        self._made_of = self._fingerprint()

    def is_current(self) -> bool:
        """Whether this object is still valid: the head has no measured tensor and its weight has not changed."""
        return not self.names and self._made_of == self._fingerprint()

    def _fingerprint(self) -> tuple[int, int, float]:
        weight = self.module.weight.detach()
        return weight.data_ptr(), weight._version, float(weight.sum(dtype=torch.float32))

    @staticmethod
    def saves_work(module: nn.Linear, attributes: int) -> bool:
        """Whether skipping a head saves work: whether K exceeds the number of columns that are sampled instead.

        Args:
            module: The head.
            attributes: Number of its tensors that are measured.
        """
        return module.out_features > module.in_features * (1 + attributes)

    def draws(self, hidden: OutputValues, generator: torch.Generator, count: int) -> Iterator[Draw]:
        """Yield the draws of several probes on one forward pass; see `draw`."""
        for _ in range(count):
            yield self.draw(hidden, generator)

    def draw(self, hidden: OutputValues, generator: torch.Generator) -> Draw:
        """Sample the gradient of phi at the head's input, and D phi_n of the head's measured tensors.

        Args:
            hidden: The output of the model with the head bypassed: the head's input h, [N, ..., d].
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
        return _gradients(draws, h, self.names)


class ChunkedHead(LinearHead):
    """The last linear layer in a metric that depends on its outputs, which it computes a few positions at a time.

    Args:
        module: The layer.
        updates: As for `LinearHead`.
        metric: The metric.
    """

    def __init__(self, module: nn.Linear, updates: Mapping[str, tuple[str, Tensor]], metric: Metric) -> None:
        self.module = module
        self.names = {attribute: name for attribute, (name, _) in updates.items()}
        self._updates = updates
        self._metric = metric

    def is_current(self) -> bool:
        """Whether this object is still valid: the head has no measured tensor. Its weight is read at every draw."""
        return not self.names

    def draws(self, hidden: OutputValues, generator: torch.Generator, count: int) -> Iterator[Draw]:
        """Yield the draws of several probes on one forward pass, which share the roots of the metric."""
        roots_of = self._metric.roots
        if roots_of is None:
            raise ValueError("the metric does not depend on the outputs: use LinearHead")
        shape = hidden.values.shape[:-1]
        h = hidden.values.detach()
        rows = h.flatten(0, -2)  # [N T, d]
        counted = hidden.weight.expand(*shape, 1).flatten().nonzero().squeeze(1)
        weight, bias = self.module.weight.detach(), self.module.bias
        columns = _columns(self.module, self._updates)
        dtype = columns["hidden"].dtype
        drawn = [
            {key: rows.new_zeros(len(rows), block.shape[1], dtype=dtype) for key, block in columns.items()}
            for _ in range(count)
        ]
        with torch.no_grad():
            for chunk in counted.split(max(_CHUNK // len(weight), 1)):
                roots = roots_of(F.linear(rows[chunk].to(weight.dtype), weight, bias))  # [positions, K]
                for of_probe in drawn:
                    noise = torch.randn(roots.shape, generator=generator, device=generator.device, dtype=roots.dtype)
                    omega = self._metric.draw(roots, noise.to(roots.device)).to(dtype)
                    with torch.autocast(h.device.type, enabled=False):
                        for key, block in columns.items():
                            of_probe[key][chunk] = omega @ block
        for of_probe in drawn:
            yield _gradients({key: values.view(*shape, -1) for key, values in of_probe.items()}, h, self.names)


def _columns(module: nn.Linear, updates: Mapping[str, tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the columns C in three blocks, [K, ...] each: V as `hidden`, U_V as `weight`, U_b as `bias`."""
    blocks = {"hidden": module.weight.detach()}
    blocks |= {attribute: update.reshape(len(module.weight), -1) for attribute, (_, update) in updates.items()}
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    return {key: block.to(dtype) for key, block in blocks.items()}


def _gradients(draws: Mapping[str, Tensor], h: Tensor, names: Mapping[str, str]) -> Draw:
    """Make the gradient at the head's input h, and D phi_n, of omega C in the blocks of `_columns`, [N, ..., width]."""
    derivatives = {
        name: (draws[attribute] * h if attribute == "weight" else draws[attribute]).flatten(1).sum(1)
        for attribute, name in names.items()
    }
    return draws["hidden"].to(h.dtype), derivatives


@contextmanager
def bypassed(module: nn.Module) -> Iterator[list[Tensor]]:
    """Context manager: a module with one input returns that input instead of its output.

    Yields:
        The inputs, in the order of the calls.
    """
    inputs: list[Tensor] = []

    def return_input(hidden: Tensor) -> Tensor:
        inputs.append(hidden)
        return hidden

    with replaced_forward(module, return_input):
        yield inputs


def is_same_up_to_dtype(output: Tensor, source: Tensor) -> bool:
    """Whether `output` is `source` itself, or `source` cast to another dtype according to the autograd graph."""
    if output is source:
        return True
    node = output.grad_fn
    if output.dtype == source.dtype or node is None or source.grad_fn is None or node.name() != "ToCopyBackward0":
        return False
    return node.next_functions[0][0] is source.grad_fn


def find_linear_head(model: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    """Find the `nn.Linear` whose output is returned unchanged as the model's output.

    Args:
        model: The model.
        forward: Runs it and returns its output.

    Returns:
        Its name in `named_modules()`; None if there is none, for instance because a soft-cap or a softmax follows. Such
        operations change the values, or the version of the tensor. A change of dtype is allowed.
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
            of_layer.is_floating_point()  # complex values are not cast but cut
            and output.dtype != of_layer.dtype
            and output.shape == of_layer.shape
            and torch.equal(output, of_layer.to(output.dtype))
        )
        return name if of_layer._version == version and (of_layer is output or cast) else None
    finally:
        for handle in handles:
            handle.remove()


def _gram(blocks: Sequence[Tensor]) -> Tensor:
    """Compute C^T C for the columns C of all blocks, half of it by transposing; C itself is never concatenated."""
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
    """Return a matrix R with R R^T = gram, for a positive semidefinite matrix that may be singular.

    It is singular if columns are dependent: an update of rank 1, two equal columns. Cholesky then fails; the square
    root from eigenvalues is used instead, with eigenvalues that round-off made negative set to 0.
    """
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(gram)
    if not bool(failed):
        return root
    values, vectors = torch.linalg.eigh(gram.double())
    root = (vectors * values.clamp_min(0).sqrt()).to(gram.dtype)
    return root
