"""What "the function" is: the outputs whose movement is measured, which of them count, and by which metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import find_batch_size, send_to_device
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers.utils import logging

from ..engines import engine_of
from ..model.isolation import undisturbed

logger = logging.get_logger(__name__)

Batch = Mapping[str, Any]
OutputFunction = Callable[[nn.Module, Batch], Tensor]

_LABELS = ("labels", "label", "label_ids", "num_items_in_batch")


@dataclass(frozen=True)
class Metric:
    """By what the size of an output change is taken.

    Attributes:
        draw: (f, N(0, 1) noise shaped like f) -> omega.
        project: (f, D f) -> a tensor whose sum of squares is the size of D f.
        counts_width: Whether M counts every entry of the last dimension, or positions.
    """

    draw: Callable[[Tensor, Tensor], Tensor]
    project: Callable[[Tensor, Tensor], Tensor]
    counts_width: bool


def _fisher_draw(values: Tensor, noise: Tensor) -> Tensor:
    probabilities = _probabilities(values)
    omega = probabilities.sqrt() * noise
    return (omega - probabilities * omega.sum(-1, keepdim=True)).to(values.dtype)


def _fisher_project(values: Tensor, change: Tensor) -> Tensor:
    probabilities = _probabilities(values)
    return probabilities.sqrt() * (change - (probabilities * change).sum(-1, keepdim=True))


def _probabilities(values: Tensor) -> Tensor:
    if values.ndim < 2 or values.shape[-1] < 2:
        raise ValueError(
            f"metric 'fisher' needs the logits of at least two classes along the last dimension; the output has shape "
            f"{tuple(values.shape)}. Use metric='euclidean'."
        )
    return values.detach().to(torch.promote_types(values.dtype, torch.float32)).softmax(-1)


METRICS = {
    "euclidean": Metric(lambda values, noise: noise, lambda values, change: change, counts_width=True),
    "fisher": Metric(_fisher_draw, _fisher_project, counts_width=False),
}


@dataclass(frozen=True)
class Output:
    """The outputs for one batch.

    Attributes:
        values: f, [N, ...].
        weight: 1 where an output counts and 0 where it does not; shaped like `values` but for a last dimension of 1
            (like `values` if that is [N]).
        metric: By what changes are sized.
    """

    values: Tensor
    weight: Tensor
    metric: Metric = METRICS["euclidean"]

    def omega(self, generator: torch.Generator) -> Tensor:
        """Draw the random output weights of one probe.

        Args:
            generator: Source of randomness.

        Returns:
            omega, shaped like `values`, 0 where an output does not count. Its covariance is the metric's: the identity,
            or the softmax's diag(p) - p p^T at every position.
        """
        values = self.values
        noise = torch.randn(values.shape, generator=generator, device=generator.device, dtype=values.dtype)
        return self.metric.draw(values, noise.to(values.device)) * self.weight

    def sized(self, change: Tensor) -> Tensor:
        """Turn a change of the outputs into numbers whose sum of squares is its size.

        Args:
            change: D f, shaped like `values`.

        Returns:
            Likewise, 0 where an output does not count.
        """
        return self.metric.project(self.values, change) * self.weight

    def count(self, width: int | None = None) -> float:
        """Count the outputs.

        Args:
            width: Entries in their last dimension; None: those of `values` (a skipped head has more).

        Returns:
            M: the number of outputs that count, or of positions for a metric that sizes positions as a whole.
        """
        wide = self.metric.counts_width and self.values.ndim > 1
        return float(self.weight.count_nonzero()) * ((width or self.values.shape[-1]) if wide else 1)


@dataclass(frozen=True)
class Outputs:
    """What "the function" is, as a callable (model, batch) -> `Output`.

    Args:
        output: A key of `OUTPUTS`, None for logits, or the user's own `(model, batch) -> tensor` with examples first.
        positions: One of `POSITIONS`.
        metric: A key of `METRICS`.

    Raises:
        ValueError: If one of these is not allowed, or they do not go together.
    """

    output: str | OutputFunction | None = None
    positions: str = "attention_mask"
    metric: str = "euclidean"

    def __post_init__(self) -> None:
        output = self.output or "logits"
        if not callable(output):
            _check("output", output, OUTPUTS, " or a callable (model, batch) -> tensor")
        _check("positions", self.positions, POSITIONS)
        _check("metric", self.metric, METRICS)
        if callable(output) and self.positions != "attention_mask":
            raise ValueError("positions are chosen by an output callable itself: leave positions at 'attention_mask'.")
        if output == "hidden" and self.metric == "fisher":
            raise ValueError("metric 'fisher' needs logits or log-probabilities; output is 'hidden'.")

    def __call__(self, model: nn.Module, batch: Batch) -> Output:
        """Run a model on a batch and take its outputs.

        Args:
            model: The model.
            batch: Its inputs.

        Returns:
            The outputs.

        Raises:
            ValueError: If there is no such tensor, or no output counts.
        """
        if callable(self.output):
            values = self.output(model, batch)
            if not isinstance(values, Tensor):
                raise ValueError(
                    f"output must return a tensor with examples first; it returned {type(values).__name__}."
                )
            weight = torch.ones((), device=values.device)
        else:
            inputs, mask = _inputs(model, batch)
            values = OUTPUTS[self.output or "logits"](model, inputs)
            if self.positions == "labels":
                mask = _trained_positions(model, batch, values)
            weight = _weight(values, mask)
        if values.ndim == 0 or not values.is_floating_point():
            raise ValueError(
                f"the output must be a floating-point tensor with examples first; got shape {tuple(values.shape)} of "
                f"{values.dtype}. Pass output=(model, batch) -> tensor."
            )
        shape = (*values.shape[:-1], 1) if values.ndim > 1 else values.shape
        return Output(values, weight.to(values.dtype).expand(shape), METRICS[self.metric])

    def check(self, model: nn.Module, batch: Batch, device: torch.device) -> None:
        """Refuse a model that has no such outputs, by running it once; it is left as it was.

        Whatever else goes wrong in the model says nothing yet: of autocast and its like only a step knows.

        Args:
            model: The model.
            batch: Its inputs.
            device: Where it runs.

        Raises:
            ValueError: As for a call.
        """
        with undisturbed(model, device), engine_of(model).released_after(), torch.no_grad():
            try:
                self(model, send_to_device(dict(batch), device)).omega(torch.Generator(device))
            except ValueError:
                raise
            except Exception as error:
                logger.debug(f"the model could not be run before training: {error!r}")
        clear_device_cache()  # training starts with as much memory as it would have


def num_examples(batch: Batch) -> int:
    """Count the examples of a batch.

    Args:
        batch: Model inputs, examples along the first dimension.

    Returns:
        N.

    Raises:
        ValueError: If there is no tensor or no example in it.
    """
    count: int | None = find_batch_size(dict(batch)) if batch else None
    if not count:
        raise ValueError(f"a probe batch holds no examples: {sorted(batch)}. Pass dicts of tensors, examples first.")
    return count


def _check(name: str, value: object, allowed: Iterable[str], also: str = "") -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}{also}.")


def _logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    result = model(**inputs)
    if isinstance(result, Mapping):
        logits = result.get("logits")
    else:
        logits = getattr(result, "logits", result[0] if isinstance(result, tuple) and result else result)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{type(model).__name__} returned {type(result).__name__} without logits. "
            "Pass output='hidden' or output=(model, batch) -> tensor to say what the function is."
        )
    return logits


def _log_probs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    logits = _logits(model, inputs)
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _hidden(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the backbone hands to the head. Asking for `output_hidden_states` would leave hooks in the model."""
    whole: Any = model
    inner = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    backbone = getattr(inner, "base_model", None)
    seen: list[Any] = []
    if isinstance(backbone, nn.Module):
        handle = backbone.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            model(**inputs)
        finally:
            handle.remove()
    state = getattr(seen[-1], "last_hidden_state", None) if seen else None
    if not isinstance(state, Tensor):
        raise ValueError(
            f"{type(model).__name__} has no backbone with a last_hidden_state. "
            "Pass output=(model, batch) -> tensor to say what the function is."
        )
    return state


OUTPUTS = {"logits": _logits, "log_probs": _log_probs, "hidden": _hidden}
POSITIONS = ("attention_mask", "labels")


def _inputs(model: Any, batch: Batch) -> tuple[dict[str, Any], Any]:
    """What the model is called with, and the mask of the positions of its output."""
    inputs = {name: value for name, value in batch.items() if name not in _LABELS}
    mask = inputs.get("attention_mask")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        labels = batch.get("labels")
        mask = inputs.get("decoder_attention_mask")
        if "decoder_input_ids" not in inputs and isinstance(labels, Tensor) and labels.ndim == 2:
            inputs["decoder_input_ids"] = _shifted_right(labels, config)
            mask = (labels != -100) if mask is None else mask
    if hasattr(config, "use_cache"):
        inputs["use_cache"] = False
    return inputs, mask


def _shifted_right(labels: Tensor, config: Any) -> Tensor:
    """The decoder's inputs, as encoder-decoder models make them of labels; not all have a method for it."""
    shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=config.decoder_start_token_id)
    return shifted.masked_fill(shifted == -100, config.pad_token_id)


def _trained_positions(model: Any, batch: Batch, values: Tensor) -> Tensor:
    """Where the loss looks: the positions whose label is not -100. A causal model's next token is the label."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != values.ndim - 1:
        raise ValueError(
            "positions 'labels' needs labels for every position of the output: the batch has "
            f"{tuple(labels.shape) if isinstance(labels, Tensor) else 'none'}, the output has shape "
            f"{tuple(values.shape)}. Use positions='attention_mask'."
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trained = labels != -100
    causal = getattr(base, "can_generate", bool)() and not getattr(base.config, "is_encoder_decoder", False)
    if trained.ndim == 2:
        trained = nn.functional.pad(trained, (max(values.shape[1] - trained.shape[1], 0), 0))
        if causal:
            trained = nn.functional.pad(trained[:, 1:], (0, 1))
    return trained


def _weight(values: Tensor, mask: Any) -> Tensor:
    """1 where an output counts, 0 elsewhere."""
    weight = torch.ones((), device=values.device)
    if isinstance(mask, Tensor) and mask.shape == values.shape[:-1]:
        weight = (mask != 0).to(values).unsqueeze(-1)
    elif isinstance(mask, Tensor) and mask.ndim == 2 and values.ndim == 3 and len(mask) == len(values):
        virtual = values.shape[1] - mask.shape[1]  # positions that prompt tuning puts in front
        if virtual >= 0:
            weight = nn.functional.pad((mask != 0).to(values), (virtual, 0), value=1.0).unsqueeze(-1)
    if not bool(weight.any()):
        raise ValueError("every position of a probe batch is padding, or labeled -100: no output counts.")
    return weight
