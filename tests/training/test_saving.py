"""Profiles are saved beside checkpoints and models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from torch import nn

from hf_flerm import FLeRMConfig, RateProfile, RateProfileError
from hf_flerm.profile.rate_profile import PROFILE_NAME
from tests.shared.trainer_runs import DROPOUT
from tests.shared.training import Rows, flerm_callback, gpt2, lora, make_trainer


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_every_checkpoint_holds_the_profile_so_far(tmp_path: Path, alone: bool) -> None:
    config = FLeRMConfig(measure_steps=(0, 1, 3, 5))
    trainer = make_trainer(tmp_path, gpt2(), config, alone=alone, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    steps = {name: RateProfile.from_pretrained(tmp_path / name).steps.tolist() for name in checkpoints}
    assert steps == {"checkpoint-2": [0, 1], "checkpoint-4": [0, 1, 3], "checkpoint-6": [0, 1, 3, 5]}
    assert RateProfile.from_pretrained(tmp_path) == flerm_callback(trainer).rate_profile
    assert not list(tmp_path.rglob("_*"))


def test_save_model_writes_the_profile_beside_the_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", gpt2(), FLeRMConfig(), max_steps=2)
    trainer.train()
    (tmp_path / "out" / PROFILE_NAME).unlink()
    trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    for folder in ("out", "elsewhere"):
        assert (tmp_path / folder / "model.safetensors").is_file()
        assert (tmp_path / folder / PROFILE_NAME).read_bytes() == trainer.rate_profile.to_bytes()


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_a_folder_that_is_used_again_gets_the_new_profile(tmp_path: Path, alone: bool) -> None:
    options = {"alone": alone, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    for seed in (0, 1):
        trainer = make_trainer(tmp_path, gpt2(seed=seed), FLeRMConfig(seed=seed), **options)
        trainer.train()
        assert RateProfile.from_pretrained(tmp_path / "checkpoint-2") == flerm_callback(trainer).rate_profile


@pytest.mark.parametrize("data", ["rows", "datasets"])
@pytest.mark.parametrize("make", [gpt2, lora], ids=["full", "lora"])
def test_the_same_run_gives_the_same_bytes(tmp_path: Path, make: Callable[..., nn.Module], data: str) -> None:
    files = []
    for name in ("first", "second"):
        rows = Rows()
        if data == "datasets":
            rows = datasets.Dataset.from_dict({"input_ids": rows.tokens.tolist(), "labels": rows.tokens.tolist()})
        make_trainer(tmp_path / name, make(DROPOUT), FLeRMConfig(), data=rows, max_steps=2).train()
        files.append((tmp_path / name / PROFILE_NAME).read_bytes())
    assert files[0] == files[1]
    assert str(tmp_path).encode() not in files[0]


def test_the_profile_is_there_only_after_training_began(folder: Path) -> None:
    trainer = make_trainer(folder, gpt2(), FLeRMConfig())
    with pytest.raises(RateProfileError, match="nothing is recorded yet"):
        _ = trainer.rate_profile
