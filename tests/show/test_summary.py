"""What a report says first, and the titles of figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hf_flerm import FLeRMConfig, RateProfile
from hf_flerm.show.figures import step_ticks
from hf_flerm.show.plotting import PICTURES, close
from hf_flerm.show.report import report
from hf_flerm.show.summary import title_of, verdict
from tests.shared.training import gpt2, lora, make_trainer, recorded


def swept(rate: float, **metadata: Any) -> RateProfile:
    sweep = [[1e-3, 3.0], [1e-2, 2.5], [1e-1, None]]
    about = {"training_arguments": {"learning_rate": rate}, "sweep": sweep, **metadata}
    return RateProfile([0, 1], {"h.0.w": [1.0, 2.0]}, about, {"block": {"h.0": [1.0, 2.0]}})


def test_the_verdict_of_a_base_is_whether_its_learning_rate_was_the_best() -> None:
    assert verdict(swept(1e-2)) == {
        "decision": "recorded only: no learning rate was changed",
        "as a base": "0.01 was the best learning rate of its sweep",
        "validation losses": "3 at 0.001, 2.5 at 0.01, nan at 0.1",
    }
    assert verdict(swept(1e-3))["as a base"] == "0.001 was not the best learning rate of its sweep: 0.01 was"
    assert "not chosen" in verdict(RateProfile([0], {"w": [1.0]}))["as a base"]


def test_the_verdict_of_a_matched_run_is_its_decision_and_its_reason(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gpt2(width=32), FLeRMConfig("match", recorded(tmp_path, gpt2())))
    trainer.train()
    found = verdict(trainer.rate_profile)
    scales = trainer.flerm_callback.scales.values()
    ends = f"(from {min(scales):.3g} to {max(scales):.3g})"
    assert found["decision"] == f"different scales for different tensors {ends}"
    assert trainer.flerm_callback.run.summary.decision.endswith(f", as {found['reason']}")
    page = report(trainer.rate_profile)
    assert page.index(found["decision"]) < page.index(found["base"]) < page.index("Rates over training</h2>")
    assert verdict(swept(1e-2, matching={"scales": {"w": math.log(0.5)}}))["decision"].startswith("one scale for all")
    assert verdict(swept(1e-2, matching={}))["decision"].startswith("recorded only")


def test_pictures_name_model_learning_rate_and_profile_and_explain_themselves(tmp_path: Path) -> None:
    base = recorded(tmp_path, lora())
    assert title_of(base) == "gpt2, LORA r 2, learning rate 0.01, profile of a recorded run"
    for name in ("rates", "layers"):
        figure = PICTURES[name](base)
        title, explained = figure.axes[0].get_title(loc="left").split("\n")
        close(figure)
        assert title == title_of(base)
        assert explained.startswith({"rates": "Line: ", "layers": "Color: "}[name])


def test_a_formula_in_a_name_is_not_drawn_as_one() -> None:
    figure = PICTURES["rates"](swept(1e-2, model="$\\frac{$"))
    figure.canvas.draw()
    assert "$" in figure.axes[0].get_title(loc="left")
    close(figure)


def test_ticks_are_the_steps_themselves_at_distances_that_can_be_read() -> None:
    assert step_ticks([0, 1, 2, 4]) == {1: "0", 2: "1", 3: "2", 5: "4"}
    assert step_ticks(range(100, 130)) == {101: "100", 127: "126"}  # 1.25 * 101 = 126.25
    assert step_ticks([]) == {}
