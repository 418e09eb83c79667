"""Scales act on whatever really steps: optimizers inside others, and optimizers that do not read their groups."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.behavior import check_optimizer, weight_decays
from hf_flerm.optimizer.param_groups import learning_rates, stepping_optimizers
from hf_flerm.optimizer.step_scales import StepScales
from tests.shared.optimizers import backward, bits, net
from tests.shared.processes import launch
from tests.shared.training import assert_identical
from tests.shared.wrapped_optimizers import NOT_READ, READ, Groups, Lookahead, Pair, PairByProperty

SCALES = {"0.weight": 2.0, "0.bias": 0.5, "1.weight": 3.0}
LR = {2: 0.03, 1: 0.05}  # by the dimensions of a tensor


def groups_of(model: nn.Module, scales: Mapping[str, float] | None = None) -> Groups:
    """A group for matrices and one for vectors; with scales one for each tensor, in whose learning rate they are."""
    parameters = trainable_parameters(model)
    if scales is None:
        return [{"params": [p for p in parameters.values() if p.ndim == n], "lr": rate} for n, rate in LR.items()]
    return [{"params": [p], "lr": LR[p.ndim] * scales.get(name, 1.0)} for name, p in parameters.items()]


def run(model: nn.Module, optimizer: Optimizer, steps: int = 4) -> list[dict[str, torch.Tensor]]:
    weights = []
    for seed in range(steps):
        backward(model, seed)

        def closure(seed: int = seed) -> None:
            backward(model, seed)

        optimizer.step(closure)  # type: ignore[arg-type]
        weights.append(bits(model))
    return weights


@pytest.mark.parametrize("name", [*READ, *NOT_READ])
def test_scales_of_one_change_no_bit(name: str) -> None:
    make = (READ | NOT_READ)[name]
    plain, ours = net(), net()
    optimizer = make(groups_of(ours))
    groups = list(optimizer.param_groups)
    StepScales(optimizer, trainable_parameters(ours))
    assert_identical(run(ours, optimizer), run(plain, make(groups_of(plain))))
    assert all(left is right for left, right in zip(optimizer.param_groups, groups, strict=True))


@pytest.mark.parametrize("name", READ)
def test_inner_steps_are_those_at_the_scaled_learning_rates(name: str, warnings_of: Callable[[], list[str]]) -> None:
    baked, ours = net(), net()
    expected = run(baked, READ[name](groups_of(baked, SCALES)))
    optimizer = READ[name](groups_of(ours))
    StepScales(optimizer, trainable_parameters(ours)).scales = SCALES
    assert_identical(run(ours, optimizer), expected)
    assert [group["lr"] for group in optimizer.param_groups] == list(LR.values())
    assert warnings_of() == []


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_is_scaled_by_its_movement(name: str, warnings_of: Callable[[], list[str]]) -> None:
    baked, ours = net(), net()
    expected = run(baked, NOT_READ[name](groups_of(baked, SCALES)))
    optimizer = NOT_READ[name](groups_of(ours))
    StepScales(optimizer, trainable_parameters(ours)).scales = SCALES
    for actual, wanted in zip(run(ours, optimizer), expected, strict=True):
        for key in wanted:
            torch.testing.assert_close(actual[key], wanted[key], rtol=1e-5, atol=1e-6)
    (warning,) = warnings_of()
    assert f"the step of {type(optimizer).__name__} does not read the learning rates of" in warning


def test_scales_that_come_later_and_change_act_as_well() -> None:
    for make in (READ["Muon and AdamW"], NOT_READ["flat"]):
        model = net()
        optimizer = make(groups_of(model))
        scaling = StepScales(optimizer, trainable_parameters(model))
        run(model, optimizer, 1)
        for scales in (SCALES, {"1.bias": 4.0}):
            twin = net()
            twin.load_state_dict(model.state_dict())
            scaling.scales = scales
            before = bits(model)
            moved = run(model, optimizer, 1)[0]["1.bias"] - before["1.bias"]
            if make is NOT_READ["flat"]:
                unscaled = run(twin, make(groups_of(twin)), 1)[0]["1.bias"] - before["1.bias"]
                torch.testing.assert_close(moved, unscaled * scales.get("1.bias", 1.0))
            assert moved.any()


class HiddenAdamW(AdamW):
    """Decays apart, by an optimizer that nobody finds."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.125, weight_decay=0.5)
        inner = AdamW(self.param_groups, lr=0.0)
        self.run = lambda: inner.step()

    def step(self, closure: Any = None) -> Any:
        self.run()


def test_a_tensor_without_a_gradient_has_no_movement_to_scale() -> None:
    """It did not decay either."""
    model = net()
    optimizer = HiddenAdamW(model.parameters())
    StepScales(optimizer, trainable_parameters(model)).scales = SCALES
    backward(model)
    optimizer.step()
    for idle in SCALES:
        before = bits(model)
        backward(model)
        model.get_parameter(idle).grad = None
        optimizer.step()
        after = bits(model)
        assert torch.equal(after[idle], before[idle])
        assert not any(torch.equal(after[name], before[name]) for name in after if name != idle)


def test_a_step_by_an_inner_optimizer_alone_is_scaled() -> None:
    """SAM's second step, called by itself."""
    model = net()
    optimizer: Any = READ["SAM"](groups_of(model))
    StepScales(optimizer, trainable_parameters(model)).scales = SCALES
    before = bits(model)
    backward(model)
    optimizer.base.step()
    for name, parameter in model.named_parameters():
        rate = LR[parameter.ndim] * SCALES.get(name, 1.0)
        torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad)


def test_every_tensor_is_stepped_by_the_innermost_optimizer() -> None:
    model = net()
    pair: Any = READ["pair of pairs"](groups_of(model))
    muon, adamw = pair.optimizers[0].optimizers
    ids = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert stepping_optimizers(pair) == {
        muon: {ids["0.weight"], ids["1.weight"]},
        adamw: {ids["0.bias"], ids["1.bias"]},
    }


class Synced(Pair):
    """Has groups of its own, and gives the others their learning rates before they step."""

    def __init__(self, optimizers: Any) -> None:
        super().__init__(optimizers)
        self.param_groups = [dict(group) for group in self.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        inner = [group for each in self.optimizers for group in each.param_groups]
        for group, own in zip(inner, self.param_groups, strict=True):
            group["lr"] = own["lr"]
        super().step()


def test_learning_rates_and_decays_are_those_of_the_optimizer_that_steps() -> None:
    model = net()
    parameters = trainable_parameters(model)
    sgd = SGD([parameters["0.weight"], parameters["1.weight"]], lr=0.5, weight_decay=0.1)
    adamw = AdamW([parameters["0.bias"], parameters["1.bias"]], lr=0.25, weight_decay=0.2)
    pair = Synced([sgd, adamw])
    pair.param_groups[1]["lr"] = 0.125
    StepScales(pair, parameters).scales = {"0.bias": 2.0}
    backward(model)
    before = bits(model)
    pair.step()
    assert learning_rates(pair, parameters) == {"0.weight": 0.5, "0.bias": 0.125, "1.weight": 0.5, "1.bias": 0.125}
    decays = weight_decays(pair, parameters)
    assert decays == {"0.weight": 0.0, "0.bias": 0.2, "1.weight": 0.0, "1.bias": 0.2}
    for name, scale in (("0.bias", 2.0), ("1.bias", 1.0)):  # Adam's first update is a sign
        decayed = before[name] * (1 - 0.125 * 0.2)
        expected = decayed - 0.125 * scale * parameters[name].grad.sign()
        torch.testing.assert_close(parameters[name].detach(), expected, rtol=1e-4, atol=1e-5)


# --- what is refused ----------------------------------------------------------------------------------------------


class Deaf(Optimizer):
    """Steps by itself and does not call `Optimizer.__init__`."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]
        self.defaults = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


@pytest.mark.parametrize("wrap", [lambda deaf: deaf, lambda deaf: PairByProperty([deaf])], ids=["alone", "inside"])
def test_an_optimizer_without_hooks_is_refused(wrap: Callable[[Optimizer], Optimizer]) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"does not call the step hooks.*super\(\)\.__init__.*or match with AdamW"):
        StepScales(wrap(Deaf(model.parameters())), trainable_parameters(model))


def test_an_optimizer_without_hooks_inside_one_with_hooks_is_scaled_by_its_movement() -> None:
    model = net()
    pair = Pair([Deaf(model.parameters())])
    StepScales(pair, trainable_parameters(model)).scales = SCALES
    before = bits(model)
    backward(model)
    pair.step()
    for name, parameter in model.named_parameters():
        moved = -0.1 * SCALES.get(name, 1.0) * parameter.grad
        torch.testing.assert_close(parameter.detach() - before[name], moved, rtol=1e-5, atol=1e-7)


def test_an_optimizer_is_refused_for_what_is_inside_it() -> None:
    model = net()
    pair = Pair([SGD([model.get_parameter("0.weight")], lr=0.1), torch.optim.Rprop([model.get_parameter("0.bias")])])
    with pytest.raises(ValueError, match="the update of Rprop is not linear"):
        check_optimizer(pair, "match")


def test_lookahead_is_not_linear() -> None:
    moved = []
    for rate in (0.01, 0.02):
        model = net()
        optimizer = Lookahead(SGD(model.parameters(), lr=0.01))
        check_optimizer(optimizer, "record")
        with pytest.raises(ValueError, match=r"the update of Lookahead is not linear .* the optimizer that it wraps"):
            check_optimizer(optimizer, "match")
        run(model, optimizer, 1)
        optimizer.param_groups[0]["lr"] = rate
        before = bits(model)["0.weight"]
        moved.append(run(model, optimizer, 1)[0]["0.weight"] - before)
    assert (moved[1] - 2 * moved[0]).norm() > 0.1 * moved[0].norm()


def redundant() -> str:
    redundancy = importlib.import_module("torch.distributed.optim").ZeroRedundancyOptimizer  # warns of torch.jit
    optimizer = redundancy(net().parameters(), AdamW, lr=0.1)
    check_optimizer(optimizer, "record")
    with pytest.raises(ValueError) as caught:  # noqa: PT011, what it says is checked below
        check_optimizer(optimizer, "match")
    return str(caught.value)


def test_an_optimizer_that_steps_a_part_on_every_process_is_refused(tmp_path: Path) -> None:
    (message,) = launch(redundant, 1, tmp_path)
    assert message.startswith(
        "ZeroRedundancyOptimizer cannot use a different learning rate for each tensor: each process"
    )
