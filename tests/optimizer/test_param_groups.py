"""One param group per tensor, on optimizers that somebody else made: order, options and state are kept."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.param_groups import learning_rates, raw_optimizer, split_param_groups
from hf_flerm.optimizer.step_scales import StepScales
from tests.shared.optimizers import NAMES, OPTIMIZERS, ORDER, backward, bits, net, rates, sgd, stepped, two_groups
from tests.shared.training import assert_identical


def test_unwraps_what_wraps_an_optimizer() -> None:
    optimizer = sgd(net())
    assert raw_optimizer(optimizer) is optimizer
    assert raw_optimizer(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))) is optimizer


@pytest.mark.parametrize("what", [None, object(), SimpleNamespace(optimizer=None)])
def test_refuses_what_is_no_optimizer(what: Any) -> None:
    with pytest.raises(ValueError, match=f"{type(what).__name__} is not a torch optimizer"):
        raw_optimizer(what)


def test_reads_the_learning_rate_of_every_tensor() -> None:
    model = net()
    assert rates(sgd(model), model) == {"0.weight": 0.5, "0.bias": 0.25, "1.weight": 0.5, "1.bias": 0.25}


@pytest.mark.parametrize("function", [learning_rates, split_param_groups])
def test_names_the_parameters_that_the_optimizer_lacks(function: Callable[..., Any]) -> None:
    model = net()
    optimizer = SGD([model.get_parameter("0.weight"), model.get_parameter("1.bias")], lr=1.0)
    with pytest.raises(ValueError, match=r"SGD does not hold the trainable parameters \[0.bias, 1.weight\]"):
        function(optimizer, trainable_parameters(model))
    assert len(optimizer.param_groups) == 1


def test_a_split_keeps_order_options_and_state() -> None:
    model = net()
    optimizer = sgd(model)
    backward(model)
    optimizer.step()
    before = optimizer.state_dict()
    split_param_groups(optimizer, trainable_parameters(model))
    assert [group["flerm_name"] for group in optimizer.param_groups] == ORDER
    parameters = trainable_parameters(model)
    for group in optimizer.param_groups:
        assert len(group["params"]) == 1
        assert group["params"][0] is parameters[group["flerm_name"]]
        parent = before["param_groups"][0 if group["params"][0].ndim > 1 else 1]
        assert {**group, "params": 0} == {**parent, "params": 0, "flerm_name": group["flerm_name"]}
    assert_identical(optimizer.state_dict()["state"], before["state"])


def test_a_second_split_changes_nothing() -> None:
    model = net()
    optimizer = sgd(model)
    split_param_groups(optimizer, trainable_parameters(model))
    groups = list(optimizer.param_groups)
    split_param_groups(optimizer, trainable_parameters(model))
    assert len(optimizer.param_groups) == len(groups)
    assert all(left is right for left, right in zip(optimizer.param_groups, groups, strict=True))
    assert [group["flerm_names"] for group in optimizer.state_dict()["param_groups"]] == [ORDER[:2], ORDER[2:]]


def test_frozen_tensors_in_the_optimizer_keep_groups_of_their_own() -> None:
    model = net()
    optimizer = sgd(model)
    for name in ("0.weight", "0.bias"):
        model.get_parameter(name).requires_grad_(False)
    parameters = trainable_parameters(model)
    split_param_groups(optimizer, parameters)
    names = [group["flerm_name"] for group in optimizer.param_groups]
    assert {"1.weight", "1.bias"} < set(names)
    assert len(names) == len(set(names)) == 4
    StepScales(optimizer, parameters).scales = {"1.weight": 2.0}
    backward(model)
    before = bits(model)
    optimizer.step()
    after = bits(model)
    assert [name for name in NAMES if not torch.equal(before[name], after[name])] == ["1.weight", "1.bias"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_split_optimizer_saves_what_a_plain_one_saves(name: str) -> None:
    plain, split = net(), net()
    expected = stepped(plain, OPTIMIZERS[name](plain), range(2)).state_dict()
    optimizer = OPTIMIZERS[name](split)
    split_param_groups(optimizer, trainable_parameters(split))
    actual = stepped(split, optimizer, range(2)).state_dict()
    assert [group.pop("flerm_names") for group in actual["param_groups"]] == [ORDER[:2], ORDER[2:]]
    assert_identical(actual, expected)
    assert [group["flerm_name"] for group in optimizer.param_groups] == ORDER, "saving must not join the groups"


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("saved_split", [False, True], ids=["saved plain", "saved split"])
@pytest.mark.parametrize("loaded_split", [False, True], ids=["loaded plain", "loaded split"])
def test_split_and_plain_optimizers_read_each_others_state(name: str, saved_split: bool, loaded_split: bool) -> None:
    whole = net()
    stepped(whole, OPTIMIZERS[name](whole), range(5))
    model = net()
    first = OPTIMIZERS[name](model)
    if saved_split:
        split_param_groups(first, trainable_parameters(model))
    saved = stepped(model, first, range(3)).state_dict()
    second = OPTIMIZERS[name](model)
    if loaded_split:
        split_param_groups(second, trainable_parameters(model))
    for group in second.param_groups:
        group["lr"] = 123.0  # what was saved must win
    second.load_state_dict(saved)
    assert rates(second, model) == rates(first, model)
    stepped(model, second, range(3, 5))
    assert_identical(bits(model), bits(whole))
    if loaded_split:
        assert [group["flerm_name"] for group in second.param_groups] == ORDER


@pytest.mark.parametrize("empty_first", [True, False])
def test_an_empty_group_is_there_again_in_the_state(empty_first: bool) -> None:
    """LoRA leaves the Trainer's group without weight decay empty."""

    def two(model: nn.Module) -> SGD:
        full: dict[str, Any] = {"params": list(model.parameters()), "lr": 0.5}
        empty: dict[str, Any] = {"params": [], "lr": 0.125}
        return SGD([empty, full] if empty_first else [full, empty], lr=1.0)

    model = net()
    optimizer = two(model)
    split_param_groups(optimizer, trainable_parameters(model))
    assert [group["flerm_name"] for group in optimizer.param_groups] == NAMES
    assert rates(optimizer, model) == dict.fromkeys(NAMES, 0.5)
    saved = optimizer.state_dict()
    sizes = [0, 4] if empty_first else [4, 0]
    assert [len(group["params"]) for group in saved["param_groups"]] == sizes
    plain = two(model)
    plain.load_state_dict(saved)
    assert rates(plain, model) == dict.fromkeys(NAMES, 0.5)
    optimizer.load_state_dict(saved)
    assert [group["flerm_name"] for group in optimizer.param_groups] == NAMES


def test_the_state_of_other_tensors_is_refused() -> None:
    model, other = net(), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizers = sgd(model), sgd(other)
    for optimizer, its in zip(optimizers, (model, other), strict=True):
        split_param_groups(optimizer, trainable_parameters(its))
    with pytest.raises(ValueError, match=r"\[2\.bias, 2\.weight\]"):
        optimizers[0].load_state_dict(optimizers[1].state_dict())


class LoadsByItself(AdamW):
    """As bitsandbytes' optimizers do: no hook is called."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError("loaded state dict has a different number of parameter groups")


def test_an_optimizer_that_loads_by_itself_keeps_its_groups() -> None:
    model = net()
    optimizer = LoadsByItself(two_groups(model), lr=0.5)
    groups = list(optimizer.param_groups)
    assert split_param_groups(optimizer, trainable_parameters(model)) == []
    assert all(left is right for left, right in zip(optimizer.param_groups, groups, strict=True))
    optimizer.load_state_dict(optimizer.state_dict())
