"""What "the function" is: the outputs of a model whose movement is measured, and which of them count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor, nn

Batch = Mapping[str, Any]
OutputFunction = Callable[[nn.Module, Batch], Tensor]

_LABELS = ("labels", "label", "label_ids", "num_items_in_batch")


@dataclass(frozen=True)
class Output:
    """The outputs for one batch.

    Attributes:
        values: f, [N, ...].
        weight: 1 where an output counts and 0 where it does not; shaped like `values` but for a last dimension of 1
            (like `values` if that is [N]).
    """

    values: Tensor
    weight: Tensor

    def omega(self, generator: torch.Generator) -> Tensor:
        """Draw the random output weights of one probe.

        Args:
            generator: Source of randomness.

        Returns:
            omega ~ N(0, 1), shaped like `values`, 0 where an output does not count.
        """
        values = self.values
        noise = torch.randn(values.shape, generator=generator, device=generator.device, dtype=values.dtype)
        return noise.to(values.device) * self.weight

    def count(self, width: int) -> float:
        """Count the outputs.

        Args:
            width: Entries in their last dimension (a skipped head has more than `values`).

        Returns:
            M, the number of outputs that count.
        """
        return float(self.weight.count_nonzero()) * (width if self.values.ndim > 1 else 1)


def model_output(model: nn.Module, batch: Batch, function: OutputFunction | None) -> Output:
    """Run a model on a batch and take its outputs.

    Args:
        model: The model.
        batch: Its inputs.
        function: The user's own `(model, batch) -> tensor`, or None for the logits at unpadded positions.

    Returns:
        The outputs.

    Raises:
        ValueError: If there is no such tensor, or no output counts.
    """
    if function is None:
        values, weight = _logits(model, batch)
    else:
        values = function(model, batch)
        if not isinstance(values, Tensor):
            raise ValueError(f"output must return a tensor with examples first; it returned {type(values).__name__}.")
        weight = torch.ones((), device=values.device)
    if values.ndim == 0 or not values.is_floating_point():
        raise ValueError(
            f"the output must be a floating-point tensor with examples first; got shape {tuple(values.shape)} of "
            f"{values.dtype}. Pass output=(model, batch) -> tensor."
        )
    shape = (*values.shape[:-1], 1) if values.ndim > 1 else values.shape
    return Output(values, weight.to(values.dtype).expand(shape))


def num_examples(batch: Batch) -> int:
    """Count the examples of a batch.

    Args:
        batch: Model inputs, examples along the first dimension.

    Returns:
        N.

    Raises:
        ValueError: If there is no tensor or no example in it.
    """
    count: int | None = find_batch_size(dict(batch))
    if not count:
        raise ValueError(f"a probe batch holds no examples: {sorted(batch)}. Pass dicts of tensors, examples first.")
    return count


def _logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits, and a weight that leaves padding out."""
    inputs = {name: value for name, value in batch.items() if name not in _LABELS}
    mask = inputs.get("attention_mask")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        labels = batch.get("labels")
        mask = inputs.get("decoder_attention_mask")
        if "decoder_input_ids" not in inputs and labels is not None:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
            mask = (labels != -100) if mask is None else mask
    if hasattr(config, "use_cache"):
        inputs["use_cache"] = False
    result = model(**inputs)
    if isinstance(result, Mapping):
        logits = result.get("logits")
    else:
        logits = getattr(result, "logits", result[0] if isinstance(result, tuple) and result else result)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{type(model).__name__} returned {type(result).__name__} without logits. "
            "Pass output=(model, batch) -> tensor to say what the function is."
        )
    weight = torch.ones((), device=logits.device)
    if isinstance(mask, Tensor) and mask.ndim == 2 and logits.ndim == 3 and len(mask) == len(logits):
        virtual = logits.shape[1] - mask.shape[1]  # positions that prompt tuning puts in front
        if virtual >= 0:
            weight = nn.functional.pad((mask != 0).to(logits), (virtual, 0), value=1.0).unsqueeze(-1)
    if not bool(weight.any()):
        raise ValueError("every position of a probe batch is padding: its attention mask is all zero.")
    return logits, weight
