"""The measured function: which output of a model, at which positions, in which metric."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, get_args

import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from transformers.utils import logging

from .. import choices
from ..choices import check_choice
from ..engines import engine_of
from ..model.isolation import checkpointed, trainable, undisturbed
from .distributions import distribution_of, known_distribution
from .metrics import FISHER, METRICS, Metric
from .model_call import (
    Batch,
    ModelCallError,
    OutputError,
    Signature,
    base_model,
    call_inputs,
    candidate_exclusions,
    missing_tokens,
)
from .positions import labeled_weight, unpadded_weight

logger = logging.get_logger(__name__)

OutputFunction = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class OutputValues:
    """The measured output for one batch.

    Attributes:
        values: f, [N, ...].
        weight: 1 where an entry counts and 0 where it does not; shaped like `values`, but the last dimension may be 1.
        metric: The metric that measures changes.
    """

    values: Tensor
    weight: Tensor
    metric: Metric = METRICS["euclidean"]

    def omega(self, generator: torch.Generator) -> Tensor:
        """Draw the random output weights of one probe.

        Args:
            generator: Source of randomness.

        Returns:
            omega, shaped like `values`, 0 where an entry does not count. Its covariance at each position is the matrix
            of the metric: the identity or a Fisher matrix.
        """
        values = self.values
        dtype = values.dtype if self._roots is None else self._roots.dtype
        noise = torch.randn(values.shape, generator=generator, device=generator.device, dtype=dtype)
        return self.metric.draw(self._roots, noise.to(values.device)).mul_(self.weight).to(values.dtype)

    def in_metric(self, change: Tensor) -> Tensor:
        """Transform a change of the output so that the sum of squares is its squared size in the metric.

        Args:
            change: D f, shaped like `values`.

        Returns:
            A tensor shaped like `values`, 0 where an entry does not count.
        """
        return self.metric.project(self._roots, change) * self.weight

    def count(self, width: int | None = None) -> float:
        """Count the outputs.

        Args:
            width: Size of the last dimension of the output; None: that of `values`. Needed if the head was skipped,
                whose output is wider.

        Returns:
            M: the number of entries that count, or of positions for a metric that measures positions as a whole.
        """
        if not self.metric.counts_entries:
            return float(self.weight.amax(-1).count_nonzero())
        entries = (width or self.values.shape[-1]) if self.weight.shape[-1] == 1 else 1
        return float(self.weight.count_nonzero()) * entries

    @cached_property
    def _roots(self) -> Any:
        """The roots of the metric; the probability of classes that do not count (starts in the padding) is 0."""
        if self.metric.roots is None:
            return None
        is_masked = self.weight.shape[-1] > 1
        return self.metric.roots(self.values.masked_fill(self.weight == 0, -torch.inf) if is_masked else self.values)


@dataclass
class MeasuredOutput:
    """The measured output of a model, as a callable (model, batch) -> `OutputValues`.

    Use one instance for one model, because it remembers how to call the model.

    Args:
        output: A key of `OUTPUTS`, None for logits, or a user's `(model, batch) -> tensor` with examples first.
        positions: One of `choices.Positions`.
        metric: A key of `METRICS`.

    Raises:
        ValueError: If one of these is not allowed, or they contradict each other.
    """

    output: str | OutputFunction | None = None
    positions: str = "attention_mask"
    metric: str = "euclidean"
    _left_out: frozenset[str] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        output = self.output or "logits"
        if not callable(output):
            check_choice("output", output, get_args(choices.Output), " or a callable (model, batch) -> tensor")
        check_choice("positions", self.positions, get_args(choices.Positions))
        check_choice("metric", self.metric, get_args(choices.Metric))
        if callable(output) and self.positions != "attention_mask":
            raise ValueError("positions are chosen by an output callable itself: leave positions at 'attention_mask'.")
        if output == "hidden" and self.metric == "fisher":
            raise ValueError("metric 'fisher' needs logits or log-probabilities; output is 'hidden'.")

    def prepare(self, model: nn.Module, batch: Batch) -> None:
        """Choose once which columns to leave out of calls: the first of `candidate_exclusions` that gives the output.

        Several candidates are tested by running the model without gradients; a single one is used without a test.

        Args:
            model: The model.
            batch: A batch on the model's device.

        Raises:
            Exception: The error with the preferred candidate, if none gives the output.
        """
        if self._left_out is not None or callable(self.output):
            return
        candidates = candidate_exclusions(model, batch)
        failure: Exception | None = None
        for left_out in candidates if len(candidates) > 1 else ():
            self._left_out = left_out
            try:
                with torch.no_grad():
                    self(model, batch)
            except Exception as error:
                self._left_out = None
                if should_reduce_batch_size(error):
                    raise
                failure = failure or error
            else:
                break
        if failure is not None and self._left_out is None:
            raise failure
        self._left_out = self._left_out if self._left_out is not None else candidates[0]
        refused = sorted(name for name in self._left_out & batch.keys() if not Signature.of(model).accepts(name))
        if refused:
            logger.warning_once(
                f"{type(base_model(model)).__name__}.forward does not accept {refused}: probes drop these columns."
            )

    def __call__(self, model: nn.Module, batch: Batch, metric: Metric | None = None) -> OutputValues:
        """Run a model on a batch and read its output.

        Args:
            model: The model.
            batch: A batch as for training, on the model's device.
            metric: The metric of an earlier output, for a model whose last layer is bypassed: what is read is not
                logits then. None: as the labels or the config say.

        Raises:
            OutputError: If the model has no such output, no entry of it counts, or the metric does not apply to it.
        """
        read = self._read(model, batch)
        weight = None
        if not callable(self.output):
            weigh = labeled_weight if self.positions == "labels" else unpadded_weight
            weight = weigh(model, batch, read.values)
        values = read.values
        if weight is None:
            weight = values.new_ones(()).expand([1] * values.ndim)
        if metric is None:
            metric = METRICS[self.metric]
            if self.metric == "fisher" or self.output == "log_probs":
                distribution, dim = self._distribution(model, batch, read)
                metric = FISHER[distribution] if self.metric == "fisher" else metric
                if dim is None:
                    values, weight = values.unsqueeze(-1), weight.unsqueeze(-1)
                elif dim % values.ndim != values.ndim - 1:  # [N, C, H, W] -> [N, H, W, C]
                    values, weight = values.movedim(dim, -1), weight.movedim(dim, -1)
        if self.output == "log_probs":
            values = values.log_softmax(-1, dtype=torch.promote_types(values.dtype, torch.float32))
        if not bool(weight.any()):
            raise OutputError("every position of a probe batch is padding, or labeled -100: no output counts.")
        return OutputValues(values, weight.expand(*values.shape[:-1], weight.shape[-1]), metric)

    def default_metric(self, model: nn.Module, batch: Batch) -> str:
        """Return the metric for this output where the user chooses none, by running the model without gradients.

        Args:
            model: The model.
            batch: A batch as for training, on the model's device.

        Returns:
            'fisher' if the output is logits of classes or of 0/1 labels according to the batch's labels or the config
            (`distributions.py`). 'euclidean' for everything else: regressions, where Fisher's metric is the same up to
            a factor, embeddings, hidden states, log-probabilities and the outputs of callables.
        """
        if self.output not in (None, "logits"):
            return "euclidean"
        if not engine_of(model).sharded:
            self.prepare(model, batch)
        with torch.no_grad():
            read = self._read(model, batch)
        if read.class_dim is not None:
            return "fisher"
        found = known_distribution(model, batch, read.values)
        return "euclidean" if found is None or found[0] == "normal" else "fisher"

    def _read(self, model: nn.Module, batch: Batch) -> _ModelOutput:
        """Run the model, and read the tensor that is the output."""
        if callable(self.output):
            return _ModelOutput(_checked_tensor(self.output(model, batch)), -1)
        left_out = candidate_exclusions(model, batch)[0] if self._left_out is None else self._left_out
        read = OUTPUTS[self.output or "logits"](model, call_inputs(model, batch, left_out))
        _checked_tensor(read.values)
        return read

    def _distribution(self, model: nn.Module, batch: Batch, read: _ModelOutput) -> tuple[str, int | None]:
        """Return the distribution of the logits, and the dimension of the entries of a position."""
        found: tuple[str, int | None]
        if read.class_dim is None:
            found = distribution_of(model, batch, read.values)
        elif read.values.ndim < 2 or read.values.shape[read.class_dim] < 2:
            raise OutputError(
                "metric 'fisher' needs the logits of at least two classes along the last dimension; the output has "
                f"shape {tuple(read.values.shape)}. Use metric='euclidean'."
            )
        else:
            found = "categorical", read.class_dim
        if self.output == "log_probs" and found[0] != "categorical":
            raise OutputError(
                f"output 'log_probs' needs the logits of classes; the logits of {type(base_model(model)).__name__} "
                f"have a {found[0]} distribution. Use output='logits'."
            )
        return found

    def check(self, model: nn.Module, batch: Batch, device: torch.device) -> None:
        """Check that the model has this output and that gradients reach it, by running the model.

        The model is left unchanged.

        Args:
            model: The model.
            batch: A batch as for training.
            device: The device that the model runs on.

        Raises:
            OutputError: If the model has no such output, no entry of it counts, the metric does not apply to it, or it
                depends on no parameter.
            ModelCallError: If the model cannot be run on the batch. Running out of memory is no error here: probes
                need less.
        """
        engine = engine_of(model)
        parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        failure: Exception | None = None
        # A custom loop may enter autocast around its calls of the model, which is not visible here: try that, too.
        for enter in (contextlib.nullcontext, partial(torch.autocast, device.type, torch.bfloat16)):
            try:
                with undisturbed(model, device), engine.released_after(), checkpointed(model), enter():
                    sent = send_to_device(dict(batch), device)
                    self.prepare(model, sent)
                    with trainable(trained):
                        out = self(model, sent)
                        out.omega(torch.Generator(device))
                    if not out.values.requires_grad:  # it may depend on frozen parameters only
                        with trainable(parameters):
                            check_differentiable(model, self(model, sent))
                return
            except OutputError:
                raise
            except Exception as error:
                if should_reduce_batch_size(error):
                    return
                failure = failure or error
            finally:
                clear_device_cache()  # leave as much free memory as before
        hint = missing_tokens(model, batch)
        raise ModelCallError(
            f"{type(base_model(model)).__name__} cannot be run on a probe batch: {failure!r}. "
            f"{hint and f'{hint} '}The batch has {sorted(batch)}, forward takes {sorted(Signature.of(model).named)}. "
            "Pass FLeRMConfig(output=(model, batch) -> tensor) to say how the model is run and what its output is, or "
            "a probe_dataset with what it needs."
        ) from failure


def check_differentiable(model: nn.Module, out: OutputValues) -> None:
    """Raise OutputError if an output computed with all parameters trainable depends on none of them."""
    if not out.values.requires_grad:
        raise OutputError(
            f"the output of {type(base_model(model)).__name__} depends on no parameter through autograd: nothing can "
            "be measured. Pass output=(model, batch) -> tensor that is computed with gradients enabled."
        )


def num_examples(batch: Batch) -> int:
    """Count the examples of a batch.

    Not every entry has the examples along its first dimension: a batch for a vision-language model holds images, or
    their patches, of which examples have several or none, and others hold flags (`return_loss`). The length that most
    tensors have is taken, and of several the one that comes first.

    Args:
        batch: Model inputs, examples along the first dimension; inputs of several encoders may be mappings of their
            own.

    Returns:
        N.

    Raises:
        ValueError: If there is no tensor or no example in it.
    """
    lengths = Counter(len(tensor) for tensor in _tensors(batch) if tensor.ndim)
    count = lengths.most_common(1)[0][0] if lengths else 0
    if not count:
        raise ValueError(f"a probe batch holds no examples: {sorted(batch)}. Pass dicts of tensors, examples first.")
    return count


def _tensors(batch: Batch) -> Iterator[Tensor]:
    """Yield the tensors of a batch, also those in mappings; tensors in lists belong to single examples."""
    for value in batch.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value)


class _ModelOutput(NamedTuple):
    """A tensor read from a model's return value.

    Attributes:
        values: The tensor, [N, ...].
        class_dim: Its class dimension, if the type of output determines it; None: the labels or the config do.
    """

    values: Tensor
    class_dim: int | None = None


def _checked_tensor(values: object) -> Tensor:
    """Raise OutputError unless the output is a floating-point tensor with examples."""
    if not isinstance(values, Tensor):
        raise OutputError(f"output must return a tensor with examples first; it returned {type(values).__name__}.")
    if values.ndim == 0 or not values.is_floating_point():
        raise OutputError(
            f"the output must be a floating-point tensor with examples first; got shape {tuple(values.shape)} of "
            f"{values.dtype}. Pass output=(model, batch) -> tensor."
        )
    return values


def _logits(model: nn.Module, inputs: dict[str, Any]) -> _ModelOutput:
    """Read the logits. Start and end logits of an answer, [N, T] each, become [N, T, 2]."""
    result = model(**inputs)
    if isinstance(result, Mapping):
        tensors = {name: value for name, value in result.items() if isinstance(value, Tensor)}
    else:
        found = getattr(result, "logits", result)
        if isinstance(found, (tuple, list)):  # the first element may be a scalar loss
            found = next((value for value in found if isinstance(value, Tensor) and value.ndim), None)
        tensors = {"logits": found} if isinstance(found, Tensor) else {}
    if "logits" in tensors:
        return _ModelOutput(tensors["logits"])
    if {"start_logits", "end_logits"} <= tensors.keys():
        return _ModelOutput(torch.stack([tensors["start_logits"], tensors["end_logits"]], -1), 1)
    named = [name for name in tensors if name.endswith("logits")]
    if len(named) == 1:
        return _ModelOutput(tensors[named[0]])
    raise OutputError(
        f"{type(base_model(model)).__name__} returned {type(result).__name__} without logits; it has "
        f"{', '.join(tensors) or 'no tensor'}. Pass output='hidden' or output=(model, batch) -> tensor to say what the "
        "function is."
    )


def _hidden(model: nn.Module, inputs: dict[str, Any]) -> _ModelOutput:
    """Read the last hidden state of the backbone, by a hook: `output_hidden_states` would leave hooks in the model."""
    backbone = getattr(base_model(model), "base_model", None)
    seen: list[Any] = []
    if isinstance(backbone, nn.Module):
        handle = backbone.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            model(**inputs)
        finally:
            handle.remove()
    state = getattr(seen[-1], "last_hidden_state", None) if seen else None
    if not isinstance(state, Tensor):
        raise OutputError(
            f"{type(model).__name__} has no backbone with a last_hidden_state. "
            "Pass output=(model, batch) -> tensor to say what the function is."
        )
    return _ModelOutput(state)


OUTPUTS = {"logits": _logits, "log_probs": _logits, "hidden": _hidden}
