"""Pictures of profiles (needs matplotlib: `pip install hf_flerm[plot]`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .rate_profile import RateProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_profile(profile: RateProfile, axes: Axes | None = None) -> Figure:
    """Draw rates over steps on log axes: one line per tensor kind, its band from the lowest to the highest tensor.

    Args:
        profile: The profile.
        axes: Where to draw. None: on a new figure.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install 'hf_flerm[plot]'.") from error
    figure: Any
    if axes is None:
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    else:
        figure = axes.figure
    known: dict[str, str] = profile.metadata.get("kinds", {})
    kinds: dict[str, list[str]] = {}
    for name in profile.names:
        kinds.setdefault(known.get(name, name), []).append(name)
    x = [step + 1 for step in profile.steps.tolist()]
    for kind, names in kinds.items():
        columns = list(zip(*(profile.rates[name].tolist() for name in names), strict=True))
        shown = [(step, [r for r in column if r > 0]) for step, column in zip(x, columns, strict=True)]
        shown = [(step, rates) for step, rates in shown if rates]
        steps = [step for step, _ in shown]
        (line,) = axes.plot(steps, [sorted(rates)[len(rates) // 2] for _, rates in shown], marker=".", label=kind)
        low, high = [min(rates) for _, rates in shown], [max(rates) for _, rates in shown]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="optimizer step + 1", ylabel="rate (output units per unit lr)")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure  # type: ignore[no-any-return]
