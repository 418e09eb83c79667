"""Summary of a profile: rates by kind of tensor, and the origin of the profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.names import without_prefix
from ..profile.rate_profile import RateProfile

_ADAPTER_FIELDS = ("r", "lora_alpha", "init_lora_weights", "use_rslora", "use_dora")
_SIZES = ("num_hidden_layers", "n_layer", "hidden_size", "n_embd", "vocab_size")


@dataclass(frozen=True)
class KindRates:
    """The rates of one kind of tensor over training.

    Attributes:
        names: Names of the tensors.
        mean: Geometric mean over the tensors with a rate above 0, float64 [S]; nan if all are 0.
        log_error: Standard error of the mean of the logarithms, over the tensors, float64 [S]; nan for fewer than two.
    """

    names: tuple[str, ...]
    mean: Tensor
    log_error: Tensor

    @property
    def band(self) -> tuple[Tensor, Tensor]:
        """One standard error below and above the mean, float64 [S] each; the mean itself if the error is unknown."""
        factor = self.log_error.nan_to_num(0.0).exp()
        return self.mean / factor, self.mean * factor


def rates_by_kind(profile: RateProfile) -> dict[str, KindRates]:
    """Return `{kind: rates}`.

    A kind is the name of a tensor without PEFT's prefix and with `*` for the indices of blocks.
    """
    known = profile.about.kinds
    groups: dict[str, list[str]] = {}
    for name in profile.names:
        groups.setdefault(without_prefix(known.get(name, name)), []).append(name)
    summary = {}
    for kind, names in groups.items():
        logs = torch.stack([profile.rates[name] for name in names]).log()
        logs[~logs.isfinite()] = torch.nan
        count = logs.isfinite().sum(0)
        mean = logs.nanmean(0)
        variance = (logs - mean).square().nansum(0) / (count - 1)
        error = (variance / count).sqrt().where(count > 1, torch.tensor(torch.nan, dtype=torch.float64))
        summary[kind] = KindRates(tuple(names), mean.exp(), error)
    return summary


def describe(profile: RateProfile) -> dict[str, str]:
    """Return `{label: text}`: the origin of a profile according to its metadata.

    The texts are untrusted: do not interpret them.
    """
    about = profile.about
    arguments, settings = about.training_arguments, about.settings
    batch = arguments.get("per_device_train_batch_size")
    accumulated = arguments.get("gradient_accumulation_steps", 1)
    steps = profile.steps.tolist()
    texts = {
        "model": _joined(about.model_name, *_fields(about.model_config, _SIZES)),
        "base model": next((adapter.base_model for adapter in about.adapters if adapter.base_model), None),
        "trained": _joined(
            f"{len(profile.names)} tensors",
            *(_joined(a.config.get("peft_type"), *_fields(a.config, _ADAPTER_FIELDS)) for a in about.adapters),
        ),
        "data": about.dataset_fingerprint and f"fingerprint {about.dataset_fingerprint}",
        "learning rate": _joined(
            *(about.learning_rate_texts if len(about.learning_rate_texts) > 1 else ()),
            None if len(about.learning_rate_texts) > 1 else arguments.get("learning_rate"),
            arguments.get("lr_scheduler_type"),
            *_fields(arguments, ("warmup_steps", "max_steps")),
        ),
        "sweep": ", ".join(f"{rate:g}: loss {loss:g}" for rate, loss in about.sweep.items()),
        "sweep's optimum": about.sweep_optimum and f"{about.sweep_optimum:.3g}",
        "optimizer": _joined(about.optimizer.get("class"), *_fields(arguments, ("weight_decay",))),
        "batch": f"{batch} x {accumulated} per device" if batch else None,
        "seed": arguments.get("seed"),
        "measured at": f"{len(steps)} steps, {steps[0]} to {steps[-1]}" if steps else "no step",
        "estimator": _joined(settings.get("estimator"), *_fields(settings, ("probes", "probes_per_batch"))),
        "output": _joined(*(settings.get(key) for key in ("output", "positions", "metric"))),
        "averaged over": about.averaged_over and f"{about.averaged_over} profiles",
        "matched": _joined(f"{len(about.matched_scales)} scales", *_fields(about.matching, ("base_commit",)))
        if about.matching
        else None,
        "packages": _joined(*(f"{package} {version}" for package, version in about.packages.items())),
    }
    return {label: str(text) for label, text in texts.items() if text not in (None, "")}


def _fields(values: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    return [f"{key} {values[key]}" for key in keys if values.get(key) not in (None, False)]


def _joined(*items: Any) -> str:
    return ", ".join(str(item) for item in items if item not in (None, ""))
