"""Figures of profiles and measurements (needs matplotlib: `pip install 'hf_flerm[plot]'`).

The data of figures that `report` also shows come from `figures`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..model.name_text import without_prefix
from ..profile.rate_profile import RateProfile, RateProfileError
from .figures import (
    GRAY,
    LAYERS_LEGEND,
    MULTIPLIERS_LEGEND,
    RATE,
    RATES_LEGEND,
    STEP,
    layer_heat_map,
    layers_of,
    multiplier_series,
    rate_curves,
    step_ticks,
    styles,
    tick_positions,
)
from .summary import title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

_MARKS, _DASHES = ("o", "s", "^", "D"), ("-", "--", ":", "-.")  # by variant of `styles`
_SPREAD = 0.6  # fraction of the space between two layers over which the error bars of all kinds are spread
_MOST_STEPS, _MOST_NAMES = 16, 80  # largest numbers of tick labels


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
    for curve, style in zip(rate_curves(profile), _styles(), strict=False):
        axes.plot(curve.x, curve.rates, label=curve.kind, **style)
        axes.fill_between(curve.x, curve.low, curve.high, color=style["color"], alpha=0.12, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=STEP, ylabel=RATE)
    ticks = step_ticks(profile.table.steps.tolist())
    axes.set_xticks([*ticks], [*ticks.values()])
    axes.set_xticks([], minor=True)
    _title(axes, title_of(profile), RATES_LEGEND)
    _legend(axes)
    return figure


def plot_layers(profile: RateProfile, axes: Axes | None = None) -> Figure:
    """Draw the joint rate of each layer at each measured step as a heat map.

    Args:
        profile: The profile; it must hold joint rates by block.
        axes: Where to draw. None: on a new figure.

    Returns:
        The figure: a row for each layer and for each trained module outside the layers.

    Raises:
        ImportError: If matplotlib is not installed.
        RateProfileError: If there are no joint rates by block.
    """
    found = layer_heat_map(profile)
    figure, axes = _axes(axes, (8, 1.5 + 0.3 * len(found.rows)))
    positive = found.rates[found.rates > 0]
    scale = _pyplot().matplotlib.colors.LogNorm(*((positive.min(), positive.max()) if len(positive) else (None, None)))
    image = axes.imshow(found.positive, aspect="auto", cmap="viridis", norm=scale)
    labeled = tick_positions(len(found.steps), _MOST_STEPS)
    axes.set_xticks(labeled, [str(found.steps[index]) for index in labeled])
    axes.set_yticks(range(len(found.rows)), found.rows)
    axes.set(xlabel=STEP, ylabel="layer")
    figure.colorbar(image, ax=axes, label="joint rate (output units\nper unit learning rate)")
    _title(axes, title_of(profile), LAYERS_LEGEND)
    return figure


def plot_multipliers(profile: RateProfile, axes: Axes | None = None) -> Figure:
    """Draw the learning-rate multipliers of a matched run over its layers.

    Args:
        profile: The profile of a run that matched another one.
        axes: Where to draw. None: on a new figure.

    Returns:
        The figure: for each kind of tensor, a line for the multipliers that were used, and markers for the multipliers
        measured in each layer (geometric means of base rate / target rate, with standard errors over measurements).

    Raises:
        ImportError: If matplotlib is not installed.
        RateProfileError: If the run only recorded.
    """
    series = multiplier_series(profile)
    if not series:
        raise RateProfileError(
            "the profile holds no multipliers: its run only recorded. Use the profile of a matched run."
        )
    figure, axes = _axes(axes, (8, 5))
    layers = layers_of(series)
    for index, (one, style) in enumerate(zip(series, _styles(), strict=False)):
        # Error bars of different kinds at the same layer are drawn side by side, so that all can be seen.
        aside = _SPREAD * ((index + 0.5) / len(series) - 0.5)
        places: list[float] = [layers.index(layer) for layer in one.layers]
        line = {"color": style["color"], "linestyle": style["linestyle"]}
        if len(places) == 1:  # a line through one point cannot be seen
            places, line = [places[0] + aside], {"color": style["color"], "marker": "_", "markersize": 16}
        axes.plot(places, one.multipliers, label=one.kind, **line)
        if one.measured:
            x = [layers.index(point.layer) + aside for point in one.measured]
            y = [point.multiplier for point in one.measured]
            low = [point.multiplier - point.low for point in one.measured]
            high = [point.high - point.multiplier for point in one.measured]
            axes.errorbar(x, y, (low, high), fmt=style["marker"], color=style["color"], markersize=5, capsize=2)
    axes.axhline(1, color=GRAY, linestyle=":", linewidth=1)
    axes.set(yscale="log", xlabel="layer", ylabel="learning-rate multiplier (base rate / target rate)")
    axes.yaxis.set_major_formatter("{x:g}")
    labeled = tick_positions(len(layers), _MOST_STEPS)
    axes.set_xticks(labeled, [layers[index] for index in labeled])
    _title(axes, title_of(profile), MULTIPLIERS_LEGEND)
    _legend(axes)
    return figure


def plot_interactions(names: Sequence[str], inner_products: Tensor, axes: Axes | None = None) -> Figure:
    """Draw how much the updates of tensors reinforce or cancel each other.

    Args:
        names: Names of the tensors, [L].
        inner_products: Inner products of the output changes that their updates cause, [L, L], from
            `Measurement.interactions`.
        axes: Where to draw. None: on a new figure.

    Returns:
        The figure: correlations, 1 where two updates change the outputs in the same way and -1 where they cancel.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the matrix does not have one row and one column per name.
    """
    products = np.asarray(inner_products)
    if products.shape != (len(names), len(names)):
        raise ValueError(
            f"there are {len(names)} names and a matrix of shape {products.shape}. Pass the result of "
            "Measurement.interactions()."
        )
    side = 0.25 * min(len(names), _MOST_NAMES)
    figure, axes = _axes(axes, (3 + side, 1.5 + side))
    sizes = np.sqrt(products.diagonal().clip(min=0))
    norms = sizes[:, None] * sizes  # [L, L]
    correlations = np.divide(products, norms, out=np.full_like(norms, np.nan), where=norms > 0)
    image = axes.imshow(correlations, cmap="RdBu_r", vmin=-1, vmax=1)
    labeled = tick_positions(len(names), _MOST_NAMES)
    labels = [without_prefix(names[index]) for index in labeled]
    axes.set_xticks(labeled, labels, rotation=90, fontsize="x-small")
    axes.set_yticks(labeled, labels, fontsize="x-small")
    figure.colorbar(image, ax=axes, label="correlation of output changes\n(red: in the same way, blue: they cancel)")
    return figure


def plot_losses(
    sweeps: Mapping[str, Mapping[float, Sequence[float]]], axes: Axes | None = None, *, stable: float = 1.0
) -> Figure:
    """Draw loss against learning rate, with each sweep's optimum and the edge of its stable rates.

    Args:
        sweeps: `{run: {learning rate: losses, one per seed}}`; a loss that is not finite means that the run diverged.
        axes: Where to draw. None: on a new figure.
        stable: Distance from the best loss of a sweep at which a loss counts as unstable.

    Returns:
        The figure: means with standard errors over seeds, a star at the optimum, and a dashed line at the largest
        learning rate before the first unstable one, if there is one.

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
        edge = _stable_edge(means, stable)
        if edge is not None:
            axes.axvline(edge, color=style["color"], linestyle="--", linewidth=1)
        levels += [loss for loss in finite.values() if loss <= finite[best] + 2 * stable]
    room = 0.1 * (max(levels) - min(levels)) or 0.1
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(min(levels) - room, max(levels) + room))
    _title(axes, "Star: best learning rate. Bars: one standard error over seeds. Dashed: edge of stability.")
    _legend(axes)
    return figure


def plot_sweep(profile: RateProfile, axes: Axes | None = None) -> Figure:
    """Draw the sweep in which the learning rate of a profile's run was chosen.

    Args:
        profile: A profile with a sweep in its metadata, as `hf_flerm.sweep` saves it.
        axes: Where to draw. None: on a new figure.

    Returns:
        The figure: `plot_losses` of the sweep, with a dotted line at the optimum between the learning rates.

    Raises:
        ImportError: If matplotlib is not installed.
        RateProfileError: If the profile has no sweep.
    """
    losses, optimum = profile.about.sweep_losses, profile.about.sweep_optimum
    if not any(math.isfinite(mean(of)) for of in losses.values()):
        raise RateProfileError("the profile holds no sweep. Use the profile that hf_flerm.sweep has saved.")
    figure, axes = _axes(axes, (7, 4.5))
    plot_losses({"loss": losses}, axes)
    if optimum is not None:
        axes.axvline(optimum, color=GRAY, linestyle=":", linewidth=1, label=f"optimum: {optimum:.3g}")
        _legend(axes)
    return figure


PICTURES = {"rates": plot_profile, "layers": plot_layers, "multipliers": plot_multipliers, "sweep": plot_sweep}


def _stable_edge(means: Mapping[float, float], stable: float) -> float | None:
    """Return the largest learning rate before training becomes unstable; None if no learning rate is unstable.

    Args:
        means: `{learning rate: mean loss}`.
        stable: Distance from the best loss at which a loss counts as unstable.
    """
    best = min((rate for rate, loss in means.items() if math.isfinite(loss)), key=means.__getitem__)
    above = [rate for rate in sorted(means) if rate >= best]
    unstable = next((index for index, rate in enumerate(above) if not means[rate] < means[best] + stable), None)
    return None if unstable is None else above[max(unstable - 1, 0)]


def close(figure: Figure) -> None:
    """Close a figure that one of these functions returned, so that pyplot does not keep it in memory."""
    _pyplot().close(figure)


def _axes(axes: Axes | None, size: tuple[float, float]) -> tuple[Figure, Any]:
    if axes is not None:
        return axes.figure, axes  # type: ignore[return-value]
    return _pyplot().subplots(figsize=size, layout="constrained")  # type: ignore[no-any-return]


def _pyplot() -> ModuleType:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'hf_flerm[plot]'.") from error
    return pyplot


def _styles() -> Iterator[dict[str, Any]]:
    for color, variant in styles():
        marks = {"marker": _MARKS[variant], "linestyle": _DASHES[variant]}
        yield {"color": color, **marks, "markersize": 4, "linewidth": 1.5}


def _title(axes: Any, *lines: str) -> None:
    """Set a title as plain text: names come from files, and `$` would begin a formula."""
    axes.set_title("\n".join(f"{line:.110}" for line in lines), loc="left", fontsize="small", parse_math=False)


def _legend(axes: Any) -> None:
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0, frameon=False)


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
