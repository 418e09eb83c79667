"""Recorded runs, and plans that are made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import SGD, Optimizer
from transformers import TrainingArguments

from hf_flerm import FLeRMConfig, FLeRMTrainer, RateProfile, Research, plan
from hf_flerm.planning.plan import PlanFromBase
from tests.shared.training import Rows, gpt2

LEARNING_RATE = 1e-2


def lora(rank: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(gpt2(), LoraConfig(r=rank, target_modules=["c_attn"], fan_in_fan_out=True, **options))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": LEARNING_RATE, **options}
    return TrainingArguments(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **given)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=LEARNING_RATE)


def recorded(folder: Path, model: nn.Module, metric: str = "euclidean", **extra: Any) -> RateProfile:
    config = FLeRMConfig(measure_steps=range(8), metric=metric, research=Research(probes=4))
    trainer = FLeRMTrainer(model=model, args=arguments(folder), train_dataset=Rows(), flerm=config, **extra)
    trainer.train()
    return trainer.rate_profile


def planned(folder: Path, model: nn.Module, base: RateProfile, **options: Any) -> PlanFromBase:
    """By the rates alone."""
    config = FLeRMConfig(research=Research(probes=4))
    return plan(model, arguments(folder), Rows(), base, steps=6, looks=0, config=config, **options)
