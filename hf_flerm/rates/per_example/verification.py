"""Verification of sites: where a tensor's per-example derivatives can be read, found by trial and checked by number.

A tensor is first given gates at the modules that hold it. On the first batch on which it acts, three numbers are
compared, for a draw of omega and factors c_n that differ between examples:

    D phi_n            read by the gates
    <U, G>             from the weight gradient G = d (sum_n phi_n) / d W; must equal sum_n D phi_n
    D (c_n phi_n)      read by the gates for omega[n] * c_n; must equal c_n D phi_n, or the gate of an example also
                       sees others

Where one differs (the module is never called, or is called with something other than the examples), the enclosing
module takes the site's place, up to the model itself; after that the tensor is measured by its weight gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers.utils import logging

from ...engines.engine import Engine
from ...model.isolation import trainable
from ..outputs import Batch, MeasuredOutput, OutputValues, num_examples
from ..tensors import MeasuredTensor, as_real, elementwise_products
from .gates import Gates, ModuleCalls, call_layouts, unchanged
from .sites import Site, outermost, owners
from .tangents import ModuleTangents

logger = logging.get_logger(__name__)

# Measurements in which a tensor may act too little to be verified. LoRA's A does not act while B is 0, which ends with
# the first step; a warm-up or a frozen B may last longer. A tensor that is still unverified then is measured by its
# weight gradient, which needs no verification.
_PATIENCE = 8

# The outputs' derivatives are sums of products. Each is rounded to a unit of the output's dtype, and errors of some ten
# layers add up; differences below this many units are round-off.
_ROUND_OFF = 16

# D phi_n and <U, G> are sums of products. Two ways of adding up one number differ by more than round-off where terms
# cancel, and a wrong site is wrong by the whole number: half of the digits must agree, up to eps^(1/2) of the outputs'
# dtype. Likewise, a sum whose terms have cancelled to less than that is round-off: a bias of attention's keys leaves
# 2 to 16 eps of the root sum of squares of its terms in float32 and 0.5 to 3 eps in bfloat16 (2 to 12 layers, 8 to 256
# positions); tensors that act leave 0.6 of it and more.
_DIGITS = 0.5

# Numbers D phi_n that must be small before a tensor is taken for round-off: one is small by chance in 7 draws of 100 in
# bfloat16, six are in 1 of 10^7. Batches of fewer examples take several draws of omega.
_SMALL_BY_CHANCE = 6

Layouts = dict[str, tuple[int, ...]]  # {module: rows per example of its outputs, call by call}


@dataclass(frozen=True)
class _Checked:
    """A batch on which a tensor was verified: the number of examples, and the layouts of the tensor's modules."""

    num_examples: int
    layouts: Layouts


class VerifiedSites:
    """The sites of a model's tensors, each verified on the first batch on which the tensor moves the outputs.

    Attributes:
        sites: `{name: sites}` of the tensors that gates can measure.
        unmeasurable: Tensors that only their weight gradient can measure.
        absent: Tensors on which the outputs did not depend when they were last verified.
        round_off: Tensors whose derivatives are round-off: the terms that they are sums of cancel. Attention is blind
            to a bias of its keys, a norm over positions to a bias before it. Their rate is 0.

    Args:
        model: The model.
        outputs: What "the function" is.
        engine: The engine that holds the model's weights.
    """

    def __init__(self, model: nn.Module, outputs: MeasuredOutput, engine: Engine) -> None:
        self.sites: dict[str, list[Site]] = {}
        self.unmeasurable: set[str] = set()
        self.absent: set[str] = set()
        self.round_off: set[str] = set()
        self._blind: set[str] = set()  # round-off in `_PATIENCE` measurements: by structure, not looked at again
        self._model = model
        self._outputs = outputs
        self._engine = engine
        self._tangents = ModuleTangents(engine)
        self._verified: dict[str, list[_Checked]] = {}
        self._pass_on: Callable[[Tensor], Tensor] = unchanged
        self._attempts: Counter[str] = Counter()
        self._largest_gradient = 0.0  # largest RMS of a weight gradient that any verification has met

    def gates(
        self,
        names: Iterable[str],
        tensors: Mapping[str, MeasuredTensor],
        updates: Mapping[str, Tensor],
        batch: Batch,
        skip: str | None = None,
    ) -> Gates:
        """Make gates for some tensors at their sites; they are not in place yet.

        Args:
            names: Their names.
            tensors: The measured tensors, by canonical name.
            updates: Their unit updates.
            batch: The batch that will go through.
            skip: A module that gets none.
        """
        places = {name: [site for site in self.sites[name] if site.module != skip] for name in names}
        return Gates(
            self._model,
            tensors,
            places,
            updates,
            num_examples(batch),
            self._tangents,
            pass_on=self._pass_on,
            engine=self._engine,
        )

    def find(self, tensors: Mapping[str, MeasuredTensor], updates: Mapping[str, Tensor], batch: Batch) -> None:
        """Propose sites for the tensors that have none, and verify those that are not verified yet.

        Args:
            tensors: `{name: tensor}`; none of their parameters requires a gradient.
            updates: Their unit updates.
            batch: Model inputs.

        Raises:
            ValueError: If the outputs' derivatives are not finite.
        """
        for name, tensor in tensors.items():
            if name not in self.sites and name not in self.unmeasurable:
                self.sites[name] = outermost(s for p in tensor.parameters for s in owners(self._model, p))
        located = [name for name in tensors if name in self.sites]
        unverified = self._on_any_process(located, lambda name: not self._is_verified(name, batch))
        pending = [name for name in unverified if name not in self._blind]
        self.verify(pending, tensors, updates, batch)

    def with_new_layouts(self, gates: Gates, names: Iterable[str], batch: Batch) -> list[str]:
        """Find the tensors whose modules put out other rows than when they were verified.

        A module that is called with chosen tokens (an expert, a special token) changes its layout from batch to batch.

        Args:
            gates: Gates through which the batch has gone.
            names: The tensors to look at.
            batch: The batch.

        Returns:
            The tensors that must be verified on this batch before they are measured on it.
        """

        def is_new(name: str) -> bool:
            return self._is_verified(name, batch) and not self._is_verified(name, batch, gates.calls)

        return self._on_any_process(names, is_new)

    def verify(
        self,
        pending: list[str],
        tensors: Mapping[str, MeasuredTensor],
        updates: Mapping[str, Tensor],
        batch: Batch,
    ) -> None:
        """Verify some tensors on a batch; widen the sites of those that fail, until all are verified or given up.

        Args:
            pending: The tensors.
            tensors: As for `find`.
            updates: As for `find`.
            batch: As for `find`.
        """
        while pending:
            self._engine.release()  # a pass that has failed leaves weights gathered
            gates = self.gates(pending, tensors, updates, batch)
            with trainable(p for name in pending for p in tensors[name].parameters), gates:
                try:
                    out = self._outputs(self._model, batch)
                except RuntimeError as error:
                    if should_reduce_batch_size(error):
                        raise
                    failed = self._after_failed_forward(gates)
                    if failed is None:
                        raise
                else:
                    refuted = self._refuted(gates, out, pending, updates, num_examples(batch))
                    failed = set(self._on_any_process(pending, refuted.__contains__))
                    pending = [name for name in pending if name in failed]
            for name in failed:
                self._widen(name, gates)
            pending = [name for name in pending if name in self.sites]

    def close_measurement(self, names: Iterable[str]) -> None:
        """Count one more measurement of the tensors that are still unverified; give up after `_PATIENCE` of them.

        Args:
            names: The tensors that were measured.
        """
        located = [name for name in names if name in self.sites and name not in self._blind]
        unverified = self._on_any_process(located, lambda name: name not in self._verified)
        self._attempts.update(unverified)
        exhausted = [name for name in unverified if self._attempts[name] == _PATIENCE]
        blind = self._on_every_process(exhausted, self.round_off.__contains__)
        for name in set(exhausted).difference(blind):
            self._give_up(name)
        self._blind.update(blind)

    def _on_any_process(self, names: Iterable[str], condition: Callable[[str], bool]) -> list[str]:
        """The names for which a condition holds on any process that runs the model in step with this one."""
        names = list(names)
        return list(compress(names, self._engine.agree([condition(name) for name in names])))

    def _on_every_process(self, names: Iterable[str], condition: Callable[[str], bool]) -> list[str]:
        """The names for which a condition holds on every process that runs the model in step with this one."""
        names = list(names)
        failing = set(self._on_any_process(names, lambda name: not condition(name)))
        return [name for name in names if name not in failing]

    def _is_verified(self, name: str, batch: Batch, calls: Mapping[str, ModuleCalls] | None = None) -> bool:
        """Whether a tensor was verified; with `calls`, whether at the layouts that these show.

        A batch of one example says nothing about how examples are laid out: it verifies only for batches of one.
        """
        enough = min(num_examples(batch), 2)
        layouts = self._layouts(name, calls or {})
        checked = self._verified.get(name, ())
        return any(c.num_examples >= enough and layouts.items() <= c.layouts.items() for c in checked)

    def _layouts(self, name: str, calls: Mapping[str, ModuleCalls]) -> Layouts:
        return call_layouts(calls, (site.module for site in self.sites[name]))

    def _after_failed_forward(self, gates: Gates) -> set[str] | None:
        """What to change after the model failed with gates in place: the tensors to widen; None if nothing is left."""
        if gates.broadcast:  # a row for each example does not fit what comes after the module
            return gates.broadcast
        if self._pass_on is not torch.clone:  # the model may write into its modules' outputs in place
            self._pass_on = torch.clone
            return set()
        return None

    def _refuted(
        self,
        gates: Gates,
        out: OutputValues,
        names: Sequence[str],
        updates: Mapping[str, Tensor],
        count: int,
    ) -> set[str]:
        """Compare the three numbers of every tensor; note those that agree, return those that do not.

        A tensor whose numbers are round-off is neither.
        """
        if len(out.values) % count:
            return set(names)  # the rows of the output are no examples
        # An activation checkpoint runs the hooks again in the backward pass: the layouts are noted before it.
        layouts = {name: self._layouts(name, gates.calls) for name in names}
        generator = torch.Generator(out.values.device).manual_seed(0)
        omega = out.omega(generator)
        # Distinct factors of size at most 1, in random order: neighbors, the first and the last example are told apart.
        order = torch.randperm(count, generator=generator, device=omega.device)
        factors = torch.linspace(-1, 1, count, device=omega.device, dtype=torch.float64)[order]
        by_row = factors.to(omega).repeat_interleave(len(omega) // count).reshape(-1, *[1] * (omega.ndim - 1))
        reductions = {name: partial(_summary, updates, name) for name in names}
        derivatives, summaries = gates.differentiate(out.values, omega, reductions, retain_graph=True, keep_terms=True)
        terms = gates.terms
        if any(self._engine.agree([not all(bool(found[2].isfinite()) for found in summaries.values())])):
            raise ValueError("the outputs' derivatives are not finite on a probe batch: the weights have diverged.")
        multiplied, _ = gates.differentiate(out.values, omega.mul_(by_row), retain_graph=True)
        self._largest_gradient = max(self._largest_gradient, *(float(found[2]) for found in summaries.values()), 0.0)
        # <U, G> of a gradient that consists of round-off of the largest one, per unit length of U.
        noise = _ROUND_OFF * gates.precision * self._largest_gradient
        tolerance = gates.precision**_DIGITS
        sizes = {name: found[0].abs() + derivatives[name].norm() for name, found in summaries.items()}
        cancelled = {n for n, size in sizes.items() if terms[n] > 0 and bool(size <= tolerance * terms[n])}
        candidates = self._on_every_process(names, cancelled.__contains__)
        round_off = self._confirmed(candidates, gates, out, count, generator, tolerance)
        refuted = set()
        for name in names:
            if name not in summaries:
                self.absent.add(name)
                continue
            self.absent.discard(name)
            self.round_off.discard(name)
            if name in round_off:
                self.round_off.add(name)
                continue
            by_gradient, products, _, length = summaries[name]
            floor = noise * length
            if bool(sizes[name] <= floor):
                # Too small to be verified, here as at any other site. Nothing at all is read where the backward pass
                # does not come by, though: a tensor that acts would get the rate 0.
                if name not in gates.reached and bool(products > 0):
                    refuted.add(name)
                continue
            leak = (multiplied[name] - derivatives[name] * factors).norm()
            missing = (derivatives[name].sum() - by_gradient).abs()
            leaks = leak > tolerance * derivatives[name].norm() + floor
            if bool(leaks or missing > tolerance * (sizes[name] + products)):
                refuted.add(name)
            else:
                self._verified.setdefault(name, []).append(_Checked(count, layouts[name]))
        return refuted

    def _confirmed(
        self,
        candidates: list[str],
        gates: Gates,
        out: OutputValues,
        count: int,
        generator: torch.Generator,
        tolerance: float,
    ) -> set[str]:
        """Those tensors whose terms cancel for other draws of omega, too, until enough D phi_n have been small.

        Args:
            candidates: The tensors whose terms have cancelled once, on every process.
            gates: Gates through which the batch has gone.
            out: The outputs.
            count: The number of examples.
            generator: Source of omega.
            tolerance: Fraction of the terms that may be left.
        """
        seen = count
        while candidates and any(self._engine.agree([seen < _SMALL_BY_CHANCE])):
            derivatives, _ = gates.differentiate(out.values, out.omega(generator), retain_graph=True, keep_terms=True)
            again = {name for name in candidates if bool(derivatives[name].norm() <= tolerance * gates.terms[name])}
            candidates = self._on_every_process(candidates, again.__contains__)
            seen += count
        return set(candidates)

    def _widen(self, name: str, gates: Gates) -> None:
        """Replace a tensor's sites: examples along the second dimension, then the enclosing modules, then none."""
        sites = self.sites[name]
        calls = [gates.calls[site.module] for site in sites if site.module in gates.calls]
        if all(site.dim == 0 for site in sites) and calls and all(call.transposable for call in calls):
            self.sites[name] = [site.transposed() for site in sites]
            return
        wider = [site.enclosing() for site in sites]
        self.sites[name] = outermost(site for site in wider if site is not None)
        if None in wider or not wider:
            self._give_up(name)
            cause = gates.failures.get(name)
            logger.warning(
                f"{name} cannot be told apart by example in {type(self._model).__name__}: "
                f"its rate comes from its weight gradient.{f' The cause: {cause!r}' if cause else ''}"
            )

    def _give_up(self, name: str) -> None:
        del self.sites[name]
        self.unmeasurable.add(name)


def _summary(updates: Mapping[str, Tensor], name: str, gradient: Tensor) -> Tensor:
    """<U, G>, |U * G|, the RMS of G, and |U|: what verification keeps of a weight gradient."""
    update = updates[name]
    products = elementwise_products(update, gradient)
    norms = [torch.linalg.vector_norm(as_real(t), dtype=torch.float64) for t in (products, gradient, update)]
    rms = norms[1] / max(gradient.numel(), 1) ** 0.5
    return torch.stack([products.sum(dtype=torch.float64), norms[0], rms, norms[2]])
