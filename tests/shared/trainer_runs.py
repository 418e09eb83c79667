"""Runs of a `Trainer` to compare with, and bases whose scales are known."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_flerm import FLeRMConfig, RateProfile
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.param_groups import learning_rates, raw_optimizer
from hf_flerm.transfer.mapping import ProfileMap
from tests.shared import training
from tests.shared.training import MODELS, Outcome, flerm_config, make_trainer, recorded, scaled, some_factors, train

DROPOUT = 0.1


# Dropout, a decaying schedule (the Trainer's default) and accumulation, under each of these.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw-fused": {"optim": "adamw_torch_fused"},
    "adamw-foreach": {"extra": {"optimizer_cls_and_kwargs": (AdamW, {"lr": 1e-2, "foreach": True})}},
    "sgd-momentum": {"extra": {"optimizer_cls_and_kwargs": (SGD, {"lr": 1e-1, "momentum": 0.9})}},
    "adafactor": {"optim": "adafactor"},
}


def llama(dropout: float = 0.0, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=training.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=training.LENGTH,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


@functools.cache
def plain_run(folder: Path, model: str, optimizer: str) -> Outcome:
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS[optimizer]}
    return train(make_trainer(folder, MODELS[model](DROPOUT), **options))


class SpyRates(TrainerCallback):
    """The learning rate of every tensor: inside each `optimizer.step`, and at three events around it."""

    def __init__(self) -> None:
        self.inside: list[dict[str, float]] = []
        self.outside: list[dict[str, float]] = []
        self.optimizer: Optimizer | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.optimizer is None:
            self.optimizer = raw_optimizer(kwargs["optimizer"])
            self.parameters = trainable_parameters(kwargs["model"])
            self.optimizer.register_step_pre_hook(lambda *_: self.inside.append(self._rates()))
        self.outside.append(self._rates())

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.outside.append(self._rates())

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.outside.append(self._rates())

    def _rates(self) -> dict[str, float]:
        assert self.optimizer is not None
        return learning_rates(self.optimizer, self.parameters)


def all_ones(mapped: ProfileMap, logs: Mapping[str, float]) -> dict[str, float]:
    return dict.fromkeys(mapped.shapes, 1.0)


def known_base(folder: Path, make: Callable[[], nn.Module], **options: Any) -> RateProfile:
    """A base that a run of `make()` matches with the scales `some_factors`: its own rates, seen by the same probes."""
    config = FLeRMConfig(measure_steps=(0,), metric="euclidean")
    return scaled(recorded(folder, make(), flerm=config, **{"max_steps": 1, **options}), some_factors(make()))


def match_known(base: RateProfile, **changes: Any) -> FLeRMConfig:
    return flerm_config(
        **{
            "mode": "match",
            "profile": base,
            "metric": "euclidean",  # as in `known_base`, also for a profile that is made of its rates
            "pool": "unit",
            "beta": 1.0,
            "measure_steps": (0,),
            **changes,
        }
    )


def weight_decays(optimizer: Optimizer, model: nn.Module) -> dict[str, float]:
    by_id = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in trainable_parameters(model).items()}


def ones(model: nn.Module) -> dict[str, list[float]]:
    return {name: [1.0] for name in trainable_parameters(model)}


def match(profile: Any, **changes: Any) -> FLeRMConfig:
    return flerm_config(mode="match", profile=profile, **changes)
