"""Groups whose values have an entry for every tensor, and optimizers that step tensors together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import nn
from torch.optim import AdamW, Optimizer

from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.behavior import check_optimizer
from hf_flerm.optimizer.step_scales import StepScales
from tests.shared.optimizers import NAMES, backward, bits, net, stepped
from tests.shared.training import assert_identical, gpt2

SCALES = {"0.weight": 2.0, "0.bias": 0.5, "1.weight": 3.0}


class Multiplied(Optimizer):
    """SGD with a factor and a name for every tensor, in a list and in a tuple."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p, name, factor in zip(group["params"], group["tensor_names"], group["factors"], strict=True):
                p.sub_(group["lr"] * factor * p.grad)
                self.state[p]["name"] = name


class Buffered(Optimizer):
    """Keeps momentum in a list in its groups, which it makes in its first step."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if "buffers" not in group:
                group["buffers"] = [torch.zeros_like(p) for p in group["params"]]
            for index, (p, buffer) in enumerate(zip(group["params"], group["buffers"], strict=True)):
                group["buffers"][index] = 0.5 * buffer + p.grad
                p.sub_(group["lr"] * group["buffers"][index])


class Unlisted(Optimizer):
    """Takes all options from its groups and names no defaults, as single-file optimizers of Muon do."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                p.sub_(group["lr"] * (beta1 * p.grad + beta2 * p.grad.sign()))


def multiplied(groups: list[dict[str, Any]]) -> Optimizer:
    for group in groups:
        group["tensor_names"] = [str(p.shape) for p in group["params"]]
        group["factors"] = tuple(float(p.numel()) / 10 for p in group["params"])
    return Multiplied(groups)


def named(groups: list[dict[str, Any]]) -> Optimizer:
    for group in groups:
        group["params"] = [(str(tuple(p.shape)), p) for p in group["params"]]  # which torch makes `param_names` of
    return AdamW(groups, lr=0.1, weight_decay=0.0, betas=(0.5, 0.9))


MAKE: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "multiplied": multiplied,
    "buffered": Buffered,
    "param names": named,
    "option lists": lambda groups: Unlisted([group | {"betas": [0.5, 0.9]} for group in groups]),
    "option tuples": lambda groups: Unlisted([group | {"betas": (0.5, 0.9)} for group in groups]),
}


def groups_of(model: nn.Module, scales: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """Two groups of two tensors; with scales one for each tensor."""
    parameters = trainable_parameters(model)
    if scales is None:
        return [{"params": [parameters[name] for name in names], "lr": 0.1} for names in (NAMES[:2], NAMES[2:])]
    return [{"params": [parameters[name]], "lr": 0.1 * scales.get(name, 1.0)} for name in NAMES]


@pytest.mark.parametrize("name", MAKE)
def test_lists_are_cut_along_with_the_tensors(name: str) -> None:
    plain, baked, ours = net(), net(), net()
    expected_groups = stepped(plain, MAKE[name](groups_of(plain)), range(3)).state_dict()["param_groups"]
    stepped(baked, MAKE[name](groups_of(baked, SCALES)), range(3))
    optimizer = MAKE[name](groups_of(ours))
    StepScales(optimizer, trainable_parameters(ours)).scales = SCALES
    stepped(ours, optimizer, range(3))
    assert_identical(bits(ours), bits(baked))
    groups = optimizer.state_dict()["param_groups"]
    assert [group.keys() for group in groups] == [group.keys() for group in expected_groups]
    for group, expected in zip(groups, expected_groups, strict=True):
        for key in group.keys() - {"buffers"}:
            assert group[key] == expected[key], key
        if "buffers" in group:  # which do not depend on learning rates in the first step
            assert [buffer.shape for buffer in group["buffers"]] == [buffer.shape for buffer in expected["buffers"]]


@pytest.mark.parametrize("name", MAKE)
def test_scales_of_one_change_no_bit(name: str) -> None:
    plain, ours = net(), net()
    expected = stepped(plain, MAKE[name](groups_of(plain)), range(3))
    optimizer = MAKE[name](groups_of(ours))
    StepScales(optimizer, trainable_parameters(ours))
    stepped(ours, optimizer, range(3))
    assert_identical(bits(ours), bits(plain))
    assert_identical(optimizer.state_dict(), expected.state_dict())


def test_what_an_optimizer_writes_into_a_part_reaches_its_tensors() -> None:
    model = net()
    optimizer = Buffered(groups_of(model))
    StepScales(optimizer, trainable_parameters(model)).scales = SCALES
    backward(model)
    optimizer.step()
    for group in optimizer.param_groups:
        for p, buffer in zip(group["params"], group["buffers"], strict=True):
            assert torch.equal(buffer, p.grad)


class Warming(Optimizer):
    """SGD that doubles the learning rate and halves the weight decay of its groups in every step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01, "weight_decay": 0.5})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)
            group["lr"] *= 2
            group["weight_decay"] /= 2


def test_learning_rates_that_an_optimizer_sets_itself_stay_nominal() -> None:
    model = net()
    optimizer = Warming(model.parameters())
    StepScales(optimizer, trainable_parameters(model)).scales = {"0.weight": 4.0}
    stepped(model, optimizer, range(3))
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.08, 0.0625)]


# --- tensors that are stepped together ----------------------------------------------------------------------------


def adapted(rank: int = 4) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    return get_peft_model(gpt2(), config)


def lora_fa(model: Any, **options: Any) -> Optimizer:
    return create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2, **options)


def train(model: nn.Module, optimizer: Optimizer) -> None:
    tokens = torch.arange(16).view(2, 8)
    for _ in range(3):
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lora_fa_is_scaled_pair_by_pair(decay: float) -> None:
    """Every B has a scale of its own, and is stepped with its own A, which is frozen."""
    ours, baked = adapted(), adapted()
    optimizer = lora_fa(ours, weight_decay=decay)
    check_optimizer(optimizer, "match")
    parameters = trainable_parameters(ours)
    assert all("lora_B" in name for name in parameters)
    scales = {name: 2.0 ** (index - 2) for index, name in enumerate(parameters)}
    StepScales(optimizer, parameters).scales = scales
    train(ours, optimizer)

    by_hand = lora_fa(baked, weight_decay=decay)
    (group,) = by_hand.param_groups
    names = [name.replace(".default", "") for name in group["names"]]
    own = [scales.get(name.replace("lora_A", "lora_B"), 1.0) for name in names]
    by_hand.param_groups = [
        group
        | {
            "lr": group["lr"] * scale,
            "weight_decay": group["weight_decay"] / scale,
            **{
                key: [value for value, its in zip(group[key], own, strict=True) if its == scale]
                for key in ("params", "names", "scaling_factors")
            },
        }
        for scale in dict.fromkeys(own)
    ]
    train(baked, by_hand)
    assert_identical(bits(ours), bits(baked))
    moved = [name for name, parameter in parameters.items() if parameter.any()]
    assert moved == list(parameters)
    assert [len(group["names"]) for group in optimizer.param_groups] == [len(list(ours.parameters()))]
