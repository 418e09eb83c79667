"""Where each tensor can be told apart by example: sites are proposed by ownership and believed only when verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import compress

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers.utils import logging

from ...engines.engine import Engine
from ...model.isolation import trainable
from ..outputs import Batch, MeasuredOutput, OutputValues, num_examples
from .gates import Gates, Passage, Site, itself, layouts
from .tangents import Affine

logger = logging.get_logger(__name__)

_PATIENCE = 8
_ROUND_OFF = 16  # how many units of rounding a sum of products may be off


class VerifiedSites:
    """Sites of tensors, each checked on the first batch on which the tensor moves the outputs.

    A tensor is first given gates at the modules that own it. They must add up to <U, G> from the weight gradient,
    and each must follow its own example alone. Where they do not (the module is
    never called, or called with something other than the examples), the enclosing module takes its place. Where none
    is left, or the tensor moved no output in `_PATIENCE` measurements, only its weight gradient is to be trusted.

    Attributes:
        sites: `{name: sites}` of the tensors that gates can measure.
        unmeasurable: Tensors that gates cannot measure.
        absent: Tensors on which the outputs did not depend when that was last looked at.

    Args:
        model: The model.
        outputs: What "the function" is.
        engine: What holds the model's weights.
    """

    def __init__(self, model: nn.Module, outputs: MeasuredOutput, engine: Engine) -> None:
        self.sites: dict[str, list[Site]] = {}
        self.unmeasurable: set[str] = set()
        self.absent: set[str] = set()
        self._model = model
        self._outputs = outputs
        self._engine = engine
        self._affine = Affine(engine)
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
        return Gates(
            self._model,
            places,
            updates,
            num_examples(batch),
            self._affine,
            hand_out=self._hand_out,
            engine=self._engine,
        )

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
        located = [name for name in parameters if name in self.sites]
        pending = self._agreed(located, lambda name: not self._trusts(name, batch))
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
        return self._agreed(
            names, lambda name: self._trusts(name, batch) and not self._trusts(name, batch, gates.passages)
        )

    def _agreed(self, names: Iterable[str], is_meant: Callable[[str], bool]) -> list[str]:
        """The names that are meant, by any process that runs in step with this one."""
        names = list(names)
        return list(compress(names, self._engine.agree([is_meant(name) for name in names])))

    def _trusts(self, name: str, batch: Batch, passages: Mapping[str, Passage] | None = None) -> bool:
        """Whether a tensor was verified, at the layouts of these passages if they are given.

        One example alone says nothing of how examples are laid out.
        """
        enough = min(num_examples(batch), 2)
        here = layouts(passages or {}, (site.module for site in self.sites[name]))
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
            self._engine.release()  # a pass that has failed leaves weights gathered
            gates = self.gates(pending, updates, batch)
            with trainable(parameters[name] for name in pending), gates:
                try:
                    out = self._outputs(self._model, batch)
                except RuntimeError as error:
                    if should_reduce_batch_size(error):
                        raise
                    if gates.broadcast:  # a row for each example does not fit what comes after
                        wrong = gates.broadcast
                    elif self._hand_out is not torch.clone:
                        wrong, self._hand_out = set(), torch.clone
                    else:
                        raise
                else:
                    chosen = {name: parameters[name] for name in pending}
                    refuted = self._refuted(gates, out, chosen, updates, num_examples(batch))
                    wrong = set(self._agreed(pending, refuted.__contains__))
                    pending = [name for name in pending if name in wrong]
            for name in wrong:
                self._widen(name, gates)
            pending = [name for name in pending if name in self.sites]

    def close_measurement(self, names: Iterable[str]) -> None:
        """Count a measurement against the tensors that are still not verified, and give up on the oldest of them.

        Args:
            names: What was measured.
        """
        located = [name for name in names if name in self.sites]
        for name in self._agreed(located, lambda name: name not in self._verified):
            self._attempts[name] += 1
            if self._attempts[name] == _PATIENCE:
                del self.sites[name]
                self.unmeasurable.add(name)

    def _refuted(
        self,
        gates: Gates,
        out: OutputValues,
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
        # An activation checkpoint runs the hooks again in the backward pass, so this is noted before.
        seen = {name: layouts(gates.passages, (site.module for site in self.sites[name])) for name in parameters}
        generator = torch.Generator(out.values.device).manual_seed(0)
        omega = out.omega(generator)
        order = torch.randperm(count, generator=generator, device=omega.device)
        factors = torch.linspace(-1, 1, count, device=omega.device, dtype=torch.float64)[order]
        by_row = factors.to(omega).repeat_interleave(len(omega) // count).reshape(-1, *[1] * (omega.ndim - 1))
        reductions = {parameters[name]: partial(_sizes, updates, name) for name in parameters}
        values, sizes = gates.differentiate(out.values, omega, reductions, retain_graph=True)
        if any(self._engine.agree([not all(bool(found[2].isfinite()) for found in sizes.values())])):
            raise ValueError("the outputs' derivatives are not finite on a probe batch: the weights have diverged.")
        multiplied, _ = gates.differentiate(out.values, omega.mul_(by_row))
        self._largest_gradient = max(self._largest_gradient, *(float(found[2]) for found in sizes.values()), 0.0)
        noise = _ROUND_OFF * gates.precision * self._largest_gradient
        coarse = gates.precision**0.5
        wrong = set()
        for name, parameter in parameters.items():
            if parameter not in sizes:
                self.absent.add(name)
                continue
            self.absent.discard(name)
            expected, products, _, length = sizes[parameter]
            size = expected.abs() + values[name].norm()
            floor = noise * length
            if bool(size <= floor):
                continue
            leaks = multiplied[name] - values[name] * factors
            missing = (values[name].sum() - expected).abs()
            if bool(leaks.norm() > coarse * values[name].norm() + floor or missing > coarse * (size + products)):
                wrong.add(name)
            else:
                self._verified.setdefault(name, []).append((count, seen[name]))
        return wrong

    def _widen(self, name: str, gates: Gates) -> None:
        """See a tensor along the second dimension, or from the modules around its sites; at last not at all."""
        sites = self.sites[name]
        passages = [gates.passages[site.module] for site in sites if site.module in gates.passages]
        if all(site.dim == 0 for site in sites) and passages and all(passage.transposable for passage in passages):
            self.sites[name] = [site.transposed() for site in sites]
            return
        wider = [site.enclosing() for site in sites]
        self.sites[name] = _outermost(site for site in wider if site is not None)
        if None in wider or not wider:
            del self.sites[name]
            self.unmeasurable.add(name)
            cause = gates.failures.get(name)
            logger.warning(
                f"{name} cannot be told apart by example in {type(self._model).__name__}: "
                f"its rate comes from its weight gradient.{f' The cause: {cause!r}' if cause else ''}"
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


def _sizes(updates: Mapping[str, Tensor], name: str, gradient: Tensor) -> Tensor:
    """<U, G>, |U * G|, the RMS of G, and |U|: what verifying keeps of a weight gradient."""
    update = updates[name]
    products = update * gradient
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in (products, gradient, update)]
    rms = norms[1] / max(gradient.numel(), 1) ** 0.5
    return torch.stack([products.sum(dtype=torch.float64), norms[0], rms, norms[2]])


def _outermost(sites: Iterable[Site]) -> list[Site]:
    """Drop the sites that lie inside another one."""
    kept: list[Site] = []
    for site in sorted(set(sites), key=lambda site: site.module):
        if not any(f"{site.module}.".startswith(f"{other.module}.") or not other.module for other in kept):
            kept.append(site)
    return kept
