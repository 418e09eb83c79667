"""Learning-rate schedules are left as they are; steps at rate 0, and schedules that measure nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import SchedulerType

from hf_flerm import FLeRMConfig
from tests.shared.trainer_runs import DROPOUT, SpyRates, known_base, match_known
from tests.shared.training import (
    BATCH,
    STEPS,
    Rows,
    assert_same_run,
    flerm_callback,
    gpt2,
    lora,
    make_trainer,
    train,
    weights_of,
)

SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 2},
    # Their metric never improves, so both lower the rate at every evaluation.
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 0},
    "greedy": {"factor": 0.5, "patience": 0},
}


@pytest.mark.parametrize("schedule", [kind.value for kind in SchedulerType])
def test_every_schedule_is_logged_as_the_plain_trainer_logs_it(folder: Path, schedule: str) -> None:
    options: dict[str, Any] = {
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": SCHEDULES.get(schedule),
        "warmup_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "constant",
        "extra": {"eval_dataset": Rows(BATCH, seed=1), "compute_metrics": lambda prediction: {"constant": 1.0}},
    }
    plain_spy = SpyRates()
    plain = make_trainer(folder, lora(), callbacks=[plain_spy], **options)
    logged = [entry["learning_rate"] for entry in train(plain).logs]
    assert len(logged) == STEPS
    assert (len(set(logged)) > 1) == (schedule != "constant")
    base = known_base(folder, lora)
    for alone in (False, True):
        spy = SpyRates()
        config = match_known(base, measure_steps=(0, 1))
        trainer = make_trainer(folder, lora(), config, alone=alone, callbacks=[spy], **options)
        assert [entry["learning_rate"] for entry in train(trainer).logs] == logged
        assert spy.outside == plain_spy.outside
        scales = flerm_callback(trainer).scales
        assert any(abs(math.log(scale)) > 0.1 for scale in scales.values())
        last = plain_spy.inside[-1]
        assert spy.inside[-1] == {name: rate * scales[name] for name, rate in last.items()}
        assert all(map(math.isfinite, (float(w.sum()) for w in weights_of(trainer.model).values())))


@pytest.mark.parametrize("mode", ["record", "match"])
def test_a_step_at_learning_rate_zero_is_not_measured(
    folder: Path, warnings_of: Callable[[], list[str]], mode: str
) -> None:
    config = FLeRMConfig() if mode == "record" else match_known(known_base(folder, gpt2), measure_steps=None)
    spy = SpyRates()
    plain = train(make_trainer(folder, gpt2(DROPOUT), warmup_steps=2))
    trainer = make_trainer(folder, gpt2(DROPOUT), config, callbacks=[spy], warmup_steps=2)
    outcome = train(trainer)
    assert set(spy.inside[0].values()) == {0.0}
    assert trainer.rate_profile.steps.tolist() == [1, 2, 4]
    assert all(bool((rates > 0).all()) for rates in trainer.rate_profile.rates.values())
    assert [text for text in warnings_of() if "learning-rate scales are above" not in text] == []
    if mode == "record":
        assert_same_run(outcome, plain)
    else:
        scales = flerm_callback(trainer).scales
        assert any(abs(math.log(scale)) > 0.1 for scale in scales.values())


def test_a_schedule_that_asks_for_no_step_is_told(folder: Path, warnings_of: Callable[[], list[str]]) -> None:
    make_trainer(folder, gpt2(), FLeRMConfig(measure_steps=(STEPS,))).train()
    assert warnings_of() == [
        "nothing was measured in this run, and its profile is empty: "
        f"measure_steps=({STEPS},) asks for none of its steps."
    ]
