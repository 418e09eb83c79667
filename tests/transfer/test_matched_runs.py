"""Matching across what people change, end to end through `FLeRMTrainer`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import TrainingArguments

from hf_flerm import FLeRMConfig, FLeRMTrainer, RateProfile, Research
from hf_flerm.model.names import tensor_kinds, trainable_parameters
from tests.shared.training import Rows, gpt2


def lora(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **options))


def trainer_of(folder: Path, model: nn.Module, flerm: FLeRMConfig, **options: Any) -> FLeRMTrainer:
    given = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **options}
    optimizer = given.pop("optimizer", None)
    args = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", **given
    )
    return FLeRMTrainer(model=model, args=args, train_dataset=Rows(), flerm=flerm, optimizers=(optimizer, None))


def recorded(folder: Path, model: nn.Module, **options: Any) -> RateProfile:
    trainer = trainer_of(folder, model, FLeRMConfig(), **options)
    trainer.train()
    return trainer.rate_profile


def matched(folder: Path, model: nn.Module, base: RateProfile, **choices: Any) -> FLeRMTrainer:
    trainer = trainer_of(folder, model, FLeRMConfig(mode="match", profile=base, **choices))
    trainer.train()
    return trainer


def test_recorded_joint_rates_are_those_of_the_measurement(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lora(), FLeRMConfig())
    trainer.train()
    measured, profile = trainer.flerm_callback.last_measurement, trainer.rate_profile
    assert measured is not None
    assert profile.joint_rates["global"][""][-1].item() == pytest.approx(measured.total, rel=1e-12)
    path = "base_model.model.transformer.h.0.attn.c_attn"
    names = [name for name in measured.rates if name.startswith(path)]
    assert len(names) == 2
    assert profile.joint_rates["module"][path][-1].item() == pytest.approx(measured.group_rate(names), rel=1e-12)
    block = [name for name in measured.rates if ".h.1." in name]
    assert profile.joint_rates["block"]["base_model.model.transformer.h.1"][-1].item() == pytest.approx(
        measured.group_rate(block), rel=1e-12
    )


@pytest.mark.parametrize("depth", ["joint", "equal", "sqrt", "copy"])
def test_two_layers_to_four(tmp_path: Path, depth: str) -> None:
    base = recorded(tmp_path, gpt2())
    trainer = matched(tmp_path, gpt2(layers=4), base, research=Research(depth=depth, rules="none"))
    scales, kinds = trainer.flerm_callback.scales, tensor_kinds(gpt2(layers=4))
    assert set(scales) == set(trainable_parameters(gpt2(layers=4)))
    assert any(scale != 1.0 for scale in scales.values())
    for kind in set(kinds.values()):
        assert len({round(scales[name], 12) for name in scales if kinds[name] == kind}) == 1


def test_one_scale_for_everything(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    trainer = matched(tmp_path, gpt2(layers=4, width=32), base, granularity="global", research=Research(beta=0.0))
    (scale,) = set(trainer.flerm_callback.scales.values())
    measured = trainer.flerm_callback.last_measurement
    assert measured is not None
    last = int(trainer.rate_profile.steps[-1])
    wanted = base.interpolated(base.joint_rates["global"][""], last).item()
    assert scale == pytest.approx(wanted / measured.total, rel=1e-9)


@pytest.mark.parametrize("granularity", ["module", "block"])
def test_adapters_to_all_weights(tmp_path: Path, granularity: str) -> None:
    base = recorded(tmp_path, lora())
    if granularity == "block":
        with pytest.raises(ValueError, match="only in the model"):
            matched(tmp_path, gpt2(), base, granularity=granularity)
    trainer = matched(tmp_path, gpt2(), base, granularity=granularity, unmatched="global", research=Research(beta=0.0))
    scales = trainer.flerm_callback.scales
    within = "attn.c_attn" if granularity == "module" else ".h."
    assert len({scales[name] for name in scales if within not in name}) == 1  # that of everything together
    assert len({scales[name] for name in scales if within in name}) == 1  # one kind


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_frozen_tensors_stay_as_they_are_bit_by_bit(tmp_path: Path, optimizer: type[Optimizer]) -> None:
    """Weight decay included, whether it is decoupled or goes through the gradient."""
    base = recorded(tmp_path, lora())
    model = gpt2()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    config = FLeRMConfig(mode="match", profile=base, granularity="module", unmatched="freeze")
    decaying = optimizer(model.parameters(), lr=1e-2, weight_decay=0.1)
    trainer_of(tmp_path, model, config, optimizer=decaying).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("attn.c_attn" not in name), name


def test_rates_carry_over_from_one_optimizer_to_another(tmp_path: Path) -> None:
    """SGD at lr 1 has its own unit: the scales make its step as large in function space as AdamW's was."""
    base = recorded(tmp_path, gpt2())
    model = gpt2()
    config = FLeRMConfig(mode="match", profile=base, measure_steps=(0,), research=Research(pool="unit", beta=0.0))
    trainer = trainer_of(tmp_path, model, config, optimizer=SGD(model.parameters(), lr=1e-2), max_steps=1)
    trainer.train()
    measured, scales = trainer.flerm_callback.last_measurement, trainer.flerm_callback.scales
    assert measured is not None
    own = {name: scales[name] * rate for name, rate in measured.rates.items() if rate > 0}
    assert own == pytest.approx({name: base.at(0)[name] for name in own}, rel=1e-9)


def test_a_scale_that_is_held_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = recorded(tmp_path, gpt2())
    far = RateProfile(base.steps, {name: rates * 100 for name, rates in base.rates.items()})
    trainer = matched(tmp_path, gpt2(), far, max_scale=2.0, research=Research(beta=0.0))
    assert max(trainer.flerm_callback.scales.values()) == pytest.approx(2.0)
    assert len([record for record in caplog.records if "have reached max_scale = 2" in record.getMessage()]) == 1


@pytest.mark.parametrize("make", [lambda: gpt2(layers=4), lambda: gpt2(width=32)], ids=["depth", "width"])
def test_a_resumed_match_has_the_very_same_scales(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    base = recorded(tmp_path, gpt2())

    def run(folder: Path, resume: str | None = None) -> FLeRMTrainer:
        args = TrainingArguments(
            str(folder),
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="steps",
            save_steps=2,
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
        )
        research = Research(policy="follow")
        config = FLeRMConfig(mode="match", profile=base, max_change=1.5, research=research)
        trainer = FLeRMTrainer(model=make(), args=args, train_dataset=Rows(), flerm=config)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    again = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"))
    assert again.flerm_callback.scales == whole.flerm_callback.scales
    assert again.rate_profile == whole.rate_profile
    for ours, theirs in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_warm_up_at_zero_is_made_up_for(tmp_path: Path) -> None:
    config = FLeRMConfig(measure_steps=(0,))
    trainer = trainer_of(tmp_path, gpt2(), config, warmup_steps=2)
    trainer.train()
    assert trainer.rate_profile.steps.tolist() == [1]
    assert all(math.isfinite(rate) for rate in trainer.rate_profile.at(1).values())


def test_measurements_weigh_as_the_learning_rate_in_force(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    evidence = matched(tmp_path, gpt2(), base).flerm_callback.evidence
    assert evidence.steps == (0, 1, 2)
    assert evidence.weights == pytest.approx([1e-2 * (1 - step / 4) for step in evidence.steps], rel=1e-12)


def test_a_base_that_jumps_is_followed_by_max_change(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2(), max_steps=2)
    jump = {name: rates * torch.tensor([1.0, 100.0]) for name, rates in base.rates.items()}
    options = {"max_change": 1.5, "measure_steps": (0, 1), "research": Research(beta=0.0)}
    config = {"profile": RateProfile(base.steps, jump), **options}
    first, second = (
        trainer_of(tmp_path, gpt2(), FLeRMConfig(mode="match", **config), max_steps=steps) for steps in (1, 2)
    )
    first.train()
    second.train()
    before, after = first.flerm_callback.scales, second.flerm_callback.scales
    changes = {name: after[name] / before[name] for name in after}
    assert changes == pytest.approx(dict.fromkeys(after, 1.5), rel=1e-9)


class SkipsOnce(SGD):
    """Its first step moves nothing, as where gradients overflowed."""

    skipped = False

    def step(self, closure: Any = None) -> Any:
        if not self.skipped:
            self.skipped = True
            return None
        return super().step(closure)


def test_a_step_that_moved_nothing_is_made_up_for(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = SkipsOnce(model.parameters(), lr=1e-2)
    trainer = trainer_of(tmp_path, model, FLeRMConfig(measure_steps=(0, 3)), optimizer=optimizer)
    trainer.train()
    assert trainer.rate_profile.steps.tolist() == [1, 3]
    assert any(rate > 0 for rate in trainer.rate_profile.at(1).values())
