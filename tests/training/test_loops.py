"""`FLeRMRun` in loops that are nobody's `Trainer`: the Trainer's numbers, and no trace when it records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from hf_flerm import FLeRMConfig, FLeRMRun, RateProfile, RateProfileError
from hf_flerm.optimizer.param_groups import raw_optimizer
from tests.shared.loops import LEARNING_RATE, Loop
from tests.shared.training import (
    BATCH,
    MEASURED,
    MODELS,
    STEPS,
    Rows,
    assert_identical,
    gpt2,
    make_trainer,
    recorded,
    scaled,
    some_factors,
    weights_of,
)


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Accelerate keeps its state for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerate"])
@pytest.mark.parametrize("model", MODELS)
def test_recording_changes_nothing(model: str, accelerated: bool) -> None:
    plain, followed = (Loop(MODELS[model](0.1), accelerated=accelerated) for _ in range(2))
    plain_losses = plain.train()
    plain_random = torch.get_rng_state()
    run = followed.follow()
    assert followed.train(run) == plain_losses
    assert run.profile.steps.tolist() == MEASURED
    assert all(rates.any() for rates in run.profile.rates.values())
    assert torch.equal(torch.get_rng_state(), plain_random)
    assert_identical(weights_of(followed.model), weights_of(plain.model))
    assert_identical(raw_optimizer(followed.optimizer).state_dict(), raw_optimizer(plain.optimizer).state_dict())


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerate"])
def test_a_loop_gives_the_trainers_profile_and_scales(
    tmp_path: Path, accelerated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.Trainer._get_train_sampler", lambda *_: None)
    options = {
        "data": Rows(BATCH * STEPS),
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "adam_epsilon": 1e-4,
    }
    base = recorded(tmp_path, gpt2(), **options)
    loop = Loop(gpt2(), accelerated=accelerated, weight_decay=0.0)
    run = loop.follow()
    loop.train(run)
    assert_same_rates(run.profile, base)
    assert run.profile.metadata["training_arguments"]["learning_rate"] == LEARNING_RATE

    config = FLeRMConfig(mode="match", profile=base)
    trainer = make_trainer(tmp_path, gpt2(layers=1), FLeRMConfig(mode="match", profile=base), **options)
    trainer.train()
    loop = Loop(gpt2(layers=1), accelerated=accelerated, weight_decay=0.0)
    run = loop.follow(config)
    loop.train(run)
    run.close()
    assert set(run.scales.values()) != {1.0}
    assert run.scales == pytest.approx(trainer.flerm_callback.scales, rel=1e-4)
    for name, weight in weights_of(trainer.model).items():
        torch.testing.assert_close(weights_of(loop.model)[name], weight, rtol=1e-4, atol=1e-6)


def assert_same_rates(actual: RateProfile, expected: RateProfile, tolerance: float = 1e-4) -> None:
    assert actual.steps.tolist() == expected.steps.tolist()
    assert actual.rates.keys() == expected.rates.keys()
    for name, rates in expected.rates.items():
        torch.testing.assert_close(actual.rates[name], rates, rtol=tolerance, atol=1e-9, msg=name)


def test_only_steps_that_are_made_count_while_gradients_accumulate() -> None:
    loop = Loop(gpt2(), accelerated=True, accumulation=2)
    run = loop.follow(FLeRMConfig(measure_steps=range(STEPS)))
    loop.train(run)
    assert run.steps == STEPS // 2
    assert run.profile.steps.tolist() == list(range(STEPS // 2))
    assert run.profile.metadata["training_arguments"]["gradient_accumulation_steps"] == 2


def test_a_step_that_the_scaler_skips_is_made_up_for() -> None:
    loop = Loop(gpt2())
    run = loop.follow(FLeRMConfig(measure_steps=(0, 3)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, batch in enumerate(loop.loader):
        loss = loop.model(**batch).loss
        scaler.scale(loss * (torch.inf if step == 0 else 1.0)).backward()
        with run.step():
            scaler.step(loop.optimizer)
            scaler.update()
        loop.optimizer.zero_grad()
    assert run.profile.steps.tolist() == [1, 3]
    assert run.steps == STEPS


@pytest.mark.parametrize("mode", ["record", "match"])
def test_a_resumed_loop_goes_on_as_if_it_had_not_stopped(tmp_path: Path, mode: str) -> None:
    base = Loop(gpt2(seed=1))
    run = base.follow()
    base.train(run)
    config = FLeRMConfig(mode=mode, profile=run.profile if mode == "match" else None)
    whole = Loop(gpt2(), accelerated=True)
    through = whole.follow(config)
    whole.train(through)

    def registered() -> tuple[Loop, FLeRMRun]:
        loop = Loop(gpt2(), accelerated=True)
        run = loop.follow(config)
        loop.accelerator.register_for_checkpointing(loop.schedule, run)
        return loop, run

    loop, run = registered()
    loop.train(run, stop=3)
    loop.accelerator.save_state(str(tmp_path))
    loop, run = registered()
    loop.accelerator.load_state(str(tmp_path))
    assert run.steps == 3
    loop.train(run, start=3)
    assert_identical(weights_of(loop.model), weights_of(whole.model))
    assert run.profile.to_bytes() == through.profile.to_bytes()
    assert run.scales == through.scales


def test_a_saved_profile_is_the_runs(tmp_path: Path) -> None:
    loop = Loop(gpt2())
    run = loop.follow()
    loop.train(run)
    run.save(tmp_path)
    assert RateProfile.from_pretrained(tmp_path) == run.profile
    assert run.take_logs()["flerm/rate/total"] > 0


def test_a_closed_run_leaves_the_optimizer_alone() -> None:
    base = Loop(gpt2())
    run = base.follow()
    base.train(run)
    loop, plain = Loop(gpt2()), Loop(gpt2())
    run = loop.follow(FLeRMConfig(mode="match", profile=scaled(run.profile, some_factors(base.model))))
    run.close()
    loop.train(run)
    plain.train()
    assert not len(run.profile.steps)
    assert_identical(weights_of(loop.model), weights_of(plain.model))


@pytest.mark.parametrize("mode", ["record", "match"])
def test_what_follows_the_step_may_lie_inside_the_block(mode: str) -> None:
    """The update ends with `optimizer.step()`: learning rates and gradients are read there."""
    found = []
    base = None
    if mode == "match":
        plain = Loop(gpt2())
        base_run = plain.follow()
        plain.train(base_run)
        base = scaled(base_run.profile, some_factors(gpt2()))
    for inside in (False, True):
        loop = Loop(gpt2())
        run = loop.follow(FLeRMConfig(mode=mode, profile=base))
        for batch in loop.loader:
            loop.model(**batch).loss.backward()
            with run.step():
                loop.optimizer.step()
                if inside:
                    loop.schedule.step()
                    loop.optimizer.zero_grad()
            if not inside:
                loop.schedule.step()
                loop.optimizer.zero_grad()
        found.append((weights_of(loop.model), run.profile, run.scales))
    (weights, profile, scales), (weights_inside, profile_inside, scales_inside) = found
    assert_identical(weights, weights_inside)
    assert profile == profile_inside
    assert len(profile.steps) > 1
    assert scales == scales_inside
    assert (set(scales.values()) == {1.0}) == (mode == "record")


def test_a_step_without_gradients_moves_nothing_and_is_made_up_for() -> None:
    loop = Loop(gpt2())
    run = loop.follow()
    with run.step():
        loop.optimizer.step()
    assert not len(run.profile.steps)
    loop.model(**next(iter(loop.loader))).loss.backward()
    with run.step():
        loop.optimizer.step()
    assert run.profile.steps.tolist() == [1]


def test_a_step_that_raises_is_not_counted() -> None:
    loop = Loop(gpt2())
    run = loop.follow()
    with pytest.raises(KeyError), run.step():
        raise KeyError
    assert (run.steps, len(run.profile.steps)) == (0, 0)
    loop.train(run)
    assert run.profile.steps.tolist() == MEASURED


def test_batches_that_are_no_dicts_need_a_collate_fn_and_an_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    rows = list(zip(torch.randn(16, 3), torch.randn(16, 2), strict=True))
    loader, optimizer = DataLoader(rows, 4), torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"returns list, but model inputs must be a dict.*collate_fn"):
        FLeRMRun(model, optimizer, FLeRMConfig(), loader)
    config = FLeRMConfig(output=lambda model, batch: model(batch["x"]))
    run = FLeRMRun(
        model, optimizer, config, loader, collate_fn=lambda rows: {"x": torch.stack([row[0] for row in rows])}
    )
    for inputs, targets in loader:
        (model(inputs) - targets).square().mean().backward()
        with run.step():
            optimizer.step()
        optimizer.zero_grad()
    assert run.profile.steps.tolist() == [0, 1, 2]
    assert all(rates.all() for rates in run.profile.rates.values())


@pytest.mark.parametrize("given", [[], [{"input_ids": torch.ones(1, 2).long()}], Rows()], ids=["none", "list", "rows"])
def test_what_is_no_loader_is_refused_as_such(given: Any) -> None:
    model = gpt2()
    with pytest.raises(ValueError, match=rf"^{type(given).__name__} has no data set to probe with: pass a torch"):
        FLeRMRun(model, AdamW(model.parameters()), FLeRMConfig(), given)


def test_a_loader_that_does_not_tell_its_batch_size() -> None:
    loop = Loop(gpt2())
    batches = DataLoader(Rows(), batch_sampler=[[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="has no batch size: pass batch_size"):
        FLeRMRun(loop.model, loop.optimizer, FLeRMConfig(), batches)
    assert FLeRMRun(loop.model, loop.optimizer, FLeRMConfig(), batches, batch_size=2).steps == 0


def test_a_checkpoint_of_another_model_is_refused() -> None:
    loop, other = Loop(gpt2()), Loop(gpt2(layers=1))
    run = loop.follow()
    loop.train(run)
    run.close()
    with pytest.raises(RateProfileError, match=r"only in the checkpoint's profile \[transformer.h.1"):
        other.follow().load_state_dict(run.state_dict())
    with pytest.raises(RateProfileError, match=r"holds step 4.*from step 2"):
        loop.follow().resume(run.profile, 2)
