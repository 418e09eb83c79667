"""The metric where the user chooses none: Fisher's for class logits when recording, the profile's when matching."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_flerm import FLeRMConfig, RateProfile, RateProfileError
from hf_flerm.rates.outputs import MeasuredOutput
from tests.shared.training import flerm_callback, gpt2, make_trainer, recorded


def metric_of(profile: RateProfile) -> str:
    return profile.about.units["metric"]


def test_class_logits_are_recorded_by_fisher(tmp_path: Path) -> None:
    default = recorded(tmp_path, gpt2(), max_steps=2)
    explicit = recorded(tmp_path, gpt2(), flerm=FLeRMConfig(metric="fisher"), max_steps=2)
    assert default.to_bytes() == explicit.to_bytes()


@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_a_matched_run_takes_the_metric_of_its_base(tmp_path: Path, metric: str) -> None:
    base = recorded(tmp_path, gpt2(), flerm=FLeRMConfig(metric=metric), max_steps=2)
    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig(mode="match", profile=base), max_steps=2)
    trainer.train()
    assert metric_of(flerm_callback(trainer).rate_profile) == metric


def test_an_explicit_mismatch_is_refused(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2(), flerm=FLeRMConfig(metric="euclidean"), max_steps=1)
    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig(mode="match", profile=base, metric="fisher"))
    with pytest.raises(RateProfileError, match="recorded with metric='euclidean', this run has 'fisher'"):
        trainer.train()


def test_a_resumed_run_keeps_the_metric_of_its_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    recorded(tmp_path, gpt2(), flerm=FLeRMConfig(metric="euclidean"), max_steps=2, **options)
    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig(), max_steps=5)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert metric_of(flerm_callback(trainer).rate_profile) == "euclidean"


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def first(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"])


@pytest.mark.parametrize(
    ("labels", "output", "metric"),
    [
        ({"labels": torch.tensor([0, 3])}, None, "fisher"),
        ({"labels": torch.zeros(2, 4)}, None, "euclidean"),  # a regression
        ({}, None, "euclidean"),  # embeddings, for all that is known
        ({"labels": torch.tensor([0, 3])}, first, "euclidean"),
    ],
)
def test_labels_tell_classes(labels: dict[str, Tensor], output: Callable[..., Tensor] | None, metric: str) -> None:
    assert MeasuredOutput(output).default_metric(Linear(), {"x": torch.ones(2, 3), **labels}) == metric
