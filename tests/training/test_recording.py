"""Recording changes nothing: a recorded run is the plain one bit for bit."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import default_data_collator

from hf_flerm import FLeRMConfig, Research
from hf_flerm.optimizer.param_groups import raw_optimizer
from hf_flerm.profile.rate_profile import PROFILE_NAME
from tests.shared import training
from tests.shared.trainer_runs import DROPOUT, OPTIMIZERS, known_base, llama, plain_run
from tests.shared.training import (
    MEASURED,
    MODELS,
    Rows,
    assert_same_run,
    flerm_callback,
    gpt2,
    lora,
    make_trainer,
    train,
)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_recording_changes_nothing(folder: Path, model: str, optimizer: str) -> None:
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS[optimizer]}
    trainer = make_trainer(folder, MODELS[model](DROPOUT), FLeRMConfig(), **options)
    outcome = train(trainer)
    assert trainer.rate_profile.steps.tolist() == MEASURED
    assert_same_run(outcome, plain_run(folder, model, optimizer))


def test_these_runs_can_tell_one_bit(folder: Path) -> None:
    """The comparison sees what it must: another seed, another random stream, a weight one bit off."""
    plain = plain_run(folder, "full", "adamw-fused")
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS["adamw-fused"]}
    other = train(make_trainer(folder, gpt2(DROPOUT), seed=1, **options))
    with pytest.raises(AssertionError):
        assert_same_run(other, plain)
    twin = train(make_trainer(folder, gpt2(DROPOUT), **options))
    assert_same_run(twin, plain)
    weight = twin.weights["transformer.h.0.mlp.c_fc.weight"].view(-1)
    weight[3] = torch.nextafter(weight[3], torch.tensor(math.inf))
    with pytest.raises(AssertionError, match=r"h\.0\.mlp\.c_fc\.weight"):
        assert_same_run(twin, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"max_grad_norm": 0.0},
        {"eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=["bf16", "checkpointing", "unclipped", "evaluating"],
)
def test_recording_changes_nothing_whatever_else_goes_on(folder: Path, options: dict[str, Any]) -> None:
    options = {"extra": {"eval_dataset": Rows(seed=1)}, **options}
    plain = train(make_trainer(folder, llama(DROPOUT), **options))
    trainer = make_trainer(folder, llama(DROPOUT), FLeRMConfig(), **options)
    assert_same_run(train(trainer), plain)
    assert trainer.rate_profile.steps.tolist() == MEASURED


@pytest.mark.parametrize("estimator", ["kronecker", "full", "exact"])
def test_recording_changes_nothing_with_any_estimator(folder: Path, estimator: str) -> None:
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS["adamw-fused"]}
    trainer = make_trainer(folder, lora(DROPOUT), FLeRMConfig(research=Research(estimator=estimator)), **options)
    assert_same_run(train(trainer), plain_run(folder, "lora", "adamw-fused"))
    assert trainer.rate_profile.steps.tolist() == MEASURED


def test_recording_changes_nothing_with_a_collator_that_draws(folder: Path) -> None:
    """Masking collators use the global random streams, all three of them."""

    calls = []

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        calls.append(len(rows))
        batch = default_data_collator(rows)
        hit = torch.rand(batch["input_ids"].shape) < 0.3
        batch["input_ids"][hit] = random.randrange(training.VOCABULARY)
        batch["input_ids"][0, 0] = np.random.randint(training.VOCABULARY)
        return batch

    extra = {"data_collator": collate}
    plain = train(make_trainer(folder, gpt2(DROPOUT), extra=extra))
    by_training = len(calls)
    trainer = make_trainer(
        folder,
        gpt2(DROPOUT),
        FLeRMConfig(metric="fisher", research=Research(probes=2, probe_batch_size=3)),
        extra=extra,
    )
    assert_same_run(train(trainer), plain)
    assert trainer.rate_profile.steps.tolist() == MEASURED
    assert len(calls) == 2 * by_training + 1 + 2 * len(MEASURED), "one before training, to see whether it can be probed"
    assert calls.count(3) == 1 + 2 * len(MEASURED)


class Masking:
    """A collator that masks by a generator of its own, made at once or when it is first needed."""

    def __init__(self, make: Callable[[], Any], draw: Callable[[Any], float], *, at_once: bool) -> None:
        self.make, self.draw = make, draw
        self.generator = make() if at_once else None

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.generator = self.make() if self.generator is None else self.generator
        batch = default_data_collator(rows)
        batch["input_ids"][:, int(self.draw(self.generator) * training.LENGTH) :] = 0
        return batch


class MaskedRows(Rows):
    """Rows whose masks are drawn by a generator of the data set."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        hidden = range(self.generator.randrange(training.LENGTH), training.LENGTH)
        return {**row, "input_ids": row["input_ids"].index_fill(0, torch.tensor([*hidden]), 0)}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(0), lambda generator: torch.rand((), generator=generator).item()),
        (lambda: np.random.default_rng(0), lambda generator: generator.random()),
        (lambda: np.random.RandomState(0), lambda generator: generator.rand()),
        (lambda: random.Random(0), lambda generator: generator.random()),
    ],
    ids=["torch", "numpy", "older numpy", "python"],
)
def test_recording_changes_nothing_with_a_collator_that_has_a_seed(
    folder: Path, make: Callable[[], Any], draw: Callable[[Any], float], at_once: bool
) -> None:
    """`DataCollatorForLanguageModeling(seed=...)` is one; the `Trainer` puts it into another that removes columns."""
    own, plainly = ({"data_collator": Masking(make, draw, at_once=at_once)} for _ in range(2))
    plain = train(make_trainer(folder, gpt2(), extra=plainly))
    trainer = make_trainer(folder, gpt2(), FLeRMConfig(), extra=own)
    assert_same_run(train(trainer), plain)
    assert trainer.rate_profile.steps.tolist() == MEASURED


def test_recording_changes_nothing_with_a_data_set_that_has_a_seed(folder: Path) -> None:
    plain = train(make_trainer(folder, gpt2(), data=MaskedRows()))
    assert_same_run(train(make_trainer(folder, gpt2(), FLeRMConfig(), data=MaskedRows())), plain)


def test_recording_leaves_the_param_groups_alone(folder: Path) -> None:
    trainer = make_trainer(folder, gpt2(), FLeRMConfig(), max_steps=1)
    trainer.train()
    groups = raw_optimizer(trainer.optimizer).param_groups
    assert len(groups) == 2
    plain = make_trainer(folder, gpt2(), max_steps=1)
    plain.train()
    assert [group.keys() for group in groups] == [group.keys() for group in raw_optimizer(plain.optimizer).param_groups]


@pytest.mark.parametrize("mode", ["record", "match"])
@pytest.mark.parametrize("model", MODELS)
def test_the_callback_alone_does_what_the_trainer_does(tmp_path: Path, model: str, mode: str) -> None:
    config = FLeRMConfig()
    if mode == "match":
        config = FLeRMConfig(mode="match", profile=known_base(tmp_path, MODELS[model]))
    outcomes, profiles, scales = [], [], []
    for alone in (False, True):
        trainer = make_trainer(
            tmp_path / str(alone), MODELS[model](DROPOUT), config, alone=alone, gradient_accumulation_steps=2
        )
        outcomes.append(train(trainer))
        profiles.append(flerm_callback(trainer).rate_profile.to_bytes())
        scales.append(flerm_callback(trainer).scales)
        assert (tmp_path / str(alone) / PROFILE_NAME).read_bytes() == profiles[-1]
    assert_same_run(outcomes[1], outcomes[0], same_groups=mode == "record")
    assert profiles[1] == profiles[0]
    assert scales[1] == scales[0]
    assert (set(scales[0].values()) == {1.0}) == (mode == "record")
