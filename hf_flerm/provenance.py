"""Where rates come from: what a reader of a profile must know to judge them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from .config import FLeRMConfig
from .probe_data import ProbeData
from .profile_file import serialize
from .rate_profile import RateProfile, RateProfileError
from .sharding import own_type

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
            "model": own_type(model).__name__,
            "model_config": config.to_diff_dict() if hasattr(config, "to_diff_dict") else None,
            "adapters": {name: adapter.to_dict() for name, adapter in adapters.items()},
            "optimizer": {"class": type(optimizer).__name__, **_simple(optimizer.defaults)},
            "training_arguments": {key: arguments[key] for key in _RECORDED_ARGUMENTS if key in arguments},
            "shapes": {name: list(parameter.shape) for name, parameter in parameters.items()},
        }
    )
    return description


def measuring_settings(config: FLeRMConfig, probe_data: ProbeData) -> dict[str, Any]:
    """Describe how rates are measured.

    Args:
        config: A run's.
        probe_data: What it probes with.

    Returns:
        What JSON can hold.
    """
    return {
        "mode": config.mode,
        "estimator": config.estimator,
        **_units(config),
        "probes": probe_data.num_batches,
        "probes_per_batch": config.probes_per_batch,
        "probe_batch_size": probe_data.batch_size,
        "seed": config.seed,
    }


def base_identity(base: RateProfile) -> dict[str, str]:
    """Say which profile a run is matched to.

    Args:
        base: The profile.

    Returns:
        `base`, the SHA-256 of its rates; and, if it was read from a repository, `base_commit`, the commit.
    """
    digest = hashlib.sha256(serialize(base.steps, base.rates, {}, base.joint_rates)).hexdigest()
    return {"base": digest} | ({"base_commit": base.commit_hash} if base.commit_hash else {})


def check_units(profile: RateProfile, config: FLeRMConfig, which: str) -> None:
    """Refuse a profile whose rates are rates of something else than a run's.

    Args:
        profile: Was recorded before.
        config: The run's.
        which: What to call the profile in the message.

    Raises:
        RateProfileError: If output, positions or metric differ.
    """
    recorded = profile.metadata.get("flerm", {})
    for name, value in _units(config).items():
        if recorded.get(name, value) != value:
            raise RateProfileError(
                f"{which} was recorded with {name}={recorded[name]!r}, this run has {value!r}: "
                "their rates cannot be compared. Use the profile's."
            )


def _units(config: FLeRMConfig) -> dict[str, str]:
    output = "callable" if callable(config.output) else config.output or "logits"
    return {"output": output, "positions": config.positions, "metric": config.metric}


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
