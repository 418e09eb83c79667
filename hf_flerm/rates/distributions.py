"""Determine the distribution that a model's logits parametrize, and the class dimension.

    [N, C], [N, T, V]     categorical, classes along the last dimension
    [N, C, H, W]          categorical, classes along dimension 1 (`cross_entropy` with positions behind the classes)
    [N, C]                bernoulli for several labels at once, normal for a regression
    [N, T], [N, H, W]     bernoulli, one for each position

The labels (shape, dtype) or the config (`problem_type`, `num_labels`, `vocab_size`) determine both. Where they say
nothing, `distribution_of` takes a last dimension of at least two entries for classes, or raises OutputError.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .model_call import Batch, OutputError, base_model
from .positions import entries_are_positions

Distribution = tuple[str, int | None]  # key of `FISHER`, class dimension (None: no class dimension)
_BY_PROBLEM: dict[str, Distribution] = {
    "single_label_classification": ("categorical", -1),
    "multi_label_classification": ("bernoulli", -1),
    "regression": ("normal", -1),
}


def distribution_of(model: nn.Module, batch: Batch, logits: Tensor) -> Distribution:
    """Find the distribution that logits parametrize.

    Args:
        model: The model.
        batch: A training batch, with labels if there are any.
        logits: The model's logits, [N, ...].

    Returns:
        The distribution and its class dimension (for `bernoulli` and `normal`: of the entries of a position).

    Raises:
        OutputError: If the labels and the config contradict every distribution.
    """
    found = known_distribution(model, batch, logits) or _assumed(model, batch, logits)
    if found is None:
        labels = batch.get("labels")
        shapes = f", the labels {tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else ""
        raise OutputError(
            "metric 'fisher' needs the logits of at least two classes, along a dimension that the labels or the config "
            f"determine: the output of {type(base_model(model)).__name__} has shape {tuple(logits.shape)}{shapes}. Use "
            "metric='euclidean', or output=(model, batch) -> tensor with classes along the last dimension."
        )
    return found


def known_distribution(model: nn.Module, batch: Batch, outputs: Tensor) -> Distribution | None:
    """Find the distribution that outputs parametrize, if labels or config determine it; arguments as above.

    Returns:
        As `distribution_of`; None if the outputs may be something else than logits, for instance embeddings.
    """
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if outputs.ndim == 2 and problem in _BY_PROBLEM:
        return _BY_PROBLEM[problem]
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return _by_config(model, outputs)
    if labels.is_floating_point():
        return _by_numbers(model, outputs, labels)
    return _by_classes(model, batch, outputs, labels)


def _assumed(model: nn.Module, batch: Batch, logits: Tensor) -> Distribution | None:
    """Take the last dimension for classes, unless floating-point labels or the images of a model speak against it."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.is_floating_point():
        return None
    is_image = getattr(base_model(model), "main_input_name", "") == "pixel_values"
    if logits.ndim in (2, 3) and logits.shape[-1] > 1 and not (is_image and logits.ndim == 3):
        return "categorical", -1
    return None


def _is_classifier(model: nn.Module, logits: Tensor) -> bool:
    """Whether the model is a classification head of Transformers.

    There, floating-point labels mean a regression if there is one logit, and several labels at once otherwise.
    """
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    return logits.ndim == 2 and logits.shape[1] == classes and isinstance(base_model(model), PreTrainedModel)


def _by_numbers(model: nn.Module, logits: Tensor, labels: Tensor) -> Distribution | None:
    """Distribution from floating-point labels of a Transformers head; other models may use them in any loss."""
    if _is_classifier(model, logits) and labels.numel() == logits.numel():
        return ("normal" if logits.shape[1] == 1 else "bernoulli"), -1
    return _by_config(model, logits) if logits.ndim > 3 else None


def _by_classes(model: nn.Module, batch: Batch, logits: Tensor, labels: Tensor) -> Distribution | None:
    """Distribution from integer labels: the class of each position, or 0 or 1 for each entry."""
    if labels.shape == logits.shape:
        return "bernoulli", None if entries_are_positions(model, batch, logits) else -1
    for dim in (1, logits.ndim - 1) if logits.ndim > 3 else (logits.ndim - 1, 1):
        if 0 < dim < logits.ndim and labels.shape == (*logits.shape[:dim], *logits.shape[dim + 1 :]):
            if logits.shape[dim] > 1:
                return "categorical", dim
            return None if _is_classifier(model, logits) else ("bernoulli", dim)
    # The labels do not match the logits (the text of an audio model, images of another size).
    return _by_config(model, logits)


def _by_config(model: nn.Module, logits: Tensor) -> Distribution | None:
    """Distribution from the numbers of classes in the config."""
    config = getattr(model, "config", None)
    classes = getattr(config, "num_labels", None)
    if logits.ndim > 1 and logits.shape[-1] > 1 and logits.shape[-1] in _class_counts(config):
        return "categorical", -1
    if logits.ndim > 2 and logits.shape[1] == classes:
        return ("categorical" if classes > 1 else "bernoulli"), 1
    return None


def _class_counts(config: Any) -> set[int]:
    """Return the numbers of classes that a config mentions, nested configs included. Detectors add "no object"."""
    parts = [config, *(part for part in vars(config or object).values() if hasattr(part, "vocab_size"))]
    counts = {getattr(part, "vocab_size", None) for part in parts}
    labels = getattr(config, "num_labels", None)
    if isinstance(labels, int):
        counts |= {labels, labels + 1}
    return {count for count in counts if isinstance(count, int)}
