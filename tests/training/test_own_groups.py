"""Trainers, schedules and callbacks that count param groups train as they would without matching."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from transformers import Trainer, TrainerCallback

from hf_flerm import FLeRMConfig, FLeRMMixin, RateProfile, Research
from hf_flerm.optimizer.param_groups import raw_optimizer
from tests.shared.training import Rows, arguments, assert_identical, gpt2, lora, weights_of

LR = (1e-2, 4e-3, 2e-2)


class ThreeGroups(Trainer):
    """A group for everything in the first block, one for the rest, and one for biases."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            model: Any = self.model
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            kinds = [0 if ".h.0." in name else 2 if p.ndim < 2 else 1 for name, p in named]
            self.optimizer = AdamW(
                weight_decay=0.0,
                params=[
                    {"params": [p for (_, p), its in zip(named, kinds, strict=True) if its == kind], "lr": rate}
                    for kind, rate in enumerate(LR)
                ],
            )
        return self.optimizer


class ThreeLambdas(ThreeGroups):
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            schedules = [lambda step: 1.0, lambda step: 1 / (1 + step), lambda step: min(1.0, step / 2)]
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, schedules)
        return self.lr_scheduler


class OneCycle(ThreeGroups):
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = OneCycleLR(optimizer or self.optimizer, list(LR), total_steps=num_training_steps + 1)
        return self.lr_scheduler


class Freezes(TrainerCallback):
    """Freezes the group of the first block until the third step, by a learning rate of 0."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        assert len(groups) == len(LR)
        groups[0]["lr"] = 0.0 if state.global_step < 2 else LR[0]


class Unfreezes(TrainerCallback):
    """Puts what was not trained before the third step into the second group."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        assert len(groups) == 2
        if state.global_step == 2:
            new = [p for p in kwargs["model"].parameters() if not p.requires_grad]
            groups[1]["params"].extend(new)
            for parameter in new:
                parameter.requires_grad_(True)


class FirstBlock(Trainer):
    """Trains the first block alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".h.0." in name)


CASES: dict[str, tuple[type[Trainer], Callable[[], list[TrainerCallback]], dict[str, Any]]] = {
    "three lambdas": (ThreeLambdas, list, {}),
    "one cycle": (OneCycle, list, {}),
    "callback that freezes": (ThreeGroups, lambda: [Freezes()], {"lr_scheduler_type": "constant"}),
    "callback that unfreezes": (FirstBlock, lambda: [Unfreezes()], {"lr_scheduler_type": "constant"}),
}


def run(
    folder: Path, case: str, make: Callable[[], nn.Module], flerm: FLeRMConfig | None = None, *more: TrainerCallback
) -> Trainer:
    trainer_class, callbacks, options = CASES[case]
    made: Any = trainer_class if flerm is None else type("WithRates", (FLeRMMixin, trainer_class), {})
    given = {} if flerm is None else {"flerm": flerm}
    args = arguments(folder, **options)
    trainer: Trainer = made(model=make(), args=args, train_dataset=Rows(), callbacks=[*callbacks(), *more], **given)
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [gpt2, lora], ids=["gpt2", "lora"])
def test_matching_a_run_to_itself_is_that_run(tmp_path: Path, case: str, make: Callable[[], nn.Module]) -> None:
    if case == "callback that unfreezes" and make is lora:
        make = gpt2  # LoRA's base weights stay frozen
    plain = run(tmp_path / "plain", case, make)
    recorded: Any = run(tmp_path / "recorded", case, make, FLeRMConfig())
    follow = FLeRMConfig(mode="match", profile=recorded.rate_profile, research=Research(policy="follow"))
    matched: Any = run(tmp_path / "matched", case, make, follow)
    for trainer in (recorded, matched):
        assert_identical(weights_of(trainer.model), weights_of(plain.model))
        states = [raw_optimizer(each.optimizer).state_dict() for each in (trainer, plain)]
        assert_identical(*states)
    if plain.lr_scheduler is not None:
        last = [each.lr_scheduler.state_dict()["_last_lr"] for each in (matched, plain)]
        assert last[0] == last[1]


@pytest.mark.parametrize("case", ["three lambdas", "callback that freezes"])
def test_scales_multiply_what_schedules_and_callbacks_set(tmp_path: Path, case: str) -> None:
    """Half of every rate is a scale of one half, and nobody outside of the step sees it."""
    recorded: Any = run(tmp_path / "recorded", case, gpt2, FLeRMConfig(measure_steps=[3]))
    profile = recorded.rate_profile
    half = RateProfile(profile.steps, {name: rates / 2 for name, rates in profile.rates.items()})
    research = Research(pool="unit", beta=1.0)
    config = FLeRMConfig(mode="match", profile=half, measure_steps=[3], granularity="tensor", research=research)
    rates: list[list[float]] = []
    weights: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.append([group["lr"] for group in kwargs["optimizer"].param_groups])
            weights.append(weights_of(kwargs["model"]))

    matched: Any = run(tmp_path / "matched", case, gpt2, config, Watch())
    seen_when_matched, before, after = list(rates), weights[3], weights[4]
    rates.clear()
    weights.clear()
    run(tmp_path / "plain", case, gpt2, None, Watch())
    assert seen_when_matched == rates
    scales = matched.flerm_callback.scales
    assert scales == pytest.approx(dict.fromkeys(scales, 0.5), rel=1e-6)
    assert_identical(before, weights[3])
    for name, whole in weights[4].items():
        torch.testing.assert_close(after[name], (before[name] + whole) / 2, rtol=1e-4, atol=2e-6)
