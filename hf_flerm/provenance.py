"""Where rates come from: what a reader of a profile must know to judge them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

_PACKAGES = ("hf_flerm", "torch", "transformers", "peft", "accelerate")
_RECORDED_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "bf16",
    "fp16",
)


def provenance(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, args: TrainingArguments
) -> dict[str, Any]:
    """Describe a run by what determines its rates; nothing that differs between two equal runs.

    Args:
        model: What is trained.
        parameters: `{canonical name: parameter}` of what is trained of it.
        optimizer: The optimizer that steps.
        args: The Trainer's arguments.

    Returns:
        What JSON can hold.
    """
    config: Any = getattr(model, "config", None)
    adapters = getattr(model, "peft_config", None) or {}
    arguments = args.to_dict()
    description: dict[str, Any] = _plain(
        {
            "packages": {name: version(name) for name in _PACKAGES},
            "model": type(model).__name__,
            "model_config": config.to_diff_dict() if hasattr(config, "to_diff_dict") else None,
            "adapters": {name: adapter.to_dict() for name, adapter in adapters.items()},
            "optimizer": {"class": type(optimizer).__name__, **_simple(optimizer.defaults)},
            "training_arguments": {key: arguments[key] for key in _RECORDED_ARGUMENTS if key in arguments},
            "shapes": {name: list(parameter.shape) for name, parameter in parameters.items()},
        }
    )
    return description


def _simple(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, (bool, int, float, str, tuple))}


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: sets sorted, everything unknown as text, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(getattr(value, "value", value))
