"""A small model, optimizers that somebody else made of it, and their learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer, RMSprop
from transformers.optimization import Adafactor

from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.param_groups import learning_rates

NAMES = ["0.weight", "0.bias", "1.weight", "1.bias"]
ORDER = ["0.weight", "1.weight", "0.bias", "1.bias"]  # the optimizer's: matrices first


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """As the Trainer makes them; the second with a learning rate of its own, to tell the groups apart."""
    parameters = trainable_parameters(model)
    return [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0, "lr": 0.25},
    ]


def sgd(model: nn.Module) -> SGD:
    return SGD(two_groups(model), lr=0.5, momentum=0.9)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda model: AdamW(two_groups(model), lr=1e-2, foreach=False),
    "adamw-foreach": lambda model: AdamW(two_groups(model), lr=1e-2, foreach=True),
    "adamw-fused": lambda model: AdamW(two_groups(model), lr=1e-2, fused=True),
    "sgd": sgd,
    "sgd-foreach": lambda model: SGD(two_groups(model), lr=0.5, momentum=0.9, foreach=True),
    "adafactor": lambda model: Adafactor(two_groups(model), lr=1e-2, scale_parameter=False, relative_step=False),
    "adagrad": lambda model: Adagrad(two_groups(model), lr=1e-2),
    "rmsprop": lambda model: RMSprop(two_groups(model), lr=1e-2),
}


def rates(optimizer: Optimizer, model: nn.Module) -> dict[str, float]:
    return learning_rates(optimizer, trainable_parameters(model))


def backward(model: nn.Module, seed: int = 0) -> None:
    model.zero_grad()
    model(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def spy(optimizer: Optimizer, model: nn.Module) -> list[dict[str, float]]:
    """The learning rates that every step from now on uses."""
    seen: list[dict[str, float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(rates(optimizer, model)))
    return seen


def stepped(model: nn.Module, optimizer: Optimizer, steps: range) -> Optimizer:
    for step in steps:
        backward(model, step)
        optimizer.step()
    return optimizer
