"""Whole runs with optimizers inside optimizers: half of every rate is half of the learning rate, on every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import TrainerCallback

from hf_flerm import FLeRMConfig, RateProfile, Research
from tests.shared.training import assert_identical, gpt2, lora, make_trainer, weights_of
from tests.shared.wrapped_optimizers import Flat, Hybrid, Lookahead, Pair, PairByProperty, muon_and_adamw

OPTIONS: dict[str, Any] = {"max_steps": 4, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
Make = Callable[[Any, float], Optimizer]


def by_dimension(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if (p.ndim > 1) == matrix], "lr": lr} for matrix in (True, False)]


CASES: dict[str, tuple[Callable[[], nn.Module], Make]] = {
    "Muon and AdamW": (gpt2, lambda model, lr: muon_and_adamw(Pair, by_dimension(model, lr))),
    "Muon and AdamW by property": (gpt2, lambda model, lr: muon_and_adamw(PairByProperty, by_dimension(model, lr))),
    "hybrid": (gpt2, lambda model, lr: Hybrid(by_dimension(model, lr))),
    "flat": (gpt2, lambda model, lr: Flat(by_dimension(model, lr))),
    "LoRA-FA": (lora, lambda model, lr: create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=lr)),
    "Riemannian": (
        lambda: lora(init=False),
        lambda model, lr: create_riemannian_optimizer(model, AdamW, lr=lr, weight_decay=0.0),
    ),
}


class Watch(TrainerCallback):
    """Keeps the weights from before every step and after the last."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(weights_of(kwargs["model"]))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(weights_of(kwargs["model"]))


def run(folder: Path, case: str, lr: float, flerm: FLeRMConfig | None = None) -> tuple[Any, list[dict[str, Tensor]]]:
    make, optimizer = CASES[case]
    model, watch = make(), Watch()
    extra = {"optimizers": (optimizer(model, lr), None)}
    trainer = make_trainer(folder, model, flerm, extra=extra, callbacks=[watch], **OPTIONS)
    trainer.train()
    return trainer, watch.weights


@pytest.mark.parametrize("case", CASES)
def test_half_of_every_rate_is_half_of_the_learning_rate(tmp_path: Path, case: str) -> None:
    AdamW([nn.Parameter(torch.ones(1))])  # from here on torch runs its hooks in the steps of subclasses once more
    _, plain = run(tmp_path, case, 1e-2)
    recorder, recorded = run(tmp_path, case, 1e-2, FLeRMConfig(measure_steps=[0]))
    assert_identical(recorded, plain)
    profile = recorder.rate_profile
    half = RateProfile(profile.steps, {name: rates / 2 for name, rates in profile.rates.items()})
    research = Research(pool="unit", beta=1.0)
    config = FLeRMConfig(mode="match", profile=half, measure_steps=[0], granularity="tensor", research=research)
    matcher, matched = run(tmp_path, case, 1e-2, config)
    _, expected = run(tmp_path, case, 5e-3)
    scales = matcher.flerm_callback.scales
    moving = {name for name, rates in profile.rates.items() if rates.any()}
    assert {name: scale for name, scale in scales.items() if name in moving} == pytest.approx(
        dict.fromkeys(moving, 0.5), rel=1e-6
    )
    for step in range(1, len(expected)):
        for name in expected[0]:
            wanted, found = (weights[step][name] - weights[step - 1][name] for weights in (expected, matched))
            # Muon works in bfloat16, and Adam divides small gradients by each other.
            assert (found - wanted).norm() <= 3e-2 * wanted.norm() + 1e-6, (step, name)


def test_lookahead_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = gpt2()
    base = RateProfile([0], {name: [1.0] for name, _ in model.named_parameters()})
    extra = {"optimizers": (Lookahead(SGD(model.parameters(), lr=1e-2)), None)}
    trainer = make_trainer(tmp_path, model, FLeRMConfig(mode="match", profile=base), extra=extra, **OPTIONS)
    with pytest.raises(ValueError, match="the update of Lookahead is not linear"):
        trainer.train()
    assert trainer.state.global_step == 0
