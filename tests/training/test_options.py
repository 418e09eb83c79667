"""What can be chosen about measurements, in a run: nothing of it may disturb training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from hf_flerm import FLeRMConfig, RateProfileError, Research
from hf_flerm.model.names import trainable_parameters
from hf_flerm.profile.rate_profile import PROFILE_NAME
from tests.shared.training import (
    MEASURED,
    assert_same_run,
    flerm_callback,
    flerm_config,
    gpt2,
    lora,
    make_trainer,
    recorded,
    train,
)


@pytest.mark.parametrize(
    "config",
    [
        {"snapshot_device": "cpu"},
        {"output": "hidden"},
        {"output": "log_probs", "positions": "labels"},
        {"metric": "fisher"},
        {"probes": "auto", "max_probes": 3},
        {"probes_per_batch": 3},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_recording_changes_nothing_whatever_is_measured(tmp_path: Path, config: dict[str, Any]) -> None:
    plain = train(make_trainer(tmp_path, gpt2(0.1)))
    trainer = make_trainer(tmp_path, gpt2(0.1), flerm_config(**config))
    assert_same_run(train(trainer), plain)
    assert trainer.rate_profile.steps.tolist() == MEASURED
    assert all(rates.all() for rates in trainer.rate_profile.rates.values())


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"bf16": True},
    ],
    ids=["reentrant", "not reentrant", "compiled", "bf16"],
)
@pytest.mark.parametrize("model", [gpt2, lora])
def test_recording_changes_nothing_however_it_is_trained(tmp_path: Path, model: Any, options: dict[str, Any]) -> None:
    plain = train(make_trainer(tmp_path, model(), **options))
    trainer = make_trainer(tmp_path, model(), FLeRMConfig(), **options)
    assert_same_run(train(trainer), plain)
    assert trainer.rate_profile.steps.tolist() == MEASURED


def test_where_the_snapshot_lies_does_not_matter_to_a_matched_run(tmp_path: Path) -> None:
    base = recorded(tmp_path, lora(seed=1))
    research = Research(policy="follow")
    runs, scales = [], []
    for device in (None, "cpu"):
        config = FLeRMConfig(mode="match", profile=base, snapshot_device=device, research=research)
        trainer = make_trainer(tmp_path, lora(), config)
        runs.append(train(trainer))
        scales.append(flerm_callback(trainer).scales)
    assert_same_run(runs[1], runs[0])
    assert scales[0] == scales[1]
    assert set(scales[0].values()) != {1.0}


@pytest.mark.parametrize(("target_error", "probes"), [(10.0, 2), (1e-9, 10)])
def test_probes_are_taken_until_the_target_or_the_cap(tmp_path: Path, target_error: float, probes: int) -> None:
    config = FLeRMConfig(measure_steps=(2,), research=Research(probes="auto", target_error=target_error, max_probes=5))
    trainer = make_trainer(tmp_path, gpt2(), config)
    trainer.train()
    measurement = flerm_callback(trainer).last_measurement
    assert measurement is not None
    assert measurement.num_probes == probes  # two of each batch


@pytest.mark.parametrize(
    ("recorded_with", "matched_with"),
    [
        ({"metric": "fisher"}, {"metric": "euclidean"}),
        ({}, {"output": "hidden"}),
        ({"positions": "labels"}, {"positions": "attention_mask"}),
    ],
)
def test_a_profile_in_other_units_is_refused(
    tmp_path: Path, recorded_with: dict[str, Any], matched_with: dict[str, Any]
) -> None:
    base = recorded(tmp_path, gpt2(), flerm=flerm_config(**recorded_with))
    (name, value), *_ = recorded_with.items() or matched_with.items()
    trainer = make_trainer(tmp_path, gpt2(), flerm_config(mode="match", profile=base, **matched_with))
    with pytest.raises(RateProfileError, match=f"recorded with {name}=.*{value}|recorded with {name}='logits'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_profile_in_the_same_units_is_taken(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2(), flerm=FLeRMConfig(metric="fisher"))
    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig(mode="match", profile=base, metric="fisher"))
    trainer.train()
    assert trainer.rate_profile.steps.tolist() == MEASURED


def test_a_profile_that_cannot_be_written_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    plain = train(make_trainer(tmp_path / "plain", gpt2(), **options))

    def too_large(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("header too large")

    monkeypatch.setattr("hf_flerm.profile.file.save", too_large)
    caplog.set_level(logging.WARNING, "hf_flerm")
    assert_same_run(train(make_trainer(tmp_path / "recorded", gpt2(), FLeRMConfig(), **options)), plain)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("hf_flerm")]
    assert "could not be written and will be tried at every save: the profile cannot be written" in said
    assert not list(tmp_path.glob(f"recorded/**/{PROFILE_NAME}"))


class Spare(GPT2LMHeadModel):
    """A GPT-2 with a tensor that no forward uses."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.spare = nn.Linear(2, 2)


def test_tensors_that_take_no_part_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, Spare(gpt2().config), FLeRMConfig(), weight_decay=0.0)
    caplog.set_level(logging.WARNING, "hf_flerm")
    trainer.train()
    reported = [record.getMessage() for record in caplog.records if "do not depend on" in record.getMessage()]
    assert len(reported) == 1
    assert "[spare.bias, spare.weight]" in reported[0]
    assert trainer.rate_profile.rates["spare.weight"].tolist() == [0.0] * len(MEASURED)


def test_a_failed_measurement_leaves_the_snapshot_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights copied to a buffer and back, an error in between must not leave the old ones in the model."""
    plain = train(make_trainer(tmp_path, gpt2()))
    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig(snapshot_device="cpu"))
    seen: list[Tensor] = []

    def fail(*args: Any, **kwargs: Any) -> None:
        seen.append(next(iter(trainable_parameters(trainer.model).values())).detach().clone())
        raise RuntimeError("no probe today")

    monkeypatch.setattr("hf_flerm.rates.probe.RateProbe.measure", fail)
    assert_same_run(train(trainer), plain)
    assert len(seen) == 3  # then it is given up
