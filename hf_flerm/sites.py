"""Where each tensor can be told apart by example: sites are proposed by ownership and believed only when verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .gates import Gates, Site, itself
from .modes import trainable
from .outputs import Batch, Output, OutputFunction, model_output, num_examples

logger = logging.get_logger(__name__)

_PATIENCE = 8


class VerifiedSites:
    """Sites of tensors, each checked on the first batch on which the tensor moves the outputs.

    A tensor is first given gates at the modules that own it. They must add up to <U, G> from the weight gradient,
    and each must follow its own example alone. Where they do not (the module is
    never called, or called with something other than the examples), the enclosing module takes its place. Where none
    is left, or the tensor moved no output in `_PATIENCE` measurements, only its weight gradient is to be trusted.

    Attributes:
        sites: `{name: sites}` of the tensors that gates can measure.
        unmeasurable: Tensors that gates cannot measure.

    Args:
        model: The model.
        output: What "the function" is; see `measure_rates`.
    """

    def __init__(self, model: nn.Module, output: OutputFunction | None) -> None:
        self.sites: dict[str, list[Site]] = {}
        self.unmeasurable: set[str] = set()
        self._model = model
        self._output = output
        self._verified: dict[str, list[tuple[int, dict[str, tuple[int, ...]]]]] = {}  # examples, and layouts
        self._hand_out: Callable[[Tensor], Tensor] = itself
        self._attempts: Counter[str] = Counter()
        self._largest_gradient = 0.0

    def gates(
        self, names: Iterable[str], updates: Mapping[str, Tensor], batch: Batch, skip: str | None = None
    ) -> Gates:
        """Make gates for some tensors, at their sites.

        Args:
            names: Tensors.
            updates: Their unit updates.
            batch: The batch that will go through.
            skip: A module that gets none.

        Returns:
            Gates that are not in place yet.
        """
        places = {name: [site for site in self.sites[name] if site.module != skip] for name in names}
        return Gates(self._model, places, updates, num_examples(batch), hand_out=self._hand_out)

    def find(self, parameters: Mapping[str, nn.Parameter], updates: Mapping[str, Tensor], batch: Batch) -> None:
        """Find sites for the tensors that have none yet, and check those that could not be checked before.

        Args:
            parameters: `{name: parameter}`, none of which requires a gradient.
            updates: Their unit updates.
            batch: Model inputs.

        Raises:
            ValueError: If the outputs' derivatives are not finite.
        """
        for name, parameter in parameters.items():
            if name not in self.sites and name not in self.unmeasurable:
                self.sites[name] = _outermost(owners(self._model, parameter))
        pending = [name for name in parameters if name in self.sites and not self._trusts(name, batch)]
        self.verify(pending, parameters, updates, batch)

    def strange(self, gates: Gates, names: Iterable[str], batch: Batch) -> list[str]:
        """Find what put out other rows than when it was verified (a module that is given chosen tokens).

        Args:
            gates: Gates through which the batch has gone.
            names: The tensors to look at.
            batch: The batch.

        Returns:
            Those that must be verified on this batch before they are measured on it.
        """
        return [name for name in names if self._trusts(name, batch) and not self._trusts(name, batch, gates.layouts)]

    def _trusts(self, name: str, batch: Batch, layouts: Mapping[str, tuple[int, ...]] | None = None) -> bool:
        """Whether a tensor was verified, at these layouts if they are given.

        One example alone says nothing of how examples are laid out.
        """
        enough = min(num_examples(batch), 2)
        here = {s.module: layouts[s.module] for s in self.sites[name] if s.module in layouts} if layouts else {}
        return any(count >= enough and here.items() <= seen.items() for count, seen in self._verified.get(name, ()))

    def verify(
        self,
        pending: list[str],
        parameters: Mapping[str, nn.Parameter],
        updates: Mapping[str, Tensor],
        batch: Batch,
    ) -> None:
        """Check the sites of some tensors on a batch, and replace those that are wrong.

        Args:
            pending: The tensors.
            parameters: As for `find`.
            updates: As for `find`.
            batch: As for `find`.
        """
        while pending:
            gates = self.gates(pending, updates, batch)
            with trainable(parameters[name] for name in pending), gates:
                try:
                    out = model_output(self._model, batch, self._output)
                except RuntimeError as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    if gates.broadcast:  # a row for each example does not fit what comes after
                        wrong = gates.broadcast
                    elif self._hand_out is not torch.clone:
                        wrong, self._hand_out = set(), torch.clone
                    else:
                        raise
                else:
                    chosen = {name: parameters[name] for name in pending}
                    wrong = self._refuted(gates, out, chosen, updates, num_examples(batch))
                    pending = [name for name in pending if name in wrong]
            for name in wrong:
                self._widen(name, gates.failures.get(name))
            pending = [name for name in pending if name in self.sites]

    def close_measurement(self, names: Iterable[str]) -> None:
        """Count a measurement against the tensors that are still not verified, and give up on the oldest of them.

        Args:
            names: What was measured.
        """
        for name in {name for name in names if name in self.sites} - self._verified.keys():
            self._attempts[name] += 1
            if self._attempts[name] == _PATIENCE:
                del self.sites[name]
                self.unmeasurable.add(name)

    def _refuted(
        self,
        gates: Gates,
        out: Output,
        parameters: Mapping[str, nn.Parameter],
        updates: Mapping[str, Tensor],
        count: int,
    ) -> set[str]:
        """The tensors whose gates contradict their weight gradients, or leak between examples.

        With omega multiplied by another number on every example, each gate must follow its own example's. A tensor
        whose gradient is rounding noise (attention is blind to a bias of its keys) can be neither verified nor refuted.
        """
        if len(out.values) % count:
            return set(parameters)  # the rows of the output are no examples
        layouts = dict(gates.layouts)  # an activation checkpoint adds to them in the backward pass
        generator = torch.Generator(out.values.device).manual_seed(0)
        omega = out.omega(generator)
        order = torch.randperm(count, generator=generator, device=omega.device)
        factors = torch.linspace(-1, 1, count, device=omega.device, dtype=omega.dtype)[order]
        by_row = factors.repeat_interleave(len(omega) // count).reshape(-1, *[1] * (omega.ndim - 1))
        found = gradients(out.values, [*gates.leaves, *parameters.values()], omega, retain_graph=True)
        values = gates.derivatives(found[: len(gates.leaves)])
        by_weight = dict(zip(parameters, found[len(gates.leaves) :], strict=True))
        if not all(bool(gradient.isfinite().all()) for gradient in by_weight.values()):
            raise ValueError("the outputs' derivatives are not finite on a probe batch: the weights have diverged.")
        self._largest_gradient = max(self._largest_gradient, *map(_rms, by_weight.values()))
        noise = gates.precision * self._largest_gradient
        multiplied = gates.derivatives(gradients(out.values, gates.leaves, omega * by_row))
        wrong = set()
        for name, gradient in by_weight.items():
            expected = (updates[name] * gradient).sum()
            products = (updates[name] * gradient).norm()
            size = expected.abs() + values[name].norm()
            floor = noise * updates[name].norm()
            if bool(size <= floor):
                continue
            leaks = multiplied[name] - values[name] * factors
            missing = (values[name].sum() - expected).abs()
            coarse = gates.precision**0.5
            if bool(leaks.norm() > coarse * values[name].norm() + floor or missing > coarse * (size + products)):
                wrong.add(name)
            else:
                seen = {s.module: layouts[s.module] for s in self.sites[name] if s.module in layouts}
                self._verified.setdefault(name, []).append((count, seen))
        return wrong

    def _widen(self, name: str, failure: Exception | None) -> None:
        """See a tensor from the modules around its sites; around the model itself there is nothing."""
        wider = [site.enclosing() for site in self.sites[name]]
        self.sites[name] = _outermost(site for site in wider if site is not None)
        if None in wider or not wider:
            del self.sites[name]
            self.unmeasurable.add(name)
            logger.warning(
                f"{name} cannot be told apart by example in {type(self._model).__name__}: "
                f"its rate comes from its weight gradient.{f' The cause: {failure!r}' if failure else ''}"
            )


def owners(model: nn.Module, parameter: nn.Parameter) -> list[Site]:
    """Find the modules that hold a parameter.

    Args:
        model: The model.
        parameter: One of its parameters.

    Returns:
        A site for each; a tied parameter has several.
    """
    return [
        Site(path, attribute)
        for path, module in model.named_modules()
        for attribute, value in module.named_parameters(recurse=False, remove_duplicate=False)
        if value is parameter
    ]


def gradients(values: Tensor, leaves: Sequence[Tensor], omega: Tensor, *, retain_graph: bool = False) -> list[Tensor]:
    """Differentiate sum(omega * values).

    Args:
        values: Outputs.
        leaves: What to differentiate by.
        omega: Shaped like `values`.
        retain_graph: Whether the graph is needed again.

    Returns:
        One gradient for each leaf; zero where it takes no part.
    """
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if values.requires_grad:
        found = torch.autograd.grad(values, leaves, omega, retain_graph=retain_graph, allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad.to_dense() if grad.is_sparse else grad
        for leaf, grad in zip(leaves, found, strict=True)
    ]


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0


def _outermost(sites: Iterable[Site]) -> list[Site]:
    """Drop the sites that lie inside another one."""
    kept: list[Site] = []
    for site in sorted(set(sites), key=lambda site: site.module):
        if not any(f"{site.module}.".startswith(f"{other.module}.") or not other.module for other in kept):
            kept.append(site)
    return kept
