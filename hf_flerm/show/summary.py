"""Summary of a profile: rates by kind of tensor, and the origin of the profile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model.name_text import without_prefix
from ..profile.rate_profile import RateProfile
from ..profile.table import Row
from ..transfer.match_summary import decision_from

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
    mean: Row
    log_error: Row

    @property
    def band(self) -> tuple[Row, Row]:
        """One standard error below and above the mean, float64 [S] each; the mean itself if the error is unknown."""
        factor = np.exp(np.nan_to_num(self.log_error, nan=0.0))
        return self.mean / factor, self.mean * factor


def rates_by_kind(profile: RateProfile) -> dict[str, KindRates]:
    """Return `{kind: rates}`.

    A kind is the name of a tensor without PEFT's prefix and with `*` for the indices of blocks.
    """
    known, rates = profile.about.kinds, profile.table.rates
    groups: dict[str, list[str]] = {}
    for name in rates:
        groups.setdefault(without_prefix(known.get(name, name)), []).append(name)
    summary = {}
    for kind, names in groups.items():
        table = np.stack([rates[name] for name in names])  # [tensors of the kind, S]
        logs = np.log(np.where(table > 0, table, np.nan))
        count = np.isfinite(logs).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):  # nan where a kind has too few rates above 0
            mean = np.nansum(logs, 0) / count
            error = np.sqrt(np.nansum(np.square(logs - mean), 0) / (count - 1) / count)
        summary[kind] = KindRates(tuple(names), np.exp(mean), np.where(count > 1, error, np.nan))
    return summary


def title_of(profile: RateProfile) -> str:
    """Return model, adapter, learning rate and kind of a profile in one line, for a figure or a page.

    The text is untrusted: do not interpret it.
    """
    about = profile.about
    rates = about.learning_rate_texts if len(about.learning_rate_texts) > 1 else [about.learning_rate]
    kind = "matched run" if about.matching else "average" if about.averaged_over else "recorded run"
    return _joined(
        about.model_name or next(iter(about.base_models), None) or "unnamed model",
        *(" ".join([adapter.method, *_fields(adapter.config, ("r",))]) for adapter in about.adapters),
        _joined(*(f"learning rate {rate}" for rate in rates if rate is not None)),
        f"profile of a {kind}" if kind != "average" else f"average of {about.averaged_over} profiles",
    )


def verdict(profile: RateProfile) -> dict[str, str]:
    """Return `{label: text}`: what matters most about a profile, in an order in which it can be read.

    A matched run: its decision, the reason, and its base. A recorded run: whether its learning rate was the best of its
    sweep, and the losses. The texts are untrusted: do not interpret them.
    """
    about = profile.about
    rate, sweep = about.learning_rate, about.sweep
    finite = {swept: loss for swept, loss in sweep.items() if math.isfinite(loss)}
    losses = ", ".join(f"{loss:.4g} at {swept:g}" for swept, loss in sweep.items())
    if about.matching:
        scales = about.matched_scales
        texts: dict[str, Any] = {
            "decision": f"{decision_from(scales)} (from {min(scales.values()):.3g} to {max(scales.values()):.3g})"
            if scales
            else "no scale was recorded",
            "reason": about.matching.get("reason"),
            "base": _joined(
                about.matching.get("base_commit") and f"commit {about.matching['base_commit']}",
                about.matching.get("base") and f"rates with SHA-256 {about.matching['base']!s:.12}",
            ),
        }
    else:
        best = min(finite, key=finite.__getitem__) if finite else None
        texts = {
            "decision": "recorded only: no learning rate was changed",
            "as a base": "the learning rate of this run was not chosen in a recorded sweep"
            if best is None or rate is None
            else f"{rate:g} was the best learning rate of its sweep"
            if rate == best
            else f"{rate:g} was not the best learning rate of its sweep: {best:g} was",
        }
    if about.largest_change is not None:
        step, change = about.largest_change
        texts["largest change"] = f"step {step} moved the outputs by {change:.3g} ({about.units.get('metric', '')})"
    texts["validation losses"] = losses
    return {label: str(text) for label, text in texts.items() if text not in (None, "")}


def describe(profile: RateProfile) -> dict[str, str]:
    """Return `{label: text}`: the origin of a profile according to its metadata.

    The texts are untrusted: do not interpret them.
    """
    about = profile.about
    arguments, settings = about.training_arguments, about.settings
    batch = arguments.get("per_device_train_batch_size")
    accumulated = arguments.get("gradient_accumulation_steps", 1)
    steps = profile.table.steps.tolist()
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
