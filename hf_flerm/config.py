"""`FLeRMConfig`: all options of a run, checked when the object is created."""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from textwrap import fill
from typing import Any, TypeVar

import torch

from .choices import (
    Depth,
    Estimator,
    Granularity,
    LogBy,
    Metric,
    Mode,
    Policy,
    Pool,
    Positions,
    Rules,
    Unmatched,
    check_choice,
    values,
)
from .profile.rate_profile import RateProfile
from .rates.outputs import MeasuredOutput, OutputFunction

_ALLOWED: Mapping[str, object] = {
    "mode": Mode,
    "granularity": Granularity,
    "unmatched": Unmatched,
    "metric": Metric,
    "positions": Positions,
    "log_by": LogBy,
    "estimator": Estimator,
    "depth": Depth,
    "pool": Pool,
    "policy": Policy,
    "rules": Rules,
}
# Options that may also be None.
_OPTIONAL = ("granularity", "metric", "policy", "positions")

Config = TypeVar("Config", bound=type)


def _documented(cls: Config) -> Config:
    """Class decorator: insert an `Args:` section, made from the help texts of the fields, before `Raises:`."""
    entries = [
        fill(f"{entry.name}: {help_of(entry)}", 112, initial_indent=" " * 8, subsequent_indent=" " * 12)
        for entry in fields(cls)
    ]
    summary, raises = (cls.__doc__ or "").split("    Raises:")
    cls.__doc__ = "\n".join([f"{summary}    Args:", *entries, "", f"    Raises:{raises}"])
    return cls


def help_of(entry: Field[Any]) -> str:
    """Return the help text of a field of `FLeRMConfig` or `Research`."""
    return str(entry.metadata.get("help", ""))


@_documented
@dataclass
class Research:
    """Options of the measuring method: the estimator, how scales are averaged, and how probes are drawn.

    Most users keep the defaults.

    Raises:
        ValueError: If a value is not allowed.
    """

    estimator: str = field(
        default="per_example",
        metadata={"help": "How rates are estimated from probes; see `measure_rates`. 'kronecker' is the paper's."},
    )
    depth: str = field(
        default="equal",
        metadata={
            "help": "How the rate of a base block is split over the m blocks that correspond to it in a deeper "
            "target; see `map_profile`."
        },
    )
    policy: str | None = field(
        default=None,
        metadata={
            "help": "Which scales a matched run takes. 'hold': the prior, which is what published rules say of the "
            "change, or 1. 'level': the prior and one factor for all tensors, by the joint rate of the model. "
            "'follow': each kind of tensor follows its own rates. 'gate': the prior while the kinds are in balance, "
            "else as 'follow'. None: by what changed since the base; see `hf_flerm.transfer.strategy`."
        },
    )
    rules: str = field(
        default="published",
        metadata={"help": "Where the prior of the scales comes from: 'published' rules, or 'none', which is 1."},
    )
    pool: str = field(
        default="kind",
        metadata={
            "help": "For policy 'follow': what the logarithms of scales are averaged over: all units of one 'kind' "
            "(their names differ only in block indices), or nothing ('unit'). A unit is what `granularity` gives one "
            "scale: a tensor, a module, a block or the whole model."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "For policy 'follow': how the logarithms of scales are averaged over measurements. None: each is "
            "weighted by its standard error. A number: decay of a bias-corrected running average; 1 is the plain mean, "
            "0.9 the value of the paper, 0 the latest measurement."
        },
    )
    probes: int | str | None = field(
        default=None,
        metadata={
            "help": "Number of probe batches in one measurement. Each batch has `probes_per_batch` draws of the "
            "random output weights omega. None: enough batches for n pairs of an example and a draw, where n is half "
            "the examples of an optimizer step on one device, at most 8; a measurement then costs about a third of a "
            "training step. 'auto': more batches until the relative standard error of every rate is at most "
            "`target_error`, but no more than `max_probes`."
        },
    )
    target_error: float = field(
        default=0.05,
        metadata={"help": "Relative standard error at which probes='auto' stops."},
    )
    max_probes: int = field(
        default=64,
        metadata={
            "help": "Largest number of probe batches in one measurement with probes='auto'. Each batch has "
            "`probes_per_batch` draws of omega."
        },
    )
    probes_per_batch: int = field(
        default=2,
        metadata={
            "help": "Number of draws of omega that share the forward pass of a probe batch. More draws cost less "
            "than more batches, but they use fewer examples."
        },
    )
    probe_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples in a probe batch. None: n / `probes_per_batch`, with n as for `probes`, but no more "
            "than a training batch of one process has."
        },
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_whole_number("probes", self.probes, 1, (None, "auto"))
        _check_whole_number("max_probes", self.max_probes, 1)
        _check_whole_number("probes_per_batch", self.probes_per_batch, 1)
        _check_whole_number("probe_batch_size", self.probe_batch_size, 1, (None,))
        if self.beta is not None and not (_is_number(self.beta) and 0 <= self.beta <= 1):
            raise ValueError(f"beta is {self.beta!r}; it must lie between 0 and 1, or be None.")
        if not _is_number(self.target_error) or not 0 < self.target_error < math.inf:
            raise ValueError(f"target_error is {self.target_error!r}; it must be positive, 0.05 for 5 %.")


_MOVED = tuple(entry.name for entry in fields(Research))


def _with_old_keywords(cls: Config) -> Config:
    """Class decorator: also accept the fields of `Research` as keywords of the config, with a FutureWarning.

    They were fields of the config in version 0.1. To be removed in version 0.3.
    """
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def with_old_keywords(self: Any, *args: Any, **options: Any) -> None:
        old = {name: options.pop(name) for name in _MOVED if name in options}
        if old:
            _warn_of_old(old)
            research = options.get("research") or Research()
            options["research"] = Research(**{**asdict(research), **old})
        init(self, *args, **options)

    cls.__init__ = with_old_keywords  # type: ignore[misc]
    return cls


def _warn_of_old(names: Iterable[str]) -> None:
    given = ", ".join(f"{name}=..." for name in names)
    warnings.warn(
        f"FLeRMConfig({given}) is deprecated: write FLeRMConfig(research=Research({given})). Version 0.3 will accept "
        "only that.",
        FutureWarning,
        stacklevel=3,
    )


@_with_old_keywords
@_documented
@dataclass
class FLeRMConfig:
    """Options of a run: what to measure, at which steps, and how to use the rates. The defaults suit most runs.

    Raises:
        ValueError: If a value is not allowed, or `mode` and `profile` contradict each other.
    """

    mode: str = field(
        default="record",
        metadata={
            "help": "'record' measures and changes nothing. 'match' also scales the learning rate of each tensor, so "
            "that its update changes the outputs as much as it did in the base run (`profile`)."
        },
    )
    profile: RateProfile | str | os.PathLike[str] | None = field(
        default=None,
        metadata={
            "help": "For 'match': the profile of the base run, as a `RateProfile`, a folder, a file, or a "
            "repository on the Hub."
        },
    )
    granularity: str | None = field(
        default=None,
        metadata={
            "help": "What gets its own scale. None: what suits the change since the base. Else each unit follows its "
            "own rates: each 'tensor'; each 'module' (by the joint rate of its trained "
            "tensors; for a target with another adapter or with full fine-tuning); each 'block'; or the whole model "
            "('global')."
        },
    )
    unmatched: str = field(
        default="error",
        metadata={
            "help": "What happens to tensors without a rate in the profile: 'error' raises, 'global' uses the scale "
            "of the whole model, 'nominal' keeps their learning rate, 'freeze' sets it to 0."
        },
    )
    metric: str | None = field(
        default=None,
        metadata={
            "help": "How the size of an output change is measured: 'euclidean' or 'fisher'; see `measure_rates`. None: "
            "in mode 'match' as in the profile; in mode 'record' 'fisher' if the outputs are logits of classes or of "
            "0/1 labels according to labels or config, else 'euclidean'."
        },
    )
    output: str | OutputFunction | None = field(
        default=None,
        metadata={
            "help": "Which output of the model is measured; see `measure_rates`. None: the logits, but in mode 'match' "
            "as in the profile; if the base had a callable, pass it here again. A callable cannot be written to JSON."
        },
    )
    positions: str | None = field(
        default=None,
        metadata={
            "help": "Which positions count; see `measure_rates`. None: in mode 'match' as in the profile; in mode "
            "'record' 'attention_mask', but 'labels' in TRL's trainers of language models."
        },
    )
    measure_every: int = field(
        default=100,
        metadata={
            "help": "Besides the first steps, measure at the multiples of this number of optimizer steps; see "
            "`measure_steps`."
        },
    )
    measure_steps: Sequence[int] | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps at which to measure; 0 is the first update. None: 0, 1, 2, 4, 8, 12, 16, 24, "
            "32, 48, 64 and all multiples of `measure_every`."
        },
    )
    max_scale: float = field(
        default=100000.0,
        metadata={"help": "Largest scale, and the inverse of the smallest. FLeRM warns once when scales reach it."},
    )
    max_change: float = field(
        default=4.0,
        metadata={
            "help": "Largest factor by which a scale changes from one measurement to the next. The first change of the "
            "scale of a single tensor that follows its own rates is not limited."
        },
    )
    snapshot_device: str | None = field(
        default=None,
        metadata={
            "help": "Device of the copy of the weights from before a measured update, for instance 'cpu' if a "
            "second copy of the trainable weights does not fit. None: the device of the weights."
        },
    )
    seed: int = field(
        default=0,
        metadata={"help": "Seed of the random numbers of the probes."},
    )
    log_by: str = field(
        default="kind",
        metadata={
            "help": "What has entries in the logs, besides the joint rate, the range of the scales and the time: each "
            "'kind' of tensor, by a geometric mean, each 'tensor', or 'none'. The console does not show these entries."
        },
    )
    research: Research = field(
        default_factory=Research,
        metadata={"help": "Options of the measuring method, for instance `Research(estimator=..., probes=...)`."},
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        if not isinstance(self.research, Research):
            raise ValueError(f"research is {self.research!r}; it must be a hf_flerm.config.Research.")
        if not isinstance(self.profile, (RateProfile, str, os.PathLike, type(None))):
            raise ValueError(
                f"profile is {self.profile!r}; it must be a RateProfile, a folder, a file or a repository."
            )
        if self.mode == "match" and self.profile is None:
            raise ValueError("mode 'match' needs a profile: the folder, file or repository of the base run's profile.")
        if self.mode == "record" and self.profile is not None:
            raise ValueError("mode 'record' takes no profile. Use mode='match' to train at a profile's rates.")
        _check_whole_number("measure_every", self.measure_every, 1)
        _check_whole_number("seed", self.seed, 0)
        for name in ("max_scale", "max_change"):
            value = getattr(self, name)
            if not _is_number(value) or not value >= 1:
                raise ValueError(f"{name} is {value!r}; it must be a number of at least 1.")
        MeasuredOutput(self.output, self.positions or "attention_mask", self.metric or "euclidean")
        if self.snapshot_device is not None:
            try:
                torch.device(self.snapshot_device)
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"snapshot_device is {self.snapshot_device!r}; it must be a device such as 'cpu', or None."
                ) from error
        if self.measure_steps is not None:
            steps = list(self.measure_steps) if isinstance(self.measure_steps, Iterable) else []
            if not steps or not all(_is_whole(step) and step >= 0 for step in steps):
                raise ValueError(
                    f"measure_steps is {self.measure_steps!r}; it must hold whole numbers from 0, at least one."
                )
            self.measure_steps = tuple(sorted(set(steps)))

    def __getattr__(self, name: str) -> Any:
        if name in _MOVED:  # fields of version 0.1; see `_with_old_keywords`
            _warn_of_old([name])
            return getattr(self.research, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def to_json_string(self) -> str:
        """Return all fields as JSON with sorted keys.

        Raises:
            ValueError: If `profile` is an object and not a path or repository, or `output` is a callable.
        """
        if isinstance(self.profile, RateProfile) or callable(self.output):
            raise ValueError(
                "a profile object or an output callable has no JSON form. Save the profile and give its folder; "
                "set output in code."
            )
        fields_ = asdict(self)
        fields_["profile"] = None if self.profile is None else os.fspath(self.profile)
        return json.dumps(fields_, indent=2, sort_keys=True)

    @classmethod
    def from_json_string(cls, text: str) -> FLeRMConfig:
        """Read what `to_json_string` wrote.

        Raises:
            ValueError: If `text` is not a JSON object of known fields.
        """
        content: Any = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"an FLeRMConfig is a JSON object, not {type(content).__name__}.")
        _check_known("fields", content, {entry.name for entry in fields(cls)} | {*_MOVED})
        research = content.pop("research", {})
        if not isinstance(research, dict):
            raise ValueError(f"research is {research!r}; it must be a JSON object.")
        _check_known("fields of research", research, {*_MOVED})
        return cls(research=Research(**research), **content)


def check_config(config: object) -> FLeRMConfig:
    """Return `config`, or raise ValueError if it is not an `FLeRMConfig`."""
    if not isinstance(config, FLeRMConfig):
        raise ValueError(
            f"{config!r:.100} is not an FLeRMConfig: pass FLeRMConfig(...), or the config of FLeRMArguments "
            "(flerm.config)."
        )
    return config


def _check_choices(config: Any) -> None:
    for entry in fields(config):
        value = getattr(config, entry.name)
        if entry.name in _ALLOWED and not (value is None and entry.name in _OPTIONAL):
            also = ", or None" if entry.name in _OPTIONAL else ""
            check_choice(entry.name, value, values(_ALLOWED[entry.name]), also)


def _check_known(what: str, given: Mapping[str, Any], known: set[str]) -> None:
    if given.keys() - known:
        raise ValueError(f"unknown {what} {sorted(given.keys() - known)}; known are {sorted(known)}.")


def _check_whole_number(name: str, value: object, least: int, words: tuple[str | None, ...] = ()) -> None:
    if not (_is_whole(value) and value >= least) and value not in words:  # type: ignore[operator]
        also = "".join(f", or {word!r}" for word in words)
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}{also}.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
