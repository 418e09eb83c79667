"""Verification of sites: find by trial where per-example derivatives can be read, and check them numerically.

A tensor first gets gates at the modules that hold it. On the first batch on which it has an effect, three numbers are
compared, for a draw of omega and factors c_n that differ between examples:

    D phi_n            read by the gates
    <U, G>             from the weight gradient G = d (sum_n phi_n) / d W; must equal sum_n D phi_n
    D (c_n phi_n)      read by the gates for omega[n] * c_n; must equal c_n D phi_n, else the gate of an example also
                       contains other examples

If one differs (the module is never called, or the rows of its output are not the examples), the site moves to the
enclosing module, up to the model itself; after that the tensor is measured by its weight gradient.
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
from ..model_call import Batch
from ..outputs import MeasuredOutput, OutputValues, num_examples
from ..tensors import TensorAliases, as_real, elementwise_products
from .gates import Gates, ModuleCalls, call_layouts, unchanged
from .sites import Site, outermost, owners
from .tangents import ModuleTangents

logger = logging.get_logger(__name__)

# Number of measurements for which an unverified tensor keeps its gates. LoRA's A has no effect while B is 0, which ends
# with the first step; a warm-up or a frozen B may last longer. A tensor that is still unverified then is measured by
# its weight gradient, which needs no verification.
_PATIENCE = 8

# Differences below this many machine epsilons of the outputs are round-off: the rounding errors of about ten layers.
_ROUND_OFF = 16

# The tolerance is eps^(1/2) of the outputs' dtype: half of the digits. It has two uses.
# (1) D phi_n and <U, G> must agree to it. They are two ways to add up the same terms, which differ by more than
#     round-off if terms cancel; a wrong site is wrong by its whole value.
# (2) A D phi_n below it times the root of the sum of its squared terms is round-off. A bias of attention keys leaves 2
#     to 16 eps of that root in float32 and 0.5 to 3 eps in bfloat16 (2 to 12 layers, 8 to 256 positions); tensors that
#     have an effect leave 0.6 of it or more.
_TOLERANCE_EXPONENT = 0.5

# Minimum number of small D phi_n before a tensor counts as round-off: in bfloat16 one is small by chance in 7 draws of
# 100, six are in 1 of 10^7. Batches of fewer examples take several draws of omega.
_MIN_SMALL_DERIVATIVES = 6

Layouts = dict[str, tuple[int, ...]]  # {module: rows per example of its outputs, call by call}


@dataclass(frozen=True)
class _Verification:
    """One successful verification: the number of examples, and the layouts of the tensor's modules."""

    num_examples: int
    layouts: Layouts


class VerifiedSites:
    """The sites of a model's tensors, each verified on the first batch on which the tensor changes the outputs.

    A tensor with sites is verified (on a batch with its present layouts), or not yet; it may be absent or round-off
    when that is tried. If it fails, its sites are widened; without any left it is unmeasurable.

    Attributes:
        sites: `{name: sites}` of the tensors that gates can measure.
        unmeasurable: Tensors that can only be measured by their weight gradient.
        absent: Tensors on which the outputs did not depend when they were last verified.
        round_off: Tensors whose derivatives are round-off because their terms cancel; their rate is 0. (A bias of
            attention keys cancels in the softmax, a bias before a normalization over positions in the norm.)

    Args:
        model: The model.
        output: The measured output.
        engine: The engine that holds the model's weights.
    """

    def __init__(self, model: nn.Module, output: MeasuredOutput, engine: Engine) -> None:
        self.sites: dict[str, list[Site]] = {}
        self.unmeasurable: set[str] = set()
        self.absent: set[str] = set()
        self.round_off: set[str] = set()
        self._always_round_off: set[str] = set()  # in `_PATIENCE` measurements, so by structure: not verified again
        self._model = model
        self._output = output
        self._engine = engine
        self._tangents = ModuleTangents(engine)
        self._verified: dict[str, list[_Verification]] = {}
        self._pass_on: Callable[[Tensor], Tensor] = unchanged
        self._attempts: Counter[str] = Counter()
        self._largest_gradient = 0.0  # largest RMS of a weight gradient in all verifications

    def gates(
        self,
        names: Iterable[str],
        tensors: Mapping[str, TensorAliases],
        updates: Mapping[str, Tensor],
        batch: Batch,
        skip: str | None = None,
    ) -> Gates:
        """Create gates for some tensors at their sites. Enter the result as a context manager to install them.

        Args:
            names: Names of the tensors.
            tensors: The measured tensors, by canonical name.
            updates: Their unit updates.
            batch: The batch that the model will be run on.
            skip: Name of a module that gets no gates.
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

    def find(self, tensors: Mapping[str, TensorAliases], updates: Mapping[str, Tensor], batch: Batch) -> None:
        """Propose sites for the tensors that have none, and verify those that are not verified yet.

        Args:
            tensors: `{name: tensor}`; none of their parameters requires a gradient.
            updates: Their unit updates.
            batch: Model inputs.

        Raises:
            ValueError: If the derivatives of the outputs are not finite.
        """
        for name, tensor in tensors.items():
            if name not in self.sites and name not in self.unmeasurable:
                self.sites[name] = outermost(s for p in tensor.parameters for s in owners(self._model, p))
        located = [name for name in tensors if name in self.sites]
        unverified = self._on_any_process(located, lambda name: not self._is_verified(name, batch))
        pending = [name for name in unverified if name not in self._always_round_off]
        self.verify(pending, tensors, updates, batch)

    def with_new_layouts(self, gates: Gates, names: Iterable[str], batch: Batch) -> list[str]:
        """Find the tensors whose modules have output layouts with which they were not verified.

        A module that is called with selected tokens (an expert, a special token) changes its layout with the batch.

        Args:
            gates: Gates with which the model was run on the batch.
            names: The tensors to check.
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
        tensors: Mapping[str, TensorAliases],
        updates: Mapping[str, Tensor],
        batch: Batch,
    ) -> None:
        """Verify some tensors on a batch; widen the sites of those that fail, until all are verified or given up.

        Args:
            pending: Names of the tensors to verify.
            tensors: `{name: tensor}`; none of their parameters requires a gradient.
            updates: Their unit updates.
            batch: Model inputs.

        Raises:
            ValueError: If the derivatives of the outputs are not finite.
        """
        while pending:
            self._engine.release()  # a failed pass leaves weights gathered
            gates = self.gates(pending, tensors, updates, batch)
            with trainable(p for name in pending for p in tensors[name].parameters), gates:
                try:
                    out = self._output(self._model, batch)
                except RuntimeError as error:
                    if should_reduce_batch_size(error):
                        raise
                    failed = self._after_failed_forward(gates)
                    if failed is None:
                        raise
                else:
                    failed_here = self._failed_verification(gates, out, pending, updates, num_examples(batch))
                    failed = set(self._on_any_process(pending, failed_here.__contains__))
                    pending = [name for name in pending if name in failed]
            for name in failed:
                self._widen(name, gates)
            pending = [name for name in pending if name in self.sites]

    def close_measurement(self, names: Iterable[str]) -> None:
        """Count one more measurement of the tensors that are still unverified; give up after `_PATIENCE` of them.

        Args:
            names: The tensors that were measured.
        """
        located = [name for name in names if name in self.sites and name not in self._always_round_off]
        unverified = self._on_any_process(located, lambda name: name not in self._verified)
        self._attempts.update(unverified)
        exhausted = [name for name in unverified if self._attempts[name] == _PATIENCE]
        always_round_off = self._on_every_process(exhausted, self.round_off.__contains__)
        for name in set(exhausted).difference(always_round_off):
            self._give_up(name)
        self._always_round_off.update(always_round_off)

    def _on_any_process(self, names: Iterable[str], condition: Callable[[str], bool]) -> list[str]:
        """The names for which a condition holds on any of the processes that run the model together."""
        names = list(names)
        return list(compress(names, self._engine.agree([condition(name) for name in names])))

    def _on_every_process(self, names: Iterable[str], condition: Callable[[str], bool]) -> list[str]:
        """The names for which a condition holds on every one of the processes that run the model together."""
        names = list(names)
        failing = set(self._on_any_process(names, lambda name: not condition(name)))
        return [name for name in names if name not in failing]

    def _is_verified(self, name: str, batch: Batch, calls: Mapping[str, ModuleCalls] | None = None) -> bool:
        """Whether a tensor was verified; with `calls`, whether with the layouts of these calls.

        A batch of one example does not show how examples are laid out: it verifies only for batches of one.
        """
        enough = min(num_examples(batch), 2)
        layouts = self._layouts(name, calls or {})
        verifications = self._verified.get(name, ())
        return any(v.num_examples >= enough and layouts.items() <= v.layouts.items() for v in verifications)

    def _layouts(self, name: str, calls: Mapping[str, ModuleCalls]) -> Layouts:
        return call_layouts(calls, (site.module for site in self.sites[name]))

    def _after_failed_forward(self, gates: Gates) -> set[str] | None:
        """Return the tensors whose sites must be widened after a failed forward pass; None if gates are not the cause.

        An empty set means that the pass is to be repeated as it was, with cloned outputs.
        """
        if gates.broadcast:  # the model may not accept a row for each example after the module
            return gates.broadcast
        if self._pass_on is not torch.clone:  # the model may modify its modules' outputs in place
            self._pass_on = torch.clone
            return set()
        return None

    def _failed_verification(
        self,
        gates: Gates,
        out: OutputValues,
        names: Sequence[str],
        updates: Mapping[str, Tensor],
        count: int,
    ) -> set[str]:
        """Compare the three numbers of every tensor: note the verified tensors, return those that failed.

        Tensors that are absent, round-off, or too small to compare are neither.
        """
        if len(out.values) % count:
            return set(names)  # the rows of the output are not examples
        # An activation checkpoint runs the hooks again in the backward pass: note the layouts before it.
        layouts = {name: self._layouts(name, gates.calls) for name in names}
        generator = torch.Generator(out.values.device).manual_seed(0)
        omega = out.omega(generator)
        # Distinct factors c_n of size at most 1, in random order, so that any two examples differ.
        order = torch.randperm(count, generator=generator, device=omega.device)
        factors = torch.linspace(-1, 1, count, device=omega.device, dtype=torch.float64)[order]
        by_row = factors.to(omega).repeat_interleave(len(omega) // count).reshape(-1, *[1] * (omega.ndim - 1))
        reductions = {name: partial(_summary, updates, name) for name in names}
        derivatives, summaries = gates.differentiate(out.values, omega, reductions, retain_graph=True, keep_terms=True)
        terms = gates.terms
        if any(self._engine.agree([not all(bool(found[2].isfinite()) for found in summaries.values())])):
            raise ValueError("the derivatives of the outputs are not finite on a probe batch: the weights diverged.")
        multiplied, _ = gates.differentiate(out.values, omega.mul_(by_row), retain_graph=True)
        self._largest_gradient = max(self._largest_gradient, *(float(found[2]) for found in summaries.values()), 0.0)
        # Upper bound of the round-off in <U, G> / |U|: that of the largest weight gradient.
        noise = _ROUND_OFF * gates.precision * self._largest_gradient
        tolerance = gates.precision**_TOLERANCE_EXPONENT
        # Round-off first: tensors whose terms cancel here, then on every process, then for further draws of omega.
        sizes = {name: found[0].abs() + derivatives[name].norm() for name, found in summaries.items()}
        cancelled = {n for n, size in sizes.items() if terms[n] > 0 and bool(size <= tolerance * terms[n])}
        candidates = self._on_every_process(names, cancelled.__contains__)
        round_off = self._confirm_round_off(candidates, gates, out, count, generator, tolerance)
        failed = set()
        for name in names:
            if name not in summaries:  # phi does not depend on it
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
                # Too small to be verified, at this site or any other. But if no gate was reached although the weight
                # gradient has terms, the backward pass bypasses the gates, and the rate would wrongly be 0.
                if name not in gates.reached and bool(products > 0):
                    failed.add(name)
                continue
            leak = (multiplied[name] - derivatives[name] * factors).norm()
            missing = (derivatives[name].sum() - by_gradient).abs()
            leaks = leak > tolerance * derivatives[name].norm() + floor
            if bool(leaks or missing > tolerance * (sizes[name] + products)):
                failed.add(name)
            else:
                self._verified.setdefault(name, []).append(_Verification(count, layouts[name]))
        return failed

    def _confirm_round_off(
        self,
        candidates: list[str],
        gates: Gates,
        out: OutputValues,
        count: int,
        generator: torch.Generator,
        tolerance: float,
    ) -> set[str]:
        """Return the candidates whose terms also cancel for further draws of omega, until enough D phi_n were small.

        Args:
            candidates: Tensors whose terms have cancelled once, on every process.
            gates: Gates with which the model was run on the batch.
            out: The outputs.
            count: Number of examples.
            generator: Source of omega.
            tolerance: Largest D phi_n that counts as small, as a fraction of the root of the sum of squared terms.
        """
        seen = count
        while candidates and any(self._engine.agree([seen < _MIN_SMALL_DERIVATIVES])):
            derivatives, _ = gates.differentiate(out.values, out.omega(generator), retain_graph=True, keep_terms=True)
            again = {name for name in candidates if bool(derivatives[name].norm() <= tolerance * gates.terms[name])}
            candidates = self._on_every_process(candidates, again.__contains__)
            seen += count
        return set(candidates)

    def _widen(self, name: str, gates: Gates) -> None:
        """Widen the sites of a tensor: try dimension 1, then the enclosing modules, and finally give up."""
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
                f"the per-example derivatives of {name} in {type(self._model).__name__} cannot be read: its rate is "
                f"estimated from its weight gradient.{f' The cause: {cause!r}' if cause else ''}"
            )

    def _give_up(self, name: str) -> None:
        del self.sites[name]
        self.unmeasurable.add(name)


def _summary(updates: Mapping[str, Tensor], name: str, gradient: Tensor) -> Tensor:
    """Reduce a weight gradient to <U, G>, |U * G|, the RMS of G, and |U|, float64 [4]."""
    update = updates[name]
    products = elementwise_products(update, gradient)
    norms = [torch.linalg.vector_norm(as_real(t), dtype=torch.float64) for t in (products, gradient, update)]
    rms = norms[1] / max(gradient.numel(), 1) ** 0.5
    return torch.stack([products.sum(dtype=torch.float64), norms[0], rms, norms[2]])
