"""Pictures show the numbers of the profile."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hf_flerm import FLeRMConfig, RateProfile, RateProfileError
from hf_flerm.choices import Picture, values
from hf_flerm.show.plotting import (
    PICTURES,
    close,
    plot_interactions,
    plot_layers,
    plot_losses,
    plot_multipliers,
    plot_profile,
)
from hf_flerm.show.summary import rates_by_kind
from tests.shared.profiles import profile
from tests.shared.training import gpt2, make_trainer, recorded


def test_a_kind_is_summarized_by_its_geometric_mean_and_the_error_of_its_logarithms() -> None:
    kinds = {"h.0.w": "h.*.w", "h.1.w": "h.*.w", "h.2.w": "h.*.w", "lone": "lone"}
    rates = {"h.0.w": [1.0, 0.0], "h.1.w": [math.e, 2.0], "h.2.w": [math.e**2, 8.0], "lone": [3.0, 0.0]}
    found = rates_by_kind(RateProfile([0, 1], rates, {"kinds": kinds}))
    assert found["h.*.w"].mean.tolist() == pytest.approx([math.e, 4.0])
    assert found["h.*.w"].log_error.tolist() == pytest.approx([1 / math.sqrt(3), math.log(2)])
    low, high = found["h.*.w"].band
    assert (low[1], high[1]) == pytest.approx((2.0, 8.0))
    assert found["lone"].mean[0].item() == pytest.approx(3.0)
    assert math.isnan(found["lone"].mean[1])
    assert all(map(math.isnan, found["lone"].log_error))


def test_the_lines_are_the_means_by_kind() -> None:
    figure = plot_profile(profile())
    (axes,) = figure.axes
    expected = {kind: rates.mean.tolist() for kind, rates in rates_by_kind(profile()).items()}
    assert {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()} == expected
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "per unit learning rate" in axes.get_ylabel()
    ticks = [(tick.get_position()[0], tick.get_text()) for tick in axes.get_xticklabels()]
    assert ticks == [(step + 1, str(step)) for step in profile().steps.tolist()]
    close(figure)


def test_layers_show_joint_rates_and_multipliers_those_that_were_used(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    figure = plot_layers(base)
    shown = torch.as_tensor(figure.axes[0].get_images()[0].get_array().filled(torch.nan))
    assert torch.equal(shown, torch.stack(list(base.joint_rates["block"].values())))
    close(figure)
    with pytest.raises(RateProfileError, match="no multipliers: its run only recorded"):
        plot_multipliers(base)
    with pytest.raises(RateProfileError, match="no joint rates by block"):
        plot_layers(profile())
    trainer = make_trainer(tmp_path, gpt2(width=32), FLeRMConfig("match", base))
    trainer.train()
    scales = trainer.rate_profile.about.matched_scales
    assert scales == pytest.approx({name: trainer.flerm_callback.scales[name] for name in scales})
    figure = plot_multipliers(trainer.rate_profile)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    name = "transformer.h.{}.attn.c_attn.weight"
    drawn = lines[name.format("*")]
    assert list(drawn.get_ydata()) == pytest.approx([scales[name.format(layer)] for layer in range(2)])
    layers = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert [layers[place] for place in drawn.get_xdata()] == ["0", "1"]
    assert [layers[round(place)] for place in lines["transformer.wte.weight"].get_xdata()] == ["outside"]
    close(figure)


def test_multipliers_stand_at_the_layers_that_names_say() -> None:
    scales = dict.fromkeys(["h.2.w", "h.10.w", "h.3.w", "h.10.experts.0.w", "wte"], 0.1)
    matched = RateProfile([0], {"wte": [1.0]}, {"matching": {"scales": scales}})
    figure = plot_multipliers(matched)
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["outside", "2", "3", "10", "10.0"]
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].get_lines()}
    assert lines["h.*.w"] == [1, 2, 3]
    assert list(map(round, lines["wte"])) == [0]
    close(figure)


def test_what_is_matched_as_one_is_called_everything() -> None:
    matching = {"scales": {"": 0.5}, "logs": {"": [0.25, 0.75]}}
    figure = plot_multipliers(RateProfile([0], {"w": [1.0]}, {"matching": matching}))
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["everything"]
    close(figure)


def test_interactions_are_drawn_as_correlations() -> None:
    figure = plot_interactions(["a", "b"], torch.tensor([[4.0, -3.0], [-3.0, 9.0]]))
    shown = figure.axes[0].get_images()[0].get_array()
    assert shown.tolist() == [[1.0, -0.5], [-0.5, 1.0]]
    close(figure)
    with pytest.raises(ValueError, match="1 names"):
        plot_interactions(["a"], torch.eye(2))


def test_labels_are_as_many_as_fit() -> None:
    steps = list(range(0, 2500, 100))
    figure = plot_layers(RateProfile(steps, {"h.0.w": [1.0] * 25}, None, {"block": {"h.0": [1.0] * 25}}))
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == [str(step) for step in steps[::2]]
    close(figure)
    figure = plot_interactions([f"h.{layer}.w" for layer in range(200)], torch.eye(200))
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == [f"h.{i}.w" for i in range(0, 200, 3)]
    assert max(figure.get_size_inches()) < 25
    close(figure)


def test_losses_have_a_star_at_the_optimum_and_a_line_at_the_edge() -> None:
    figure = plot_losses({"run": {1e-3: [3.0], 1e-2: [2.0], 1e-1: [2.5], 1.0: [math.inf]}})
    lines = figure.axes[0].get_lines()
    star = next(line for line in lines if line.get_marker() == "*")
    edge = next(line for line in lines if line.get_linestyle() == "--")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (1e-2, 2.0)
    assert edge.get_xdata()[0] == 1e-1
    close(figure)
    with pytest.raises(ValueError, match="'run' has no finite loss"):
        plot_losses({"run": {1.0: [math.nan]}})


def test_every_picture_that_can_be_chosen_is_drawn() -> None:
    assert tuple(PICTURES) == values(Picture)
