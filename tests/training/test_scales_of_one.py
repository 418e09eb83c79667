"""Matching with scales of 1, or a run with itself, changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from hf_flerm import FLeRMConfig, RateProfile
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.param_groups import raw_optimizer
from hf_flerm.transfer.mapping import ProfileMap
from tests.shared.trainer_runs import DROPOUT, OPTIMIZERS, all_ones, plain_run, weight_decays
from tests.shared.training import (
    MEASURED,
    MODELS,
    Rows,
    assert_identical,
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
    ("optimizer", "alone"),
    [*((name, False) for name in OPTIMIZERS), ("adamw-fused", True)],
    ids=[*OPTIMIZERS, "callback"],
)
@pytest.mark.parametrize("model", MODELS)
def test_matching_with_scales_of_one_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, optimizer: str, alone: bool
) -> None:
    names = trainable_parameters(MODELS[model]())
    config = FLeRMConfig(mode="match", profile=RateProfile([0], {name: [1.0] for name in names}))
    monkeypatch.setattr(ProfileMap, "tensor_scales", all_ones)
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS[optimizer]}
    trainer = make_trainer(folder, MODELS[model](DROPOUT), config, alone=alone, **options)
    outcome = train(trainer)
    assert flerm_callback(trainer).rate_profile.steps.tolist() == MEASURED
    assert_same_run(outcome, plain_run(folder, model, optimizer), same_groups=False)


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_a_users_own_optimizer_and_scheduler_go_through(
    folder: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    def own(model: nn.Module) -> dict[str, Any]:
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        optimizer = AdamW([{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "lr": 1e-3}], lr=1e-2)
        return {"optimizers": (optimizer, LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]))}

    model = gpt2(DROPOUT)
    plain = train(make_trainer(folder, model, extra=own(model)))
    model = gpt2(DROPOUT)
    config = FLeRMConfig(mode="match", profile=RateProfile([0], {name: [1.0] for name in trainable_parameters(gpt2())}))
    monkeypatch.setattr(ProfileMap, "tensor_scales", all_ones)
    trainer = make_trainer(folder, model, config, alone=alone, extra=own(model))
    outcome = train(trainer)
    assert_same_run(outcome, plain, same_groups=False)
    names = set(trainable_parameters(model))
    decays = weight_decays(raw_optimizer(trainer.optimizer), model)
    assert decays == {name: 0.3 if model.get_parameter(name).ndim > 1 else 0.01 for name in names}


@pytest.mark.parametrize("model", MODELS)
def test_matching_a_run_with_itself_changes_nothing(folder: Path, model: str) -> None:
    """Nothing is patched: with the same probes as the base, the measured rates are the base's, and every scale is 1."""
    base = recorded(folder, MODELS[model](DROPOUT), gradient_accumulation_steps=2, optim="adamw_torch_fused")
    config = flerm_config(mode="match", profile=base, policy="follow")
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS["adamw-fused"]}
    trainer = make_trainer(folder, MODELS[model](DROPOUT), config, **options)
    outcome = train(trainer)
    assert flerm_callback(trainer).scales == dict.fromkeys(base.names, 1.0)
    assert trainer.rate_profile.rates.keys() == base.rates.keys()
    assert_identical(trainer.rate_profile.rates, {name: base.rates[name] for name in trainer.rate_profile.names})
    assert_same_run(outcome, plain_run(folder, model, "adamw-fused"), same_groups=False)


@pytest.mark.parametrize("model", ["full", "lora"])
def test_matching_a_run_with_itself_by_other_probes_is_as_exact_as_its_noise(folder: Path, model: str) -> None:
    """Base and target draw their own omega on the same examples, so the standard errors are the whole difference.

    sd(log scale) = sqrt((se / rate)^2 of base + of target). The tensors share omega, so nothing better is assumed of
    the mean over tensors than full correlation: its sd is at most the mean of theirs.
    """
    # LoRA's A would have rate 0 at the first step with the default init.
    make = {"full": gpt2, "lora": lambda: lora(init=False)}[model]
    probe_dataset = Rows(1024, seed=5)
    options = {"probe_dataset": probe_dataset, "max_steps": 1}
    shared = {"measure_steps": (0,), "probes": 16, "probe_batch_size": len(probe_dataset)}
    base = make_trainer(folder, make(), flerm_config(**shared), **options)
    base.train()
    profile = base.rate_profile
    target = make_trainer(
        folder,
        make(),
        flerm_config(mode="match", profile=profile, seed=1, pool="unit", **shared),
        **options,
    )
    target.train()
    scales = flerm_callback(target).scales
    assert scales.keys() == profile.rates.keys()

    def relative_errors(trainer: Trainer) -> dict[str, float]:
        measurement = flerm_callback(trainer).last_measurement
        return {name: measurement.standard_errors[name] / rate for name, rate in measurement.rates.items()}

    of_base, of_target = relative_errors(base), relative_errors(target)
    sd = {name: math.hypot(of_base[name], of_target[name]) for name in scales}
    logs = {name: math.log(scale) for name, scale in scales.items()}
    assert any(logs.values()), "the two runs must not share their random numbers"
    assert {name: logs[name] / sd[name] for name in logs if abs(logs[name]) > 4 * sd[name]} == {}
    mean_sd = sum(sd.values()) / len(sd)
    assert 3 * mean_sd < math.log(1.03), "too few probes: three standard deviations must fit into 3 %"
    assert abs(sum(logs.values()) / len(logs)) < math.log(1.03)
