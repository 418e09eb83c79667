"""Per-example derivatives without weight gradients: one zero gate per example and tensor, f(W + gate_n U).

A site is a module whose forward is really called and through which a tensor acts. Its output would move by gate_n * T,
T being the output's derivative along the update U (its tangent), so d phi / d gate_n = g_n . T_n with g the gradient of
phi in that output: D phi_n. A node behind the site's output reads it off in the backward pass. What several sites of
one tensor read (tied weights, a module that is called twice) adds up.

Axes: n an example of N, t a position, i/o input/output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...engines.engine import Engine
from .readers import Kept, Reader, Readers
from .tangents import Affine

_PHI_SCALES = (2.0**6, 1.0, 2.0**-6, 2.0**-12)  # powers of two are exact; the first keeps float16 from underflow

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """Where a tensor acts.

    Attributes:
        module: Name of the module in `named_modules()` of the model.
        attribute: Name of the parameter inside that module.
        dim: Dimension of the module's outputs along which the examples lie.
    """

    module: str
    attribute: str
    dim: int = 0

    def enclosing(self) -> Site | None:
        """The same tensor seen from the module that holds this one; None from the model itself."""
        if not self.module:
            return None
        parent, _, child = self.module.rpartition(".")
        return Site(parent, f"{child}.{self.attribute}")

    def transposed(self) -> Site:
        """The same site with the examples along the second dimension."""
        return replace(self, dim=1)


@dataclass
class Passage:
    """What was seen of a site's module in one forward pass.

    Attributes:
        layouts: Rows per example of what it put out, call by call; 0 if these were none.
        transposable: Whether the second dimension of an output holds as many entries as there are examples.
    """

    layouts: list[int] = field(default_factory=list)
    transposable: bool = False


class _Node(torch.autograd.Function):
    """The output itself; backward reads off the gates behind it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, read: Callable[..., None], *kept: Tensor) -> Tensor:
        ctx.read = read
        ctx.save_for_backward(*kept)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        with torch.no_grad():
            ctx.read(grad, ctx.saved_tensors)
        return (grad if ctx.needs_input_grad[0] else None, *[None] * (len(ctx.needs_input_grad) - 1))


def itself(output: Tensor) -> Tensor:
    """Hand out a module's output as it is."""
    return output


class Gates(AbstractContextManager["Gates"]):
    """Gates on the sites of some tensors, for as long as the context lasts.

    Attributes:
        precision: The machine epsilon of the coarsest output that was gated, 0 before any was.
        broadcast: Tensors whose site puts out one row for all examples; it is given a row for each.
        failures: Tensors whose site could not be differentiated, and why. They have no gate there.
        passages: What was seen of each site's module, by its name.
        reached: Tensors of which a gate was met in a backward pass.

    Args:
        model: The model.
        sites: Where each tensor acts.
        updates: Unit update of each tensor, by the same names; looked up each time one is needed.
        num_examples: N of the batch that will go through.
        affine: What is known of the modules' tangents.
        hand_out: `torch.clone` for a model that writes into its modules' outputs in place.
        engine: What holds the model's weights.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Sequence[Site]],
        updates: Mapping[str, Tensor],
        num_examples: int,
        affine: Affine,
        *,
        hand_out: Callable[[Tensor], Tensor] = itself,
        engine: Engine,
    ) -> None:
        self._num_examples = num_examples
        self._hand_out = hand_out
        self._engine = engine
        self._leaves: Mapping[nn.Parameter, nn.Parameter] = {}
        self._stack = ExitStack()
        self._readers = Readers(updates, affine)
        self._paths: dict[nn.Module, str] = {}
        self._tensors: dict[nn.Module, list[tuple[str, Site]]] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, places in sites.items():
            for site in places:
                module = modules[site.module]
                self._tensors.setdefault(module, []).append((name, site))
                self._paths[module] = site.module
        device = engine.device(next(model.parameters()))
        self._rows = {name: row for row, name in enumerate(sites)}
        self._values = torch.zeros(len(self._rows), num_examples, dtype=torch.float64, device=device)
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._measuring = False
        self.precision = 0.0
        self.broadcast: set[str] = set()
        self.failures: dict[str, Exception] = {}
        self.passages: dict[str, Passage] = {}
        self.reached: set[str] = set()

    def __enter__(self) -> Gates:
        self._leaves = self._stack.enter_context(self._engine.gathered_leaves())
        for module in self._tensors:
            self._handles.append(module.register_forward_hook(self._hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._stack.close()

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

    def differentiate(
        self,
        values: Tensor,
        omega: Tensor,
        reductions: Mapping[nn.Parameter, Reduce] | None = None,
        *,
        retain_graph: bool = False,
        keep_tangents: bool = False,
    ) -> tuple[dict[str, Tensor], dict[nn.Parameter, Tensor]]:
        """Differentiate phi = sum(omega * values) by the gates, and by some parameters.

        phi is scaled by a power of two for as long as a low precision overflows. A parameter's gradient is reduced as
        soon as it is there, and let go: no two are ever held.

        Args:
            values: Outputs.
            omega: Shaped like `values`.
            reductions: For parameters that require a gradient, what to keep of d phi / d W.
            retain_graph: Whether the graph is needed again.
            keep_tangents: Whether to keep what the next pass can use: faster, for the memory of the sites' outputs.

        Returns:
            `{name: D phi_n}`, float64 [N] each, and the reductions of those parameters that phi depends on.
        """
        self._readers.keep_tangents = keep_tangents
        reductions = reductions or {}
        leaves = {parameter: self._leaves.get(parameter, parameter) for parameter in reductions}
        reduced: dict[nn.Parameter, Tensor] = {}
        if not values.requires_grad:
            return {name: row.clone() for name, row in zip(self._rows, self._values, strict=True)}, reduced
        for scale in _PHI_SCALES:
            last = scale == _PHI_SCALES[-1]
            self._values.zero_()
            reduced = {}
            handles = [
                leaves[parameter].register_hook(partial(_reduce, reduced, parameter, scale, reduce))
                for parameter, reduce in reductions.items()
            ]
            try:
                # The caller's autocast is for the forward pass.
                with torch.autocast(values.device.type, enabled=False), self._engine.repeatable_backward():
                    torch.autograd.grad(
                        values,
                        [self._anchor, *leaves.values()],
                        (omega * scale).to(values.dtype),
                        retain_graph=retain_graph or not last,
                        allow_unused=True,
                    )
            finally:
                for handle in handles:
                    handle.remove()
            finite = [found.isfinite().all().to(values.device) for found in (self._values, *reduced.values())]
            if not any(self._engine.agree([not bool(torch.stack(finite).all())])):
                break
        return dict(zip(self._rows, self._values / scale, strict=True)), reduced

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._measuring:
            return output
        outputs, spec = tree_flatten(output)
        readers: dict[int, list[Reader]] = {i: [] for i, value in enumerate(outputs) if _is_numeric(value)}
        self._measuring = True
        try:
            for name, site in self._tensors[module]:
                try:
                    found = self._readers.of_call(module, site.attribute, name, site.dim, args, kwargs, outputs)
                except RuntimeError as error:
                    if should_reduce_batch_size(error):
                        raise
                    self.failures[name] = error
                    continue
                for i in readers.keys() & found.keys():
                    readers[i].append(found[i])
        finally:
            self._measuring = False
        for i, of_output in readers.items():
            outputs[i] = self._gate(module, outputs[i], of_output)
        return tree_unflatten(outputs, spec)

    def _gate(self, module: nn.Module, output: Tensor, readers: Sequence[Reader]) -> Tensor:
        passage = self.passages.setdefault(self._paths[module], Passage())
        passage.transposable |= output.ndim > 2 and output.shape[1] == self._num_examples
        rows = self._rows_per_example(output, 0)
        passage.layouts.append(rows)
        if len(output) == 1 < self._num_examples and all(reader.dim == 0 for reader in readers):
            # One row that is broadcast over the examples later on (position embeddings): broadcast it here.
            output = output.expand(self._num_examples, *output.shape[1:])
            self.broadcast.update(name for name, _ in self._tensors[module])
        self.precision = max(self.precision, torch.finfo(output.dtype).eps)
        readers = [reader for reader in readers if self._rows_per_example(output, reader.dim)]
        if not readers:
            return output

        def read(grad: Tensor, kept: Kept) -> None:
            start = 0
            for reader in readers:
                end = start + len(reader.kept)
                derivative = reader.derivative(grad, kept[start:end], self._num_examples)
                self._values[self._rows[reader.name]] += derivative.to(self._values)
                self.reached.add(reader.name)
                start = end

        return self._hand_out(_Node.apply(output, self._anchor, read, *(k for reader in readers for k in reader.kept)))

    def _rows_per_example(self, output: Tensor, dim: int) -> int:
        if output.ndim <= dim or output.shape[dim] % self._num_examples:
            return 0
        return output.shape[dim] // self._num_examples


def _reduce(
    reduced: dict[nn.Parameter, Tensor], parameter: nn.Parameter, scale: float, reduce: Reduce, grad: Tensor
) -> Tensor:
    with torch.no_grad():
        dense = grad.to_dense() if grad.is_sparse else grad
        reduced[parameter] = reduce((dense.float() if dense.dtype == torch.float16 else dense) / scale)
    return grad if grad.is_sparse else grad.new_zeros(()).expand(grad.shape)


def _is_numeric(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def layouts(passages: Mapping[str, Passage], modules: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The layouts of some modules.

    Args:
        passages: What was seen.
        modules: Names.

    Returns:
        `{name: rows per example, call by call}` of those that were called.
    """
    return {module: tuple(passages[module].layouts) for module in modules if module in passages}
