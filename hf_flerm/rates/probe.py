"""A measurement on a model: how far unit updates of its tensors move its outputs.

One measurement reads top to bottom in `RateProbe.measure`: for each batch, find where each tensor can be read, run the
model forward once, run backward once per draw of omega, and add the numbers to `Samples`; at the end they become rates.

Symbols: f[n, k] are the outputs of example n, M is how many outputs count, omega ~ N(0, 1) (or as the metric has it),
phi_n = sum_k omega[n, k] f[n, k], U a unit update, D phi_n the derivative of phi_n along U (`reference.py`).

    per_example     D phi_n by gates; M * rate^2 = sum_n (D phi_n)^2
    kronecker, ...  Z = U * G from the weight gradient G = d (sum_n phi_n) / d W (`estimators.py`)
    exact           D f itself by one JVP per tensor; no omega

The model is left exactly as it was: weights, gradients, modes, hooks and random streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import compress
from typing import Any

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from ..choices import Estimator, check_choice, values
from ..engines import engine_of
from ..model.isolation import checkpointed, trainable, undisturbed
from ..model.names import resolve_names
from ..optimizer.step import UnitUpdates
from .estimators import FALLBACK, WEIGHT_GRADIENT_ESTIMATORS
from .measurement import Measurement, Samples
from .outputs import Batch, MeasuredOutput, OutputFunction, OutputValues, check_differentiable, num_examples
from .per_example.gates import Gates
from .per_example.linear_head import LinearHead, bypassed, find_linear_head, is_cast
from .per_example.sites import Site, owners
from .per_example.tangents import jvp, swapped
from .per_example.verification import VerifiedSites
from .tensors import MeasuredTensor, SharedMemory, as_real, elementwise_products

# Forward passes that one batch may need before its tensors can be read: one that meets a module in a new layout (an
# expert that is given other tokens), one to read it there, and one more if verification has widened a site meanwhile,
# whose module may have a layout that is new as well.
_LAYOUTS_PER_BATCH = 3

# A tensor is looked at for round-off if, per unit length of its update, it moves the outputs by at most this many eps
# of the tensor that moves them most. Round-off was 0.1 to 4 eps there in tiny and in 12-layer models.
_SUSPECT = 16


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
        estimator: One of `hf_flerm.choices.Estimator`: `per_example`, the paper's `kronecker`, `full`, `iid`,
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
        check_choice("estimator", estimator, values(Estimator))
        if probes_per_batch < 1:
            raise ValueError(f"probes_per_batch is {probes_per_batch}; it must be at least 1.")
        self.model = model
        self.estimator = estimator
        self.probes_per_batch = probes_per_batch
        self.outputs = outputs or MeasuredOutput()
        self.engine = engine_of(model)
        self._sites = VerifiedSites(model, self.outputs, self.engine)
        self._memory = SharedMemory(model, self.engine)
        self._precision = 0.0  # machine epsilon of the outputs
        self._asked: list[str] = []
        self._paths: dict[str, str] = {}  # canonical name: name in named_parameters()
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
            self._paths, self._asked = resolve_names(self.model, updates), list(updates)
        tensors = {name: self._memory.tensor(self.model.get_parameter(path)) for name, path in self._paths.items()}
        parameters = {name: tensor.parameter for name, tensor in tensors.items()}
        unit_updates = UnitUpdates(updates, dict(zip(self._paths, updates, strict=True)), parameters, self.engine)
        device = self.engine.device(next(iter(parameters.values())))
        samples = Samples(unit_updates, _same_moves(tensors, unit_updates))
        with undisturbed(self.model, device), self.engine.released_after(), self._kept_head():
            if generator is None:
                generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
            first: Batch | None = None
            for batch in self._on_device(batches, device):
                first = batch if first is None else first
                if not self.engine.sharded:
                    self.outputs.prepare(self.model, batch)
                if self.estimator == "exact":
                    self._differentiate(tensors, unit_updates, batch, samples)
                    continue
                with checkpointed(self.model):
                    self._seek_head(batch)
                    if self.estimator == "per_example":
                        self._sites.find(tensors, unit_updates, batch)
                    self._probe(tensors, unit_updates, batch, generator, samples)
                if target_error is not None:
                    goes_on = samples.measurement().relative_error > target_error
                    if not any(self.engine.agree([goes_on])):
                        break
            measurement = samples.measurement()
            if self.estimator != "per_example" and first is not None:
                self._verify_suspects(measurement, tensors, unit_updates, first)
        self._sites.close_measurement(unit_updates)
        round_off = self._sites.round_off & unit_updates.keys()
        if not round_off:
            return measurement
        samples.set_to_zero(round_off)
        return samples.measurement()

    @contextmanager
    def _kept_head(self) -> Iterator[None]:
        """Keep the head of an earlier measurement if it is still right; keep none whose draw depends on an update.

        That of a trained head has (2d)^2 numbers, which training needs the memory for.
        """
        if self._head is not None and not self._head.is_current():
            self._head = None
        try:
            yield
        finally:
            if self._head is not None and self._head.names:
                self._head = None

    def _verify_suspects(
        self,
        measurement: Measurement,
        tensors: Mapping[str, MeasuredTensor],
        updates: Mapping[str, Tensor],
        batch: Batch,
    ) -> None:
        """Find out which rates of other estimators than `per_example` are round-off.

        Weight gradients and JVPs do not show the terms that cancel in them; gates do. They are tried on the tensors
        that move the outputs by no more than round-off of the largest, per unit length of the update.
        """
        lengths = {name: float(torch.linalg.vector_norm(as_real(update).float())) for name, update in updates.items()}
        effects = {name: rate / lengths[name] for name, rate in measurement.rates.items() if lengths[name]}
        floor = _SUSPECT * self._precision * max(effects.values(), default=0.0)
        is_suspect = [0 < effects.get(name, 0.0) <= floor for name in tensors]
        suspects = list(compress(tensors, self.engine.agree(is_suspect)))
        with checkpointed(self.model):
            self._sites.find({name: tensors[name] for name in suspects}, updates, batch)

    def _on_device(self, batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
        """Move batches to a device. Processes that run the model in step all raise if one of them cannot make one."""
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
        tensors: Mapping[str, MeasuredTensor],
        updates: Mapping[str, Tensor],
        batch: Batch,
        generator: torch.Generator,
        samples: Samples,
    ) -> None:
        """Add the samples of `probes_per_batch` probes on one batch: one forward pass, one backward pass each."""
        with ExitStack() as stack:
            for _ in range(_LAYOUTS_PER_BATCH):
                self.engine.release()
                by_gates = [name for name in updates if self._has_gates(name)]
                by_gradient = [name for name in updates if not self._has_gates(name)]
                stack.enter_context(trainable(p for name in by_gradient for p in tensors[name].parameters))
                gates, out, head = self._forward(stack, by_gates, tensors, updates, batch)
                unverified = self._sites.with_new_layouts(gates, by_gates, batch)
                if not unverified:
                    break
                stack.close()
                self._sites.verify(unverified, tensors, updates, batch)
            else:
                raise RuntimeError(f"the layout of {unverified} differs between forward passes on one batch.")
            self._precision = torch.finfo(out.values.dtype).eps
            if not out.values.requires_grad and head is None:
                self._check_differentiable(batch)
            num_outputs = out.count(None if head is None else head.module.out_features)
            estimators = {name: self._weight_gradient_estimator(tensors[name]) for name in by_gradient}
            reductions = {name: partial(_statistics, updates, name, estimators[name]) for name in by_gradient}
            for probe in range(self.probes_per_batch):
                is_last = probe + 1 == self.probes_per_batch
                omega, of_head = (out.omega(generator), {}) if head is None else head.draw(out, generator)
                derivatives, statistics = gates.differentiate(
                    out.values, omega, reductions, retain_graph=not is_last, keep_tangents=not is_last
                )
                for name, drawn in of_head.items():
                    per_example = drawn.reshape(num_examples(batch), -1).sum(1)
                    derivatives[name] = derivatives[name] + per_example if name in derivatives else per_example
                samples.add_derivatives(derivatives, (gates.reached | of_head.keys()) - self._sites.absent)
                for name in by_gradient:
                    samples.add_statistics(name, estimators[name][0], statistics.get(name))
                samples.count_outputs(num_outputs)

    def _has_gates(self, name: str) -> bool:
        return self.estimator == "per_example" and name in self._sites.sites

    def _forward(
        self,
        stack: ExitStack,
        names: Sequence[str],
        tensors: Mapping[str, MeasuredTensor],
        updates: Mapping[str, Tensor],
        batch: Batch,
    ) -> tuple[Gates, OutputValues, LinearHead | None]:
        """Run the model with gates; where its output is one last wide linear map, up to that map's input.

        The gates stay in place until `stack` closes, after the last backward pass: an activation checkpoint runs their
        hooks again.
        """
        head = self._linear_head(tensors, updates)
        if head is not None:
            with ExitStack() as attempt:
                gates = attempt.enter_context(self._sites.gates(names, tensors, updates, batch, skip=self._head_name))
                hidden = attempt.enter_context(bypassed(head.module))
                try:
                    out = self.outputs(self.model, batch)
                except Exception:  # if the bypass is not the cause, the run below meets it again
                    hidden.clear()
                if len(hidden) == 1 and is_cast(out.values, hidden[0]) and out.weight.shape[-1] == 1:
                    gates.raise_failures()
                    stack.push(attempt.pop_all())
                    return gates, out, head
            self._head_name = None  # something looks at the logits on their way out
        gates = stack.enter_context(self._sites.gates(names, tensors, updates, batch))
        out = self.outputs(self.model, batch)
        gates.raise_failures()
        return gates, out, None

    def _differentiate(
        self,
        tensors: Mapping[str, MeasuredTensor],
        updates: Mapping[str, Tensor],
        batch: Batch,
        samples: Samples,
    ) -> None:
        """Add the exact derivative of the outputs along every update: one JVP for each tensor."""
        num_examples(batch)
        with torch.no_grad():
            out = self.outputs(self.model, batch)
        self._precision = torch.finfo(out.values.dtype).eps
        changes = []
        for name, update in updates.items():
            tensor = tensors[name]
            moved = tensor.parameters

            def outputs_with(*weights: Tensor, moved: Sequence[nn.Parameter] = moved) -> tuple[Tensor, ...]:
                with swapped(self.model, dict(zip(moved, weights, strict=True))):
                    return (self.outputs(self.model, batch).values,)

            (change,) = jvp(outputs_with, moved, [tensor.seen_by(p, update) for p in moved], self.model, self.engine)
            changes.append(out.sized(change))
        samples.add_tangents(torch.stack(changes))
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

    def _linear_head(self, tensors: Mapping[str, MeasuredTensor], updates: Mapping[str, Tensor]) -> LinearHead | None:
        """The head to skip, if there is one, gates measure all its tensors, and it pays; made once a measurement."""
        if self._head_name is None or self.estimator != "per_example":
            return None
        module: Any = self.model.get_submodule(self._head_name)
        measured = {}
        for attribute, parameter in module.named_parameters():
            for name, tensor in tensors.items():
                if parameter in tensor.views:
                    return None  # it moves with another tensor's update, which the head's own draw knows nothing of
                if tensor.parameter is parameter:
                    if tensor.views or Site(self._head_name, attribute) not in self._sites.sites.get(name, ()):
                        return None
                    measured[attribute] = name
        if self._head is not None and self._head.names != measured:
            self._head = None
        if self._head is None and LinearHead.pays(module, len(measured)):
            self._head = LinearHead(module, {a: (name, updates[name]) for a, name in measured.items()})
        return self._head

    def _weight_gradient_estimator(self, tensor: MeasuredTensor) -> tuple[str, tuple[int, ...]]:
        """Which estimator a tensor gets when it is measured by its weight gradient, and its independent dimensions."""
        if self.estimator == "per_example":
            return FALLBACK, ()
        if self.estimator != "kronecker_output":
            return self.estimator, ()
        holders = [site.module for parameter in tensor.parameters for site in owners(self.model, parameter)]
        return (self.estimator, (0,)) if holders == [self._head_name] else ("kronecker", ())


def _same_moves(tensors: Mapping[str, MeasuredTensor], updates: Mapping[str, Tensor]) -> dict[str, str]:
    """Find tensors in one memory whose updates are one: before an optimizer step and after it, all see all of it.

    Returns:
        `{name: the first name with the same move}` of all but the first.
    """
    sharing = [name for name, tensor in tensors.items() if tensor.views]
    found: dict[str, str] = {}
    for i, name in enumerate(sharing):
        for first in sharing[:i]:
            views = tensors[first].views
            parameter = tensors[name].parameter
            if first in found or parameter not in views:
                continue
            if torch.equal(tensors[first].seen_by(parameter, updates[first]), updates[name]):
                found[name] = first
    return found


def _statistics(
    updates: Mapping[str, Tensor], name: str, estimator: tuple[str, tuple[int, ...]], gradient: Tensor
) -> Tensor:
    """Reduce a weight gradient: the sum of Z = U * G, and the estimator's own statistics of it."""
    products = elementwise_products(updates[name], gradient)
    statistics = WEIGHT_GRADIENT_ESTIMATORS[estimator[0]].statistics(products, estimator[1])
    return torch.cat([products.sum(dtype=torch.float64).reshape(1), statistics])
