"""Both libraries draw the numbers of `figures`, and hostile numbers and names never reach an axis."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import torch

from hf_flerm import RateProfile, RateProfileError
from hf_flerm.show.figures import (
    COLORS,
    layer_heat_map,
    layers_of,
    multiplier_series,
    rate_curves,
    styles,
    tensor_heat_map,
    tick_positions,
)
from hf_flerm.show.plotting import close, plot_layers, plot_multipliers, plot_profile
from hf_flerm.show.report import report
from tests.shared.profiles import profile


def matched() -> RateProfile:
    """A profile with a tensor that starts at rate 0, layers, and multipliers in layers 2, 10 and outside."""
    rates = {"h.10.w": [0.0, 2.0, 4.0], "h.2.w": [0.0, 8.0, 1.0], "e": [1.0, 1.0, 0.5]}
    kinds = {"h.10.w": "h.*.w", "h.2.w": "h.*.w", "e": "e"}
    logs = {"h.10.w": [math.log(2.0), math.log(8.0)], "e": [0.5]}
    matching = {"scales": {"h.10.w": math.log(3.0), "h.2.w": math.log(0.5), "e": 0.0}, "logs": logs}
    block = {"h.10": [0.0, 2.0, 4.0], "h.2": [0.0, 8.0, 1.0]}
    return RateProfile([0, 1, 4], rates, {"kinds": kinds, "matching": matching}, {"block": block})


def drawn_by_plotly(found: RateProfile) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Traces and layout of the report's figures."""
    decoder, page, figures = json.JSONDecoder(), report(found), []
    for start in re.finditer(r'Plotly\.newPlot\(\s*"picture-\d+",\s*', page):
        traces, end = decoder.raw_decode(page, start.end())
        layout, _ = decoder.raw_decode(page, page.index("{", end))
        figures.append((traces, layout))
    return figures


def test_curves_leave_out_steps_at_which_all_rates_are_0() -> None:
    kind, outside = rate_curves(matched())
    assert (kind.kind, kind.tensors, kind.x) == ("h.*.w", 2, [2, 5])
    assert kind.rates == pytest.approx([4.0, 2.0])  # geometric means of 2 and 8, of 4 and 1
    factor = 2.0  # the logarithms of each pair differ by log(4): standard error log(2)
    assert kind.low == pytest.approx([4.0 / factor, 2.0 / factor])
    assert kind.high == pytest.approx([4.0 * factor, 2.0 * factor])
    assert outside.x == [1, 2, 5]
    assert outside.low == outside.rates == outside.high == pytest.approx([1.0, 1.0, 0.5])


def test_multipliers_by_kind_in_the_order_of_the_layers() -> None:
    kind, outside = multiplier_series(matched())
    assert (kind.kind, kind.layers) == ("h.*.w", ["2", "10"])
    assert kind.multipliers == pytest.approx([0.5, 3.0])
    (measured,) = kind.measured
    assert (measured.layer, measured.multiplier) == ("10", pytest.approx(4.0))
    assert (measured.low, measured.high) == (pytest.approx(2.0), pytest.approx(8.0))
    assert outside.layers == ["outside"]
    assert layers_of([kind, outside]) == ["outside", "2", "10"]


def test_both_libraries_draw_the_same_rates() -> None:
    found = matched()
    figure = plot_profile(found)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].get_lines()}
    close(figure)
    traces, layout = drawn_by_plotly(found)[0]
    assert {t["name"]: (t["x"], t["y"]) for t in traces if t["mode"] == "lines+markers"} == lines
    assert lines == {curve.kind: (curve.x, curve.rates) for curve in rate_curves(found)}
    assert layout["yaxis"]["title"]["text"] == "rate (output units per unit learning rate)"


def test_both_libraries_draw_the_same_layers() -> None:
    found = matched()
    figure = plot_layers(found)
    image = torch.as_tensor(figure.axes[0].get_images()[0].get_array().filled(torch.nan))
    rows = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    close(figure)
    (trace,), layout = drawn_by_plotly(found)[1]
    table = layer_heat_map(found)
    assert rows == table.rows == layout["yaxis"]["ticktext"] == ["h.10", "h.2"]
    assert torch.equal(image.isnan(), torch.tensor(table.rates == 0))
    assert torch.equal(image.nan_to_num(0.0), torch.tensor(table.rates))
    assert trace["customdata"] == table.rates.tolist()
    assert trace["z"] == [[None if rate == 0 else math.log10(rate) for rate in row] for row in table.rates.tolist()]


def test_both_libraries_draw_the_same_multipliers_at_the_same_layers() -> None:
    found = matched()
    figure = plot_multipliers(found)
    (axes,) = figure.axes
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    lines = {line.get_label(): line for line in axes.get_lines()}
    drawn = {
        kind: ([labels[round(x)] for x in lines[kind].get_xdata()], list(lines[kind].get_ydata()))
        for kind in ("h.*.w", "e")
    }
    close(figure)
    traces, layout = drawn_by_plotly(found)[3]
    assert labels == layout["xaxis"]["categoryarray"] == ["outside", "2", "10"]
    assert {t["name"]: (t["x"], t["y"]) for t in traces if t["mode"] != "markers"} == drawn
    marks = next(t for t in traces if t["mode"] == "markers" and t["name"] == "h.*.w")
    assert (marks["x"], marks["y"]) == (["10"], pytest.approx([4.0]))
    assert (marks["error_y"]["array"], marks["error_y"]["arrayminus"]) == (pytest.approx([4.0]), pytest.approx([2.0]))


HOSTILE = {
    "a scale that overflows": ({"w": 1e6}, {}),
    "a scale that underflows": ({"w": -1e6}, {}),
    "a measured factor that overflows": ({"w": 0.0}, {"w": [1e6]}),
    "an error that overflows": ({"w": 0.0}, {"w": [5e4, -5e4]}),
    "a whole number of 400 digits": ({"w": 10**400}, {"w": [10**400]}),
    "digits that are no numbers": ({"h.²": 0.0}, {"h.²": [0.5]}),
    "a layer of 5,000 digits": ({f"h.{'9' * 5000}.w": 0.0}, {}),
    "columns of another form": ({"w": 0.0}, {"w": 3, "v": None, "u": "text", "t": {"a": 1}}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_multipliers_are_drawn_where_they_are_numbers_and_left_out_where_not(case: str) -> None:
    scales, logs = HOSTILE[case]
    found = RateProfile([0], {"w": [1.0]}, {"matching": {"scales": scales, "logs": logs}})
    series = multiplier_series(found)
    numbers = [m for one in series for m in one.multipliers] + [p.multiplier for one in series for p in one.measured]
    assert all(0 < number < math.inf for number in numbers)
    assert report(found)
    if series:
        close(plot_multipliers(found))
    else:
        with pytest.raises(RateProfileError, match="no multipliers"):
            plot_multipliers(found)


def test_styles_differ_for_as_many_lines_as_possible_and_then_repeat() -> None:
    found = styles()
    first = [next(found) for _ in range(4 * len(COLORS))]
    assert len(set(first)) == len(first)
    assert next(found) == first[0]


@pytest.mark.parametrize(
    ("count", "most", "labels"), [(0, 3, []), (3, 3, [0, 1, 2]), (4, 3, [0, 2]), (7, 3, [0, 3, 6])]
)
def test_labels_that_fit(count: int, most: int, labels: list[int]) -> None:
    assert tick_positions(count, most) == labels


def test_heat_maps_have_a_row_for_each_layer_and_each_tensor() -> None:
    found = matched()
    assert tensor_heat_map(found).rows == ["h.10.w", "h.2.w", "e"]
    assert tensor_heat_map(found).rates.tolist() == [row.tolist() for row in found.rates.values()]
    with pytest.raises(RateProfileError, match="no joint rates by block"):
        layer_heat_map(profile())
