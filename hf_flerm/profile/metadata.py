"""The metadata of a profile. Only this module reads their keys.

Metadata come from a file and are untrusted. Any JSON is accepted: entries that are missing or have an unexpected type
are ignored. When a profile is created, `check_metadata` refuses what must not be accepted at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import numpy as np

from ..model.name_text import preview, without_prefix
from .file import RESERVED, RateProfileError

SETTINGS = "flerm"  # what was measured and how: options of `FLeRMConfig`
GROUPS = "param_groups"  # what stepped which tensors; see `hf_flerm.optimizer.param_groups.described_groups`
MATCHING = "matching"  # of a matched run: its base and `Evidence.to_record()`
AVERAGED_OVER = "averaged_over"
LARGEST_CHANGE = "largest_change"  # [optimizer step, change of the outputs in this step]
SWEEP = "sweep"  # [[learning rate, mean loss or null], ...]
SWEEP_RUNS = "sweep_runs"  # [{"learning_rate": ..., "seed": ..., "end": ..., "loss": ..., "steps": ...}, ...]
SWEEP_OPTIMUM = "sweep_optimum"  # the learning rate between those of the sweep at which the loss is lowest
# Settings that define what a rate measures. Profiles that differ in one of them cannot be compared.
UNITS = ("output", "positions", "metric")
CALLABLE = "callable"  # recorded as `output` if it was a function
_Value = TypeVar("_Value")
_TRAINING_OPTIONS: Mapping[str, tuple[type, ...]] = {  # and their types in JSON
    "optim": (str,),
    "optim_args": (str,),
    "lr_scheduler_type": (str,),
    "lr_scheduler_kwargs": (dict,),
    "warmup_steps": (int, float),
    "max_steps": (int,),
    "num_train_epochs": (int, float),
    "per_device_train_batch_size": (int,),
    "gradient_accumulation_steps": (int,),
    "weight_decay": (int, float),
    "adam_beta1": (int, float),
    "adam_beta2": (int, float),
    "adam_epsilon": (int, float),
    "max_grad_norm": (int, float),
}
_OBJECTS = (SETTINGS, "kinds", MATCHING, "training_arguments")  # entries that must be JSON objects
_LARGEST_SIZE = 2**63 - 1  # of a tensor's dimension in torch, or of a count
# Entries of `optimizer` that do not change an update, or are recorded elsewhere.
_NO_OPTIONS = {"class", "lr", "weight_decay", "fused", "foreach", "capturable", "differentiable"}


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise RateProfileError if the metadata are not JSON-serializable, or a main entry has the wrong type."""
    if taken := metadata.keys() & RESERVED:
        raise RateProfileError(f"{preview(taken)} cannot be keys of the metadata: the file format uses them.")
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RateProfileError(f"the metadata cannot be written as JSON: {error}") from error
    for key in _OBJECTS:
        if not isinstance(metadata.get(key, {}), dict):
            raise RateProfileError(f"{key!r} in the metadata must be an object; got {metadata[key]!r:.200}.")
    if not all(isinstance(kind, str) for kind in metadata.get("kinds", {}).values()):
        raise RateProfileError(f"'kinds' in the metadata must be texts; got {metadata['kinds']!r:.200}.")


@dataclass(frozen=True)
class Adapter:
    """The config of a PEFT adapter: from a profile's metadata, or `PeftConfig.to_dict()` of a model's adapter."""

    config: Mapping[str, Any]

    @property
    def method(self) -> str:
        """PEFT's name of the method; "DORA" for LoRA with `use_dora`."""
        peft_type = self.config.get("peft_type")
        return "DORA" if self.config.get("use_dora") else str(getattr(peft_type, "value", peft_type))

    @property
    def scaling(self) -> float:
        """The factor on LoRA's output: alpha / r, or alpha / sqrt(r) for rsLoRA; 1 if either is unknown."""
        rank, alpha = _positive(self.config.get("r")), _positive(self.config.get("lora_alpha"))
        if rank is None or alpha is None:
            return 1.0
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    @property
    def base_model(self) -> str | None:
        """The folder or repository of the model that the adapter was trained on."""
        return _text(self.config.get("base_model_name_or_path"))


@dataclass(frozen=True)
class ProfileMetadata:
    """Typed view of `RateProfile.metadata`. Properties are evaluated lazily and never raise.

    Args:
        raw: The metadata, as `hf_flerm.training.provenance` writes them.
    """

    raw: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was measured and how: estimator, probes, mode, and the entries of `units`."""
        return self._object(SETTINGS)

    @property
    def training_arguments(self) -> Mapping[str, Any]:
        """The `TrainingArguments` that determine the rates."""
        return self._object("training_arguments")

    @property
    def training_options(self) -> dict[str, Any]:
        """The recorded arguments that a similar training should share, for `TrainingArguments(**training_options)`.

        Learning rate, seed and precision are left out.
        """
        found = self.training_arguments
        return {key: found[key] for key, kind in _TRAINING_OPTIONS.items() if type(found.get(key)) in kind}

    @property
    def optimizer(self) -> Mapping[str, Any]:
        """Class and defaults of the optimizer; if it delegates its step, "parts" has those of the optimizers inside."""
        return self._object("optimizer")

    @property
    def optimizer_class(self) -> str | None:
        """Name of the optimizer's class."""
        return _text(self.optimizer.get("class"))

    @property
    def algorithms(self) -> dict[str, str]:
        """`{canonical parameter name: algorithm that stepped it}`, such as "Muon" and "AdamW" in one run."""
        return {name: found for name, found in self._by_group("optimizer").items() if isinstance(found, str)}

    @property
    def optimizer_name(self) -> str | None:
        """The algorithms that stepped the run ("AdamW", or "AdamW, Muon"), else the class of its optimizer."""
        return ", ".join(sorted(set(self.algorithms.values()))) or self.optimizer_class

    @property
    def learning_rates(self) -> dict[str, float]:
        """`{canonical parameter name: its learning rate before any schedule}` of those with one above 0."""
        rates = {name: _positive(found) for name, found in self._by_group("learning_rate").items()}
        return {name: rate for name, rate in rates.items() if rate is not None}

    @property
    def model_config(self) -> Mapping[str, Any]:
        """The config of the model, without default values."""
        return self._object("model_config")

    @property
    def packages(self) -> Mapping[str, Any]:
        """`{package: version}`."""
        return self._object("packages")

    @property
    def units(self) -> dict[str, str]:
        """What the rates measure, if known: `{"output": ..., "positions": ..., "metric": ...}`."""
        return {unit: str(value) for unit in UNITS if (value := self.settings.get(unit)) is not None}

    @property
    def config_units(self) -> dict[str, Any]:
        """`units` without an output that was a function, for `FLeRMConfig(**config_units)`."""
        return {unit: value for unit, value in self.units.items() if value != CALLABLE}

    @property
    def is_matched(self) -> bool:
        """Whether the run was itself matched to a profile."""
        return self.settings.get("mode") == "match"

    @property
    def learning_rate(self) -> float | None:
        """The learning rate of the run, above 0; of several, the largest.

        It is read from the param groups: an optimizer that the user made does not have that of `TrainingArguments`.
        """
        return max(self.learning_rates.values(), default=_positive(self.training_arguments.get("learning_rate")))

    @property
    def learning_rate_texts(self) -> list[str]:
        """The learning rates with what stepped at them, largest first: ["0.02 (Muon)", "0.0003 (AdamW)"]."""
        pairs = {(rate, self.algorithms.get(name, "?")) for name, rate in self.learning_rates.items()}
        return [f"{rate:g} ({algorithm})" for rate, algorithm in sorted(pairs, key=lambda pair: (-pair[0], pair[1]))]

    def learning_rates_for(self, kinds: Mapping[str, str]) -> dict[str, float]:
        """Return the learning rates that this run had for the tensors of another model.

        Args:
            kinds: `{canonical name: kind}` of the tensors of the other model.

        Returns:
            `{canonical name: learning rate}`. Tensors for which it is not known are left out: of kinds that this run
            did not train, or trained with several learning rates, unless it had a single one for everything.
        """
        everywhere = {self.learning_rate} if len(set(self.learning_rates.values())) < 2 else set()
        by_kind = _by_kind(self.learning_rates, self.kinds)
        found = {}
        for name, kind in kinds.items():
            rates = everywhere or by_kind.get(without_prefix(kind), set())
            rate = self.learning_rates.get(name) if len(rates) > 1 else next(iter(rates), None)
            if rate is not None:
                found[name] = rate
        return found

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """The optimizer's defaults that influence an update, without learning rate and weight decay."""
        return {key: value for key, value in self.optimizer.items() if key not in _NO_OPTIONS}

    @property
    def weight_decay(self) -> float | None:
        """The largest weight decay of a tensor, from the param groups like `learning_rate`."""
        found = [decay for each in self._by_group("weight_decay").values() if (decay := _number(each)) is not None]
        return max(found, default=_number(self.training_arguments.get("weight_decay")))

    @property
    def batch_size(self) -> int | None:
        """Examples per optimizer step on all processes together."""
        return _count(self.training_arguments.get("total_train_batch_size"))

    @property
    def schedule(self) -> str | None:
        """The type of the learning-rate schedule."""
        return _text(self.training_arguments.get("lr_scheduler_type"))

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole training."""
        return _count(self.training_arguments.get("max_steps"))

    @property
    def warmup_steps(self) -> int | None:
        """Optimizer steps of the warm-up; older profiles may hold them as a fraction of all steps."""
        steps, total = _number(self.training_arguments.get("warmup_steps")), self.total_steps
        if steps is None or steps < 0:
            return None
        if 0 < steps < 1:
            return None if total is None else math.ceil(steps * total)
        return int(steps)

    @property
    def model_name(self) -> str | None:
        """The repository or folder of the model, else its type, else its class."""
        names = (self.model_config.get("_name_or_path"), self.model_config.get("model_type"), self.raw.get("model"))
        return next((name for name in names if isinstance(name, str) and name), None)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The configs of the adapters, in the order of PEFT."""
        return tuple(Adapter(config) for config in self._object("adapters").values() if isinstance(config, Mapping))

    @property
    def base_models(self) -> tuple[str, ...]:
        """Names of the pretrained model: from the adapters' configs first, then from the model's config."""
        names = [*(adapter.base_model for adapter in self.adapters), self.model_config.get("_name_or_path")]
        return tuple(name for name in names if isinstance(name, str) and name)

    @property
    def kinds(self) -> dict[str, str]:
        """`{canonical parameter name: kind}`; a kind is the name with `*` for the indices of blocks."""
        return {name: kind for name, kind in self._object("kinds").items() if isinstance(kind, str)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`{canonical parameter name: shape}`."""
        rows = self._object("shapes").items()
        return {name: tuple(row) for name, row in rows if isinstance(row, list) and all(map(_is_size, row))}

    @property
    def dataset_fingerprint(self) -> str | None:
        """The fingerprint that `datasets` gives the training set."""
        return _text(self.raw.get("dataset_fingerprint"))

    @property
    def largest_change(self) -> tuple[int, float] | None:
        """The measured step that changed the outputs most, and the change: learning rates times rates, joint."""
        found = self.raw.get(LARGEST_CHANGE)
        if not isinstance(found, list) or len(found) != 2:
            return None
        step, change = found[0], _positive(found[1])
        return None if type(step) is not int or step < 0 or change is None else (step, change)

    @property
    def averaged_over(self) -> int | None:
        """How many profiles this one is the average of."""
        return _count(self.raw.get(AVERAGED_OVER))

    @property
    def sweep(self) -> dict[float, float]:
        """`{learning rate: validation loss}` of the sweep in which the run's learning rate was chosen.

        The loss is nan if a run diverged. Users can add a sweep to the metadata: `sweep`, a list of [rate, loss] pairs.
        """
        pairs = self.raw.get(SWEEP)
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            return {}
        numbers = [(_number(rate), math.nan if loss is None else _number(loss)) for rate, loss in pairs]
        return {rate: loss for rate, loss in numbers if rate is not None and loss is not None}

    @property
    def sweep_losses(self) -> dict[float, tuple[float, ...]]:
        """`{learning rate: losses, one per seed}` of the sweep, inf for a run that diverged; for `plot_losses`.

        Runs that were stopped early are left out. A sweep without runs of several seeds has the losses of `sweep`.
        """
        rows = self.raw.get(SWEEP_RUNS)
        found: dict[float, tuple[float, ...]] = {}
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, Mapping):
                rate = _positive(row.get("learning_rate"))
                loss = math.inf if row.get("end") == "diverged" else _number(row.get("loss"))
                if rate is not None and loss is not None:
                    found[rate] = (*found.get(rate, ()), loss)
        return found or {rate: (math.inf if math.isnan(loss) else loss,) for rate, loss in self.sweep.items()}

    @property
    def sweep_optimum(self) -> float | None:
        """The learning rate at which the loss of the sweep is lowest, read between those that were tried."""
        return _positive(self.raw.get(SWEEP_OPTIMUM))

    @property
    def matching(self) -> Mapping[str, Any] | None:
        """Of a matched run: its `Evidence.to_record()` and the profile that it was matched to. None for other runs."""
        found = self.raw.get(MATCHING)
        return found if isinstance(found, Mapping) else None

    @property
    def matched_scales(self) -> dict[str, float]:
        """`{unit: scale}` at the end of a matched run; empty if the run only recorded."""
        found = (self.matching or {}).get("scales")
        numbers = {unit: _number(log) for unit, log in found.items()} if isinstance(found, Mapping) else {}
        logs = {unit: log for unit, log in numbers.items() if log is not None}
        with np.errstate(over="ignore"):  # a scale too large for a float is inf
            return dict(zip(logs, np.exp([*logs.values()]).tolist(), strict=True))

    @property
    def matched_quotients(self) -> dict[str, tuple[float, float]]:
        """The mean quotient base rate / target rate of each unit of a matched run, without pooling or shrinkage.

        Returns:
            `{unit: (geometric mean over the measurements, standard error of its logarithm)}` of the units that have a
            quotient. The error is 0 if there is only one measurement.
        """
        columns = (self.matching or {}).get("logs")
        found = {}
        for unit, column in columns.items() if isinstance(columns, Mapping) else ():
            numbers = [_number(value) for value in column] if isinstance(column, list) else []
            logs = np.array([number for number in numbers if number is not None])
            with np.errstate(over="ignore", invalid="ignore"):
                if len(logs):
                    error = float(logs.std(ddof=1) / len(logs) ** 0.5) if len(logs) > 1 else 0.0
                    found[unit] = (float(np.exp(logs.mean())), error)
        return found

    def _by_group(self, key: str) -> dict[str, Any]:
        """`{canonical name: entry of its param group}`."""
        groups = self.raw.get(GROUPS)
        described = [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []
        named = [(group.get("names"), group.get(key)) for group in described]
        return {
            name: value for names, value in named if isinstance(names, list) for name in names if isinstance(name, str)
        }

    def _object(self, key: str) -> Mapping[str, Any]:
        found = self.raw.get(key)
        return found if isinstance(found, Mapping) else {}


def other_algorithms(base: ProfileMetadata, other: ProfileMetadata) -> dict[str, tuple[str, str]]:
    """Compare what stepped the tensors of two runs.

    Args:
        base: One run.
        other: The other run.

    Returns:
        `{kind: (algorithms in base, algorithms in other)}` of the kinds of tensors that both trained, by different
        algorithms: `{"h.*.attn.c_attn.weight": ("AdamW", "Muon")}`. Empty also if one of the runs does not say.
    """
    before, after = (_by_kind(run.algorithms, run.kinds) for run in (base, other))
    both = ((kind, before[kind], after[kind]) for kind in sorted(before.keys() & after.keys()))
    return {kind: (", ".join(sorted(was)), ", ".join(sorted(now))) for kind, was, now in both if was != now}


def _by_kind(values: Mapping[str, _Value], kinds: Mapping[str, str]) -> dict[str, set[_Value]]:
    """Return `{kind without PEFT's prefix: values of its tensors}`."""
    found: dict[str, set[_Value]] = {}
    for name, value in values.items():
        found.setdefault(without_prefix(kinds.get(name, name)), set()).add(value)
    return found


def _number(value: object) -> float | None:
    """Return a finite number as float, else None: JSON has integers of any length, and Python's True is an int."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _positive(value: object) -> float | None:
    number = _number(value)
    return number if number is not None and number > 0 else None


def _count(value: object) -> int | None:
    return value if _is_size(value) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= _LARGEST_SIZE
