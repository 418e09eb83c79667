"""Param groups that somebody else made: learning rates, and a group for every tensor where ZeRO needs it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import SGD

from hf_flerm.engines.zero_groups import group_per_tensor
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.param_groups import learning_rates, raw_optimizer
from hf_flerm.optimizer.step_scales import StepScales
from tests.shared.optimizers import NAMES, OPTIMIZERS, ORDER, backward, bits, net, rates, sgd, stepped
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


def test_names_the_parameters_that_the_optimizer_lacks() -> None:
    model = net()
    optimizer = SGD([model.get_parameter("0.weight"), model.get_parameter("1.bias")], lr=1.0)
    with pytest.raises(ValueError, match=r"SGD does not hold the trainable parameters \[0.bias, 1.weight\]"):
        learning_rates(optimizer, trainable_parameters(model))


def test_a_group_for_every_tensor_keeps_order_options_and_state() -> None:
    model = net()
    optimizer = sgd(model)
    backward(model)
    optimizer.step()
    before = optimizer.state_dict()
    group_per_tensor(optimizer)
    parameters = trainable_parameters(model)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(parameters[n]) for n in ORDER]
    for group in optimizer.param_groups:
        parent = before["param_groups"][0 if group["params"][0].ndim > 1 else 1]
        assert {**group, "params": 0} == {**parent, "params": 0}
    assert_identical(optimizer.state_dict()["state"], before["state"])


def test_groups_of_one_tensor_stay() -> None:
    optimizer = sgd(net())
    group_per_tensor(optimizer)
    groups = list(optimizer.param_groups)
    group_per_tensor(optimizer)
    assert all(left is right for left, right in zip(optimizer.param_groups, groups, strict=True))


def test_frozen_tensors_in_the_optimizer_are_not_scaled() -> None:
    model = net()
    optimizer = sgd(model)
    for name in ("0.weight", "0.bias"):
        model.get_parameter(name).requires_grad_(False)
    StepScales(optimizer, trainable_parameters(model)).scales = {"1.weight": 2.0}
    backward(model)
    before = bits(model)
    optimizer.step()
    after = bits(model)
    assert [name for name in NAMES if not torch.equal(before[name], after[name])] == ["1.weight", "1.bias"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaled_optimizer_saves_the_groups_that_a_plain_one_saves(name: str) -> None:
    plain, scaled = net(), net()
    expected = stepped(plain, OPTIMIZERS[name](plain), range(2)).state_dict()
    optimizer = OPTIMIZERS[name](scaled)
    StepScales(optimizer, trainable_parameters(scaled)).scales = {"0.weight": 2.0, "1.bias": 0.5}
    actual = stepped(scaled, optimizer, range(2)).state_dict()
    assert_identical(actual["param_groups"], expected["param_groups"])


def test_an_empty_group_stays() -> None:
    """LoRA leaves the Trainer's group without weight decay empty."""
    model = net()
    optimizer = SGD([{"params": [], "lr": 0.125}, {"params": list(model.parameters()), "lr": 0.5}], lr=1.0)
    groups = list(optimizer.param_groups)
    StepScales(optimizer, trainable_parameters(model)).scales = {"0.weight": 2.0}
    stepped(model, optimizer, range(2))
    assert all(left is right for left, right in zip(optimizer.param_groups, groups, strict=True))
