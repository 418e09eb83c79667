"""Whatever fails around a measurement, the training goes on as it would have without it, and says so once."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, TrainerCallback

from hf_flerm import FLeRMConfig, RateProfile, Research
from hf_flerm.optimizer.param_groups import raw_optimizer
from hf_flerm.optimizer.step import Snapshot
from hf_flerm.profile.rate_profile import PROFILE_NAME
from hf_flerm.rates.probe import RateProbe
from tests.shared.training import (
    MODELS,
    STEPS,
    Rows,
    assert_identical,
    assert_same_run,
    flerm_callback,
    flerm_config,
    gpt2,
    lora,
    make_trainer,
    recorded,
    scaled,
    some_factors,
    train,
    weights_of,
)

DROPOUT = 0.1
SAVING = {"save_strategy": "steps", "save_steps": 2}


def matching(folder: Path, make: Callable[..., nn.Module] = gpt2, **options: Any) -> FLeRMConfig:
    base = recorded(folder / "base", make())
    return flerm_config(mode="match", profile=scaled(base, some_factors(make())), pool="unit", **options)


# --- disks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_a_disk_that_refuses_is_reported_once_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_of: Callable[[], list[str]], code: int, alone: bool
) -> None:
    plain = train(make_trainer(tmp_path / "plain", gpt2(), **SAVING))
    replace = os.replace

    def refusing(source: str, target: Path) -> None:
        if "checkpoint-6" not in str(target) and PROFILE_NAME in str(target):
            raise OSError(code, os.strerror(code))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    trainer = make_trainer(tmp_path / "own", gpt2(), FLeRMConfig(), alone=alone, **SAVING)
    assert_same_run(train(trainer), plain)
    (warning,) = warnings_of()
    assert os.strerror(code) in warning
    profile = flerm_callback(trainer).rate_profile
    assert RateProfile.from_pretrained(tmp_path / "own" / "checkpoint-6") == profile
    assert [file.parent.name for file in tmp_path.glob(f"own/**/*{PROFILE_NAME}*")] == ["checkpoint-6"]


def test_two_writers_and_a_reader_never_see_a_mixture(tmp_path: Path) -> None:
    names = [f"w{index}" for index in range(200)]
    profiles = [RateProfile([0, step], {name: [1.0, float(step)] for name in names}) for step in (1, 2)]
    profiles[0].save_pretrained(tmp_path)
    whole = [profile.to_bytes() for profile in profiles]

    def write(profile: RateProfile) -> None:
        for _ in range(100):
            profile.save_pretrained(tmp_path)

    writers = [threading.Thread(target=write, args=(profile,)) for profile in profiles]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        found = RateProfile.from_pretrained(tmp_path).to_bytes()
        assert found in whole
        seen.add(whole.index(found))
    assert seen == {0, 1}
    assert [file.name for file in tmp_path.iterdir()] == [PROFILE_NAME]


# --- memory -------------------------------------------------------------------------------------------------------


class Greedy:
    """Logits; more rows than some want more memory than there is."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held: list[weakref.ref[Tensor]] = []
        self.rows: list[int] = []

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(input_ids=batch["input_ids"]).logits
        self.held.append(weakref.ref(logits))
        self.rows.append(len(logits))
        if len(logits) > self.most:
            torch.empty(2**50)
        return logits


def test_too_little_memory_makes_smaller_probes(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    plain = train(make_trainer(tmp_path, gpt2(DROPOUT)))
    options = {"probe_batch_size": 4, "probes": 2}
    trainer = make_trainer(tmp_path, gpt2(DROPOUT), flerm_config(output=Greedy(1), **options))
    assert_same_run(train(trainer), plain)
    assert warnings_of() == []
    small = make_trainer(
        tmp_path, gpt2(DROPOUT), FLeRMConfig(output=Greedy(1), research=Research(probe_batch_size=1, probes=8))
    )
    small.train()
    assert_identical(trainer.rate_profile.rates, small.rate_profile.rates)


@pytest.mark.parametrize("mode", ["record", "match"])
def test_memory_that_never_suffices_ends_the_measuring_alone(
    tmp_path: Path, warnings_of: Callable[[], list[str]], mode: str
) -> None:
    plain = train(make_trainer(tmp_path, gpt2(DROPOUT)))
    output = Greedy(0)
    settings = {"output": output, "probe_batch_size": 2}
    config = flerm_config(**settings) if mode == "record" else matching(tmp_path, **settings, unmatched="error")
    if mode == "match":
        config.profile.metadata.clear()  # it was recorded with another output
    trainer = make_trainer(tmp_path, gpt2(DROPOUT), config)
    assert_same_run(train(trainer), plain, same_groups=mode == "record")
    warning, *unscaled, empty = warnings_of()
    assert "out of memory in the measurement at step 0" in warning
    assert "can't allocate memory" in warning
    assert len(unscaled) == (mode == "match")
    assert "its profile is empty: every measurement failed, the last one with RuntimeError" in empty
    assert set(output.rows) == {2, 1}
    assert all(held() is None for held in output.held)


def test_memory_for_a_snapshot_may_be_missing_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_of: Callable[[], list[str]]
) -> None:
    plain = train(make_trainer(tmp_path, gpt2(DROPOUT)))

    class Missing(Snapshot):
        def __init__(self, *args: Any) -> None:
            torch.empty(2**50)

    monkeypatch.setattr("hf_flerm.optimizer.watch.Snapshot", Missing)
    assert_same_run(train(make_trainer(tmp_path, gpt2(DROPOUT), FLeRMConfig())), plain)
    warning, empty = warnings_of()
    assert "snapshot_device='cpu'" in warning
    assert "its profile is empty: every measurement failed" in empty


# --- numbers ------------------------------------------------------------------------------------------------------


class Poisoned(GPT2LMHeadModel):
    """Its third training loss is not a number."""

    calls = 0

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids, labels=labels, **kwargs)
        if labels is not None:
            self.calls += 1
            if self.calls == 3:
                output.loss = output.loss * float("nan")
        return output


def poisoned() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return Poisoned(gpt2().config)


@pytest.mark.parametrize("mode", ["record", "match"])
def test_a_loss_that_is_not_a_number_ends_the_measuring_alone(
    tmp_path: Path, warnings_of: Callable[[], list[str]], mode: str
) -> None:
    config = FLeRMConfig(measure_every=1) if mode == "record" else matching(tmp_path, measure_every=1)
    trainer = make_trainer(tmp_path, poisoned(), config, max_steps=8)
    trainer.train()
    assert trainer.state.global_step == 8
    assert all(bool(weights.isnan().any()) for weights in weights_of(trainer.model).values())
    assert trainer.rate_profile.steps.tolist() == [0, 1]
    assert all(0 < scale < float("inf") for scale in flerm_callback(trainer).scales.values())
    first, last = (text for text in warnings_of() if "learning-rate scales are above" not in text)
    assert "the measurement at step 2 failed" in first
    assert "not finite" in first
    assert "3 measurements failed in a row" in last


@pytest.mark.parametrize("mode", ["record", "match"])
def test_a_learning_rate_of_zero_throughout_is_no_division(
    tmp_path: Path, warnings_of: Callable[[], list[str]], mode: str
) -> None:
    config = FLeRMConfig() if mode == "record" else matching(tmp_path)
    plain = train(make_trainer(tmp_path, gpt2(), learning_rate=0.0))
    trainer = make_trainer(tmp_path, gpt2(), config, learning_rate=0.0)
    assert_same_run(train(trainer), plain, same_groups=mode == "record")
    assert len(trainer.rate_profile.steps) == 0
    *unscaled, empty = warnings_of()
    assert len(unscaled) == (mode == "match")
    assert "its profile is empty: no scheduled step changed the weights: the learning rate was 0" in empty


# --- what is trained changes --------------------------------------------------------------------------------------


class Freezes(TrainerCallback):
    """From the third step on, other tensors are trained."""

    def __init__(self, part: str, trained: bool) -> None:
        self.part, self.trained = part, trained

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            for name, parameter in kwargs["model"].named_parameters():
                if self.part in name:
                    parameter.requires_grad_(self.trained)


def half_frozen() -> nn.Module:
    model = gpt2(DROPOUT)
    model.transformer.h[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("mode", ["record", "match"])
@pytest.mark.parametrize("change", ["frozen", "unfrozen"])
def test_tensors_may_be_frozen_and_unfrozen_meanwhile(
    tmp_path: Path, warnings_of: Callable[[], list[str]], change: str, mode: str
) -> None:
    make = (lambda: gpt2(DROPOUT)) if change == "frozen" else half_frozen

    def freezes() -> list[TrainerCallback]:
        return [Freezes("h.0.mlp", change == "unfrozen")]

    if mode == "record":
        plain = train(make_trainer(tmp_path, make(), callbacks=freezes()))
        trainer = make_trainer(tmp_path, make(), FLeRMConfig(measure_every=1), callbacks=freezes())
        assert_same_run(train(trainer), plain)
    else:
        trainer = make_trainer(tmp_path, make(), matching(tmp_path, make, measure_every=1), callbacks=freezes())
        trainer.train()
    rates = trainer.rate_profile.rates
    assert trainer.rate_profile.steps.tolist() == list(range(STEPS))
    if change == "frozen":
        assert rates["transformer.h.0.mlp.c_fc.weight"].count_nonzero() == 2
        assert rates["transformer.h.1.mlp.c_fc.weight"].count_nonzero() == STEPS
    else:
        assert "transformer.h.0.mlp.c_fc.weight" not in rates
        (unfollowed,) = warnings_of()
        assert "transformer.h.0.mlp.c_fc.weight" in unfollowed
        return
    assert warnings_of() == []


# --- the user interrupts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["record", "match"])
@pytest.mark.parametrize("model", MODELS)
def test_an_interrupted_probe_leaves_the_step_that_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, mode: str
) -> None:
    """Ctrl-C while a gate is being read, at the first measurement: everything is as after one plain step."""
    plain = make_trainer(tmp_path, MODELS[model](DROPOUT), max_steps=1, lr_scheduler_type="constant")
    plain.train()
    config = FLeRMConfig() if mode == "record" else matching(tmp_path, MODELS[model])
    trainer = make_trainer(tmp_path, MODELS[model](DROPOUT), config, max_steps=1, lr_scheduler_type="constant")
    differentiate = torch.autograd.grad

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        differentiate(*args, **kwargs)
        raise KeyboardInterrupt

    flags = [parameter.requires_grad for parameter in trainer.model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in trainer.model.modules()]
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert_identical(weights_of(trainer.model), weights_of(plain.model))
    assert [parameter.requires_grad for parameter in trainer.model.parameters()] == flags
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in trainer.model.modules()] == hooks
    assert all(module.training for module in trainer.model.modules())
    optimizer = raw_optimizer(trainer.optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    trainer.train()  # and it can be trained again
    assert trainer.rate_profile.steps.tolist() == [0]


def test_a_training_that_raises_lets_go_of_the_optimizer(tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise RuntimeError("no more")

    trainer = make_trainer(tmp_path, lora(), matching(tmp_path, lora), callbacks=[Breaks()])
    with pytest.raises(RuntimeError, match="no more"):
        trainer.train()
    assert not raw_optimizer(trainer.optimizer)._optimizer_step_pre_hooks
    assert trainer.rate_profile.steps.tolist() == [0, 1]


def test_a_batch_that_is_dropped_or_short_changes_nothing(tmp_path: Path) -> None:
    for drop in (False, True):
        options = {"data": Rows(10), "dataloader_drop_last": drop, "max_steps": -1, "num_train_epochs": 2}
        plain = train(make_trainer(tmp_path, gpt2(DROPOUT), **options))
        trainer = make_trainer(tmp_path, gpt2(DROPOUT), FLeRMConfig(), **options)
        assert_same_run(train(trainer), plain)
        assert trainer.rate_profile.steps.tolist() == ([0, 1, 2] if drop else [0, 1, 2, 4])


def test_a_probe_that_fails_once_is_made_up_for_in_a_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, calls = RateProbe.measure, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            raise RuntimeError("not today")
        return measure(*args, **kwargs)

    monkeypatch.setattr(RateProbe, "measure", failing)
    trainer = make_trainer(tmp_path, gpt2(), matching(tmp_path, measure_steps=(0,)))
    calls.clear()
    trainer.train()
    assert trainer.rate_profile.steps.tolist() == [1]
    assert set(flerm_callback(trainer).scales.values()) != {1.0}
