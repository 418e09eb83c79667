"""Which distribution a model's logits parametrize, and along which dimension its classes lie.

    [N, C], [N, T, V]     categorical, classes along the last dimension
    [N, C, H, W]          categorical, classes along dimension 1 (`cross_entropy` with positions behind the classes)
    [N, C]                bernoulli for several labels at once, normal for a regression
    [N, T], [N, H, W]     bernoulli, one for each position

The shape and dtype of the labels tell, or the config (`problem_type`, `num_labels`). Nothing is guessed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .model_call import Batch, OutputError, base_model
from .positions import entries_are_positions

Distribution = tuple[str, int | None]  # a key of `FISHER`, and the dimension of the classes; None: there is none
_BY_PROBLEM: dict[str, Distribution] = {
    "single_label_classification": ("categorical", -1),
    "multi_label_classification": ("bernoulli", -1),
    "regression": ("normal", -1),
}


def distribution_of(model: nn.Module, batch: Batch, logits: Tensor) -> Distribution:
    """Find the distribution that logits parametrize.

    Args:
        model: The model.
        batch: A training batch: its labels tell most.
        logits: The model's logits, [N, ...].

    Returns:
        The distribution, and the dimension of its classes (for `bernoulli` and `normal`, of the entries of a position).

    Raises:
        OutputError: If nothing tells.
    """
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if logits.ndim == 2 and problem in _BY_PROBLEM:
        return _BY_PROBLEM[problem]
    labels = batch.get("labels")
    found = None
    if not isinstance(labels, Tensor):
        found = _by_config(model, logits)
    elif labels.is_floating_point():
        found = _by_numbers(model, logits, labels)
    else:
        found = _by_classes(model, batch, logits, labels)
    if found is None:
        told = f", the labels {tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else ""
        raise OutputError(
            "metric 'fisher' needs the logits of at least two classes, along a dimension that labels or config tell: "
            f"the output of {type(base_model(model)).__name__} has shape {tuple(logits.shape)}{told}. Use "
            "metric='euclidean', or output=(model, batch) -> tensor with classes along the last dimension."
        )
    return found


def _is_classifier(model: nn.Module, logits: Tensor) -> bool:
    """Whether Transformers' rule holds: floating-point labels are a regression if there is one, else several labels."""
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    return logits.ndim == 2 and logits.shape[1] == classes and isinstance(base_model(model), PreTrainedModel)


def _by_numbers(model: nn.Module, logits: Tensor, labels: Tensor) -> Distribution | None:
    """What floating-point labels tell; elsewhere than in Transformers' heads they may be targets of any loss."""
    if _is_classifier(model, logits) and labels.numel() == logits.numel():
        return ("normal" if logits.shape[1] == 1 else "bernoulli"), -1
    return _by_config(model, logits) if logits.ndim > 3 else None


def _by_classes(model: nn.Module, batch: Batch, logits: Tensor, labels: Tensor) -> Distribution | None:
    """What integer labels tell: the class of each position, or 0 or 1 for each entry."""
    if labels.shape == logits.shape:
        return "bernoulli", None if entries_are_positions(model, batch, logits) else -1
    for dim in (1, logits.ndim - 1) if logits.ndim > 3 else (logits.ndim - 1, 1):
        if 0 < dim < logits.ndim and labels.shape == (*logits.shape[:dim], *logits.shape[dim + 1 :]):
            if logits.shape[dim] > 1:
                return "categorical", dim
            return None if _is_classifier(model, logits) else ("bernoulli", dim)
    return _by_config(model, logits)  # labels of something else: of the text in front of frames, of larger images


def _by_config(model: nn.Module, logits: Tensor) -> Distribution | None:
    """What the config tells: how many classes there are."""
    config = getattr(model, "config", None)
    classes = getattr(config, "num_labels", None)
    if logits.ndim > 1 and logits.shape[-1] > 1 and logits.shape[-1] in _class_counts(config):
        return "categorical", -1
    if logits.ndim > 2 and logits.shape[1] == classes:
        return ("categorical" if classes > 1 else "bernoulli"), 1
    is_image = getattr(base_model(model), "main_input_name", "") == "pixel_values"
    if logits.ndim in (2, 3) and logits.shape[-1] > 1 and not (is_image and logits.ndim == 3):
        return "categorical", -1
    return None


def _class_counts(config: Any) -> set[int]:
    """Numbers of classes that a config speaks of, those of its parts included; a detector adds "no object"."""
    parts = [config, *(part for part in vars(config or object).values() if hasattr(part, "vocab_size"))]
    counts = {getattr(part, "vocab_size", None) for part in parts}
    labels = getattr(config, "num_labels", None)
    if isinstance(labels, int):
        counts |= {labels, labels + 1}
    return {count for count in counts if isinstance(count, int)}
