"""`FLeRMConfig`: every choice of a run, checked when it is made."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from .choices import Average, Depth, Granularity, Unmatched, values
from .profile.rate_profile import RateProfile
from .rates.estimators import ESTIMATORS
from .rates.outputs import OutputFunction, Outputs

_ALLOWED = {
    "mode": ("record", "match"),
    "estimator": ESTIMATORS,
    "granularity": values(Granularity),
    "depth": values(Depth),
    "pool": values(Average),
    "unmatched": values(Unmatched),
    "log_by": ("kind", "tensor"),
}

_WHOLE_NUMBERS = {
    "measure_every": 1,
    "probes": 1,
    "max_probes": 1,
    "probes_per_batch": 1,
    "probe_batch_size": 1,
    "seed": 0,
}
_WORDS = {"probes": (None, "auto"), "probe_batch_size": (None,)}
_EARLY_STEPS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64)


@dataclass
class FLeRMConfig:
    """What to measure, when, and what to do with it. The defaults are what most people should use.

    Args:
        mode: `record` measures and changes nothing; `match` also sets one learning rate per tensor so that it moves
            the outputs as far as it did in the run of `profile`.
        profile: For `match`: a `RateProfile`, a folder or file that holds one, or a repository id on the Hub.
        estimator: How a probe becomes a rate; see `measure_rates`.
        granularity: What is matched, and so has a scale of its own: each `tensor`, each `module` (the joint rate of
            all that is trained of it: another adapter, or full fine-tuning), each `block`, or everything (`global`:
            one number).
        depth: How the rate of a base block goes to the m blocks that it becomes; see `map_profile`.
        pool: What log-scales are averaged over: all units of one `kind` (a name without its block's index), or not at
            all (`unit`).
        beta: How log-scales are averaged over measurements. None: as the evidence supports. A number: the decay of a
            bias-corrected running average, 1 for the plain mean of all so far, 0.9 as in the paper, 0 for the latest.
        max_scale: Scales are held between its inverse and it, with a warning.
        max_change: A scale changes by at most this factor from one measurement to the next.
        measure_every: Steps between measurements, once they are no longer dense.
        measure_steps: Explicit optimizer steps to measure at (0 = the first update). None: 0, 1, 2, 4, 8, 12, 16,
            24, 32, 48, 64 and then every `measure_every`.
        probes: Probe batches per measurement. None: as many as it takes for half as many draws of omega as an optimizer
            step sees examples on one device, at most 8. So a measurement costs about a third of a training step.
            `auto`: until every rate's relative standard error is at most `target_error`, but no more than `max_probes`.
        target_error: For `probes="auto"`.
        max_probes: For `probes="auto"`.
        probes_per_batch: Draws of omega that share one forward pass of a probe batch: cheaper than as many batches,
            but over fewer examples.
        probe_batch_size: Examples in a probe batch. None: as many of these as fit into a training batch.
        unmatched: What becomes of tensors that the profile has no rate for: `error`, the scale of everything together
            (`global`), the `nominal` learning rate, or none at all (`freeze`).
        output: What "the function" is; see `measure_rates`. A callable is not kept in JSON.
        positions: Which positions count; see `measure_rates`. None: `attention_mask`, but `labels` in TRL's trainers of
            policies.
        metric: Size of an output change; see `measure_rates`.
        snapshot_device: Where the weights from before a measured update are kept, for instance `cpu` where a second
            copy of the trainable weights does not fit. None: beside the weights.
        seed: Of the probes' own random numbers.
        log_by: What the logs have entries of: each `kind` of tensor (geometric means) or each `tensor`.

    Raises:
        ValueError: If a value is not allowed, or the mode and the profile do not fit.
    """

    mode: str = "record"
    profile: RateProfile | str | os.PathLike[str] | None = None
    estimator: str = "per_example"
    granularity: str = "tensor"
    depth: str = "equal"
    pool: str = "kind"
    beta: float | None = None
    max_scale: float = 1e5
    max_change: float = 4.0
    measure_every: int = 100
    measure_steps: Sequence[int] | None = None
    probes: int | str | None = None
    target_error: float = 0.05
    max_probes: int = 64
    probes_per_batch: int = 2
    probe_batch_size: int | None = None
    unmatched: str = "error"
    output: str | OutputFunction | None = None
    positions: str | None = None
    metric: str = "euclidean"
    snapshot_device: str | None = None
    seed: int = 0
    log_by: str = "kind"

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        if not isinstance(self.profile, (RateProfile, str, os.PathLike, type(None))):
            raise ValueError(
                f"profile is {self.profile!r}; it must be a RateProfile, a folder, a file or a repository."
            )
        if self.mode == "match" and self.profile is None:
            raise ValueError("mode 'match' needs a profile: the folder, file or repository of the base run's profile.")
        if self.mode == "record" and self.profile is not None:
            raise ValueError("mode 'record' takes no profile. Use mode='match' to train at a profile's rates.")
        for name, least in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            words = _WORDS.get(name, ())
            if not (_is_whole(value) and value >= least) and value not in words:
                also = "".join(f", or {word!r}" for word in words)
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}{also}.")
        if self.beta is not None and not (_is_number(self.beta) and 0 <= self.beta <= 1):
            raise ValueError(f"beta is {self.beta!r}; it must lie between 0 and 1, or be None.")
        for name in ("max_scale", "max_change"):
            value = getattr(self, name)
            if not _is_number(value) or not value >= 1:
                raise ValueError(f"{name} is {value!r}; it must be a number of at least 1.")
        if not _is_number(self.target_error) or not 0 < self.target_error < math.inf:
            raise ValueError(f"target_error is {self.target_error!r}; it must be positive, 0.05 for 5 %.")
        Outputs(self.output, self.positions or "attention_mask", self.metric)
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

    def last_asked(self, step: int) -> int | None:
        """Find the latest step that the schedule wants measured.

        Args:
            step: Optimizer step, 0 = the first update.

        Returns:
            That step or one before it; None if none is wanted so early.
        """
        asked = self.measure_steps
        if asked is None:
            asked = (*_EARLY_STEPS, step - step % self.measure_every)
        return max((wanted for wanted in asked if wanted <= step), default=None)

    def to_json_string(self) -> str:
        """Write as JSON.

        Returns:
            Sorted JSON of every field.

        Raises:
            ValueError: If `profile` is an object and not a place, or `output` is a callable.
        """
        if isinstance(self.profile, RateProfile) or callable(self.output):
            raise ValueError(
                "a profile object or an output callable has no JSON form. Save the profile and give its folder; "
                "set output in code."
            )
        content = asdict(self)
        content["profile"] = None if self.profile is None else os.fspath(self.profile)
        return json.dumps(content, indent=2, sort_keys=True)

    @classmethod
    def from_json_string(cls, text: str) -> FLeRMConfig:
        """Read what `to_json_string` wrote.

        Args:
            text: JSON.

        Returns:
            The config.

        Raises:
            ValueError: If it is not a JSON object of known fields.
        """
        content: Any = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"an FLeRMConfig is a JSON object, not {type(content).__name__}.")
        known = {field.name for field in fields(cls)}
        if content.keys() - known:
            raise ValueError(f"unknown fields {sorted(content.keys() - known)}; known are {sorted(known)}.")
        return cls(**content)


def checked(config: object) -> FLeRMConfig:
    """Refuse what is given in place of a config.

    Args:
        config: What was given.

    Returns:
        The same.

    Raises:
        ValueError: If it is no `FLeRMConfig`.
    """
    if not isinstance(config, FLeRMConfig):
        raise ValueError(
            f"{config!r:.100} is no FLeRMConfig: pass FLeRMConfig(...), or the config of FLeRMArguments (flerm.config)."
        )
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
