"""Pictures of profiles and measurements (needs matplotlib: `pip install 'hf_flerm[plot]'`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from statistics import mean, stdev
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.names import without_prefix
from ..profile.rate_profile import RateProfile, RateProfileError
from .summary import rates_by_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by the color-blind, and in gray print by the marks.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKS = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))
STEP = "optimizer step + 1"
RATE = "rate (output units per unit learning rate)"
OUTSIDE = "outside"  # of all layers
EVERYTHING = "everything"
_SPREAD = 0.6  # of the room between two layers
_MOST_STEPS, _MOST_NAMES = 16, 80  # labels that fit beside each other


def plot_profile(profile: RateProfile, axes: Axes | None = None) -> Figure:
    """Draw rates over training by kind of tensor, on log axes.

    Args:
        profile: The profile.
        axes: Where to draw. None: on a new figure.

    Returns:
        The figure: a line per kind (the geometric mean over its tensors) in a band of one standard error.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure, axes = _axes(axes, (8, 5))
    x = (profile.steps + 1).tolist()
    for (kind, rates), style in zip(rates_by_kind(profile).items(), _styles(), strict=False):
        axes.plot(x, rates.mean.tolist(), label=kind, **style)
        low, high = (bound.tolist() for bound in rates.band)
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=STEP, ylabel=RATE)
    axes.xaxis.set_major_formatter("{x:g}")
    _legend(axes)
    return figure


def plot_layers(profile: RateProfile, axes: Axes | None = None) -> Figure:
    """Draw the joint rate of each layer at each measured step as a heat map.

    Args:
        profile: The profile; it must hold joint rates by block.
        axes: Where to draw. None: on a new figure.

    Returns:
        The figure; layers from the first (top) to the last, and modules outside of them where they are trained.

    Raises:
        ImportError: If matplotlib is not installed.
        RateProfileError: If there are no joint rates by block.
    """
    blocks, steps, table = layer_table(profile)
    figure, axes = _axes(axes, (8, 1.5 + 0.3 * len(blocks)))
    positive = table[table > 0]
    scale = _pyplot().matplotlib.colors.LogNorm(*((positive.min(), positive.max()) if len(positive) else (None, None)))
    image = axes.imshow(table.where(table > 0, torch.nan).numpy(), aspect="auto", cmap="viridis", norm=scale)
    shown = _shown(len(steps), _MOST_STEPS)
    axes.set_xticks(shown, [str(steps[index] + 1) for index in shown])
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set(xlabel=STEP, ylabel="layer")
    figure.colorbar(image, ax=axes, label="joint rate (output units\nper unit learning rate)")
    return figure


def plot_multipliers(profile: RateProfile, axes: Axes | None = None) -> Figure:
    """Draw the learning-rate multipliers of a matched run over its layers.

    Args:
        profile: The profile of a run that matched another one.
        axes: Where to draw. None: on a new figure.

    Returns:
        The figure: per kind of tensor a line for the multipliers that were used, and marks for what the measurements of
        each layer alone say (geometric means of base rate / own rate with standard errors over the measurements).

    Raises:
        ImportError: If matplotlib is not installed.
        RateProfileError: If the run only recorded.
    """
    figure, axes = _axes(axes, (8, 5))
    scales, quotients = profile.about.matched_scales, profile.about.matched_quotients
    if not scales:
        raise RateProfileError("the profile holds no multipliers: its run recorded. Take that of a matched run.")
    layers = sorted({layer_of(unit) for unit in scales}, key=_indices)
    kinds = units_by_kind(scales)
    for index, ((kind, units), style) in enumerate(zip(kinds.items(), _styles(), strict=False)):
        places = [layers.index(layer_of(unit)) for unit in units]
        aside = _SPREAD * ((index + 0.5) / len(kinds) - 0.5)  # of the place, so that error bars stand side by side
        line = {"marker": "_", "markersize": 16} if len(units) == 1 else {"linestyle": style["linestyle"]}
        drawn = [place + aside for place in places] if len(units) == 1 else places
        axes.plot(drawn, [scales[unit] for unit in units], label=kind, color=style["color"], **line)
        rows = [
            (place + aside, *quotients[unit]) for place, unit in zip(places, units, strict=True) if unit in quotients
        ]
        if rows:
            x, levels, errors = zip(*rows, strict=True)
            factors = [math.exp(error) for error in errors]
            low = [level - level / factor for level, factor in zip(levels, factors, strict=True)]
            high = [level * factor - level for level, factor in zip(levels, factors, strict=True)]
            axes.errorbar(x, levels, (low, high), fmt=style["marker"], color=style["color"], markersize=5, capsize=2)
    axes.axhline(1, color="#999999", linestyle=":", linewidth=1)
    axes.set(yscale="log", xlabel="layer", ylabel="learning-rate multiplier (base rate / own rate)")
    axes.yaxis.set_major_formatter("{x:g}")
    shown = _shown(len(layers), _MOST_STEPS)
    axes.set_xticks(shown, [layers[index] for index in shown])
    _legend(axes)
    return figure


def plot_interactions(names: Sequence[str], inner_products: Tensor, axes: Axes | None = None) -> Figure:
    """Draw how far the updates of tensors reinforce or cancel each other.

    Args:
        names: Of the tensors, [L].
        inner_products: Of the output changes that their updates make, [L, L], as `Measurement.interactions` gives them.
        axes: Where to draw. None: on a new figure.

    Returns:
        The figure: correlations, 1 where two updates change the outputs alike and -1 where they cancel.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the matrix is not one row and column per name.
    """
    if inner_products.shape != (len(names), len(names)):
        raise ValueError(
            f"there are {len(names)} names and a matrix of shape {tuple(inner_products.shape)}. Pass what "
            "Measurement.interactions() gives."
        )
    side = 0.25 * min(len(names), _MOST_NAMES)
    figure, axes = _axes(axes, (3 + side, 1.5 + side))
    sizes = inner_products.diagonal().clamp(min=0).sqrt()
    correlations = inner_products / (sizes[:, None] * sizes)  # [L, L]
    image = axes.imshow(correlations.where(correlations.isfinite(), torch.nan).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    shown = _shown(len(names), _MOST_NAMES)
    labels = [without_prefix(names[index]) for index in shown]
    axes.set_xticks(shown, labels, rotation=90, fontsize="x-small")
    axes.set_yticks(shown, labels, fontsize="x-small")
    figure.colorbar(image, ax=axes, label="correlation of output changes")
    return figure


def plot_losses(
    sweeps: Mapping[str, Mapping[float, Sequence[float]]], axes: Axes | None = None, *, stable: float = 1.0
) -> Figure:
    """Draw loss against learning rate, with each sweep's optimum and the edge of its stable rates.

    Args:
        sweeps: `{run: {learning rate: losses, one per seed}}`; a loss that is not finite is a run that diverged.
        axes: Where to draw. None: on a new figure.
        stable: What a loss may be above the sweep's best, in its own unit, before it counts as unstable.

    Returns:
        The figure: means with standard errors over seeds, a star at the optimum, a dashed line at the largest
        learning rate before the first unstable one; none where no rate was unstable.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If a sweep has no finite loss.
    """
    figure, axes = _axes(axes, (7, 4.5))
    levels = []
    for (name, sweep), style in zip(sweeps.items(), _styles(), strict=False):
        means = {rate: mean(losses) for rate, losses in sorted(sweep.items())}
        finite = {rate: loss for rate, loss in means.items() if math.isfinite(loss)}
        if not finite:
            raise ValueError(f"the sweep {name!r} has no finite loss: {dict(sweep)}.")
        best = min(finite, key=finite.__getitem__)
        errors = [_standard_error(sweep[rate]) for rate in finite]
        axes.errorbar([*finite], [*finite.values()], errors, label=name, capsize=2, **style)
        axes.plot([best], [finite[best]], "*", color=style["color"], markersize=14)
        edge = stable_edge(means, stable)
        if edge is not None:
            axes.axvline(edge, color=style["color"], linestyle="--", linewidth=1)
        levels += [loss for loss in finite.values() if loss <= finite[best] + 2 * stable]
    room = 0.1 * (max(levels) - min(levels)) or 0.1
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(min(levels) - room, max(levels) + room))
    _legend(axes)
    return figure


PICTURES = {"rates": plot_profile, "layers": plot_layers, "multipliers": plot_multipliers}


def stable_edge(means: Mapping[float, float], stable: float) -> float | None:
    """Find the largest learning rate before training becomes unstable.

    Args:
        means: `{learning rate: mean loss}`.
        stable: What a loss may be above the best.

    Returns:
        The learning rate before the first unstable one above the optimum; None if none is unstable.
    """
    best = min((rate for rate, loss in means.items() if math.isfinite(loss)), key=means.__getitem__)
    above = [rate for rate in sorted(means) if rate >= best]
    unstable = next((index for index, rate in enumerate(above) if not means[rate] < means[best] + stable), None)
    return None if unstable is None else above[max(unstable - 1, 0)]


def layer_table(profile: RateProfile) -> tuple[list[str], list[int], Tensor]:
    """Lay out the joint rates of layers.

    Args:
        profile: The profile.

    Returns:
        Layers, steps, and rates, float64 [layers, steps].

    Raises:
        RateProfileError: If there are no joint rates by block.
    """
    found = profile.joint_rates.get("block")
    if not found:
        raise RateProfileError("the profile holds no joint rates by block. Record it again with this version.")
    return [without_prefix(path) for path in found], profile.steps.tolist(), torch.stack(list(found.values()))


def units_by_kind(units: Mapping[str, Any]) -> dict[str, list[str]]:
    """Group the units of a matched run by their names without indices of blocks.

    Args:
        units: By name.

    Returns:
        `{kind: units}`, in the order of blocks; what is matched as one has no name: `EVERYTHING`.
    """
    groups: dict[str, list[str]] = {}
    for unit in units:
        kind = ".".join("*" if part.isdigit() else part for part in unit.split("."))
        groups.setdefault(kind or EVERYTHING, []).append(unit)
    return {
        kind: sorted(found, key=lambda unit: [int(part) for part in unit.split(".") if part.isdigit()])
        for kind, found in groups.items()
    }


def layer_of(unit: str) -> str:
    """Say in which layer a unit of a matched run lies.

    Args:
        unit: Its name.

    Returns:
        The indices in it, joined by dots, outermost stack first; `OUTSIDE` if there are none.
    """
    return ".".join(part for part in unit.split(".") if part.isdigit()) or OUTSIDE


def close(figure: Figure) -> None:
    """Let go of a figure.

    Args:
        figure: What one of the functions here has drawn.
    """
    _pyplot().close(figure)


def _indices(layer: str) -> list[int]:
    return [] if layer == OUTSIDE else [int(part) for part in layer.split(".")]


def _shown(count: int, most: int) -> list[int]:
    """Which of so many ticks have a label: all, or every second, third, ... of them."""
    return list(range(0, count, math.ceil(count / most) or 1))


def _axes(axes: Axes | None, size: tuple[float, float]) -> tuple[Figure, Any]:
    if axes is not None:
        return axes.figure, axes  # type: ignore[return-value]
    return _pyplot().subplots(figsize=size, layout="constrained")  # type: ignore[no-any-return]


def _pyplot() -> ModuleType:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'hf_flerm[plot]'.") from error
    return pyplot


def _styles() -> Iterator[dict[str, Any]]:
    while True:
        for (marker, line), color in product(_MARKS, COLORS):
            yield {"color": color, "marker": marker, "linestyle": line, "markersize": 4, "linewidth": 1.5}


def _legend(axes: Any) -> None:
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0, frameon=False)


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
