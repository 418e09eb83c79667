"""A probe that raises changes nothing, and is told once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from hf_flerm import FLeRMConfig, Research
from hf_flerm.rates.probe import RateProbe
from tests.shared.trainer_runs import DROPOUT, OPTIMIZERS, known_base, plain_run
from tests.shared.training import MODELS, Rows, assert_same_run, flerm_config, gpt2, make_trainer, train

PLACES = {
    "examples": (Rows, "__getitem__"),
    "inside the model": (GPT2MLP, "forward"),
    "after the forward": (GPT2LMHeadModel, "forward"),
    "after the backward": (torch.autograd, "grad"),
    "after the measurement": (RateProbe, "measure"),
}


def break_measurements(patch: pytest.MonkeyPatch, place: str, failing: range, message: str) -> None:
    """Let some measurements, counted from 0, raise where `place` is done; the training's own calls go through."""
    count, armed = itertools.count(), [False]
    owner, name = PLACES[place]

    def breaking(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # the Trainer reads the signature of a model's forward
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if armed[0]:
                raise RuntimeError(message)
            return result

        return call

    def arming(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            armed[0] = next(count) in failing
            try:
                return function(*args, **kwargs)
            finally:
                armed[0] = False

        return call

    patch.setattr(owner, name, breaking(getattr(owner, name)))
    patch.setattr(RateProbe, "measure", arming(RateProbe.measure))


@pytest.mark.parametrize(
    ("place", "model"), [*((place, "full") for place in PLACES), ("inside the model", "lora")], ids=[*PLACES, "lora"]
)
def test_a_probe_that_raises_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, warnings_of: Callable[[], list[str]], place: str, model: str
) -> None:
    message = f"broken at {place} of {model}"
    break_measurements(monkeypatch, place, range(2, 3), message)
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS["adamw-fused"]}
    trainer = make_trainer(folder, MODELS[model](DROPOUT), FLeRMConfig(research=Research(probes=2)), **options)
    outcome = train(trainer)
    assert_same_run(outcome, plain_run(folder, model, "adamw-fused"))
    assert trainer.rate_profile.steps.tolist() == [0, 1, 3, 4]
    (warning,) = warnings_of()
    assert message in warning
    assert "step 2" in warning


@pytest.mark.parametrize("place", ["inside the model", "after the measurement"])
def test_a_probe_that_keeps_raising_is_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, warnings_of: Callable[[], list[str]], place: str
) -> None:
    break_measurements(monkeypatch, place, range(1, 100), f"broken for good at {place}")
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS["adamw-fused"]}
    trainer = make_trainer(folder, gpt2(DROPOUT), FLeRMConfig(), **options)
    assert_same_run(train(trainer), plain_run(folder, "full", "adamw-fused"))
    assert trainer.rate_profile.steps.tolist() == [0]
    first, last = warnings_of()
    assert "the measurement at step 1 failed" in first
    assert "3 measurements failed in a row" in last


@pytest.mark.parametrize("again", ["new trainer", "same trainer"])
def test_every_run_reports_its_own_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, warnings_of: Callable[[], list[str]], again: str
) -> None:
    """A notebook's second run must not fail silently because the first one failed in the same way."""
    trainer = make_trainer(folder, gpt2(), FLeRMConfig(), max_steps=3)
    for run in (1, 2):
        with monkeypatch.context() as patch:
            break_measurements(patch, "after the measurement", range(1, 2), "broken in every run")
            trainer.train()
        assert len(warnings_of()) == run
        if again == "new trainer":
            trainer = make_trainer(folder, gpt2(), FLeRMConfig(), max_steps=3)


def test_a_probe_that_raises_leaves_the_scales_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matched run goes on as if the measurement had been asked for a step later."""
    base = known_base(folder, gpt2)
    config = {"mode": "match", "profile": base, "pool": "unit", "beta": 1.0}
    expected = train(make_trainer(folder, gpt2(), flerm_config(**config, measure_steps=(0, 2, 3))))
    break_measurements(monkeypatch, "after the measurement", range(1, 2), "broken while matching")
    trainer = make_trainer(folder, gpt2(), flerm_config(**config, measure_steps=(0, 1, 3)))
    assert_same_run(train(trainer), expected)
    assert trainer.rate_profile.steps.tolist() == [0, 2, 3]
