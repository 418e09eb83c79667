"""The numbers of a profile as NumPy arrays. Reading and showing a profile needs these only, and does not load torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .file import STEPS, RateProfileError, check_name

Row: TypeAlias = NDArray[np.float64]


class RateTable:
    """Checked rates by name and step.

    Args:
        steps: Optimizer steps, strictly increasing from 0, [S]: a sequence, an array or a tensor.
        rates: `{canonical parameter name: [S]}`, finite and >= 0.
        joint_rates: `{granularity: {path: [S]}}`, finite and >= 0.

    Attributes:
        steps: Int64 [S].
        rates: `{canonical parameter name: float64 [S]}`.
        joint_rates: `{granularity: {path: float64 [S]}}`.

    Raises:
        RateProfileError: If an argument is malformed.
    """

    def __init__(self, steps: Any, rates: Mapping[str, Any], joint_rates: Mapping[str, Mapping[str, Any]]) -> None:
        numbers = _numbers(steps, "steps")
        self.steps: NDArray[np.int64] = numbers.astype(np.int64)
        self.rates = _rows(rates)
        self.joint_rates = {granularity: _rows(groups) for granularity, groups in joint_rates.items()}
        if not np.array_equal(self.steps, numbers):
            raise RateProfileError(f"steps must be whole numbers; got {numbers.tolist()!s:.200}.")
        if self.steps.ndim != 1 or (self.steps < 0).any() or (np.diff(self.steps) <= 0).any():
            raise RateProfileError(
                f"steps must be one row of strictly increasing steps from 0; got {self.steps.tolist()!s:.200}."
            )
        if not self.rates:
            raise RateProfileError("a profile needs the rates of at least one parameter; got none.")
        if STEPS in self.rates:
            raise RateProfileError(f"{STEPS!r} cannot be the name of a parameter in a profile; rename it.")
        for group in (self.rates, *self.joint_rates.values()):
            self._check_rows(group)
        for name in self.rates:
            check_name(name)
        for path in {path for groups in self.joint_rates.values() for path in groups if path}:
            check_name(path)

    def _check_rows(self, rows: Mapping[str, Row]) -> None:
        for name, values in rows.items():
            if values.shape != self.steps.shape:
                raise RateProfileError(
                    f"the rates of {name!r} have shape {values.shape}; there are {len(self.steps)} steps."
                )
        table = np.stack([*rows.values(), np.zeros(self.steps.shape)])
        wrong = (~np.isfinite(table) | (table < 0)).any(1)
        if wrong.any():
            name, values = list(rows.items())[int(wrong.argmax())]
            raise RateProfileError(
                f"the rates of {name!r} must be finite and not negative; got {values.tolist()!s:.200}."
            )

    def neighbors(self, step: int) -> tuple[int, int, float]:
        """Find the recorded steps around an optimizer step, to interpolate between them.

        Returns:
            `(left, right, part)`: the value at `step` is `row[left] + (row[right] - row[left]) * part`. Before the
            first and after the last recorded step, both indices are that step's.

        Raises:
            RateProfileError: If no step was recorded.
        """
        if not len(self.steps):
            raise RateProfileError("the profile holds no step: its run ended before the first measurement.")
        # right: index of the first recorded step >= `step`, else of the last one. left: right - 1 strictly between two
        # recorded steps, else right.
        right = min(int(np.searchsorted(self.steps, step)), len(self.steps) - 1)
        left = right if self.steps[right] <= step or right == 0 else right - 1
        span = float(self.steps[right] - self.steps[left])
        return left, right, (step - float(self.steps[left])) / span if span else 0.0


def _rows(rates: Mapping[str, Any]) -> dict[str, Row]:
    return {name: _numbers(values, f"the rates of {name!r}").astype(np.float64) for name, values in rates.items()}


def _numbers(values: Any, what: str) -> NDArray[Any]:
    """Return an array of numbers. A tensor may be on any device and have any type: it is read as Python numbers."""
    try:
        array = values if isinstance(values, np.ndarray) else np.asarray(getattr(values, "tolist", lambda: values)())
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RateProfileError(f"{what} are not a row of numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise RateProfileError(f"{what} are not a row of numbers: {values!r:.200}")
    return array
