"""Measure rates on a model.

`RateProbe.measure` does one measurement: for each batch, find the modules at which each tensor's derivative can be read
(its sites), run the model forward once, run backward once per draw of omega, and add the results to `Samples`, which
computes the rates at the end.

Symbols: f[n, k] are the outputs of example n, M is the number of outputs that count, omega ~ N(0, 1) (in the euclidean
metric), phi_n = sum_k omega[n, k] f[n, k], U a unit update, D phi_n the derivative of phi_n along U (`reference.py`).

    per_example     D phi_n by gates; M * rate^2 = sum_n (D phi_n)^2
    kronecker, ...  Z = U * G from the weight gradient G = d (sum_n phi_n) / d W (`estimators.py`)
    exact           D f itself by one JVP per tensor; no omega

The weights, gradients, modes, hooks and random generators of the model are left unchanged.
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
from .estimators import FALLBACK_ESTIMATOR, WEIGHT_GRADIENT_ESTIMATORS
from .measurement import Measurement, Samples
from .metrics import Metric
from .model_call import Batch
from .outputs import MeasuredOutput, OutputFunction, OutputValues, check_differentiable, num_examples
from .per_example.gates import Gates
from .per_example.linear_head import ChunkedHead, Draw, LinearHead, bypassed, find_linear_head, is_same_up_to_dtype
from .per_example.sites import Site, owners
from .per_example.tangents import jvp, replaced_parameters
from .per_example.verification import VerifiedSites
from .tensors import OverlappingMemory, TensorAliases, as_real, elementwise_products

# Most forward passes on one batch. The first may meet a module whose output layout is not verified yet (an expert that
# gets other tokens). The second measures with that layout. A third is needed if verification has moved a site to an
# enclosing module, whose layout may not be verified either.
_MAX_FORWARD_PASSES = 3

# A rate is checked for round-off if rate / |U| is at most this many machine epsilons of the largest rate / |U|.
# Measured round-off was 0.1 to 4 epsilons in tiny and in 12-layer models.
_SUSPICIOUS_EPS = 16


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
        batches: Dicts of model inputs, examples along the first dimension. The model is called as in training, without
            labels (unless forward requires them) and without columns that forward does not accept.
        estimator: One of `hf_flerm.choices.Estimator`: `per_example`, the paper's `kronecker`, `full`, `iid`,
            `kronecker_output` (`kronecker`, using that the outputs of the output layer are independent), `exact`.
        probes_per_batch: Probes (draws of omega) that share one forward pass. `exact` has none.
        output: The measured output: `logits` (None), `log_probs`, `hidden` (the last hidden state), or a callable
            `(model, batch) -> tensor` with examples first; every entry of its tensor counts.
        positions: Which positions count: those that are not padding (`attention_mask`), or those with a label that the
            loss uses (`labels`).
        metric: Metric of output changes: `euclidean` (the default here, whatever the output is), the root mean square
            over all outputs, or `fisher`: omega has the covariance of the predicted distribution's Fisher matrix, so
            that rate^2 * lr^2 / 2 is the KL divergence, in nats per position, between the predictions before and after
            a small step. The labels or the config determine the distribution: classes, independent 0/1 labels, or a
            regression with unit variance.
        target_error: Stop once the relative standard error of every rate is at most this value. `exact` has no error
            and uses every batch.
        generator: Random generator for omega. None: seeded from torch's global generator, whose state is restored.

    Returns:
        Rates in output units per unit learning rate. Their squares are averaged over probes.

    Raises:
        ValueError: If a name, a shape or an argument is wrong, or there is no batch.
    """
    if isinstance(batches, Mapping):
        raise ValueError("batches is one batch: pass a list of them, [batch].")
    measured = MeasuredOutput(output, positions, metric)
    probe = RateProbe(model, estimator=estimator, probes_per_batch=probes_per_batch, output=measured)
    for (name, path), update in zip(resolve_names(model, updates).items(), updates.values(), strict=True):
        parameter = model.get_parameter(path)
        shape = probe.engine.shape(parameter)
        if parameter.is_meta:
            raise ValueError(f"{name!r} is on the meta device, without numbers: load the model's weights first.")
        if update.shape != shape:
            raise ValueError(f"the update of {name!r} has shape {tuple(update.shape)}, the parameter {tuple(shape)}.")
    return probe.measure(updates, batches, generator, target_error=target_error)


class RateProbe:
    """Measures rates on one model repeatedly; remembers the verified sites of each tensor.

    Args:
        model: Any `nn.Module`.
        estimator: One of `hf_flerm.choices.Estimator`; see `measure_rates`.
        probes_per_batch: Probes (draws of omega) that share one forward pass.
        output: The measured output; None: the logits.

    Raises:
        ValueError: If `estimator` is not one of these or `probes_per_batch` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        estimator: str = "per_example",
        probes_per_batch: int = 1,
        output: MeasuredOutput | None = None,
    ) -> None:
        check_choice("estimator", estimator, values(Estimator))
        if probes_per_batch < 1:
            raise ValueError(f"probes_per_batch is {probes_per_batch}; it must be at least 1.")
        self.model = model
        self.estimator = estimator
        self.probes_per_batch = probes_per_batch
        self.output = output or MeasuredOutput()
        self.engine = engine_of(model)
        self._sites = VerifiedSites(model, self.output, self.engine)
        self._memory = OverlappingMemory(model, self.engine)
        self._precision = 0.0  # machine epsilon of the outputs
        self._last_names: list[str] = []  # names of the last updates, which `_paths` was made for
        self._paths: dict[str, str] = {}  # canonical name: name in named_parameters()
        self._head_name: str | None = None
        self._head_sought = self.engine.sharded  # a sharded head cannot be skipped: its weight is never whole
        self._head_metric: Metric | None = None
        self._head: LinearHead | None = None

    def measure(
        self,
        updates: Mapping[str, Tensor],
        batches: Iterable[Batch],
        generator: torch.Generator | None = None,
        *,
        target_error: float | None = None,
    ) -> Measurement:
        """Measure the rates of some tensors; see `measure_rates` for the arguments.

        `updates` are shaped like their parameters; each one is looked up whenever it is needed.

        Raises:
            ValueError: If `updates` or `batches` is empty, a name is unknown, or `target_error` is not positive.
        """
        if not updates:
            raise ValueError("updates is empty: pass a unit update for at least one parameter.")
        if target_error is not None and not target_error > 0:
            raise ValueError(f"target_error is {target_error!r}; it must be positive, or None to use every batch.")
        self.engine.release()
        if list(updates) != self._last_names:
            self._paths, self._last_names = resolve_names(self.model, updates), list(updates)
        tensors = {name: self._memory.tensor(self.model.get_parameter(path)) for name, path in self._paths.items()}
        parameters = {name: tensor.parameter for name, tensor in tensors.items()}
        unit_updates = UnitUpdates(updates, dict(zip(self._paths, updates, strict=True)), parameters, self.engine)
        device = self.engine.device(next(iter(parameters.values())))
        samples = Samples(unit_updates, _shared_updates(tensors, unit_updates))
        with undisturbed(self.model, device), self.engine.released_after(), self._kept_head():
            if generator is None:
                generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
            first: Batch | None = None
            for batch in self._on_device(batches, device):
                first = batch if first is None else first
                self._add_batch(tensors, unit_updates, batch, generator, samples)
                if target_error is not None and self.estimator != "exact":
                    goes_on = samples.measurement().relative_error > target_error
                    if not any(self.engine.agree([goes_on])):
                        break
            measurement = samples.measurement()
            if self.estimator != "per_example" and first is not None:
                self._check_round_off(measurement, tensors, unit_updates, first)
        self._sites.close_measurement(unit_updates)
        round_off = self._sites.round_off & unit_updates.keys()
        if not round_off:
            return measurement
        samples.set_to_zero(round_off)
        return samples.measurement()

    @contextmanager
    def _kept_head(self) -> Iterator[None]:
        """Context manager: reuse the head of an earlier measurement only if its weight has not changed.

        At the end, discard a head that is trained: its factor, (2d)^2 numbers, depends on this update alone, and
        training needs the memory.
        """
        if self._head is not None and not self._head.is_current():
            self._head = None
        try:
            yield
        finally:
            if self._head is not None and self._head.names:
                self._head = None

    def _add_batch(
        self,
        tensors: Mapping[str, TensorAliases],
        updates: Mapping[str, Tensor],
        batch: Batch,
        generator: torch.Generator,
        samples: Samples,
    ) -> None:
        """Add the samples of all tensors on one batch, after finding how to call the model and where to read them."""
        if not self.engine.sharded:
            self.output.prepare(self.model, batch)
        if self.estimator == "exact":
            self._differentiate(tensors, updates, batch, samples)
            return
        with checkpointed(self.model):
            self._seek_head(batch)
            if self.estimator == "per_example":
                self._sites.find(tensors, updates, batch)
            self._probe(tensors, updates, batch, generator, samples)

    def _check_round_off(
        self,
        measurement: Measurement,
        tensors: Mapping[str, TensorAliases],
        updates: Mapping[str, Tensor],
        batch: Batch,
    ) -> None:
        """Find out which rates of other estimators than `per_example` are round-off.

        Weight gradients and JVPs do not reveal that terms cancel in them; gates do. Therefore the tensors whose rate
        per length of the update is within round-off of the largest are verified with gates.
        """
        lengths = {name: float(torch.linalg.vector_norm(as_real(update).float())) for name, update in updates.items()}
        effects = {name: rate / lengths[name] for name, rate in measurement.rates.items() if lengths[name]}
        floor = _SUSPICIOUS_EPS * self._precision * max(effects.values(), default=0.0)
        is_suspect = [0 < effects.get(name, 0.0) <= floor for name in tensors]
        suspects = list(compress(tensors, self.engine.agree(is_suspect)))
        with checkpointed(self.model):
            self._sites.find({name: tensors[name] for name in suspects}, updates, batch)

    def _on_device(self, batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
        """Move batches to a device. Processes that run the model together all raise if one cannot make a batch."""
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
        tensors: Mapping[str, TensorAliases],
        updates: Mapping[str, Tensor],
        batch: Batch,
        generator: torch.Generator,
        samples: Samples,
    ) -> None:
        """Add the samples of `probes_per_batch` probes on one batch: one forward pass, one backward pass each."""
        with ExitStack() as stack:
            for _ in range(_MAX_FORWARD_PASSES):
                self.engine.release()
                by_gates = [name for name in updates if self._has_gates(name)]
                by_gradient = [name for name in updates if not self._has_gates(name)]
                stack.enter_context(trainable(p for name in by_gradient for p in tensors[name].parameters))
                gates, out, head = self._forward(stack, by_gates, tensors, updates, batch)
                unverified = self._sites.with_new_layouts(gates, by_gates, batch)
                if not unverified:
                    break
                stack.close()  # remove these gates; verification sets its own, and the next pass new ones
                self._sites.verify(unverified, tensors, updates, batch)
            else:
                raise RuntimeError(
                    f"the outputs of the modules of {unverified} change their layout between forward passes on one "
                    "batch: the model must treat equal inputs alike."
                )
            self._precision = torch.finfo(out.values.dtype).eps
            if not out.values.requires_grad and head is None:
                self._check_differentiable(batch)
            num_outputs = out.count(None if head is None else head.module.out_features)
            estimators = {name: self._weight_gradient_estimator(tensors[name]) for name in by_gradient}
            reductions = {name: partial(_statistics, updates, name, estimators[name]) for name in by_gradient}
            # The graph (and, for speed, tangents) is kept for all but the last backward pass.
            for probe, (omega, of_head) in enumerate(self._draws(out, head, generator)):
                is_last = probe + 1 == self.probes_per_batch
                derivatives, statistics = gates.differentiate(
                    out.values, omega, reductions, retain_graph=not is_last, keep_tangents=not is_last
                )
                for name, drawn in of_head.items():
                    per_example = drawn.reshape(num_examples(batch), -1).sum(1)
                    derivatives[name] = derivatives[name] + per_example if name in derivatives else per_example
                samples.add_derivatives(derivatives, (gates.reached | of_head.keys()) - self._sites.absent)
                for name in by_gradient:
                    samples.add_statistics(name, estimators[name], statistics.get(name))
                samples.count_outputs(num_outputs)

    def _draws(self, out: OutputValues, head: LinearHead | None, generator: torch.Generator) -> Iterator[Draw]:
        """Yield, for each probe on one forward pass, what is sent into the output and D phi_n of a head skipped."""
        if head is not None:
            yield from head.draws(out, generator, self.probes_per_batch)
        else:
            for _ in range(self.probes_per_batch):
                yield out.omega(generator), {}

    def _has_gates(self, name: str) -> bool:
        return self.estimator == "per_example" and name in self._sites.sites

    def _forward(
        self,
        stack: ExitStack,
        names: Sequence[str],
        tensors: Mapping[str, TensorAliases],
        updates: Mapping[str, Tensor],
        batch: Batch,
    ) -> tuple[Gates, OutputValues, LinearHead | None]:
        """Run the model with gates. If it ends in a wide linear layer, stop at the input of that layer.

        The gates stay in place until `stack` closes, after the last backward pass: an activation checkpoint runs their
        hooks again.
        """
        head = self._linear_head(tensors, updates)
        if head is not None:
            with ExitStack() as attempt:
                gates = attempt.enter_context(self._sites.gates(names, tensors, updates, batch, skip=self._head_name))
                hidden = attempt.enter_context(bypassed(head.module))
                try:
                    out = self.output(self.model, batch, self._head_metric)
                except Exception:  # if skipping the head is not the cause, the run below raises it again
                    hidden.clear()
                if len(hidden) == 1 and is_same_up_to_dtype(out.values, hidden[0]) and out.weight.shape[-1] == 1:
                    gates.raise_failures()
                    stack.push(attempt.pop_all())
                    return gates, out, head
            self._head_name = None  # the model uses the logits after the head
        gates = stack.enter_context(self._sites.gates(names, tensors, updates, batch))
        out = self.output(self.model, batch)
        gates.raise_failures()
        return gates, out, None

    def _differentiate(
        self,
        tensors: Mapping[str, TensorAliases],
        updates: Mapping[str, Tensor],
        batch: Batch,
        samples: Samples,
    ) -> None:
        """Add the exact derivative of the outputs along every update, by one JVP per tensor."""
        num_examples(batch)
        with torch.no_grad():
            out = self.output(self.model, batch)
        self._precision = torch.finfo(out.values.dtype).eps
        changes = []
        for name, update in updates.items():
            tensor = tensors[name]
            changed = tensor.parameters

            def output_with(*weights: Tensor, changed: Sequence[nn.Parameter] = changed) -> tuple[Tensor, ...]:
                with replaced_parameters(self.model, dict(zip(changed, weights, strict=True))):
                    return (self.output(self.model, batch).values,)

            directions = [tensor.change_of(parameter, update) for parameter in changed]
            (change,) = jvp(output_with, changed, directions, self.model, self.engine)
            changes.append(out.in_metric(change))
        samples.add_tangents(torch.stack(changes))
        samples.count_outputs(out.count())

    def _check_differentiable(self, batch: Batch) -> None:
        """Raise OutputError if the output depends on no parameter; if on none that is measured, their rates are 0."""
        with trainable(self.model.parameters()):
            check_differentiable(self.model, self.output(self.model, batch))

    def _seek_head(self, batch: Batch) -> None:
        """Look once for a last linear layer whose output is the model's output."""
        if self._head_sought:
            return
        self._head_sought = True

        def forward() -> Tensor:
            out = self.output(self.model, batch)
            self._head_metric = out.metric
            return out.values

        self._head_name = find_linear_head(self.model, forward)

    def _linear_head(self, tensors: Mapping[str, TensorAliases], updates: Mapping[str, Tensor]) -> LinearHead | None:
        """Return the last linear layer if it can be skipped; computed once per measurement.

        None if there is none, a tensor of it is not measured by gates, or skipping saves no work.
        """
        if self._head_name is None or self.estimator != "per_example":
            return None
        module: Any = self.model.get_submodule(self._head_name)
        measured = {}
        for attribute, parameter in module.named_parameters():
            for name, tensor in tensors.items():
                if parameter in tensor.maps:
                    return None  # tied to another tensor, whose update the head does not account for
                if tensor.parameter is parameter:
                    if tensor.maps or Site(self._head_name, attribute) not in self._sites.sites.get(name, ()):
                        return None
                    measured[attribute] = name
        if self._head is not None and self._head.names != measured:
            self._head = None
        if self._head is None and LinearHead.saves_work(module, len(measured)):
            of_head = {attribute: (name, updates[name]) for attribute, name in measured.items()}
            metric = self._head_metric
            if metric is None or metric.roots is None:
                self._head = LinearHead(module, of_head)
            else:
                self._head = ChunkedHead(module, of_head, metric)
        return self._head

    def _weight_gradient_estimator(self, tensor: TensorAliases) -> str:
        """Return the estimator of a tensor that is measured by its weight gradient."""
        if self.estimator == "per_example":
            return FALLBACK_ESTIMATOR
        if self.estimator != "kronecker_output":
            return self.estimator
        holders = [site.module for parameter in tensor.parameters for site in owners(self.model, parameter)]
        is_head = holders == [self._head_name] and self.output.metric == "euclidean"  # else its outputs are dependent
        return self.estimator if is_head else FALLBACK_ESTIMATOR


def _shared_updates(tensors: Mapping[str, TensorAliases], updates: Mapping[str, Tensor]) -> dict[str, str]:
    """Find tensors that share memory and have the same update, as after an optimizer step, which changes the memory.

    Returns:
        `{name: first name with the same update}` for each such name but the first.
    """
    sharing = [name for name, tensor in tensors.items() if tensor.maps]
    found: dict[str, str] = {}
    for i, name in enumerate(sharing):
        for first in sharing[:i]:
            parameter = tensors[name].parameter
            if first in found or parameter not in tensors[first].maps:
                continue
            if torch.equal(tensors[first].change_of(parameter, updates[first]), updates[name]):
                found[name] = first
    return found


def _statistics(updates: Mapping[str, Tensor], name: str, estimator: str, gradient: Tensor) -> Tensor:
    """Reduce a weight gradient to the sum of Z = U * G and the factors of an estimator, float64 [1 + F]."""
    products = elementwise_products(updates[name], gradient)
    factors = WEIGHT_GRADIENT_ESTIMATORS[estimator].statistics(products)
    return torch.cat([products.sum(dtype=torch.float64).reshape(1), factors])
