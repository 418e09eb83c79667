"""`FLeRMArguments`: a run's choices on the command line or in a YAML file, beside those of the training."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from ..config import FLeRMConfig

_PREFIX = "flerm_"
_NUMBERS = ("float", "float | None")
_PLAIN = ("str", "int", "float", "int | None", "float | None")  # what a parser can make of text by itself


def _help(name: str) -> str:
    """What the config's docstring says of a field."""
    said = re.search(rf"^        {name}: (.+?)(?=^        \w+: |^\s*$)", FLeRMConfig.__doc__ or "", re.M | re.S)
    return " ".join(said[1].split()).replace("%", "%%") if said else ""


@dataclass
class _Prefixed:
    @property
    def config(self) -> FLeRMConfig:
        """The choices, checked; `probes`, `measure_steps` and numbers (`1e3` is text in YAML) may be text."""
        values = {entry.name: getattr(self, f"{_PREFIX}{entry.name}") for entry in fields(FLeRMConfig)}
        probes, steps = values["probes"], values["measure_steps"]
        if isinstance(probes, str) and probes.isdecimal():
            values["probes"] = int(probes)
        for entry in fields(FLeRMConfig):
            if str(entry.type) in _NUMBERS and isinstance(values[entry.name], str):
                with suppress(ValueError):
                    values[entry.name] = float(values[entry.name])
        if isinstance(steps, str) and all(step.strip().isdecimal() for step in steps.split(",")):
            values["measure_steps"] = [int(step) for step in steps.split(",")]
        return FLeRMConfig(**values)


_entries: list[tuple[str, Any, Any]] = [
    (
        f"{_PREFIX}{entry.name}",
        entry.type if str(entry.type) in _PLAIN else str | None,
        field(default=entry.default, metadata={"help": _help(entry.name)}),
    )
    for entry in fields(FLeRMConfig)
]
FLeRMArguments = make_dataclass("FLeRMArguments", _entries, bases=(_Prefixed,), namespace={"__module__": __name__})
FLeRMArguments.__doc__ = """Every field of `FLeRMConfig` with `flerm_` before its name, for `HfArgumentParser`.

    parser = HfArgumentParser((TrainingArguments, FLeRMArguments))
    args, flerm = parser.parse_args_into_dataclasses()  # --flerm_mode match --flerm_measure_steps 0,10,20
    FLeRMTrainer(..., args=args, flerm=flerm.config)

Attributes:
    config: The `FLeRMConfig`.
"""
