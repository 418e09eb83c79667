"""The allowed values of every option, for the type checker, the parsers, the command line and the error messages.

Nothing is imported here, so that the command line can show its help without loading torch. Some modules have a table
with an entry for each value (`METRICS`, `OUTPUTS`, ...); a test checks that its keys are these values.
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
Policy = Literal["hold", "level", "follow", "gate"]
Rules = Literal["published", "none"]
LogBy = Literal["kind", "tensor", "none"]
Decision = Literal["keep", "one", "match"]
Picture = Literal["rates", "layers", "multipliers", "sweep"]


def values(choice: object) -> tuple[str, ...]:
    """Return the values of one of the Literals above, in order."""
    return get_args(choice)


def check_choice(name: str, value: object, allowed: Iterable[str], also: str = "") -> None:
    """Raise ValueError unless `value` is one of the allowed values.

    Args:
        name: Name of the option, for the message.
        value: The given value.
        allowed: The allowed values: the values of a Literal above, or the keys of a table.
        also: Text that the message adds after the allowed values, such as " or None".
    """
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}{also}.")
