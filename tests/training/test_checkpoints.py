"""A training that is stopped goes on as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_flerm import FLeRMConfig, RateProfile
from hf_flerm.model.names import trainable_parameters
from hf_flerm.profile.rate_profile import PROFILE_NAME
from hf_flerm.transfer.mapping import ProfileMap
from tests.shared.trainer_runs import DROPOUT, all_ones, known_base, match_known
from tests.shared.training import MODELS, assert_identical, flerm_callback, gpt2, make_trainer, train


class Stop(TrainerCallback):
    """Ends training early, as a preempted job would after its last checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    ("model", "mode", "alone"),
    [
        ("full", "record", False),
        ("full", "match", False),
        ("full", "match", True),
        ("lora", "record", True),
        ("lora", "match", False),
    ],
    ids=["full-record", "full-match", "full-match-callback", "lora-record-callback", "lora-match"],
)
def test_a_resumed_run_ends_like_one_that_never_stopped(tmp_path: Path, model: str, mode: str, alone: bool) -> None:
    config = FLeRMConfig()
    if mode == "match":
        config = FLeRMConfig(mode="match", profile=known_base(tmp_path / "base", MODELS[model]))
    options = {"alone": alone, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", MODELS[model](DROPOUT), config, **options)
    expected = train(whole)
    stopped = make_trainer(tmp_path / "parts", MODELS[model](DROPOUT), config, callbacks=[Stop(3)], **options)
    stopped.train()
    assert stopped.state.global_step == 3
    assert flerm_callback(stopped).rate_profile.steps.tolist() == [0, 1, 2]
    resumed = make_trainer(tmp_path / "parts", MODELS[model](DROPOUT), config, **options)
    outcome = train(resumed, resume_from_checkpoint=True)
    assert len(outcome.witnessed) == len(expected.witnessed) // 2
    assert_identical(outcome.weights, expected.weights)
    assert_identical(outcome.optimizer, expected.optimizer)
    assert_identical(outcome.logs, expected.logs)
    assert_identical(outcome.random_state, expected.random_state)
    assert flerm_callback(resumed).scales == flerm_callback(whole).scales
    assert (set(flerm_callback(whole).scales.values()) == {1.0}) == (mode == "record")
    for name in (PROFILE_NAME, f"checkpoint-6/{PROFILE_NAME}"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_resumes_from_another_folders_checkpoint(tmp_path: Path) -> None:
    """The scales of steps that were measured before the checkpoint are those that the run goes on with."""
    config = match_known(known_base(tmp_path, gpt2), measure_steps=(0, 1))
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", gpt2(), config, **options)
    expected = train(whole)
    resumed = make_trainer(tmp_path / "other", gpt2(), config, **options)
    outcome = train(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_identical(outcome.weights, expected.weights)
    assert flerm_callback(resumed).scales == flerm_callback(whole).scales
    assert resumed.rate_profile == whole.rate_profile


def test_recording_may_begin_at_a_plain_checkpoint(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    plain = train(make_trainer(tmp_path, gpt2(DROPOUT), **options))
    trainer = make_trainer(tmp_path / "resumed", gpt2(DROPOUT), FLeRMConfig(), **options)
    outcome = train(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_identical(outcome.weights, plain.weights)
    assert_identical(outcome.optimizer, plain.optimizer)
    assert trainer.rate_profile.steps.tolist() == [3, 4]
    (warning,) = warnings_of()
    assert f"no {PROFILE_NAME} in {tmp_path / 'checkpoint-3'}: rates are measured from step 3" in warning


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("first", ["plain", "matched"])
def test_plain_and_matched_runs_go_on_from_each_others_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, first: str
) -> None:
    """With scales of 1, half a plain run and half a matched one make a whole plain one, in either order."""
    monkeypatch.setattr(ProfileMap, "tensor_scales", all_ones)
    base = RateProfile([0], {name: [1.0] for name in trainable_parameters(MODELS[model]())})
    matched = FLeRMConfig(mode="match", profile=base)
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = train(make_trainer(tmp_path / "whole", MODELS[model](DROPOUT), **options))
    order = (None, matched) if first == "plain" else (matched, None)
    make_trainer(tmp_path, MODELS[model](DROPOUT), order[0], callbacks=[Stop(3)], **options).train()
    outcome = train(make_trainer(tmp_path, MODELS[model](DROPOUT), order[1], **options), resume_from_checkpoint=True)
    assert_identical(outcome.weights, whole.weights)
    assert_identical(outcome.optimizer["state"], whole.optimizer["state"])
    assert_identical(outcome.logs, whole.logs)
