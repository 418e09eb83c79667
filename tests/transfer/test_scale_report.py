"""What a matched run tells about its scales: warnings of large ones, and a summary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hf_flerm import FLeRMConfig
from hf_flerm.transfer.match_summary import MatchSummary, decision_from
from hf_flerm.transfer.scale_report import LargeScales
from tests.shared.trainer_runs import known_base, match_known
from tests.shared.training import flerm_callback, gpt2, make_trainer


def test_a_large_scale_is_reported_once_for_each_kind(warnings_of: Callable[[], list[str]]) -> None:
    large = LargeScales()
    large.warn({"a": 10.0, "b": 0.1, "c": 1.0}, {}, {})
    assert warnings_of() == []
    large.warn({"a": 30.0, "b": 0.05, "c": 1.0}, {"a": 6.0, "b": 0.1}, {"a": 0.2, "b": 2.0, "c": 1.0})
    (warning,) = warnings_of()
    assert warning.splitlines()[:3] == [
        "learning-rate scales are above 10 or below 1/10:",
        "- a: 30 (rate in the base 6, in this run 0.2)",
        "- b: 0.05 (rate in the base 0.1, in this run 2)",
    ]
    assert "another rank with LoRA's 'gaussian' initialization" in warning
    large.warn({"a": 40.0, "b": 0.02, "c": 11.0}, {"c": 11.0}, {"c": 1.0})
    (_, warning) = warnings_of()
    assert [line for line in warning.splitlines() if line.startswith("- ")] == [
        "- c: 11 (rate in the base 11, in this run 1)"
    ]
    large.warn({"a": 1.0, "b": 0.0, "c": 11.0}, {}, {})
    assert len(warnings_of()) == 2


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ({"a": 1.0, "b": 1.0}, "kept the learning rate"),
        ({"a": 0.31, "b": 0.31 * (1 + 1e-12)}, "one scale for all tensors"),
        ({"a": 1.0, "b": 1.1}, "different scales for different tensors"),
    ],
)
def test_the_decision_in_words(scales: dict[str, float], expected: str) -> None:
    assert decision_from(scales) == expected


def test_the_summary_is_one_line() -> None:
    summary = MatchSummary("different scales for different tensors", 0.05, 3.2, 12, 4.5, 300.0)
    assert str(summary) == (
        "different scales for different tensors (scales from 0.05 to 3.2), from 12 measurements, which took 4.5 s, "
        "1.5% of the training."
    )


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_a_matched_run_ends_with_its_summary(tmp_path: Path, caplog: pytest.LogCaptureFixture, alone: bool) -> None:
    trainer = make_trainer(tmp_path, gpt2(), match_known(known_base(tmp_path, gpt2)), alone=alone)
    caplog.set_level("INFO", "hf_flerm")
    output = trainer.train()
    run = flerm_callback(trainer).run
    last = trainer.state.log_history[-1]
    scales = run.scales.values()
    assert last["flerm/smallest_scale"] == min(scales) == pytest.approx(0.5)
    assert last["flerm/largest_scale"] == max(scales) == pytest.approx(2.0)
    assert last["flerm/measurements"] == len(flerm_callback(trainer).rate_profile.steps)
    assert 0 < last["flerm/share_of_time"] < 1
    assert last["flerm/share_of_time"] == pytest.approx(run.seconds / last["train_runtime"], rel=0.5)
    assert {key: output.metrics[key] for key in last if key.startswith("flerm/")} == {
        key: value for key, value in last.items() if key.startswith("flerm/")
    }
    lines = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    (line,) = [line for line in lines if line.startswith("matching has ended")]
    reason = flerm_callback(trainer).run.summary.decision
    assert reason == "different scales for different tensors, as policy='follow' was asked for"
    assert line.startswith(f"matching has ended: {reason} (scales from 0.5 to 2), from 1 measurements, which took ")


def test_a_recording_run_has_no_summary(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig())
    trainer.train()
    assert flerm_callback(trainer).run.summary is None
    assert not [key for key in trainer.state.log_history[-1] if key.startswith("flerm/")]
