"""HTML report of a profile; works offline, figures can be zoomed (needs plotly: `pip install 'hf_flerm[report]'`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from ..profile.rate_profile import RateProfile
from .figures import (
    GRAY,
    LAYERS_LEGEND,
    MULTIPLIERS_LEGEND,
    RATE,
    RATES_LEGEND,
    STEP,
    Curve,
    HeatMap,
    MultiplierSeries,
    layer_heat_map,
    layers_of,
    multiplier_series,
    rate_curves,
    step_ticks,
    styles,
    tensor_heat_map,
    tick_positions,
)
from .summary import KindRates, describe, rates_by_kind, title_of, verdict

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "triangle-up", "diamond")
_ROW = 18  # height of a heat map's row, in pixels
_ENTRY = 20  # height of an entry of a legend, in pixels
_TALLEST = 4000  # largest height of a heat map, in pixels

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
h1 { font-size: 1.5rem; line-height: 1.2; overflow-wrap: anywhere; }
table.verdict { font-size: 1rem; }
th, td { text-align: left; padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
th { vertical-align: top; overflow-wrap: break-word; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media (max-width: 600px) { table { font-size: 0.8rem; } td.number, th.number { white-space: normal; } }
</style>
<script>{{ library }}</script>
</head>
<body>
<h1>{{ title }}</h1>
<table class="verdict">
{% for what, text in verdict.items() %}
<tr><th>{{ what }}</th><td>{{ text }}</td></tr>
{% endfor %}
</table>
<p>The rate of a tensor says how much its update changed the outputs of the model, per unit learning rate. Drag over a
figure to zoom in, double-click to zoom out. Click a name in a legend to hide its line, double-click to see only this
line.</p>
<table>
{% for what, text in about.items() %}
<tr><th>{{ what }}</th><td>{{ text }}</td></tr>
{% endfor %}
</table>
{% for heading, about_it, picture in pictures %}
<h2>{{ heading }}</h2>
<p>{{ about_it }}</p>
{{ picture }}
{% endfor %}
<h2>Rates in numbers</h2>
<p>Geometric means over the tensors of a kind, ± one standard error.</p>
<table>
<tr><th>kind of tensor</th><th class="number">tensors</th><th class="number">at the first measured step</th>
<th class="number">at the last</th></tr>
{% for kind, count, first, last in rows %}
<tr><td>{{ kind }}</td><td class="number">{{ count }}</td><td class="number">{{ first }}</td>
<td class="number">{{ last }}</td></tr>
{% endfor %}
</table>
</body>
</html>
"""
)


def report(profile: RateProfile) -> str:
    """Return a profile as one HTML page that needs no network and no other file.

    The page shows the origin of the profile, its rates over training by kind of tensor, of each layer and of each
    tensor, the multipliers of a matched run, and a table. The same profile gives the same page.

    Raises:
        ImportError: If plotly is not installed.
    """
    plotly = _plotly()
    pictures = [
        (heading, about, Markup(_embedded(figure, f"picture-{index}")))  # plotly escapes what it embeds
        for index, (heading, about, figure) in enumerate(_pictures(profile))
    ]
    about = describe(profile)
    if profile.commit_hash:
        about["commit"] = profile.commit_hash
    kinds = rates_by_kind(profile).items()
    rows = [(kind, len(rates.names), *_ends(rates)) for kind, rates in kinds]
    title = f"Function-space learning rates: {title_of(profile)}"
    library = Markup(plotly.offline.get_plotlyjs())
    texts = {"title": title, "verdict": verdict(profile), "about": about}
    return _PAGE.render(**texts, pictures=pictures, rows=rows, library=library)


def _pictures(profile: RateProfile) -> Iterator[tuple[str, str, Figure]]:
    """Yield heading, explanation and figure of each section."""
    yield (
        "Rates over training",
        RATES_LEGEND,
        _rates(rate_curves(profile), step_ticks(profile.table.steps.tolist())),
    )
    has_steps = len(profile.table.steps) > 0
    if has_steps and profile.table.joint_rates.get("block"):
        yield "Layers", LAYERS_LEGEND, _heat_map(layer_heat_map(profile))
    if has_steps:
        about = "The rate of each tensor. Zoom in to see the names of all of them."
        yield "Tensors", about, _heat_map(tensor_heat_map(profile))
    if series := multiplier_series(profile):
        yield (
            "Learning-rate multipliers",
            f"{MULTIPLIERS_LEGEND} A factor is base rate / target rate.",
            _multipliers(series),
        )


def _rates(curves: Iterable[Curve], ticks: Mapping[int, str]) -> Figure:
    graph, figure = _figure(height=520)
    for curve, style in zip(curves, _styles(), strict=False):
        group = {"legendgroup": curve.kind, "name": escape(curve.kind)}
        figure.add_trace(
            graph.Scatter(
                x=[*curve.x, *reversed(curve.x)],
                y=[*curve.high, *reversed(curve.low)],
                fill="toself",
                fillcolor=style["line"]["color"],
                opacity=0.2,
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                **group,
            )
        )
        figure.add_trace(
            graph.Scatter(
                x=curve.x,
                y=curve.rates,
                customdata=[x - 1 for x in curve.x],
                hovertemplate=f"step %{{customdata}}<br>rate %{{y:.3g}}<br>{curve.tensors} tensors",
                mode="lines+markers",
                **group,
                **style,
            )
        )
    figure.update_xaxes(type="log", title=STEP, tickvals=[*ticks], ticktext=[*ticks.values()])
    figure.update_yaxes(type="log", title=RATE, exponentformat="power")
    _put_legend_below(figure)
    return figure


def _heat_map(found: HeatMap) -> Figure:
    """Draw rates on a logarithmic scale of colors; 0 is left white."""
    graph, figure = _figure(height=min(180 + _ROW * len(found.rows), _TALLEST))
    logs = np.log10(found.positive)  # plotly has no logarithmic color scale
    known = logs[np.isfinite(logs)]
    ticks = range(math.floor(known.min()), math.ceil(known.max()) + 1) if len(known) else range(0)
    figure.add_trace(
        graph.Heatmap(
            x=[str(step) for step in found.steps],
            y=list(range(len(found.rows))),
            z=[[value if math.isfinite(value) else None for value in row] for row in logs.tolist()],
            customdata=found.rates.tolist(),
            text=[[escape(row)] * len(found.steps) for row in found.rows],
            hovertemplate="%{text}<br>step %{x}<br>rate %{customdata:.3g}<extra></extra>",
            colorscale="Viridis",
            colorbar={"title": "rate", "tickvals": [*ticks], "ticktext": [f"1e{tick}" for tick in ticks]},
        )
    )
    figure.update_xaxes(type="category", title="optimizer step")
    labeled = tick_positions(len(found.rows), _TALLEST // _ROW)
    figure.update_yaxes(
        autorange="reversed",
        tickvals=labeled,
        ticktext=[escape(found.rows[index]) for index in labeled],
        automargin=True,
    )
    return figure


def _multipliers(series: Sequence[MultiplierSeries]) -> Figure:
    graph, figure = _figure(height=520)
    for one, style in zip(series, _styles(), strict=False):
        group = {"legendgroup": one.kind, "name": escape(one.kind)}
        figure.add_trace(
            graph.Scatter(
                x=one.layers,
                y=one.multipliers,
                hovertemplate="layer %{x}<br>multiplier %{y:.3g}",
                mode="lines+markers" if len(one.layers) == 1 else "lines",
                **group,
                **style,
            )
        )
        figure.add_trace(
            graph.Scatter(
                x=[point.layer for point in one.measured],
                y=[point.multiplier for point in one.measured],
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [point.high - point.multiplier for point in one.measured],
                    "arrayminus": [point.multiplier - point.low for point in one.measured],
                },
                hovertemplate="layer %{x}<br>measured %{y:.3g}",
                mode="markers",
                showlegend=False,
                marker=style["marker"] | {"color": style["line"]["color"]},
                **group,
            )
        )
    figure.add_hline(1, line={"color": GRAY, "dash": "dot", "width": 1})
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=layers_of(series), title="layer")
    figure.update_yaxes(type="log", title="learning-rate multiplier", exponentformat="power")
    _put_legend_below(figure)
    return figure


def _put_legend_below(figure: Figure) -> None:
    """Make room for the legend under a figure: beside it, names of tensors leave no room on a narrow screen."""
    entries = sum(trace.showlegend is not False for trace in figure.data)
    below = {"x": 0, "y": -0.2, "xanchor": "left", "yanchor": "top", "tracegroupgap": 0}
    figure.update_layout(height=figure.layout.height + _ENTRY * entries, legend=below)


def _figure(height: int) -> tuple[ModuleType, Figure]:
    from plotly import graph_objects

    layout = {"template": "plotly_white", "height": height, "margin": {"t": 30, "b": 60}, "hovermode": "closest"}
    return graph_objects, graph_objects.Figure(layout=layout)


def _embedded(figure: Figure, name: str) -> str:
    config = {"displaylogo": False, "responsive": True}
    return str(figure.to_html(config=config, full_html=False, include_plotlyjs=False, div_id=name))


def _styles() -> Iterator[dict[str, Any]]:
    for color, variant in styles():
        line = {"color": color, "dash": _DASHES[variant], "width": 1.5}
        yield {"line": line, "marker": {"symbol": _SYMBOLS[variant], "size": 6}}


def _ends(rates: KindRates) -> list[str]:
    """Format the first and the last rate with their errors."""
    pairs = list(zip(rates.mean.tolist(), rates.log_error.tolist(), strict=True)) or [(math.nan, math.nan)]
    return [_with_error(mean, log_error) for mean, log_error in (pairs[0], pairs[-1])]


def _with_error(mean: float, log_error: float) -> str:
    if not math.isfinite(mean):
        return "0"
    return f"{mean:.3g} ± {mean * log_error:.2g}" if math.isfinite(log_error) else f"{mean:.3g}"


def _plotly() -> ModuleType:
    try:
        import plotly.offline
    except ImportError as error:
        raise ImportError("the report needs plotly: pip install 'hf_flerm[report]'.") from error
    return plotly  # type: ignore[no-any-return]
