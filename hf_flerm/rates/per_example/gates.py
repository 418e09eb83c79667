"""Gates: D phi_n of many tensors from one backward pass through activations, without any weight gradient.

Imagine a number gate_n = 0 for every example and tensor, with which the example runs at W + gate_n U:

    D phi_n = d phi_n / d gate_n = sum over the tensor's sites and their calls of  g[n, ...] . T[n, ...]

with g the gradient of phi in the output of a site (a module whose output depends on the tensor) and T the output's
derivative along U. Gates are only a notation: instead of them, an autograd node on the output of the site receives g in
the backward pass and contracts it with T (`readers.py`). Contributions of several sites or calls of a tensor are added
(tied weights, a module that is called twice).

Axes: n an example of N, t a position, o an output feature. An output has N * k rows along its example dimension, the k
rows of an example together: k = 1 for [N, t, o], k = t for positions folded into the rows, [N t, o].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...engines.engine import Engine
from ..tensors import TensorAliases
from .readers import Reader, Readers, Saved
from .sites import Site
from .tangents import ModuleTangents, is_differentiable

# Scales of phi, tried in order until no derivative overflows. Powers of two are exact. The first scale keeps small
# float16 gradients from underflowing to 0; the later ones avoid overflow.
_PHI_SCALES = (2.0**6, 1.0, 2.0**-6, 2.0**-12)

Reduce = Callable[[Tensor], Tensor]


@dataclass
class ModuleCalls:
    """Layout of the outputs of one module in a forward pass.

    Attributes:
        rows: Rows per example along the first dimension of each output, in the order of the calls; 0 for an output
            whose length is not a multiple of N.
        transposable: Whether the second dimension of an output has length N.
    """

    rows: list[int] = field(default_factory=list)
    transposable: bool = False


class _Node(torch.autograd.Function):
    """Identity function whose backward pass also calls `read(output gradient, saved tensors)`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, read: Callable[..., None], *saved: Tensor) -> Tensor:
        ctx.read = read
        ctx.save_for_backward(*saved)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        with torch.no_grad():
            ctx.read(grad, ctx.saved_tensors)
        return (grad if ctx.needs_input_grad[0] else None, *[None] * (len(ctx.needs_input_grad) - 1))


def unchanged(output: Tensor) -> Tensor:
    """Return a module's output unchanged."""
    return output


class Gates(AbstractContextManager["Gates"]):
    """Context manager: gates on the sites of some tensors.

    They must stay in place until the last backward pass: an activation checkpoint runs the forward pass of a layer
    again in the backward pass, and needs the same hooks to make the same graph.

    Attributes:
        precision: Largest machine epsilon of the outputs that have a gate; 0 before the first.
        broadcast: Tensors with a site whose output has a single row, which the model broadcasts over examples later.
        failures: `{tensor: error}` of tensors with a site that could not be differentiated; that site has no gate.
        calls: Output layout of each site's module, by the name of the module.
        reached: Tensors with a gate that a backward pass has reached.
        terms: `{tensor: sqrt(sum of squared terms of all D phi_n)}`, set by `differentiate(keep_terms=True)`. If
            D phi_n are much smaller, their terms cancel.

    Args:
        model: The model.
        tensors: The measured tensors.
        sites: The sites of each tensor, by the same names.
        updates: Unit update of each tensor; looked up whenever it is needed.
        num_examples: N of the batch.
        tangents: Differentiates modules along updates.
        pass_on: Applied to outputs with a gate; `torch.clone` if the model modifies module outputs in place.
        engine: The engine that holds the model's weights.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, TensorAliases],
        sites: Mapping[str, Sequence[Site]],
        updates: Mapping[str, Tensor],
        num_examples: int,
        tangents: ModuleTangents,
        *,
        pass_on: Callable[[Tensor], Tensor] = unchanged,
        engine: Engine,
    ) -> None:
        self._tensors = tensors
        self._num_examples = num_examples
        self._pass_on = pass_on
        self._engine = engine
        self._leaves: Mapping[nn.Parameter, nn.Parameter] = {}  # {sharded parameter: gathered parameter}
        self._stack = ExitStack()
        self._readers = Readers(tensors, updates, tangents)
        self._paths: dict[nn.Module, str] = {}
        self._sites: dict[nn.Module, list[tuple[str, Site]]] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, of_tensor in sites.items():
            for site in of_tensor:
                module = modules[site.module]
                self._sites.setdefault(module, []).append((name, site))
                self._paths[module] = site.module
        device = engine.device(next(model.parameters()))
        self._row_of = {name: row for row, name in enumerate(sites)}
        self._derivatives = torch.zeros(len(self._row_of), num_examples, dtype=torch.float64, device=device)
        self._squared_terms: Tensor | None = None
        self._anchor = torch.zeros((), device=device, requires_grad=True)  # makes autograd visit every node
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._is_differentiating = False
        self.precision = 0.0
        self.broadcast: set[str] = set()
        self.failures: dict[str, Exception] = {}
        self.calls: dict[str, ModuleCalls] = {}
        self.reached: set[str] = set()
        self.terms: dict[str, float] = {}

    def __enter__(self) -> Gates:
        self._leaves = self._stack.enter_context(self._engine.gathered_leaves())
        for module in self._sites:
            self._handles.append(module.register_forward_hook(self._hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._stack.close()

    def raise_failures(self) -> None:
        """Raise the first of `failures`, if there is one."""
        for error in self.failures.values():
            raise error

    def differentiate(
        self,
        values: Tensor,
        omega: Tensor,
        reductions: Mapping[str, Reduce] | None = None,
        *,
        retain_graph: bool = False,
        keep_tangents: bool = False,
        keep_terms: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Differentiate phi = sum(omega * values) with respect to the gates, and to the weights of some tensors.

        Each weight gradient is reduced immediately and freed. Only gradients of parameters that share memory are held
        together.

        Args:
            values: Outputs.
            omega: Random output weights, shaped like `values`.
            reductions: `{tensor: function of G = d phi / d W}`, for tensors whose parameters require a gradient.
            retain_graph: Whether the graph is needed again.
            keep_tangents: Whether to keep tangents for the next backward pass: faster, but needs the memory of the
                sites' outputs.
            keep_terms: Whether to set `terms`.

        Returns:
            `{name: D phi_n}`, float64 [N] each, and `{name: reduction}` of the tensors that phi depends on.
        """
        self._readers.keep_tangents = keep_tangents
        gradients = _Gradients(self._tensors, reductions or {})
        leaves = {parameter: self._leaves.get(parameter, parameter) for parameter in gradients.names}
        if not values.requires_grad:
            return {name: row.clone() for name, row in zip(self._row_of, self._derivatives, strict=True)}, {}
        for scale in _PHI_SCALES:
            is_last = scale == _PHI_SCALES[-1]
            self._derivatives.zero_()
            self._squared_terms = torch.zeros_like(self._derivatives) if keep_terms else None
            gradients.reset()
            for leaf in leaves.values():
                if not leaf.requires_grad:  # frozen by a forward pass that has gone on to another adapter
                    leaf.requires_grad_(True)
            handles = [leaf.register_hook(partial(gradients.add, p, scale)) for p, leaf in leaves.items()]
            try:
                # Disable the caller's autocast, which is for the forward pass.
                with torch.autocast(values.device.type, enabled=False), self._engine.repeatable_backward():
                    torch.autograd.grad(
                        values,
                        [self._anchor, *leaves.values()],
                        (omega * scale).to(values.dtype),
                        retain_graph=retain_graph or not is_last,  # a smaller scale may need another pass
                        allow_unused=True,
                    )
            finally:
                for handle in handles:
                    handle.remove()
            reduced = gradients.reduced()
            finite = [found.isfinite().all().to(values.device) for found in (self._derivatives, *reduced.values())]
            # Processes that run the model together take the same number of passes: the scale that suits all of them.
            if not any(self._engine.agree([not bool(torch.stack(finite).all())])):
                break
        if self._squared_terms is not None:  # `scale` is the one of the last pass: derivatives are those of scale * phi
            self.terms = dict(zip(self._row_of, (self._squared_terms.sum(1).sqrt() / scale).tolist(), strict=True))
            self._squared_terms = None
        return dict(zip(self._row_of, self._derivatives / scale, strict=True)), reduced

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of a site's module: put gates on its outputs."""
        if self._is_differentiating:  # computing a tangent calls this module, or one that contains it, again
            return output
        outputs, spec = tree_flatten(output)
        readers: dict[int, list[Reader]] = {i: [] for i, value in enumerate(outputs) if _can_have_gate(value)}
        self._is_differentiating = True
        try:
            for name, site in self._sites[module]:
                try:
                    # A tangent may call the module again. In an empty context nobody takes that call's outputs for the
                    # model's: Transformers collects hidden states by hooks that look for their list in the context.
                    found = Context().run(
                        self._readers.of_call, module, site.attribute, name, site.dim, args, kwargs, outputs
                    )
                except RuntimeError as error:
                    if should_reduce_batch_size(error):
                        raise
                    self.failures[name] = error
                    continue
                for i in readers.keys() & found.keys():
                    readers[i].append(found[i])
        finally:
            self._is_differentiating = False
        for i, of_output in readers.items():
            outputs[i] = self._gate(module, outputs[i], of_output)
        return tree_unflatten(outputs, spec)

    def _gate(self, module: nn.Module, output: Tensor, readers: Sequence[Reader]) -> Tensor:
        """Note the layout of one output, and put a node on it that calls the readers in the backward pass."""
        calls = self.calls.setdefault(self._paths[module], ModuleCalls())
        calls.transposable |= output.ndim > 2 and output.shape[1] == self._num_examples
        calls.rows.append(self._rows_per_example(output, 0))
        if len(output) == 1 < self._num_examples and all(reader.dim == 0 for reader in readers):
            # A single row that the model broadcasts over the examples later (position embeddings, [1, t, o]) has one
            # gradient, summed over the examples. Expand it here, before the gate, so that each example has its own. If
            # the model fails with N rows, verification moves these sites to the enclosing module.
            output = output.expand(self._num_examples, *output.shape[1:])
            self.broadcast.update(name for name, _ in self._sites[module])
        self.precision = max(self.precision, torch.finfo(output.dtype).eps)
        # No gate on an output whose rows are not N * k. Verification detects the missing contribution.
        readers = [reader for reader in readers if self._rows_per_example(output, reader.dim)]
        if not readers:
            return output

        def read(grad: Tensor, saved: Saved) -> None:
            start = 0
            for reader in readers:
                end = start + len(reader.saved)
                row, of_reader = self._row_of[reader.name], saved[start:end]
                derivative = reader.derivative(grad, of_reader, self._num_examples)
                self._derivatives[row] += derivative.to(self._derivatives)
                if self._squared_terms is not None:
                    squares = reader.squared_terms(grad, of_reader, self._num_examples)
                    self._squared_terms[row] += squares.to(self._squared_terms)
                self.reached.add(reader.name)
                start = end

        saved = (tensor for reader in readers for tensor in reader.saved)
        return self._pass_on(_Node.apply(output, self._anchor, read, *saved))

    def _rows_per_example(self, output: Tensor, dim: int) -> int:
        """Return k of an output with N * k rows along a dimension; 0 if N does not divide its length."""
        if output.ndim <= dim or output.shape[dim] % self._num_examples:
            return 0
        return output.shape[dim] // self._num_examples


class _Gradients:
    """Weight gradients of some tensors, reduced as they arrive.

    Attributes:
        names: `{parameter: names of the tensors that its gradient contributes to}`; several if they share memory.
    """

    def __init__(self, tensors: Mapping[str, TensorAliases], reductions: Mapping[str, Reduce]) -> None:
        self._tensors = tensors
        self._reductions = reductions
        self.names: dict[nn.Parameter, list[str]] = {}
        for name in reductions:
            for parameter in tensors[name].parameters:
                self.names.setdefault(parameter, []).append(name)
        self.reset()

    def reset(self) -> None:
        """Forget the gradients of an earlier backward pass."""
        self._reduced: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, parameter: nn.Parameter, scale: float, grad: Tensor) -> Tensor:
        """Reduce a parameter's gradient of `scale` * phi; return zeros without storage of their own to autograd."""
        with torch.no_grad():
            dense = grad.to_dense() if grad.is_sparse else grad
            dense = (dense.float() if dense.dtype == torch.float16 else dense) / scale
            for name in self.names[parameter]:
                tensor = self._tensors[name]
                if tensor.maps:
                    part = tensor.gradient_part(parameter, dense)
                    self._sums[name] = self._sums[name] + part if name in self._sums else part
                else:
                    self._reduced[name] = self._reductions[name](dense)
        return grad if grad.is_sparse else grad.new_zeros(()).expand(grad.shape)

    def reduced(self) -> dict[str, Tensor]:
        """Return the reductions of the tensors that a gradient was added to."""
        with torch.no_grad():
            return self._reduced | {name: self._reductions[name](total) for name, total in self._sums.items()}


def _can_have_gate(value: Any) -> bool:
    return is_differentiable(value) and value.ndim > 0


def call_layouts(calls: Mapping[str, ModuleCalls], modules: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return `{module: rows per example in each call}` of the modules that were called."""
    return {module: tuple(calls[module].rows) for module in modules if module in calls}
