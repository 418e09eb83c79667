"""Param groups of recorded and matched runs: order, weight decay, learning rates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim import AdamW

from hf_flerm import FLeRMConfig, RateProfile
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.param_groups import raw_optimizer
from tests.shared.trainer_runs import SpyRates, known_base, llama, match_known, weight_decays
from tests.shared.training import assert_identical, flerm_callback, gpt2, lora, make_trainer


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
@pytest.mark.parametrize("make", [gpt2, llama, lora], ids=["gpt2", "llama", "lora"])
def test_matching_leaves_the_param_groups_as_they_are(folder: Path, make: Callable[[], nn.Module], alone: bool) -> None:
    plain = make_trainer(folder, make(), max_steps=2)
    plain.train()
    trainer = make_trainer(folder, make(), match_known(known_base(folder, make)), alone=alone, max_steps=2)
    trainer.train()
    assert any(scale != 1.0 for scale in flerm_callback(trainer).scales.values())
    groups = [raw_optimizer(it.optimizer).state_dict()["param_groups"] for it in (trainer, plain)]
    assert_identical(*groups)
    decays = weight_decays(raw_optimizer(trainer.optimizer), trainer.model)
    assert set(decays.values()) == ({0.1} if make is lora else {0.0, 0.1})


def test_groups_with_learning_rates_of_their_own_keep_them(folder: Path) -> None:
    """LoRA+ trains B at a multiple of A's learning rate."""

    def loraplus(model: nn.Module) -> dict[str, Any]:
        optimizer = create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=16)
        return {"optimizers": (optimizer, None)}

    model = lora()
    base = RateProfile([0], {name: [1.0] for name in trainable_parameters(model)})
    spy = SpyRates()
    make_trainer(
        folder,
        model,
        FLeRMConfig(mode="match", profile=base),
        callbacks=[spy],
        extra=loraplus(model),
        lr_scheduler_type="constant",
    ).train()
    expected = {name: 16e-3 if "lora_B" in name else 1e-3 for name in base.names}
    assert spy.outside[0] == pytest.approx(expected, rel=1e-12)
    assert all(rates == spy.outside[0] for rates in spy.outside)
