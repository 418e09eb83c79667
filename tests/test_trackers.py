"""What trackers get, read back from their own files."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import gpt2, make_trainer, recorded

from hf_flerm import FLeRMConfig


def test_tensorboard_has_rates_errors_scales_and_the_nominal_learning_rate(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    config = FLeRMConfig("match", recorded(tmp_path, gpt2()), measure_steps=(0, 2))
    trainer = make_trainer(tmp_path, gpt2(width=32), config, report_to=["tensorboard"])
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    logs = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    wanted = {key for entry in logs.values() for key in entry if key.startswith("flerm/")}
    kind = "transformer.h.*.attn.c_attn.weight"
    assert {f"flerm/rate/{kind}", f"flerm/relative_error/{kind}", f"flerm/scale/{kind}", "flerm/seconds"} <= wanted
    assert {f"train/{key}" for key in wanted} <= set(events.Tags()["scalars"])
    for key in wanted:
        seen = {event.step: event.value for event in events.Scalars(f"train/{key}")}
        assert seen == pytest.approx({step: entry[key] for step, entry in logs.items() if key in entry}, rel=1e-6)
        assert seen.keys() == {1, 3}
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert rates == pytest.approx([entry["learning_rate"] for entry in logs.values()])
    assert rates[0] == pytest.approx(trainer.args.learning_rate)
