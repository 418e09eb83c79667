"""A measurement on a model: how far unit updates of its tensors move its outputs.

The data's way: updates and batches -> probes (one forward and one backward with random output weights omega) ->
samples -> `Measurement`. The model is left exactly as it was: weights, gradients, modes, hooks and random streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from ..engines import engine_of
from ..model.isolation import checkpointed, trainable, undisturbed
from ..model.names import resolve_names
from ..optimizer.step import UnitUpdates
from .estimators import ESTIMATORS, FALLBACK, WEIGHT_GRADIENT_ESTIMATORS
from .measurement import Measurement, Samples
from .outputs import Batch, MeasuredOutput, OutputFunction, OutputValues, check_differentiable, num_examples
from .per_example.gates import Gates, Site
from .per_example.linear_head import LinearHead, bypassed, find_linear_head, is_cast
from .per_example.sites import VerifiedSites, owners
from .per_example.tangents import jvp

_LAYOUTS_PER_BATCH = 3  # one to meet a new layout, one to measure it, one for what verifying it has widened


def measure_rates(
    model: nn.Module,
    updates: Mapping[str, Tensor],
    batches: Iterable[Batch],
    *,
    estimator: str = "per_example",
    probes_per_batch: int = 1,
    output: str | OutputFunction | None = None,
    positions: str = "attention_mask",
    metric: str = "euclidean",
    target_error: float | None = None,
    generator: torch.Generator | None = None,
) -> Measurement:
    """Measure function-space learning rates at the weights that the model has now.

    Args:
        model: Any `nn.Module`. It runs in eval mode and is left exactly as it was.
        updates: `{parameter name: unit update}` (weight per unit learning rate), names as `named_parameters()` gives
            them or canonical.
        batches: Dicts of model inputs, examples along the first dimension. The model is called as in training, but
            without labels and columns that its forward does not take; with labels if it cannot do without them.
        estimator: One of `hf_flerm.estimators.ESTIMATORS`: `per_example`, the paper's `kronecker`, `full`, `iid`,
            `kronecker_output` (`kronecker`, but the output layer's known independence is used), `exact`.
        probes_per_batch: Probes (draws of omega) that share one forward pass. `exact` has none.
        output: What "the function" is: `logits` (None), `log_probs`, `hidden` (the last hidden state), or a callable
            `(model, batch) -> tensor` with examples first, all of whose entries count.
        positions: Which positions count: those that are not padding (`attention_mask`) or those whose label the loss
            looks at (`labels`).
        metric: Size of an output change: `euclidean`, the root mean square over all outputs, or `fisher`: omega has the
            covariance of the predicted distribution's Fisher matrix, so that rate^2 * lr^2 / 2 is the KL divergence, in
            nats per position, between the predictions before and after a small step. Labels and config tell the
            distribution: classes, independent 0/1 labels, or a regression with unit variance.
        target_error: No more batches are taken once every rate's relative standard error is at most this.
        generator: Source of omega. None goes on from the state of torch's global generator and then puts it back.

    Returns:
        Rates in output units per unit learning rate. M * rate^2 is averaged over all probes.

    Raises:
        ValueError: If a name, a shape or an argument is wrong, or there is no batch.
    """
    if isinstance(batches, Mapping):
        raise ValueError("batches is one batch: pass a list of them, [batch].")
    outputs = MeasuredOutput(output, positions, metric)
    probe = RateProbe(model, estimator=estimator, probes_per_batch=probes_per_batch, outputs=outputs)
    for (name, path), update in zip(resolve_names(model, updates).items(), updates.values(), strict=True):
        parameter = model.get_parameter(path)
        shape = probe.engine.shape(parameter)
        if parameter.is_meta:
            raise ValueError(f"{name!r} is on the meta device, without numbers: load the model's weights first.")
        if update.shape != shape:
            raise ValueError(f"the update of {name!r} has shape {tuple(update.shape)}, the parameter {tuple(shape)}.")
    return probe.measure(updates, batches, generator, target_error=target_error)


class RateProbe:
    """Measures again and again on one model, and remembers how each tensor can be measured.

    Args:
        model: As for `measure_rates`.
        estimator: As for `measure_rates`.
        probes_per_batch: As for `measure_rates`.
        outputs: What "the function" is.

    Raises:
        ValueError: If an argument is not one of those allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        estimator: str = "per_example",
        probes_per_batch: int = 1,
        outputs: MeasuredOutput | None = None,
    ) -> None:
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}. Choose one of {', '.join(ESTIMATORS)}.")
        if probes_per_batch < 1:
            raise ValueError(f"probes_per_batch is {probes_per_batch}; it must be at least 1.")
        self.model = model
        self.estimator = estimator
        self.probes_per_batch = probes_per_batch
        self.outputs = outputs or MeasuredOutput()
        self.engine = engine_of(model)
        self._sites = VerifiedSites(model, self.outputs, self.engine)
        self._asked: list[str] = []
        self._raw: dict[str, str] = {}
        self._head_name: str | None = None
        self._head_sought = self.engine.sharded  # in shards, the head's own weight is never there as a whole
        self._head: LinearHead | None = None

    def measure(
        self,
        updates: Mapping[str, Tensor],
        batches: Iterable[Batch],
        generator: torch.Generator | None = None,
        *,
        target_error: float | None = None,
    ) -> Measurement:
        """Measure the rates of some tensors.

        Args:
            updates: As for `measure_rates`, shaped like their parameters; looked up each time one is needed.
            batches: As for `measure_rates`.
            generator: As for `measure_rates`.
            target_error: As for `measure_rates`.

        Returns:
            The measurement.

        Raises:
            ValueError: As for `measure_rates`.
        """
        if not updates:
            raise ValueError("updates is empty: pass a unit update for at least one parameter.")
        if target_error is not None and not target_error > 0:
            raise ValueError(f"target_error is {target_error!r}; it must be positive, or None to use every batch.")
        self.engine.release()
        if list(updates) != self._asked:
            self._raw, self._asked = resolve_names(self.model, updates), list(updates)
        parameters = {name: self.model.get_parameter(path) for name, path in self._raw.items()}
        moves = UnitUpdates(updates, dict(zip(self._raw, updates, strict=True)), parameters, self.engine)
        device = self.engine.device(next(iter(parameters.values())))
        samples = Samples(moves)
        if self._head is not None and not self._head.is_current():
            self._head = None
        with undisturbed(self.model, device), self.engine.released_after():
            if generator is None:
                generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
            for batch in self._there(batches, device):
                if not self.engine.sharded:
                    self.outputs.prepare(self.model, batch)
                if self.estimator == "exact":
                    self._differentiate(moves, batch, samples)
                    continue
                with checkpointed(self.model):
                    self._seek_head(batch)
                    if self.estimator == "per_example":
                        self._sites.find(parameters, moves, batch)
                    self._probe(parameters, moves, batch, generator, samples)
                if target_error is not None:
                    goes_on = samples.measurement().relative_error > target_error
                    if not any(self.engine.agree([goes_on])):
                        break
        self._sites.close_measurement(moves)
        return samples.measurement()

    def _there(self, batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
        """Batches on the device; one that a process cannot make is missing on all that run the model in step."""
        source = iter(batches)
        while True:
            batch: Batch | None = None
            failure: Exception | None = None
            try:
                batch = next(source, None)
                batch = batch and send_to_device(dict(batch), device)
            except Exception as error:
                failure = error
            out_of_memory = failure is not None and should_reduce_batch_size(failure)
            failed, out_of_memory = self.engine.agree([failure is not None, out_of_memory])
            if out_of_memory:
                raise torch.OutOfMemoryError(f"a process ran out of memory. {failure or ''}".rstrip()) from failure
            if failed:
                raise failure or RuntimeError("another process could not make a batch to probe with.")
            if batch is None:
                return
            yield batch

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
                self.engine.release()
                gated = [name for name in updates if name in self._sites.sites]
                by_gradient = {parameters[name]: name for name in updates if name not in self._sites.sites}
                stack.enter_context(trainable(by_gradient))
                gates, out, head = self._forward(stack, gated, parameters, updates, batch)
                strange = self._sites.strange(gates, gated, batch)
                if not strange:
                    break
                stack.close()
                self._sites.verify(strange, parameters, updates, batch)
            else:
                raise RuntimeError(f"the layout of {strange} differs between forward passes on one batch.")
            if not out.values.requires_grad and head is None:
                self._check_differentiable(batch)
            num_outputs = out.count(None if head is None else head.module.out_features)
            estimators = {p: self._weight_gradient_estimator(p) for p in by_gradient}
            reductions = {p: partial(_statistics, updates, name, estimators[p]) for p, name in by_gradient.items()}
            for probe in range(self.probes_per_batch):
                last = probe + 1 == self.probes_per_batch
                omega, own = (out.omega(generator), {}) if head is None else head.draw(out, generator)
                derivatives, statistics = gates.differentiate(
                    out.values, omega, reductions, retain_graph=not last, keep_tangents=not last
                )
                for name, drawn in own.items():
                    values = drawn.reshape(num_examples(batch), -1).sum(1)
                    derivatives[name] = derivatives[name] + values if name in derivatives else values
                samples.add_derivatives(derivatives, (gates.reached | own.keys()) - self._sites.absent)
                for parameter, name in by_gradient.items():
                    samples.add_statistics(name, estimators[parameter][0], statistics.get(parameter))
                samples.count_outputs(num_outputs)

    def _forward(
        self,
        stack: ExitStack,
        gated: Sequence[str],
        parameters: Mapping[str, nn.Parameter],
        updates: Mapping[str, Tensor],
        batch: Batch,
    ) -> tuple[Gates, OutputValues, LinearHead | None]:
        """Run the model with gates; where its output is one last wide linear map, up to that map's input.

        The gates stay in place until `stack` closes: an activation checkpoint runs their hooks again.
        """
        head = self._linear_head(parameters, updates)
        if head is not None:
            with ExitStack() as attempt:
                gates = attempt.enter_context(self._sites.gates(gated, updates, batch, skip=self._head_name))
                hidden = attempt.enter_context(bypassed(head.module))
                try:
                    out = self.outputs(self.model, batch)
                except Exception:  # which the run below meets again if it is not the bypass that it is about
                    hidden.clear()
                if len(hidden) == 1 and is_cast(out.values, hidden[0]) and out.weight.shape[-1] == 1:
                    stack.push(attempt.pop_all())
                    return gates.checked(), out, head
            self._head_name = None  # something looks at the logits on their way out
        gates = stack.enter_context(self._sites.gates(gated, updates, batch))
        out = self.outputs(self.model, batch)
        return gates.checked(), out, None

    def _differentiate(self, updates: Mapping[str, Tensor], batch: Batch, samples: Samples) -> None:
        """Add the exact derivative of the outputs along every update: one JVP for each tensor."""
        whole = _AsModule(self.model, self.outputs)
        num_examples(batch)
        with torch.no_grad():
            out = self.outputs(self.model, batch)
        tangents = []
        for name, update in updates.items():
            key = f"model.{self._raw[name]}"

            def values(parameter: Tensor, key: str = key) -> tuple[Tensor, ...]:
                return (torch.func.functional_call(whole, {key: parameter}, (batch,)).values,)

            (tangent,) = jvp(values, self.model.get_parameter(self._raw[name]), update, self.model, self.engine)
            tangents.append(out.sized(tangent))
        samples.add_tangents(torch.stack(tangents))
        samples.count_outputs(out.count())

    def _check_differentiable(self, batch: Batch) -> None:
        """Refuse an output that no parameter at all can move; where only the measured ones cannot, their rate is 0."""
        with trainable(self.model.parameters()):
            check_differentiable(self.model, self.outputs(self.model, batch))

    def _seek_head(self, batch: Batch) -> None:
        if not self._head_sought:
            self._head_sought = True
            if self.outputs.metric == "euclidean":
                self._head_name = find_linear_head(self.model, lambda: self.outputs(self.model, batch).values)

    def _linear_head(self, parameters: Mapping[str, nn.Parameter], updates: Mapping[str, Tensor]) -> LinearHead | None:
        """The head to skip, if there is one, gates measure all its tensors, and it pays; made once a measurement."""
        if self._head_name is None or self.estimator != "per_example":
            return None
        module: Any = self.model.get_submodule(self._head_name)
        own = {}
        for attribute, parameter in module.named_parameters():
            for name in (name for name in updates if parameters[name] is parameter):
                if Site(self._head_name, attribute) not in self._sites.sites.get(name, ()):
                    return None
                own[attribute] = name
        if self._head is not None and self._head.names != own:
            self._head = None
        if self._head is None and LinearHead.pays(module, len(own)):
            self._head = LinearHead(module, {attribute: (name, updates[name]) for attribute, name in own.items()})
        return self._head

    def _weight_gradient_estimator(self, parameter: nn.Parameter) -> tuple[str, tuple[int, ...]]:
        """Which estimator a tensor gets when it is measured by its weight gradient, and its independent dimensions."""
        if self.estimator == "per_example":
            return FALLBACK, ()
        if self.estimator != "kronecker_output":
            return self.estimator, ()
        holders = [site.module for site in owners(self.model, parameter)]
        return (self.estimator, (0,)) if holders == [self._head_name] else ("kronecker", ())


def _statistics(
    updates: Mapping[str, Tensor], name: str, estimator: tuple[str, tuple[int, ...]], gradient: Tensor
) -> Tensor:
    """Reduce a weight gradient: the sum of Z = U * G, and the estimator's own statistics of it."""
    products = updates[name] * gradient
    own = WEIGHT_GRADIENT_ESTIMATORS[estimator[0]].statistics(products, estimator[1])
    return torch.cat([products.sum(dtype=torch.float64).reshape(1), own])


class _AsModule(nn.Module):
    """A model and what is taken of its output, as one module that `functional_call` can run."""

    def __init__(self, model: nn.Module, outputs: MeasuredOutput) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, batch: Batch) -> OutputValues:
        return self.outputs(self.model, batch)
