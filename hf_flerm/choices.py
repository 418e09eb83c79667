"""Allowed values of every option, once: for the type checker, parsers, the command line and error messages.

Nothing is imported here, so that the command line can show its help without loading torch. A table that dispatches on
one of these has exactly its values as keys; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

Mode = Literal["record", "match"]
Estimator = Literal["per_example", "kronecker", "kronecker_output", "full", "iid", "exact"]
Output = Literal["logits", "log_probs", "hidden"]
Positions = Literal["attention_mask", "labels"]
Metric = Literal["euclidean", "fisher"]
Granularity = Literal["tensor", "module", "block", "global"]
Depth = Literal["joint", "equal", "sqrt", "copy"]
Unmatched = Literal["error", "global", "nominal", "freeze"]
Pool = Literal["kind", "unit"]
LogBy = Literal["kind", "tensor"]
Picture = Literal["rates", "layers", "multipliers"]


def values(choice: object) -> tuple[str, ...]:
    """Return the values of one of the Literals above, in order."""
    return get_args(choice)


def check_choice(name: str, value: object, allowed: Iterable[str], also: str = "") -> None:
    """Raise ValueError unless `value` is one of the allowed values.

    Args:
        name: The option, for the message.
        value: What was given.
        allowed: The allowed values: those of a Literal above, or the keys of a table.
        also: What else is allowed, for the message, for instance " or None".
    """
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}{also}.")
