"""`FLeRMArguments`: options of FLeRM for the command line or a YAML file, beside `TrainingArguments`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from ..config import FLeRMConfig, Research, help_of

_PREFIX = "flerm_"
_NUMBERS = ("float", "float | None")
_PARSED = ("str", "int", "float", "int | None", "float | None")  # types that HfArgumentParser parses from text itself
_RESEARCH = fields(Research)
_OPTIONS = (*(entry for entry in fields(FLeRMConfig) if entry.name != "research"), *_RESEARCH)


@dataclass
class _Prefixed:
    """Creates the `FLeRMConfig` from the prefixed fields that `FLeRMArguments` adds."""

    @property
    def config(self) -> FLeRMConfig:
        """The checked options. `probes`, `measure_steps` and floats (YAML reads `1e3` as a string) may be strings."""
        options = {entry.name: getattr(self, f"{_PREFIX}{entry.name}") for entry in _OPTIONS}
        probes, steps = options["probes"], options["measure_steps"]
        if isinstance(probes, str) and probes.isdecimal():
            options["probes"] = int(probes)
        for entry in _OPTIONS:
            if str(entry.type) in _NUMBERS and isinstance(options[entry.name], str):
                with suppress(ValueError):
                    options[entry.name] = float(options[entry.name])
        if isinstance(steps, str) and all(step.strip().isdecimal() for step in steps.split(",")):
            options["measure_steps"] = [int(step) for step in steps.split(",")]
        research = Research(**{entry.name: options.pop(entry.name) for entry in _RESEARCH})
        return FLeRMConfig(research=research, **options)


_entries: list[tuple[str, Any, Any]] = [
    (
        f"{_PREFIX}{entry.name}",
        entry.type if str(entry.type) in _PARSED else str | None,
        field(default=entry.default, metadata={"help": help_of(entry).replace("%", "%%")}),
    )
    for entry in _OPTIONS
]
FLeRMArguments = make_dataclass("FLeRMArguments", _entries, bases=(_Prefixed,), namespace={"__module__": __name__})
FLeRMArguments.__doc__ = """Options of `FLeRMConfig` and `Research`, with the prefix `flerm_`, for `HfArgumentParser`.

    parser = HfArgumentParser((TrainingArguments, FLeRMArguments))
    args, flerm = parser.parse_args_into_dataclasses()  # --flerm_mode match --flerm_measure_steps 0,10,20
    FLeRMTrainer(..., args=args, flerm=flerm.config)

Attributes:
    config: The `FLeRMConfig`.
"""
