"""Scales act as learning rates of single tensors, on the step alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from transformers import TrainerCallback

from hf_flerm import FLeRMConfig, RateProfile, RateProfileError, measure_rates
from hf_flerm.model.names import canonical_names, trainable_parameters
from hf_flerm.optimizer.param_groups import raw_optimizer
from hf_flerm.transfer.mapping import ProfileMap
from tests.shared.trainer_runs import SpyRates, known_base, match_known
from tests.shared.training import (
    BATCH,
    MEASURED,
    MODELS,
    STEPS,
    Rows,
    flerm_callback,
    flerm_config,
    gpt2,
    lora,
    make_trainer,
    recorded,
    scaled,
    some_factors,
    weights_of,
)


def plain_sgd(lr: float = 0.5) -> dict[str, Any]:
    return {"extra": {"optimizer_cls_and_kwargs": (SGD, {"lr": lr})}, "learning_rate": lr, "weight_decay": 0.0}


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_measured_steps_are_redone_at_their_scales(folder: Path, alone: bool) -> None:
    """With plain SGD, weights after a measured step are W - lr(t) * s(t) * gradient; here s is new at either step."""
    lr = 0.5
    data = Rows(BATCH)  # one batch, whatever its order
    options = {**plain_sgd(lr), "data": data, "max_steps": 2, "max_grad_norm": 0.0, "alone": alone}
    first = some_factors(gpt2())
    second = dict(zip(first, reversed(first.values()), strict=True))
    config = {"measure_steps": (0, 1), "beta": 0.0}
    # The first step's scales decide what the second's rates are; a run that has them tells the base to ask for.
    probe = make_trainer(folder, gpt2(), match_known(known_base(folder, gpt2, **options), **config), **options)
    probe.train()
    seen = flerm_callback(probe).rate_profile
    wanted = {name: [rates[0] * first[name], rates[1] * second[name]] for name, rates in seen.rates.items()}
    trainer = make_trainer(folder, gpt2(), match_known(RateProfile([0, 1], wanted), **config), **options)
    trainer.train()
    assert flerm_callback(trainer).scales == pytest.approx(second, rel=1e-3)

    reference = gpt2().double().train()
    parameters = trainable_parameters(reference)
    moved = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for rate, scales in ((lr, first), (lr / 2, second)):
        reference.zero_grad()
        # The Trainer divides the summed loss by the number of labels.
        reference(input_ids=data.tokens, labels=data.tokens, num_items_in_batch=data.tokens.numel()).loss.backward()
        with torch.no_grad():
            for name, parameter in parameters.items():
                update = rate * scales[name] * parameter.grad
                parameter -= update
                moved[name] += update.abs()
    after = trainable_parameters(trainer.model)
    for name, parameter in parameters.items():
        # A weight of size w carries a rounding error of 2^-24 w from each of three operations in either step.
        rounding = 6 * 2**-24 * parameter.abs().max()
        error = (after[name].double() - parameter).abs().max()
        assert bool(error <= 1e-3 * moved[name].max() + rounding), name
        assert bool(moved[name].max() > 20 * rounding), "an update this small would show nothing"


def test_scales_act_like_learning_rates_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end: weights and rates of a run whose param groups have lr * s baked in, under the same schedule."""
    model = gpt2()
    factors = some_factors(model)
    parameters = trainable_parameters(model)
    optimizer = SGD([{"params": [p], "lr": 0.5 * factors[name]} for name, p in parameters.items()])
    start = weights_of(model)
    baked = make_trainer(
        folder, model, FLeRMConfig(metric="euclidean"), extra={"optimizers": (optimizer, None)}, weight_decay=0.0
    )
    baked.train()
    base = RateProfile([0], {name: [1.0] for name in factors})
    monkeypatch.setattr(ProfileMap, "tensor_scales", lambda mapped, logs: dict(factors))
    config = FLeRMConfig(mode="match", profile=base, metric="euclidean")
    matched = make_trainer(folder, gpt2(), config, **plain_sgd())
    matched.train()
    expected, actual = weights_of(model), weights_of(matched.model)
    for name in expected:
        torch.testing.assert_close(actual[name] - start[name], expected[name] - start[name], rtol=1e-3, atol=2e-6)
    assert matched.rate_profile.steps.tolist() == baked.rate_profile.steps.tolist() == MEASURED
    for name, rates in baked.rate_profile.rates.items():
        torch.testing.assert_close(matched.rate_profile.rates[name], rates, rtol=2e-3, atol=0.0)


def test_a_base_that_was_matched_itself_is_refused_where_its_rates_do_not_tell_how_far_it_moved(folder: Path) -> None:
    base = recorded(folder, gpt2())
    matched = [
        recorded(folder, gpt2(), flerm=FLeRMConfig("match", profile))
        for profile in (base, scaled(base, some_factors(gpt2())))
    ]
    recorded(folder, gpt2(), flerm=FLeRMConfig("match", matched[0]))  # all scales were 1
    for profile, by in ((matched[1], r"scaled by 0\.\d+ to \d"), (RateProfile.average(matched), "scaled, and")):
        with pytest.raises(RateProfileError, match=f"comes from a matched run.*{by}"):
            recorded(folder, gpt2(), flerm=FLeRMConfig("match", profile))


class Snapshots(TrainerCallback):
    """The weights before every step, and after the last."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(weights_of(kwargs["model"]))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(weights_of(kwargs["model"]))


def test_recorded_rates_are_those_of_the_steps_that_were_made(folder: Path) -> None:
    """Each step's own learning rate under a decaying schedule, each tensor's own (LoRA+), weights from before it."""
    data, snapshots, spy = Rows(BATCH), Snapshots(), SpyRates()
    options = {"data": data, "max_steps": 4, "gradient_accumulation_steps": 1}

    def loraplus(model: nn.Module) -> dict[str, Any]:
        return {"optimizers": (create_loraplus_optimizer(model, AdamW, lr=1e-2, loraplus_lr_ratio=4), None)}

    model = lora()
    make_trainer(folder, model, extra=loraplus(model), callbacks=[snapshots, spy], **options).train()
    model = lora()
    profile = recorded(
        folder,
        model,
        flerm=flerm_config(measure_steps=range(4), metric="euclidean", estimator="exact", probe_batch_size=BATCH),
        extra=loraplus(model),
        **options,
    )
    assert profile.steps.tolist() == [0, 1, 2, 3]
    raw = {name: path for path, name in canonical_names(model).items()}
    for step, (before, after) in enumerate(itertools.pairwise(snapshots.weights)):
        updates = {name: (after[raw[name]] - before[raw[name]]) / rate for name, rate in spy.inside[step].items()}
        for name, parameter in model.named_parameters():
            parameter.data = before[name]
        batch = {"input_ids": data.tokens}
        expected = measure_rates(model, updates, [batch], estimator="exact").rates
        assert profile.at(step) == pytest.approx(expected, rel=1e-5)
    assert len(set(spy.inside[0].values())) == 2
    assert spy.inside[0] != spy.inside[3]


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
@pytest.mark.parametrize("model", MODELS)
def test_scales_are_seen_by_the_step_and_by_nobody_else(folder: Path, model: str, alone: bool) -> None:
    spies = SpyRates(), SpyRates()
    make_trainer(folder, MODELS[model](), callbacks=[spies[0]]).train()
    base = known_base(folder, MODELS[model])
    trainer = make_trainer(folder, MODELS[model](), match_known(base), alone=alone, callbacks=[spies[1]])
    trainer.train()
    scales = flerm_callback(trainer).scales
    moved = [name for name, rates in base.rates.items() if rates[0] > 0]  # not LoRA's A
    factors = some_factors(MODELS[model]())
    assert scales == pytest.approx({name: factors[name] if name in moved else 1.0 for name in scales}, rel=1e-9)
    assert len(set(scales.values())) > len(moved) // 2
    assert spies[1].outside == spies[0].outside
    assert len(spies[1].inside) == STEPS
    assert spies[1].inside[0] == spies[0].inside[0]  # made before anything was measured, then redone
    for inside, nominal in zip(spies[1].inside[1:], spies[0].inside[1:], strict=True):
        assert inside == {name: rate * scales[name] for name, rate in nominal.items()}


def test_no_hook_stays_on_the_optimizer(folder: Path) -> None:
    trainer = make_trainer(folder, gpt2(), match_known(known_base(folder, gpt2)), max_steps=2)
    trainer.train()
    optimizer = raw_optimizer(trainer.optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_training_twice_scales_once(folder: Path) -> None:
    trainer = make_trainer(folder, gpt2(), match_known(known_base(folder, gpt2)))
    trainer.train()
    spy = SpyRates()
    trainer.add_callback(spy)
    trainer.train()
    scales = flerm_callback(trainer).scales
    assert trainer.rate_profile.steps.tolist() == [0]
    nominal = spy.outside[1::3]
    assert spy.inside[1] == {name: rate * scales[name] for name, rate in nominal[1].items()}
