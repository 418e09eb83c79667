"""Weight decay in whole runs: not in the rates, not scaled; and runs with optimizers that are refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from hf_flerm import FLeRMConfig, RateProfile, Research
from hf_flerm.model.names import trainable_parameters
from tests.shared.training import (
    BATCH,
    Rows,
    flerm_callback,
    lora,
    make_trainer,
    recorded,
    scaled,
    some_factors,
    weights_of,
)

LR = 1e-2
DECAY = 5.0  # so much that scaling it would show
OPTIMIZERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw": ("torch.optim", "AdamW", {"eps": 1e-4}),
    "muon": ("torch.optim", "Muon", {}),
    "adafactor": ("transformers.optimization", "Adafactor", {"relative_step": False, "scale_parameter": False}),
    "adamw-8bit": ("bitsandbytes.optim", "AdamW8bit", {"eps": 1e-4}),
    "lion": ("bitsandbytes.optim", "Lion", {}),
}
COUPLED: dict[str, tuple[str, str, dict[str, Any]]] = {  # weight decay is added to the gradient
    "sgd": ("torch.optim", "SGD", {"momentum": 0.9}),
    "adam": ("torch.optim", "Adam", {"eps": 1e-4}),
}
OPTIONS: dict[str, Any] = {"data": Rows(BATCH), "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def model() -> nn.Module:
    """LoRA: matrices only, as Muon wants them, and none of them 0, so that all have rates."""
    return lora(init=False)


def optimizer_class(name: str) -> Any:
    module, cls, _ = (OPTIMIZERS | COUPLED)[name]
    return getattr(importlib.import_module(module), cls)


def given(name: str, parameters: Any, decay: float = DECAY) -> dict[str, Any]:
    """The Trainer's arguments for an optimizer of its user."""
    options = (OPTIMIZERS | COUPLED)[name][2]
    return {"extra": {"optimizers": (optimizer_class(name)(parameters, lr=LR, weight_decay=decay, **options), None)}}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rates_do_not_see_decay(tmp_path: Path, name: str) -> None:
    """The first step's gradients are the same whatever the decay."""
    profiles = []
    for decay in (0.0, DECAY):
        net = model()
        options = given(name, list(trainable_parameters(net).values()), decay)
        config = FLeRMConfig(measure_steps=(0,), research=Research(estimator="exact"))
        profiles.append(recorded(tmp_path, net, flerm=config, max_steps=1, **OPTIONS, **options).at(0))
    assert profiles[1] == pytest.approx(profiles[0], rel=1e-3)


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, *COUPLED])
def test_a_matched_run_decays_at_its_nominal_rate(tmp_path: Path, name: str, alone: bool) -> None:
    """As a run whose groups have lr * s and decay / s: in the step that is redone, and in those after it.

    If decay is part of the gradient, it is scaled with the rest of the update: lr * s and decay.
    """
    net = model()
    config = FLeRMConfig(measure_steps=(0,))
    own = recorded(
        tmp_path, net, flerm=config, max_steps=1, **OPTIONS, **given(name, list(trainable_parameters(net).values()))
    )
    factors = {key: factor**3 for key, factor in some_factors(net).items()}  # from 1/8 to 8
    for steps in (1, 2):
        net = model()
        start = weights_of(net)
        groups = [
            {
                "params": [parameter],
                "lr": LR * factors[key],
                "weight_decay": DECAY if name in COUPLED else DECAY / factors[key],
            }
            for key, parameter in trainable_parameters(net).items()
        ]
        make_trainer(tmp_path, net, max_steps=steps, **OPTIONS, **given(name, groups)).train()
        expected = weights_of(net)

        net = model()
        match = FLeRMConfig(
            mode="match", profile=scaled(own, factors), measure_steps=(0,), research=Research(pool="unit", beta=1.0)
        )
        trainer = make_trainer(
            tmp_path,
            net,
            match,
            alone=alone,
            max_steps=steps,
            **OPTIONS,
            **given(name, list(trainable_parameters(net).values())),
        )
        trainer.train()
        assert flerm_callback(trainer).scales == pytest.approx(factors, rel=1e-6)
        actual = weights_of(net)
        # Muon works in bfloat16, Lion by signs: from the second step on, rounding shows.
        tolerance = 1e-3 if steps == 1 else 2e-2
        for key in (key for key in start if not torch.equal(expected[key], start[key])):
            moved = expected[key] - start[key]
            assert (actual[key] - expected[key]).norm() < tolerance * moved.norm(), key


class SecondStep(TrainerCallback):
    """Gives the groups, one per tensor, other learning rates and decays for the second step."""

    def __init__(self, optimizer: Optimizer, scales: list[float]) -> None:
        self.optimizer = optimizer
        self.scales = scales

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
                group.update(lr=LR * scale, weight_decay=DECAY / scale)


def test_a_step_that_had_scales_is_redone_at_its_nominal_decay(tmp_path: Path) -> None:
    """The second measured step was made at the first one's scales, and is redone at others."""
    net = model()
    parameters = list(trainable_parameters(net).values())
    own = recorded(tmp_path, net, max_steps=1, **OPTIONS, **given("adamw", parameters))
    factors = {key: factor**3 for key, factor in some_factors(net).items()}
    net = model()
    match = FLeRMConfig(
        mode="match", profile=scaled(own, factors), measure_steps=(0, 1), research=Research(pool="unit", beta=0.0)
    )
    options = given("adamw", list(trainable_parameters(net).values()))
    trainer = make_trainer(tmp_path, net, match, max_steps=2, **OPTIONS, **options)
    trainer.train()
    actual, scales = weights_of(net), flerm_callback(trainer).scales
    assert all(abs(scales[key] / factors[key] - 1) > 0.01 for key in factors), "the second step must change scales"

    net = model()
    start = weights_of(net)
    groups = [
        {"params": [parameter], "lr": LR * factors[key], "weight_decay": DECAY / factors[key]}
        for key, parameter in trainable_parameters(net).items()
    ]
    options = given("adamw", groups)
    second = SecondStep(options["extra"]["optimizers"][0], [scales[key] for key in trainable_parameters(net)])
    make_trainer(tmp_path, net, max_steps=2, callbacks=[second], **OPTIONS, **options).train()
    expected = weights_of(net)
    for key in (key for key in start if not torch.equal(expected[key], start[key])):
        assert (actual[key] - expected[key]).norm() < 1e-3 * (expected[key] - start[key]).norm(), key


def refusals() -> list[Any]:
    from transformers.optimization import Adafactor

    cases = [
        (
            "record",
            torch.optim.Rprop,
            {},
            "the update of Rprop is not linear .* adapts the step sizes.* Train with AdamW",
        ),
        (
            "match",
            torch.optim.Rprop,
            {},
            "the update of Rprop is not linear .* adapts the step sizes.* Train with AdamW",
        ),
        ("record", torch.optim.ASGD, {}, "the update of ASGD is not linear"),
        ("match", torch.optim.Adafactor, {}, r"the update of Adafactor is not linear .* 1 / sqrt\(step\).* Match with"),
        ("match", Adafactor, {"relative_step": False, "beta1": 0.9}, "the update of Adafactor .* with beta1"),
    ]
    return [pytest.param(*case, id=f"{case[0]}-{case[1].__module__}.{case[1].__name__}") for case in cases]


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
@pytest.mark.parametrize(("mode", "optimizer", "options", "message"), refusals())
def test_optimizers_are_refused_by_name_before_the_first_step(
    tmp_path: Path, mode: str, optimizer: type[Optimizer], options: dict[str, Any], message: str, alone: bool
) -> None:
    net = model()
    base = RateProfile([0], {key: [1.0] for key in trainable_parameters(net)})
    config = FLeRMConfig() if mode == "record" else FLeRMConfig(mode="match", profile=base)
    extra = {"optimizer_cls_and_kwargs": (optimizer, {"lr": LR, **options})}
    if optimizer is torch.optim.Rprop:
        extra = {"optimizers": (optimizer(trainable_parameters(net).values(), lr=LR), None)}
    trainer = make_trainer(tmp_path, net, config, alone=alone, extra=extra)
    before = weights_of(net)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, before[key]) for key, value in weights_of(net).items())


def test_what_cannot_be_matched_may_be_recorded(tmp_path: Path) -> None:
    net = model()
    extra = {"optimizer_cls_and_kwargs": (torch.optim.Adafactor, {"lr": LR})}
    profile = recorded(tmp_path, net, extra=extra, max_steps=2)
    assert profile.steps.tolist() == [0, 1]
