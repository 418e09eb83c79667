"""What is logged, and what is not."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_flerm import FLeRMCallback, FLeRMConfig, Research
from hf_flerm.model.name_text import without_prefix
from hf_flerm.model.names import tensor_kinds
from tests.shared.training import (
    BATCH,
    STEPS,
    Rows,
    flerm_callback,
    gpt2,
    lora,
    make_trainer,
    recorded,
    scaled,
    some_factors,
)


class Tracker(TrainerCallback):
    """What an experiment tracker is told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


def geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


LINE = {"flerm/rate/total", "flerm/smallest_scale", "flerm/largest_scale", "flerm/seconds"}


def line(entry: dict[str, float]) -> dict[str, float]:
    """What the console shows of the measurements in a log."""
    return {key: value for key, value in entry.items() if key in LINE}


def test_the_console_shows_a_short_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It shows no entry of a kind of tensor, whether logs are printed or written above a progress bar."""
    base = scaled(recorded(folder, lora()), some_factors(lora()))
    config = FLeRMConfig("match", base, measure_steps=(0, 2))
    added = FLeRMCallback(config)
    trainers = [
        make_trainer(folder, lora(), config),
        make_trainer(folder, lora(), config, alone=True),
        make_trainer(folder, lora()),
        make_trainer(folder, lora(), config, disable_tqdm=False),
    ]
    added.add_to(trainers[2])
    for trainer in trainers:
        capsys.readouterr()
        trainer.train()
        printed = [
            ast.literal_eval(text) for text in capsys.readouterr().out.splitlines() if text.startswith("{'loss'")
        ]
        assert len(printed) == STEPS
        for entry, console in zip(trainer.state.log_history, printed, strict=False):
            shown = {key: float(value) for key, value in console.items() if key.startswith("flerm/")}
            assert shown == pytest.approx(line(entry), rel=1e-3)
            assert len(shown) == (4 if entry["step"] in (1, 3) else 0)
            assert any(key.startswith("flerm/scale/") for key in entry) == bool(shown)


def test_no_entry_has_the_prefix_of_adapters(folder: Path) -> None:
    trainer = make_trainer(folder, lora(), FLeRMConfig(measure_steps=(1,)))
    trainer.train()
    keys = {key for entry in trainer.state.log_history for key in entry}
    assert "flerm/rate/transformer.h.*.attn.c_attn.lora_A.weight" in keys
    assert not [key for key in keys if "base_model" in key]


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
@pytest.mark.parametrize("log_by", ["kind", "tensor", "none"])
@pytest.mark.parametrize("mode", ["record", "match"])
def test_rates_errors_and_scales_are_logged(folder: Path, mode: str, log_by: str, alone: bool) -> None:
    measured = (0, 2, 3)
    config = FLeRMConfig(measure_steps=measured, log_by=log_by)
    if mode == "match":
        base = scaled(recorded(folder, lora()), some_factors(lora()))
        config = replace(config, mode="match", profile=base, research=Research(beta=1.0))
    tracker = Tracker()
    trainer = make_trainer(folder, lora(), config, alone=alone, callbacks=[tracker])
    trainer.train()
    profile = flerm_callback(trainer).rate_profile
    known_kinds = tensor_kinds(trainer.model)
    kinds = {
        name: without_prefix(known_kinds[name] if log_by == "kind" else name)
        for name in profile.names
        if log_by != "none"
    }
    history = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    for step in range(STEPS):
        entry = {key: value for key, value in history[step + 1].items() if key.startswith("flerm/")}
        seen = {key: value for key, value in tracker.logs[step].items() if key.startswith("flerm/")}
        assert seen == (line(entry) if alone else entry)
        if step not in measured:
            assert entry == {}
            continue
        by_kind: dict[str, list[float]] = {}
        for name, rate in profile.at(step).items():
            if rate > 0 and name in kinds:
                by_kind.setdefault(f"flerm/rate/{kinds[name]}", []).append(rate)
        positive = len(set(kinds.values())) // (2 if step == 0 else 1)  # A has no rate at step 0
        assert len(by_kind) == positive
        errors = {key for key in entry if key.startswith("flerm/relative_error/")}
        assert {key.replace("relative_error", "rate") for key in errors} == by_kind.keys()
        if step == measured[-1]:
            known = flerm_callback(trainer).last_measurement.relative_errors
            for key in errors:
                mine = [known[name] for name in kinds if key == f"flerm/relative_error/{kinds[name]}"]
                assert entry[key] == pytest.approx(geometric(mine), rel=1e-12)
        for key in errors:
            assert 0 < entry.pop(key) < math.inf
        expected = {kind: geometric(rates) for kind, rates in by_kind.items()}
        assert {key: entry.pop(key) for key in expected} == pytest.approx(expected, rel=1e-12)
        assert entry.pop("flerm/rate/total") > 0
        assert entry.pop("flerm/seconds", 1.0) > 0
        if mode == "match":
            assert 0 < entry.pop("flerm/smallest_scale") < entry.pop("flerm/largest_scale")
        assert set(entry) == ({f"flerm/scale/{kind}" for kind in kinds.values()} if mode == "match" else set())
    if mode == "match":
        scales = flerm_callback(trainer).scales
        last = {f"flerm/scale/{kind}": scales[name] for name, kind in kinds.items()}
        last |= {"flerm/smallest_scale": min(scales.values()), "flerm/largest_scale": max(scales.values())}
        logged = {key: value for key, value in history[measured[-1] + 1].items() if key in last}
        assert logged == pytest.approx(last, rel=1e-12)
        assert len(set(scales.values())) == 4


def test_sparse_logs_hold_the_latest_measurement(folder: Path) -> None:
    trainer = make_trainer(folder, gpt2(), FLeRMConfig(measure_steps=(0, 1)), logging_steps=3)
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    rate = trainer.rate_profile.at(1)["transformer.wte.weight"]
    assert first["flerm/rate/transformer.wte.weight"] == pytest.approx(rate, rel=1e-12)
    assert not any(key.startswith("flerm/") for key in second)


def test_the_metrics_of_an_evaluation_stay_as_they_are(folder: Path) -> None:
    """A hyperparameter search adds up all metrics that it is given; rates must not be among them."""

    class Metrics(TrainerCallback):
        def __init__(self) -> None:
            self.keys: list[set[str]] = []

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            self.keys.append(set(kwargs["metrics"]))

    seen = Metrics(), Metrics()
    options = {"extra": {"eval_dataset": Rows(BATCH, seed=1)}, "eval_strategy": "steps", "eval_steps": 1}
    for callback, flerm in zip(seen, (None, FLeRMConfig()), strict=True):
        make_trainer(folder, gpt2(), flerm, callbacks=[callback], max_steps=3, logging_steps=2, **options).train()
    assert len(seen[0].keys) == 3
    assert seen[1].keys == seen[0].keys
