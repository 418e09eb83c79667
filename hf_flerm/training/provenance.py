"""The provenance of a profile: which model, data, optimizer and settings its rates were measured with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from accelerate import PartialState
from torch import nn
from torch.optim import Optimizer
from transformers.utils import logging

from ..config import FLeRMConfig
from ..engines import engine_of
from ..model.names import tensor_kinds
from ..optimizer.param_groups import stepping_optimizers
from ..profile.metadata import CALLABLE, GROUPS, LARGEST_CHANGE, SETTINGS, UNITS
from ..profile.rate_profile import RateProfile, RateProfileError, check_names
from ..transfer.differences import differences, instability
from .probe_data import ProbeData

logger = logging.get_logger(__name__)
_PACKAGES = ("hf_flerm", "torch", "transformers", "peft", "accelerate")
_RECORDED_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "total_train_batch_size",
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
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    config: FLeRMConfig,
    probe_data: ProbeData,
    arguments: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the metadata of a run's profile: what determines its rates.

    It has nothing that differs between two identical runs (time, host name, paths), so their files are identical.

    Args:
        model: The trained model.
        parameters: `{canonical name: parameter}` of its trained parameters.
        optimizer: The optimizer, unwrapped.
        groups: What steps which tensors; see `described_groups`.
        config: The options of the run.
        probe_data: The source of its probe batches.
        arguments: Settings of the training. None: learning rate, batch size and accumulation.

    Returns:
        Values that JSON can hold.
    """
    engine = engine_of(model)
    model_config: Any = getattr(model, "config", None)
    adapters = getattr(model, "peft_config", None) or {}
    if arguments is None:
        arguments = {
            "learning_rate": max(group["learning_rate"] for group in groups),
            "per_device_train_batch_size": probe_data.training_batch_size,
            "gradient_accumulation_steps": probe_data.accumulation_steps,
        }
    examples = probe_data.training_batch_size * probe_data.accumulation_steps * PartialState().num_processes
    arguments = {**arguments, "total_train_batch_size": examples}
    # Of an optimizer that delegates its step, the optimizers inside it.
    parts = [_described(each) for each in stepping_optimizers(optimizer) if each is not optimizer]
    description: dict[str, Any] = _plain(
        {
            "packages": {name: version(name) for name in _PACKAGES},
            "model": engine.own_type(model).__name__,
            "model_config": model_config.to_diff_dict() if hasattr(model_config, "to_diff_dict") else None,
            "adapters": {name: adapter.to_dict() for name, adapter in adapters.items()},
            "optimizer": _described(optimizer) | ({"parts": parts} if parts else {}),
            GROUPS: groups,
            "training_arguments": {key: arguments[key] for key in _RECORDED_ARGUMENTS if key in arguments},
            "shapes": {name: list(engine.shape(parameter)) for name, parameter in parameters.items()},
            "kinds": {name: kind for name, kind in tensor_kinds(model).items() if name in parameters},
            "dataset_fingerprint": probe_data.fingerprint,
            SETTINGS: _measuring_settings(config, probe_data),
        }
    )
    return description


def empty_profile(metadata: Mapping[str, Any], groups: Mapping[str, Mapping[str, Mapping[str, float]]]) -> RateProfile:
    """Return a profile without steps for a new run.

    Args:
        metadata: The `provenance` of the run.
        groups: `{granularity: {path: {canonical name: share of its update}}}` for the joint rates to be recorded.
    """
    joint: dict[str, dict[str, list[float]]] = {
        granularity: {path: [] for path in of} for granularity, of in groups.items()
    }
    return RateProfile([], {name: [] for name in metadata["shapes"]}, metadata, joint)


def resumed_profile(resumed: RateProfile, empty: RateProfile, config: FLeRMConfig) -> RateProfile:
    """Return a checkpoint's rates with the provenance of the run that resumes from it.

    Args:
        resumed: The profile of the checkpoint.
        empty: The profile of the run, from `empty_profile`.
        config: The options of the run.

    Raises:
        RateProfileError: If tensors, output, positions or metric differ.
    """
    check_names(resumed.rates, empty.rates, "the checkpoint's profile", "the model")
    check_units(resumed, config, "the checkpoint's profile")
    recorded, settings = (profile.about.settings for profile in (resumed, empty))
    changed = [key for key, value in settings.items() if recorded.get(key, value) != value]
    if changed:
        was, now = ({key: values[key] for key in changed} for values in (recorded, settings))
        logger.warning(
            f"settings changed at the checkpoint: the profile was measured with {was} before, now with {now}."
        )
    profile = RateProfile(resumed.steps, resumed.rates, empty.metadata, resumed.joint_rates)
    largest = resumed.about.largest_change
    return profile if largest is None else with_change(profile, *largest)


def with_change(profile: RateProfile, step: int, change: float) -> RateProfile:
    """Return the profile with a step's change of the outputs in its metadata, if no step before changed them more.

    Args:
        profile: The profile.
        step: The optimizer step.
        change: How far it moved the outputs, to first order and in the profile's metric.
    """
    largest = profile.about.largest_change
    if largest is not None and largest[1] >= change:
        return profile
    return RateProfile(
        profile.steps, profile.rates, {**profile.metadata, LARGEST_CHANGE: [step, change]}, profile.joint_rates
    )


def _measuring_settings(config: FLeRMConfig, probe_data: ProbeData) -> dict[str, Any]:
    return {
        "mode": config.mode,
        "estimator": config.research.estimator,
        **_units(config),
        "probes": probe_data.num_batches,
        "probes_per_batch": config.research.probes_per_batch,
        "probe_batch_size": probe_data.batch_size,
        "seed": config.seed,
    }


def with_units_of(profile: RateProfile, config: FLeRMConfig) -> FLeRMConfig:
    """Return options with the output, positions and metric of a base's profile where they are not set.

    Args:
        profile: The profile of the base. If a run recorded it without saying by which metric, its rates are euclidean;
            a profile that was put together by hand has the metric that this run would record with.
        config: The options of the matched run.

    Raises:
        RateProfileError: If what is set differs from the profile, or what the profile says is not allowed.
    """
    recorded = {**({"metric": "euclidean"} if profile.about.settings else {}), **profile.about.config_units}
    if callable(config.output):
        recorded.pop("positions", None)  # the function chooses them
    unset = {name: value for name, value in recorded.items() if getattr(config, name) is None}
    metric = unset.pop("metric", config.metric)
    try:
        config = replace(config, **unset)
        check_units(profile, config, "the profile")  # before an output that is set meets the profile's metric
        return replace(config, metric=metric)
    except RateProfileError:
        raise
    except ValueError as error:
        raise RateProfileError(f"the profile was recorded with {unset}, which this run cannot use: {error}") from error


def check_units(profile: RateProfile, config: FLeRMConfig, which: str) -> None:
    """Raise RateProfileError if a profile was measured with another output, other positions or another metric.

    A metric that is not chosen yet fits every profile.

    Args:
        profile: The profile.
        config: The options of the run.
        which: What to call the profile in the message.
    """
    recorded = profile.about.units
    for name, value in _units(config).items():
        if value is not None and recorded.get(name, value) != value:
            remedy = f"Use {name}={recorded[name]!r}, as in the profile."
            if recorded[name] == CALLABLE:
                remedy = "Pass output=(model, batch) -> tensor, the function of the base run."
            raise RateProfileError(
                f"{which} was recorded with {name}={recorded[name]!r}, this run has {value!r}: "
                f"their rates cannot be compared. {remedy}"
            )


def check_unscaled(profile: RateProfile, which: str) -> None:
    """Raise RateProfileError if a profile was recorded in a matched run with scales other than 1.

    Its rates are per unit of scaled learning rates, which are not in the profile at every step.

    Args:
        profile: The profile.
        which: What to call the profile in the message.
    """
    scales = profile.about.matched_scales.values()
    unknown = profile.about.is_matched and not scales
    if unknown or any(scale != 1.0 for scale in scales):
        by = f" by {min(scales):.3g} to {max(scales):.3g} in the end" if scales else ""
        raise RateProfileError(
            f"{which} comes from a matched run: its learning rates were scaled{by}, and its rates are per unit of the "
            "scaled ones. Use the profile of the original base run."
        )


def warn_of_differences(base: RateProfile, own: RateProfile) -> None:
    """Warn once of everything in which the training of a matched run differs from its base's, and of an unstable base.

    Other data are only mentioned at the level INFO: the fingerprint also differs if the same text was prepared twice,
    and most users who transfer to another part of their data could do nothing about a warning.

    Args:
        base: The profile of the base run.
        own: The profile of the matched run.
    """
    found = differences(base.about, own.about)
    if found:
        logger.warning(
            "this run differs from the base of its profile in more than what is transferred across:\n"
            + "\n".join(f"- {difference}" for difference in found)
        )
    if at_edge := instability(base.about):
        logger.warning(at_edge)
    prints = base.about.dataset_fingerprint, own.about.dataset_fingerprint
    if None not in prints and prints[0] != prints[1]:
        logger.info("base and target are probed on data sets with different fingerprints: {} and {}.".format(*prints))


def _units(config: FLeRMConfig) -> dict[str, str | None]:
    output = CALLABLE if callable(config.output) else config.output or "logits"
    return dict(zip(UNITS, (output, config.positions or "attention_mask", config.metric), strict=True))


def _described(optimizer: Optimizer) -> dict[str, Any]:
    return {"class": type(optimizer).__name__, **_simple(optimizer.defaults)}


def _simple(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, (bool, int, float, str, tuple))}


def _plain(value: Any) -> Any:
    """Convert a value for JSON: sets are sorted, unknown types become text, non-finite numbers None."""
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
