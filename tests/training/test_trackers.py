"""What trackers get, read back from their own files."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_flerm import FLeRMCallback, FLeRMConfig
from tests.shared.training import gpt2, make_trainer, recorded

Seen = dict[str, dict[int, float]]


def by_tensorboard(project: str) -> Seen:
    events = EventAccumulator(os.environ["TENSORBOARD_LOGGING_DIR"]).Reload()
    return {key: {event.step: event.value for event in events.Scalars(key)} for key in events.Tags()["scalars"]}


def by_trackio(project: str) -> Seen:
    file = Path(os.environ["TRACKIO_DIR"], f"{project}.db")
    seen: Seen = {}
    for (text,) in sqlite3.connect(file).execute("SELECT metrics FROM metrics"):
        row = json.loads(text)
        for key, value in row.items():
            seen.setdefault(key, {})[row["train/global_step"]] = value
    return seen


READERS = {"tensorboard": by_tensorboard, "trackio": by_trackio}


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_has_rates_errors_scales_and_the_nominal_learning_rate(
    tracker: str, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    config = FLeRMConfig("match", recorded(tmp_path, gpt2()), measure_steps=(0, 2))
    trainer: Any = make_trainer(
        tmp_path, gpt2(width=32), None if alone else config, report_to=[tracker], project="rates"
    )
    if alone:
        FLeRMCallback(config).add_to(trainer)
    trainer.train()
    logs = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    wanted = {key for entry in logs.values() for key in entry if key.startswith("flerm/")}
    kind = "transformer.h.*.attn.c_attn.weight"
    assert {f"flerm/rate/{kind}", f"flerm/relative_error/{kind}", f"flerm/scale/{kind}", "flerm/seconds"} <= wanted
    seen = READERS[tracker]("rates")
    for key in wanted | {"learning_rate"}:
        told = {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}
        assert seen[f"train/{key}"] == pytest.approx(told, rel=1e-6)
    assert seen[f"train/flerm/rate/{kind}"].keys() == {1, 3}
    assert seen["train/learning_rate"][1] == pytest.approx(trainer.args.learning_rate)
