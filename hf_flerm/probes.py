"""A measurement on a model: how far unit updates of its tensors move its outputs.

The data's way: updates and batches -> probes (one forward and one backward with random output weights omega) ->
samples -> `Measurement`. The model is left exactly as it was: weights, gradients, modes, hooks and random streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from .estimators import ESTIMATORS, Measurement, Samples
from .gates import Gates, Site, jvp
from .heads import LinearHead, bypassed, find_linear_head
from .modes import trainable, undisturbed
from .names import resolve_names
from .outputs import Batch, Output, OutputFunction, model_output, num_examples
from .sites import VerifiedSites, gradients, owners

FALLBACK = "kronecker"
_LAYOUTS_PER_BATCH = 3  # one to meet a new layout, one to measure it, one for what verifying it has widened


def measure_rates(
    model: nn.Module,
    updates: Mapping[str, Tensor],
    batches: Iterable[Batch],
    *,
    estimator: str = "per_example",
    probes_per_batch: int = 1,
    output: OutputFunction | None = None,
    generator: torch.Generator | None = None,
) -> Measurement:
    """Measure function-space learning rates at the weights that the model has now.

    Args:
        model: Any `nn.Module`. It runs in eval mode and is left exactly as it was.
        updates: `{parameter name: unit update}` (weight per unit learning rate), names as `named_parameters()` gives
            them or canonical.
        batches: Dicts of model inputs, examples along the first dimension. Labels are left out of the call.
        estimator: One of `hf_flerm.estimators.ESTIMATORS`: `per_example`, the paper's `kronecker`, `full`, `iid`,
            `kronecker_output` (`kronecker`, but the output layer's known independence is used), `exact`.
        probes_per_batch: Probes (draws of omega) that share one forward pass. `exact` has none.
        output: What "the function" is, `(model, batch) -> tensor` with examples first, all of whose entries count.
            None: the logits at unpadded positions.
        generator: Source of omega. None goes on from the state of torch's global generator and then puts it back.

    Returns:
        Rates in output units per unit learning rate. M * rate^2 is averaged over all probes.

    Raises:
        ValueError: If a name, a shape or an argument is wrong, or there is no batch.
    """
    probe = RateProbe(model, estimator=estimator, probes_per_batch=probes_per_batch, output=output)
    return probe.measure(updates, batches, generator)


class RateProbe:
    """Measures again and again on one model, and remembers how each tensor can be measured.

    Args:
        model: As for `measure_rates`.
        estimator: As for `measure_rates`.
        probes_per_batch: As for `measure_rates`.
        output: As for `measure_rates`.

    Raises:
        ValueError: If an argument is not one of those allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        estimator: str = "per_example",
        probes_per_batch: int = 1,
        output: OutputFunction | None = None,
    ) -> None:
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}. Choose one of {', '.join(ESTIMATORS)}.")
        if probes_per_batch < 1:
            raise ValueError(f"probes_per_batch is {probes_per_batch}; it must be at least 1.")
        self.model = model
        self.estimator = estimator
        self.probes_per_batch = probes_per_batch
        self.output = output
        self._sites = VerifiedSites(model, output)
        self._asked: list[str] = []
        self._raw: dict[str, str] = {}
        self._head: str | None = None
        self._head_sought = False

    def measure(
        self, updates: Mapping[str, Tensor], batches: Iterable[Batch], generator: torch.Generator | None = None
    ) -> Measurement:
        """Measure the rates of some tensors.

        Args:
            updates: As for `measure_rates`.
            batches: As for `measure_rates`.
            generator: As for `measure_rates`.

        Returns:
            The measurement.

        Raises:
            ValueError: As for `measure_rates`.
        """
        if not updates:
            raise ValueError("updates is empty: pass a unit update for at least one parameter.")
        if list(updates) != self._asked:
            self._raw, self._asked = resolve_names(self.model, updates), list(updates)
        parameters = {name: self.model.get_parameter(path) for name, path in self._raw.items()}
        moves = {}
        for (name, parameter), update in zip(parameters.items(), updates.values(), strict=True):
            if update.shape != parameter.shape:
                raise ValueError(
                    f"the update of {name!r} has shape {tuple(update.shape)}, the parameter {tuple(parameter.shape)}."
                )
            moves[name] = update.detach().to(parameter)
        device = next(iter(moves.values())).device
        samples = Samples(moves)
        with undisturbed(self.model, device):
            if generator is None:
                generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
            for batch in batches:
                batch = send_to_device(dict(batch), device)
                if self.estimator == "exact":
                    self._differentiate(moves, batch, samples)
                    continue
                self._seek_head(batch)
                if self.estimator == "per_example":
                    self._sites.find(parameters, moves, batch)
                self._probe(parameters, moves, batch, generator, samples)
        self._sites.close_measurement(moves)
        return samples.measurement()

    def _probe(
        self,
        parameters: Mapping[str, nn.Parameter],
        updates: Mapping[str, Tensor],
        batch: Batch,
        generator: torch.Generator,
        samples: Samples,
    ) -> None:
        """Add the samples of `probes_per_batch` probes on one batch."""
        with ExitStack() as stack:
            for _ in range(_LAYOUTS_PER_BATCH):
                gated = [name for name in updates if name in self._sites.sites]
                by_gradient = [name for name in updates if name not in self._sites.sites]
                stack.enter_context(trainable(parameters[name] for name in by_gradient))
                gates, out, head = self._forward(stack, gated, parameters, updates, batch)
                strange = self._sites.strange(gates, gated, batch)
                if not strange:
                    break
                stack.close()
                self._sites.verify(strange, parameters, updates, batch)
            else:
                raise RuntimeError(f"the layout of {strange} differs between forward passes on one batch.")
            num_outputs = out.count(out.values.shape[-1] if head is None else head.module.out_features)
            leaves = [*gates.leaves, *(parameters[name] for name in by_gradient)]
            for probe in range(self.probes_per_batch):
                last = probe + 1 == self.probes_per_batch
                omega, own = (out.omega(generator), {}) if head is None else head.draw(out, generator)
                found = gradients(out.values, leaves, omega, retain_graph=not last)
                derivatives = gates.derivatives(found[: len(gates.leaves)])
                for name, values in own.items():
                    derivatives[name] = derivatives[name] + values if name in derivatives else values
                samples.add_derivatives(derivatives)
                for name, gradient in zip(by_gradient, found[len(gates.leaves) :], strict=True):
                    estimator, dims = self._weight_gradient_estimator(parameters[name])
                    samples.add_products(name, updates[name] * gradient, estimator, dims)
                samples.count_outputs(num_outputs)

    def _forward(
        self,
        stack: ExitStack,
        gated: Sequence[str],
        parameters: Mapping[str, nn.Parameter],
        updates: Mapping[str, Tensor],
        batch: Batch,
    ) -> tuple[Gates, Output, LinearHead | None]:
        """Run the model with gates; where its output is one last wide linear map, up to that map's input.

        The gates stay in place until `stack` closes: an activation checkpoint runs their hooks again.
        """
        head = self._linear_head(parameters, updates)
        if head is not None:
            with ExitStack() as attempt:
                gates = attempt.enter_context(self._sites.gates(gated, updates, batch, skip=self._head))
                hidden = attempt.enter_context(bypassed(head.module))
                try:
                    out = model_output(self.model, batch, self.output)
                except Exception:  # which the run below meets again if it is not the bypass that it is about
                    hidden.clear()
                if len(hidden) == 1 and out.values is hidden[0]:
                    stack.push(attempt.pop_all())
                    return gates.checked(), out, head
            self._head = None  # something looks at the logits on their way out
        gates = stack.enter_context(self._sites.gates(gated, updates, batch))
        out = model_output(self.model, batch, self.output)
        return gates.checked(), out, None

    def _differentiate(self, updates: Mapping[str, Tensor], batch: Batch, samples: Samples) -> None:
        """Add the exact derivative of the outputs along every update: one JVP for each tensor."""
        whole = _AsModule(self.model, self.output)
        num_examples(batch)
        with torch.no_grad():
            out = model_output(self.model, batch, self.output)
        tangents = []
        for name, update in updates.items():
            key = f"model.{self._raw[name]}"

            def values(parameter: Tensor, key: str = key) -> tuple[Tensor, ...]:
                return (torch.func.functional_call(whole, {key: parameter}, (batch,)).values,)

            (tangent,) = jvp(values, self.model.get_parameter(self._raw[name]), update)
            tangents.append(tangent * out.weight)
        samples.add_tangents(torch.stack(tangents))
        samples.count_outputs(out.count(out.values.shape[-1]))

    def _seek_head(self, batch: Batch) -> None:
        if not self._head_sought:
            self._head_sought = True
            self._head = find_linear_head(self.model, lambda: model_output(self.model, batch, self.output).values)

    def _linear_head(self, parameters: Mapping[str, nn.Parameter], updates: Mapping[str, Tensor]) -> LinearHead | None:
        """The head to skip, if there is one, gates measure all its tensors, and it pays."""
        if self._head is None or self.estimator != "per_example":
            return None
        module: Any = self.model.get_submodule(self._head)
        own = {}
        for attribute, parameter in module.named_parameters():
            for name in (name for name in updates if parameters[name] is parameter):
                if Site(self._head, attribute) not in self._sites.sites.get(name, ()):
                    return None
                own[attribute] = (name, updates[name])
        return LinearHead(module, own) if LinearHead.pays(module, len(own)) else None

    def _weight_gradient_estimator(self, parameter: nn.Parameter) -> tuple[str, tuple[int, ...]]:
        """Which estimator a tensor gets when it is measured by its weight gradient, and its independent dimensions."""
        if self.estimator == "per_example":
            return FALLBACK, ()
        if self.estimator != "kronecker_output":
            return self.estimator, ()
        holders = [site.module for site in owners(self.model, parameter)]
        return (self.estimator, (0,)) if holders == [self._head] else ("kronecker", ())


class _AsModule(nn.Module):
    """A model and what is taken of its output, as one module that `functional_call` can run."""

    def __init__(self, model: nn.Module, output: OutputFunction | None) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, batch: Batch) -> Output:
        return model_output(self.model, batch, self.output)
