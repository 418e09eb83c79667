"""An update is the optimizer's: what others do to the weights around its step is not taken for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_flerm import FLeRMCallback, FLeRMConfig, FLeRMRun
from hf_flerm.model.names import trainable_parameters
from hf_flerm.rates.probe import RateProbe
from tests.shared.loops import Loop
from tests.shared.training import (
    MEASURED,
    STEPS,
    flerm_config,
    gpt2,
    lora,
    make_trainer,
    recorded,
    scaled,
    some_factors,
)

LEARNING_RATE = 0.5
SGD = {"optim": "sgd", "weight_decay": 0.0, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant"}


def change(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


class Resets(TrainerCallback):
    """Merges an adapter into the base and starts it anew, as ReLoRA does."""

    def on_step_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        change(model, 0.9)


class Prunes(TrainerCallback):
    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[parameter.abs() < 1e-3] = 0.0


class Constrains(TrainerCallback):
    def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        change(model, 0.95)


class Averages(TrainerCallback):
    """Trains on from the mean of the last two steps, as stochastic weight averaging may."""

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        change(model, 1.05)


MEDDLERS = [Resets, Prunes, Constrains, Averages]


class Seen:
    """The updates that the optimizer makes, and those that are probed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[dict[str, Tensor]] = []
        self.probed: list[dict[str, Tensor]] = []
        self.before: dict[str, Tensor] = {}
        measure = RateProbe.measure

        def noted(probe: RateProbe, updates: Mapping[str, Tensor], *args: Any, **options: Any) -> Any:
            self.probed.append({name: updates[name].clone() for name in updates})
            return measure(probe, updates, *args, **options)

        monkeypatch.setattr(RateProbe, "measure", noted)

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parameters = trainable_parameters(model)

        def pre(*_: Any) -> None:
            self.before.update({name: parameter.detach().clone() for name, parameter in parameters.items()})

        def post(*_: Any) -> None:
            self.made.append({name: parameter.detach() - self.before[name] for name, parameter in parameters.items()})

        optimizer.register_step_pre_hook(pre)
        optimizer.register_step_post_hook(post)

    def check(self, steps: list[int], learning_rate: float = LEARNING_RATE) -> None:
        assert len(self.probed) == len(steps)
        for step, probed in zip(steps, self.probed, strict=True):
            for name, update in probed.items():
                torch.testing.assert_close(update, self.made[step][name] / learning_rate, rtol=1e-6, atol=0.0)
            assert any(bool(update.any()) for update in probed.values())


class Watches(TrainerCallback):
    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def on_train_begin(self, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        self.seen.watch(model, optimizer.optimizer)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


@pytest.mark.parametrize("first", ["meddler", "flerm"])
@pytest.mark.parametrize("build", [gpt2, lora])
@pytest.mark.parametrize("meddler", MEDDLERS)
def test_what_others_do_around_the_step_is_not_taken_for_the_update(
    tmp_path: Path, seen: Seen, meddler: type[TrainerCallback], build: Any, first: str
) -> None:
    ours = FLeRMCallback(FLeRMConfig())
    both = [meddler(), ours] if first == "meddler" else [ours, meddler()]
    trainer = make_trainer(tmp_path, build(), callbacks=[Watches(seen), *both], **SGD)
    trainer.train()
    assert ours.rate_profile.steps.tolist() == MEASURED
    seen.check(MEASURED)


class Weighs(TrainerCallback):
    """Notes how far the weights have moved when the optimizer has stepped, and the scales that were set meanwhile."""

    def __init__(self, seen: Seen, ours: FLeRMCallback) -> None:
        self.seen, self.ours = seen, ours
        self.moved: list[dict[str, Tensor]] = []
        self.scales: list[dict[str, float]] = []

    def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        parameters = trainable_parameters(model)
        self.moved.append({name: p.detach() - self.seen.before[name] for name, p in parameters.items()})
        self.scales.append(dict(self.ours.scales))


@pytest.mark.parametrize("meddler", MEDDLERS)
def test_scales_multiply_the_update_alone(tmp_path: Path, seen: Seen, meddler: type[TrainerCallback]) -> None:
    """The measured step is redone as W + s U from the weights that the optimizer found; the next is made with s."""
    base = scaled(recorded(tmp_path / "base", gpt2(), **SGD), some_factors(gpt2()))
    seen.probed.clear()
    ours = FLeRMCallback(
        flerm_config(mode="match", profile=base, measure_steps=(0, 1), pool="unit", beta=0.0, max_change=1e6)
    )
    weighs = Weighs(seen, ours)
    callbacks = [Watches(seen), weighs, ours, meddler()]
    make_trainer(tmp_path / "target", gpt2(), callbacks=callbacks, **SGD, max_steps=2).train()
    scales = weighs.scales[0]
    assert len({round(scale, 3) for scale in scales.values()}) > 3
    for name, scale in scales.items():
        close = {"rtol": 1e-4, "atol": 1e-6 * float(seen.before[name].abs().max() + 1)}
        torch.testing.assert_close(weighs.moved[0][name], scale * seen.made[0][name], **close)
        torch.testing.assert_close(
            seen.probed[1][name], seen.made[1][name] / (LEARNING_RATE * scale), rtol=1e-5, atol=0.0
        )


def test_a_loop_may_change_weights_inside_the_block(seen: Seen) -> None:
    loop = Loop(gpt2(), weight_decay=0.0)
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), LEARNING_RATE)
    seen.watch(loop.model, loop.optimizer)
    run: FLeRMRun = loop.follow()
    for batch in loop.loader:
        loop.model(**batch).loss.backward()
        with run.step():
            change(loop.model, 0.9)
            loop.optimizer.step()
            change(loop.model, 1.1)
        loop.optimizer.zero_grad()
    seen.check(run.profile.steps.tolist())


def test_a_resumed_run_sees_the_optimizers_updates(tmp_path: Path, seen: Seen) -> None:
    saving = {**SGD, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, gpt2(), FLeRMConfig(measure_every=1), callbacks=[Resets()], **saving).train()
    seen.probed.clear()
    resumed = make_trainer(
        tmp_path, gpt2(), FLeRMConfig(measure_every=1), callbacks=[Watches(seen), Resets()], **saving
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.rate_profile.steps.tolist() == list(range(STEPS))
    seen.check(list(range(STEPS - 3)))
