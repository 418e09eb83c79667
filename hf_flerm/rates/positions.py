"""Which positions of the outputs count: those that are not padding, or those that the loss uses.

Masks have their own shapes: [N, T] for outputs [N, T, V]; [N, H, W] for [N, C, H, W]; [N, L] samples of sound for
[N, T, V] frames with T < L. A weight is 1 where an output counts and 0 elsewhere. It has the dimensions of the outputs,
but size 1 in a dimension whose entries all have the same weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .model_call import IGNORED_LABEL, LABELS, Batch, OutputError, base_model, generates, is_encoder_decoder

logger = logging.get_logger(__name__)

_MASKS = ("attention_mask", "padding_mask", "pixel_mask", "features_mask", "input_mask")
# Prefixes of masks that are not about positions of the outputs.
_OTHER_MASKS = ("global_", "cross_", "image_", "encoder_", "special_")


def unpadded_weight(model: nn.Module, batch: Batch, values: Tensor) -> Tensor | None:
    """Return the weight of the positions that are not padding.

    Warns once if the batch has padding but no mask fits the outputs.

    Args:
        model: The model.
        batch: A training batch.
        values: The outputs, [N, ...].

    Returns:
        The weight; None if all positions count.
    """
    unfit = []
    for name, mask in _masks(model, batch):
        weight = _weight_of_resized_mask(model, batch, values, mask)
        if weight is not None:
            return weight
        if not bool(mask.all()):
            unfit.append(f"{name} {tuple(mask.shape)}")
    if unfit and _has_positions(batch, values):
        logger.warning_once(
            f"no mask of a probe batch fits the outputs of {type(base_model(model)).__name__}, of shape "
            f"{tuple(values.shape)}: {', '.join(unfit)}. All positions count, padding included. Pass "
            "positions='labels' to count the positions that the loss uses, or output=(model, batch) -> tensor of "
            "the positions that count."
        )
    return None


def labeled_weight(model: nn.Module, batch: Batch, values: Tensor) -> Tensor:
    """Return the weight of the positions that the loss uses: those whose label is not ignored (-100).

    A causal model predicts the label of the next position, so the weight of the labels is shifted by one.

    Args:
        model: The model.
        batch: A training batch.
        values: The outputs, [N, ...].

    Returns:
        The weight, 1 at positions with a label and 0 elsewhere.

    Raises:
        OutputError: If the labels do not have one entry per position.
    """
    labels = batch.get("labels")
    weight = None
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        ignored = getattr(getattr(model, "config", None), "semantic_loss_ignore_index", None)
        used = labels != IGNORED_LABEL
        if ignored is not None and labels.ndim >= 3:
            used &= labels != ignored
        if labels.ndim == 2 and values.ndim == 3 and any(shape[:2] == labels.shape for shape in _input_shapes(batch)):
            used = _pad_for_prompt(used, values.shape[1], False)
        if labels.ndim == 2 and generates(model) and not is_encoder_decoder(model):
            used = nn.functional.pad(used[:, 1:], (0, 1))
        weight = _weight_of_mask(model, batch, values, used)
    if weight is None:
        raise OutputError(
            "positions 'labels' needs labels for every position of the output: the batch has "
            f"{tuple(labels.shape) if isinstance(labels, Tensor) else 'none'}, the output has shape "
            f"{tuple(values.shape)}. Use positions='attention_mask'."
        )
    return weight


def entries_are_positions(model: nn.Module, batch: Batch, values: Tensor) -> bool:
    """Whether every entry of the outputs is a position.

    Heads with one output per position drop the last dimension: [N, T] for tokens (ELECTRA's discriminator), [N, H, W]
    for pixels. [N, T] looks like [N, C] of a classifier if T = C; then the labels or the config decide.
    """
    labels = batch.get("labels")
    has_label_each = isinstance(labels, Tensor) and labels.shape == values.shape and not labels.is_floating_point()
    if values.ndim == 1:
        return True
    if values.ndim > 2:
        return has_label_each and values.shape[:-1] not in _input_shapes(batch)
    if values.shape not in _input_shapes(batch) or (isinstance(labels, Tensor) and labels.ndim < 2):
        return False
    return has_label_each or getattr(getattr(model, "config", None), "num_labels", None) != values.shape[-1]


def _input_shapes(batch: Batch) -> list[torch.Size]:
    return [value.shape for name, value in batch.items() if name not in LABELS and isinstance(value, Tensor)]


def _has_positions(batch: Batch, values: Tensor) -> bool:
    labels = batch.get("labels")
    return values.ndim > 2 or (isinstance(labels, Tensor) and values.ndim == 2 and labels.shape == values.shape)


def _masks(model: nn.Module, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Yield the masks of the outputs' positions by name, True where there is no padding, the most likely first.

    Outputs of an encoder-decoder lie along its decoder; the mask of its encoder may have the same shape by chance.
    """
    decodes = is_encoder_decoder(model)
    names = [
        name
        for name, value in batch.items()
        if isinstance(value, Tensor) and (name.endswith(_MASKS) or name == "mask") and not name.startswith(_OTHER_MASKS)
    ]
    for name in sorted(names, key=lambda name: name != "attention_mask"):
        if decodes == name.startswith("decoder_"):
            yield name, (batch[name] == 0) if _marks_padding(model, name, batch[name]) else (batch[name] != 0)
    labels = batch.get("labels")
    if decodes and isinstance(labels, Tensor) and not labels.is_floating_point():
        yield "labels", labels != IGNORED_LABEL


def _marks_padding(model: nn.Module, name: str, mask: Tensor) -> bool:
    """Whether a mask is True at padding, as torch's `key_padding_mask`; the masks of Transformers are 0 there."""
    padding = name.endswith("padding_mask") and mask.dtype == torch.bool
    return name.endswith("key_padding_mask") or (padding and not isinstance(base_model(model), PreTrainedModel))


def _weight_of_resized_mask(model: nn.Module, batch: Batch, values: Tensor, mask: Tensor) -> Tensor | None:
    """Turn a mask into a weight, after resizing it if necessary; None if it does not fit the outputs."""
    weight = _weight_of_mask(model, batch, values, mask)
    if weight is not None or not len(mask):
        return weight
    if mask.ndim == 2 and values.ndim == 3 and len(mask) == len(values):
        length = values.shape[1]
        if length > mask.shape[1]:
            return _pad_for_prompt(mask, length, True).to(values).unsqueeze(-1) if _has_prompt(model) else None
        frames = _frame_mask(model, mask, length)
        return None if frames is None else frames.to(values).unsqueeze(-1)
    if mask.ndim == 3 and values.ndim == 4 and len(mask) == len(values):  # pixels, at another resolution
        small = nn.functional.interpolate(mask.unsqueeze(1).float(), size=values.shape[-2:])
        return small.to(values)
    return None


def _weight_of_mask(model: nn.Module, batch: Batch, values: Tensor, mask: Tensor) -> Tensor | None:
    """Turn a mask into a weight if its shape is that of the outputs, or of the outputs without class dimension."""
    for dim in (values.ndim - 1, 1) if values.ndim > 1 else ():
        if mask.shape == (*values.shape[:dim], *values.shape[dim + 1 :]):
            return mask.to(values).unsqueeze(dim)
    if mask.shape == values.shape and (values.ndim > 2 or entries_are_positions(model, batch, values)):
        return mask.to(values)
    if values.ndim > 2 and mask.shape == (*values.shape[:-1], 1):
        return mask.to(values)
    if values.ndim == 2 and mask.numel() == len(values) > len(mask):  # all positions of all examples in one dimension
        return mask.to(values).reshape(-1, 1)
    return None


def _has_prompt(model: Any) -> bool:
    """Whether a model prepends tokens to its input: those of prompt tuning or of an image."""
    config = getattr(model, "active_peft_config", None)
    return generates(model) or bool(getattr(config, "is_prompt_learning", False))


def _pad_for_prompt(mask: Tensor, length: int, fill: bool) -> Tensor:
    """Pad a mask [N, T] on the left for the tokens that a model prepends, to [N, length]."""
    return nn.functional.pad(mask, (max(length - mask.shape[1], 0), 0), value=fill)


def _frame_mask(model: nn.Module, mask: Tensor, length: int) -> Tensor | None:
    """Turn a mask of samples or features [N, L] into a mask of frames [N, length] with the model's method.

    Convolutional front ends shorten their inputs; every family of speech models has a method for the lengths of its
    outputs, in the model or in its encoder.
    """
    for module in base_model(model).modules():
        for name, call in _FRAME_RULES.items():
            if callable(getattr(module, name, None)):
                try:
                    frames: Tensor | None = call(getattr(module, name), mask.long(), length)
                except (RuntimeError, TypeError, IndexError):  # the method does not apply to these inputs
                    continue
                if frames is not None and frames.shape == (len(mask), length):
                    return frames
    return None


def _frames_of_lengths(lengths: Any, mask: Tensor, length: int) -> Tensor | None:
    """Build a mask with a method that maps input lengths to output lengths; None if it contradicts `length`."""

    def outputs(inputs: Tensor) -> Tensor:
        found: Any = lengths(inputs)
        last: Tensor = found[-1] if isinstance(found, tuple) else found
        return last

    if int(outputs(mask.new_tensor([mask.shape[1]]))[0]) != length:
        return None
    return torch.arange(length, device=mask.device) < outputs(mask.sum(-1)).unsqueeze(-1)


_FRAME_RULES: dict[str, Any] = {
    "_get_feature_vector_attention_mask": lambda rule, mask, length: rule(length, mask),
    "_get_output_attention_mask": lambda rule, mask, length: rule(mask, target_length=length),
    "_get_feat_extract_output_lengths": _frames_of_lengths,
}
