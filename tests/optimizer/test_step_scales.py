"""Scales around the step, on optimizers and schedulers that somebody else made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from transformers.optimization import Adafactor, GreedyLR

from hf_flerm.engines.zero_groups import group_per_tensor
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.step_scales import StepScales
from tests.shared.optimizers import NAMES, OPTIMIZERS, backward, bits, net, rates, sgd, spy, stepped, two_groups
from tests.shared.training import assert_identical

SCALES = {"0.weight": 2.0, "0.bias": 0.5, "1.weight": 3.0}


def scale(optimizer: Optimizer, model: nn.Module, scales: Mapping[str, float]) -> StepScales:
    step_scales = StepScales(optimizer, trainable_parameters(model))
    step_scales.scales = dict(scales)
    return step_scales


@pytest.fixture(params=[False, True], ids=["two groups", "a group for each"])
def split(request: pytest.FixtureRequest) -> Callable[[Optimizer], None]:
    """Users may have one group for every tensor."""
    return group_per_tensor if request.param else lambda optimizer: None


Split = Callable[[Optimizer], None]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scales", [{}, dict.fromkeys(NAMES, 1.0)], ids=["none", "ones"])
def test_scales_of_one_change_no_bit(name: str, scales: Mapping[str, float], split: Split) -> None:
    models = net(), net()
    plain, scaled = (OPTIMIZERS[name](model) for model in models)
    split(scaled)
    scale(scaled, models[1], scales)
    stepped(models[0], plain, range(4))
    stepped(models[1], scaled, range(4))
    assert_identical(bits(models[1]), bits(models[0]))
    assert_identical(scaled.state_dict()["state"], plain.state_dict()["state"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaled_step_is_the_step_at_the_scaled_learning_rate(name: str, split: Split) -> None:
    """Bit for bit what the optimizer does when the scale is baked into a group's rate, and out of its decay."""
    models = net(), net()
    baked, scaled = (OPTIMIZERS[name](model) for model in models)
    group_per_tensor(baked)
    names = {id(parameter): name for name, parameter in trainable_parameters(models[0]).items()}
    for group in baked.param_groups:
        factor = SCALES.get(names[id(group["params"][0])], 1.0)
        group["lr"] *= factor
        if isinstance(baked, (AdamW, Adafactor)):
            group["weight_decay"] /= factor
    split(scaled)
    scale(scaled, models[1], SCALES)
    stepped(models[0], baked, range(3))
    stepped(models[1], scaled, range(3))
    assert_identical(bits(models[1]), bits(models[0]))
    assert_identical(scaled.state_dict()["state"], baked.state_dict()["state"])


def test_scales_stand_in_the_groups_during_a_step_only(split: Split) -> None:
    model = net()
    optimizer = sgd(model)
    split(optimizer)
    groups = list(optimizer.param_groups)
    content = [dict(group) for group in groups]
    nominal = rates(optimizer, model)
    scales = scale(optimizer, model, SCALES)
    seen = spy(optimizer, model)
    optimizer.step()
    scales.scales = {"1.bias": 4.0}
    optimizer.step()
    scales.remove()
    optimizer.step()
    assert seen == [
        {"0.weight": 1.0, "0.bias": 0.125, "1.weight": 1.5, "1.bias": 0.25},
        {**nominal, "1.bias": 1.0},
        nominal,
    ]
    assert all(left is right for left, right in zip(optimizer.param_groups, groups, strict=True))
    assert_identical([dict(group) for group in groups], content)


def sequential(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    parts: list[lr_scheduler.LRScheduler] = [
        lr_scheduler.LinearLR(optimizer, 0.25, total_iters=2),
        lr_scheduler.ExponentialLR(optimizer, 0.5),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


def chained(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.75)]
    )


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1 / (step + 1), lambda step: 1 / (step + 2)]),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda step: 0.5, lambda step: 0.75]),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, [1.0, 2.0], total_steps=8),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, [0.1, 0.2], [1.0, 2.0], step_size_up=2),
    "sequential": sequential,
    "chained": chained,
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, min_lr=[0.2, 0.01]),
    "greedy": lambda o: GreedyLR(o, factor=0.5, patience=0, min_lr=[0.2, 0.01], max_lr=[0.6, 2.0], reset_start=1),
}


@pytest.mark.parametrize(
    ("name", "metrics"),
    [*((name, [1.0] * 6) for name in SCHEDULERS), ("greedy", [6.0, 5.0, 4.0, 3.0, 2.0, 1.0])],
    ids=[*SCHEDULERS, "greedy-improving"],
)
def test_a_scheduler_that_is_there_already_notices_nothing(name: str, metrics: list[float]) -> None:
    """Scales come after two of its steps; outside of steps every rate is what an unscaled twin has."""
    models = net(), net()
    optimizers = [sgd(model) for model in models]
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in optimizers]
    nominal, actual = spy(optimizers[0], models[0]), []
    trajectory = []
    for step, metric in enumerate(metrics):
        if step == 2:
            scale(optimizers[1], models[1], SCALES)
            actual = spy(optimizers[1], models[1])
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step(*[metric] if name in ("plateau", "greedy") else [])
        expected = rates(optimizers[0], models[0])
        assert rates(optimizers[1], models[1]) == expected
        assert schedulers[1].get_last_lr() == schedulers[0].get_last_lr()
        trajectory.append(tuple(expected.values()))
    assert len(set(trajectory)) > 1
    assert actual == [{n: rate * SCALES.get(n, 1.0) for n, rate in step.items()} for step in nominal[2:]]


def test_scales_follow_a_schedule(split: Split) -> None:
    model = net()
    optimizer = sgd(model)
    split(optimizer)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    scale(optimizer, model, {"0.weight": 3.0})
    seen = spy(optimizer, model)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert [step["0.weight"] for step in seen] == [1.5, 0.75, 0.375]
    assert [step["1.weight"] for step in seen] == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("then", ["remove", "step"])
def test_a_step_that_raises_leaves_no_scale_behind(then: str, split: Split) -> None:
    model = net()
    optimizer = sgd(model)
    split(optimizer)
    groups, nominal = list(optimizer.param_groups), rates(optimizer, model)
    scales = scale(optimizer, model, SCALES)
    seen = spy(optimizer, model)

    def broken() -> float:
        raise RuntimeError("broken closure")

    with pytest.raises(RuntimeError, match="broken closure"):
        optimizer.step(broken)
    if then == "remove":
        scales.remove()
    else:
        optimizer.step()
        assert seen[0] == seen[1]
    assert rates(optimizer, model) == nominal
    assert all(left is right for left, right in zip(optimizer.param_groups, groups, strict=True))


def test_scales_survive_groups_that_were_replaced(split: Split) -> None:
    model = net()
    optimizer = sgd(model)
    split(optimizer)
    scale(optimizer, model, SCALES)
    nominal = rates(optimizer, model)
    optimizer.load_state_dict(optimizer.state_dict())
    seen = spy(optimizer, model)
    optimizer.step()
    assert seen == [{name: rate * SCALES.get(name, 1.0) for name, rate in nominal.items()}]
    assert rates(optimizer, model) == nominal


def test_scales_go_by_name_where_groups_step_one_at_a_time(split: Split) -> None:
    """ZeRO 1 and 2 step the optimizer once per group, with `param_groups` cut to that one."""
    model = net()
    optimizer = sgd(model)
    split(optimizer)
    nominal = rates(optimizer, model)
    scale(optimizer, model, SCALES)
    names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
    seen: dict[str, float] = {}

    def write(*_: Any) -> None:
        seen.update({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})

    optimizer.register_step_pre_hook(write)
    groups = optimizer.param_groups
    for group in groups:
        optimizer.param_groups = [group]
        optimizer.step()
        assert optimizer.param_groups == [group]
    optimizer.param_groups = groups
    assert seen == {name: rate * SCALES.get(name, 1.0) for name, rate in nominal.items()}
    assert rates(optimizer, model) == nominal


def test_learning_rates_that_are_tensors_are_scaled_one_by_one(split: Split) -> None:
    """`lr=torch.tensor(...)` is one tensor that all of an optimizer's groups share."""
    model = net()
    optimizer = AdamW(list(model.parameters()), lr=torch.tensor(0.5), foreach=False)
    split(optimizer)
    scale(optimizer, model, SCALES)
    seen = spy(optimizer, model)
    for _ in range(2):
        backward(model)
        optimizer.step()
        assert rates(optimizer, model) == dict.fromkeys(NAMES, 0.5)
    assert seen == [{name: 0.5 * SCALES.get(name, 1.0) for name in NAMES}] * 2
    assert all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)


def test_tensor_learning_rates_of_split_groups_are_their_own() -> None:
    """A schedule that fills one group's tensor must not change the others'."""
    model = net()
    optimizer = AdamW(list(model.parameters()), lr=torch.tensor(0.5), foreach=False)
    group_per_tensor(optimizer)
    optimizer.param_groups[0]["lr"].fill_(2.0)
    assert rates(optimizer, model) == {**dict.fromkeys(NAMES, 0.5), NAMES[0]: 2.0}


class Counting(AdamW):
    """Keeps a count in its groups, as schedule-free optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        return super().step(closure)


def test_what_an_optimizer_keeps_in_its_groups_stays_there(split: Split) -> None:
    model = net()
    optimizer = Counting(two_groups(model), lr=0.5)
    split(optimizer)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    scale(optimizer, model, SCALES)
    for _ in range(3):
        optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == decays, "a part's decay must stay its own"
    assert [group["count"] for group in optimizer.param_groups] == [3] * len(optimizer.param_groups)


def test_without_a_learning_rate_there_is_nothing_to_scale() -> None:
    """Adafactor with `relative_step` sets its own."""
    model = net()
    optimizer = Adafactor(list(model.parameters()), lr=None, relative_step=True)
    with pytest.raises(ValueError, match=r"no learning rate for \[0.bias, 0.weight, 1.bias, 1.weight\]"):
        rates(optimizer, model)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.RMSprop], ids=lambda make: make.__name__)
def test_changes_between_steps_reach_the_tensors_that_they_are_for(make: Any) -> None:
    """Learning rates, options, groups and scales may be others in every step."""
    names = ["h.0.w", "h.1.w", "h.2.w", "h.3.w"]
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(3, generator=generator) for name in names}
    ours = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    theirs = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = make(ours.values(), lr=0.1, weight_decay=0.1)
    group_per_tensor(optimizer)
    scaling = StepScales(optimizer, ours)
    scales = {"h.0.w": 2.0, "h.1.w": 2.0, "h.2.w": 0.5}
    by_hand = make([{"params": [parameter]} for parameter in theirs.values()], lr=0.1, weight_decay=0.1)
    apart = make is AdamW

    def change_weight_decay() -> None:
        for each in (optimizer, by_hand):
            each.param_groups[1]["weight_decay"] = 0.7

    def change_learning_rate() -> None:
        for each in (optimizer, by_hand):
            each.param_groups[0]["lr"] = 0.03

    def schedule() -> None:
        for each in (optimizer, by_hand):
            for group in each.param_groups:
                group["lr"] = 0.5 * group["lr"]

    def load() -> None:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def change_scales() -> None:
        scales["h.1.w"] = 3.0

    def nothing() -> None:
        pass

    before = [nothing, nothing, schedule, load, nothing]
    for change in [*before, change_learning_rate, nothing, change_weight_decay, schedule, change_scales, nothing]:
        change()
        if scaling.scales != scales:
            scaling.scales = dict(scales)
        for name in names:
            gradient = torch.randn(3, generator=generator)
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        nominal = [(group["lr"], group["weight_decay"]) for group in by_hand.param_groups]
        for group, name in zip(by_hand.param_groups, names, strict=True):
            group["lr"] = group["lr"] * scales.get(name, 1.0)
            group["weight_decay"] = group["weight_decay"] / (scales.get(name, 1.0) if apart else 1.0)
        optimizer.step()
        by_hand.step()
        for group, (rate, decay) in zip(by_hand.param_groups, nominal, strict=True):
            group["lr"], group["weight_decay"] = rate, decay
        for name in names:
            assert torch.equal(ours[name], theirs[name]), (name, change.__name__)


def test_tensors_that_join_and_leave_a_group_between_steps() -> None:
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("a", "b", "c")}
    optimizer = SGD([parameters["a"], parameters["b"]], lr=1.0)
    scaling = StepScales(optimizer, parameters)
    scaling.scales = {"a": 2.0, "b": 3.0, "c": 5.0}
    for parameter in parameters.values():
        parameter.grad = torch.ones(2)
    optimizer.step()
    optimizer.param_groups[0]["params"].append(parameters["c"])
    del optimizer.param_groups[0]["params"][0]
    optimizer.step()
    assert {name: parameter[0].item() for name, parameter in parameters.items()} == {"a": -1.0, "b": -5.0, "c": -4.0}
