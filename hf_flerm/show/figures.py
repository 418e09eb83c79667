"""The data of the figures of a profile, independent of a plotting library.

`plotting` draws them with matplotlib, `report` with plotly: both show the same numbers in the same order and style.

    figure                      shows                                   made by
    rates over training         a `Curve` per kind of tensor            `rate_curves`
    heat map of layers/tensors  a `HeatMap`: rates by row and step      `layer_heat_map`, `tensor_heat_map`
    multipliers over layers     a `MultiplierSeries` per kind of unit   `multiplier_series`, `layers_of`
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ..model.name_text import without_prefix
from ..profile.rate_profile import RateProfile, RateProfileError
from .summary import rates_by_kind

# The palette of Okabe and Ito, which color-blind readers can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
GRAY = "#999999"
VARIANTS = 4  # number of marker and dash styles per color
STEP = "optimizer step"
# What lines, bands, points and colors are, for the figure itself.
RATES_LEGEND = "Line: geometric mean over the tensors of a kind. Band: one standard error. Points: measured steps."
LAYERS_LEGEND = "Color: joint rate of the tensors of a layer; white where it is 0."
MULTIPLIERS_LEGEND = "Line: factor that was used. Point and bar: factor measured in a layer, with one standard error."
_STEP_RATIO = 1.25  # smallest ratio of neighboring ticks on the logarithmic axis of steps
RATE = "rate (output units per unit learning rate)"
OUTSIDE = "outside"  # label of units outside all layers, such as embeddings
EVERYTHING = "everything"  # label of the unit of granularity "global", whose name is ""
_LARGEST_LOG = 300.0  # largest log error of an error bar; math.exp overflows above 709, and axes need room


@dataclass(frozen=True)
class Curve:
    """The rates of one kind of tensor over training, without the steps at which all of them are 0.

    Attributes:
        kind: Kind of tensor.
        tensors: Number of tensors of this kind.
        x: Optimizer steps, plus 1, so that a logarithmic axis can show step 0; see `step_ticks`.
        rates: Geometric means over the tensors.
        low: One standard error below the mean.
        high: One standard error above it.
    """

    kind: str
    tensors: int
    x: list[int]
    rates: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class HeatMap:
    """Rates by row and step.

    Attributes:
        rows: Names of layers or tensors, [R].
        steps: Optimizer steps, [S].
        rates: Float64 [R, S].
    """

    rows: list[str]
    steps: list[int]
    rates: NDArray[np.float64]

    @property
    def positive(self) -> NDArray[np.float64]:
        """The rates, with nan in place of 0: a logarithmic color scale has no color for it."""
        return np.where(self.rates > 0, self.rates, np.nan)


@dataclass(frozen=True)
class MeasuredMultiplier:
    """The multiplier of one layer by its own measurements alone, with one standard error below and above."""

    layer: str
    multiplier: float
    low: float
    high: float


@dataclass(frozen=True)
class MultiplierSeries:
    """The learning-rate multipliers of one kind of unit over layers.

    Attributes:
        kind: Kind of tensor, module or block.
        layers: Layers of its units, in order.
        multipliers: The multipliers that the run used, one per layer.
        measured: Measured multipliers (base rate / target rate) of the layers that have one.
    """

    kind: str
    layers: list[str]
    multipliers: list[float]
    measured: list[MeasuredMultiplier]


def rate_curves(profile: RateProfile) -> list[Curve]:
    """Return the rates over training by kind of tensor."""
    x = (profile.table.steps + 1).tolist()
    curves = []
    for kind, rates in rates_by_kind(profile).items():
        low, high = rates.band
        rows = zip(x, rates.mean.tolist(), low.tolist(), high.tolist(), strict=True)
        known = [row for row in rows if math.isfinite(row[1])]
        columns = [list(column) for column in zip(*known, strict=True)] or [[], [], [], []]
        curves.append(Curve(kind, len(rates.names), *columns))
    return curves


def layer_heat_map(profile: RateProfile) -> HeatMap:
    """Return the joint rate of each layer, and of each module outside the layers, at each measured step.

    Raises:
        RateProfileError: If the profile has no joint rates by block.
    """
    joint = profile.table.joint_rates.get("block")
    if not joint:
        raise RateProfileError("the profile holds no joint rates by block. Record it again with this version.")
    rows = [without_prefix(path) for path in joint]
    return HeatMap(rows, profile.table.steps.tolist(), np.stack([*joint.values()]))


def tensor_heat_map(profile: RateProfile) -> HeatMap:
    """Return the rate of each tensor at each measured step."""
    names = [without_prefix(name) for name in profile.names]
    return HeatMap(names, profile.table.steps.tolist(), np.stack([*profile.table.rates.values()]))


def multiplier_series(profile: RateProfile) -> list[MultiplierSeries]:
    """Return the learning-rate multipliers of a matched run by kind of unit; none if the run only recorded.

    Multipliers that a logarithmic axis cannot show (0, infinite) are left out.
    """
    scales = {unit: scale for unit, scale in profile.about.matched_scales.items() if 0 < scale < math.inf}
    quotients = profile.about.matched_quotients
    series = []
    for kind, units in _units_by_kind(scales).items():
        measured = []
        for unit in units:
            level, log_error = quotients.get(unit, (math.nan, math.nan))
            factor = math.exp(min(log_error, _LARGEST_LOG))
            if 0 < level < math.inf:
                measured.append(MeasuredMultiplier(_layer_of(unit), level, level / factor, level * factor))
        series.append(MultiplierSeries(kind, [*map(_layer_of, units)], [scales[unit] for unit in units], measured))
    return series


def layers_of(series: Iterable[MultiplierSeries]) -> list[str]:
    """Return all layers of some series, first to last; `OUTSIDE` comes first."""
    layers = {layer for one in series for layer in one.layers}
    return sorted(layers, key=lambda layer: _numerical(_indices(layer)))


def styles() -> Iterator[tuple[str, int]]:
    """Yield a color and a variant (which mark and dash, 0 to 3) for each line; they repeat after all combinations."""
    while True:
        for variant, color in product(range(VARIANTS), COLORS):
            yield color, variant


def tick_positions(count: int, most: int) -> list[int]:
    """Return the positions of at most `most` of `count` labels: all, or every second, third, and so on."""
    return list(range(0, count, math.ceil(count / most) or 1))


def step_ticks(steps: Iterable[int]) -> dict[int, str]:
    """Return `{position: label}` on a logarithmic axis of steps plus 1; the labels are the steps themselves.

    Args:
        steps: The measured steps, ascending. Steps that come too close to the one before are left out.
    """
    ticks: dict[int, str] = {}
    for step in steps:
        if not ticks or step + 1 >= _STEP_RATIO * max(ticks):
            ticks[step + 1] = str(step)
    return ticks


def _units_by_kind(units: Iterable[str]) -> dict[str, list[str]]:
    """Group units by kind (`*` for every integer in the name); the units of a kind are in the order of the blocks."""
    groups: dict[str, list[str]] = {}
    for unit in units:
        kind = ".".join("*" if part.isdecimal() else part for part in unit.split("."))
        groups.setdefault(kind or EVERYTHING, []).append(unit)
    return {kind: sorted(found, key=lambda unit: _numerical(_indices(unit))) for kind, found in groups.items()}


def _layer_of(unit: str) -> str:
    """Return the block indices of a unit, joined by dots, outermost first; `OUTSIDE` if there are none."""
    return ".".join(_indices(unit)) or OUTSIDE


def _indices(unit: str) -> list[str]:
    return [part for part in unit.split(".") if part.isdecimal()]


def _numerical(indices: Iterable[str]) -> list[tuple[int, str]]:
    """Sort key for decimal strings. Names come from files, and `int` refuses very long strings."""
    return [(len(index), index) for index in indices]
