"""What a profile says in few numbers: rates by kind of tensor, and where they come from, in words."""

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
        names: Its tensors.
        mean: Geometric mean over the tensors with a rate above 0, float64 [S]; nan where all are 0.
        log_error: Standard error of the mean of the logarithms, over the tensors, float64 [S]; nan for fewer than two.
    """

    names: tuple[str, ...]
    mean: Tensor
    log_error: Tensor

    @property
    def band(self) -> tuple[Tensor, Tensor]:
        """One standard error below and above the mean, float64 [S] each; the mean itself where it is not known."""
        factor = self.log_error.nan_to_num(0.0).exp()
        return self.mean / factor, self.mean * factor


def rates_by_kind(profile: RateProfile) -> dict[str, KindRates]:
    """Summarize a profile's rates.

    Args:
        profile: The profile.

    Returns:
        `{kind: rates}`; a kind is a tensor's name without PEFT's prefix and with `*` for the indices of blocks.
    """
    known = profile.metadata.get("kinds", {})
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


def matched_scales(profile: RateProfile) -> dict[str, float]:
    """Read the scales that a matched run had in the end.

    Args:
        profile: The profile.

    Returns:
        `{unit: scale}`; empty if the run only recorded.
    """
    found = profile.metadata.get("matching", {}).get("scales")
    if not isinstance(found, Mapping):
        return {}
    logs = {unit: log for unit, log in found.items() if isinstance(log, (int, float))}
    return dict(zip(logs, torch.tensor(list(logs.values()), dtype=torch.float64).exp().tolist(), strict=True))


def matched_quotients(profile: RateProfile) -> dict[str, tuple[float, float]]:
    """Read what the measurements of a matched run say of each unit alone.

    Args:
        profile: The profile.

    Returns:
        `{unit: (geometric mean of base rate / own rate, standard error of its logarithm)}` of the units that could be
        compared; the error is that over the measurements, 0 if there is one.
    """
    columns = part(part(profile.metadata, "matching"), "logs")
    found = {}
    for unit, column in columns.items():
        logs = torch.tensor([value for value in column if isinstance(value, (int, float))], dtype=torch.float64)
        if len(logs):
            error = float(logs.std() / len(logs) ** 0.5) if len(logs) > 1 else 0.0
            found[unit] = (float(logs.mean().exp()), error)
    return found


def sweep(profile: RateProfile) -> dict[float, float]:
    """Read the learning rates that were tried before the run was recorded at the best of them.

    Args:
        profile: The profile.

    Returns:
        `{learning rate: validation loss}`, nan for a run that diverged; empty if the metadata have no `sweep`, a list
        of such pairs.
    """
    pairs = profile.metadata.get("sweep")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return {}
    numbers = [(rate, torch.nan if loss is None else loss) for rate, loss in pairs]
    return {rate: loss for rate, loss in numbers if isinstance(rate, (int, float)) and isinstance(loss, (int, float))}


def described(profile: RateProfile) -> dict[str, str]:
    """Say where a profile comes from.

    Args:
        profile: The profile.

    Returns:
        `{what: text}` of what its metadata tells. Whoever made the file wrote it: show it as text only.
    """
    metadata = profile.metadata
    config, settings = part(metadata, "model_config"), part(metadata, "flerm")
    arguments, optimizer, packages = (part(metadata, key) for key in ("training_arguments", "optimizer", "packages"))
    adapters = [adapter for adapter in part(metadata, "adapters").values() if isinstance(adapter, Mapping)]
    name = config.get("_name_or_path") or config.get("model_type") or metadata.get("model")
    batch = arguments.get("per_device_train_batch_size")
    accumulated = arguments.get("gradient_accumulation_steps", 1)
    steps = profile.steps.tolist()
    told = {
        "model": _listed(name, *_fields(config, _SIZES)),
        "base model": next((adapter["base_model_name_or_path"] for adapter in adapters if base_of(adapter)), None),
        "trained": _listed(
            f"{len(profile.names)} tensors",
            *(_listed(adapter.get("peft_type"), *_fields(adapter, _ADAPTER_FIELDS)) for adapter in adapters),
        ),
        "data": metadata.get("dataset_fingerprint") and f"fingerprint {metadata['dataset_fingerprint']}",
        "learning rate": _listed(
            arguments.get("learning_rate"),
            arguments.get("lr_scheduler_type"),
            *_fields(arguments, ("warmup_steps", "max_steps")),
        ),
        "sweep": ", ".join(f"{rate:g}: loss {loss:g}" for rate, loss in sweep(profile).items()),
        "optimizer": _listed(optimizer.get("class"), *_fields(arguments, ("weight_decay",))),
        "batch": batch and f"{batch} x {accumulated} per device",
        "seed": arguments.get("seed"),
        "measured at": f"{len(steps)} steps, {steps[0]} to {steps[-1]}" if steps else "no step",
        "estimator": _listed(settings.get("estimator"), *_fields(settings, ("probes", "probes_per_batch"))),
        "output": _listed(*(settings.get(key) for key in ("output", "positions", "metric"))),
        "averaged over": metadata.get("averaged_over") and f"{metadata['averaged_over']} profiles",
        "matched": metadata.get("matching")
        and _listed(f"{len(matched_scales(profile))} scales", *_fields(part(metadata, "matching"), ("base_commit",))),
        "packages": _listed(*(f"{package} {version}" for package, version in packages.items())),
    }
    return {what: str(text) for what, text in told.items() if text not in (None, "")}


def base_of(adapter: Mapping[str, Any]) -> str | None:
    """Read the model that an adapter was trained on.

    Args:
        adapter: Its config, from a profile's metadata.

    Returns:
        Its name; None if it has none.
    """
    found = adapter.get("base_model_name_or_path")
    return found if isinstance(found, str) and found else None


def part(metadata: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Read an object of the metadata.

    Args:
        metadata: A profile's.
        key: Which.

    Returns:
        The object; empty if there is none.
    """
    found = metadata.get(key)
    return found if isinstance(found, Mapping) else {}


def _fields(values: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    return [f"{key} {values[key]}" for key in keys if values.get(key) not in (None, False)]


def _listed(*items: Any) -> str:
    return ", ".join(str(item) for item in items if item not in (None, ""))
