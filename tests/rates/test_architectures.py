"""Every kind of model and of adapter: all of its tensors' rates against finite differences of its outputs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from hf_flerm import Measurement, measure_rates
from tests.shared.adapters import ADAPTERS
from tests.shared.architectures import ARCHITECTURES, Architecture, seeded
from tests.shared.reference import Change, finite_difference, finite_differences, joint_error

CASES = ARCHITECTURES | ADAPTERS
PROBES = 100
ROUND_OFF = 1e-5  # of float32, relative to the largest rate


def build(name: str) -> Architecture:
    torch.manual_seed(0)
    return CASES[name]()


case = cache(build)


@cache
def changes(name: str) -> dict[str, Change]:
    """The reference: `{canonical name: D f}`."""
    made = case(name)
    found = finite_differences(made.model, made.updates, made.batches, made.output)
    return {canonical(raw): change for raw, change in found.items()}


def canonical(name: str) -> str:
    """PEFT's name without its adapter."""
    return name.replace(".default", "")


def measure(made: Architecture, estimator: str, probes: int = 1) -> Measurement:
    return measure_rates(
        made.model,
        made.updates,
        made.batches,
        estimator=estimator,
        probes_per_batch=probes,
        output=made.output,
        generator=seeded(0),
    )


def joint(expected: dict[str, Change], names: Iterable[str]) -> Change:
    """The change along the updates of several tensors at once, which is first-order."""
    first = next(iter(expected.values()))
    values = sum((expected[name].values for name in names), torch.zeros_like(first.values))
    return Change(values, first.examples, first.batches)


def snapshot(model: nn.Module) -> dict[str, tuple[Tensor, bool, bool]]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (tensor.clone(), tensor.requires_grad, tensor.grad is None) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", CASES)
def test_exact_is_the_derivative(name: str) -> None:
    made, expected = case(name), changes(name)
    result = measure(made, "exact")
    assert set(result.rates) == set(expected)
    largest = max(change.rate for change in expected.values())
    for tensor, change in expected.items():
        without_effect = any(pattern in tensor for pattern in made.without_effect)
        assert (change.rate < 1e-8 * largest) == without_effect, (tensor, change.rate)
        assert result.rates[tensor] == pytest.approx(change.rate, rel=made.precision, abs=ROUND_OFF * largest), tensor
    everything = finite_difference(made.model, made.updates, made.batches, made.output)
    assert result.total == pytest.approx(everything.rate, rel=made.precision)


@pytest.mark.parametrize("name", CASES)
def test_per_example_is_unbiased(name: str) -> None:
    made, expected = case(name), changes(name)
    result = measure(made, "per_example", PROBES)
    assert result.estimators == {
        tensor: next((to for pattern, to in made.estimators.items() if pattern in tensor), "per_example")
        for tensor in expected
    }
    floor = ROUND_OFF * max(change.rate for change in expected.values())
    gated = [tensor for tensor, estimator in result.estimators.items() if estimator == "per_example"]
    for tensor in gated:
        change = expected[tensor]
        error = change.error("per_example", PROBES)
        assert abs(result.rates[tensor] - change.rate) <= 4 * error + floor, (tensor, result.rates[tensor], change.rate)
    by_example, by_gradient = joint(expected, gated), joint(expected, expected.keys() - set(gated))
    error = joint_error(by_example, by_gradient, PROBES)
    assert abs(result.total - joint(expected, expected).rate) <= 4 * error


@pytest.mark.parametrize("name", CASES)
def test_measuring_leaves_no_trace(name: str) -> None:
    made = build(name)  # the first measurement of a model is the one that could do something to it
    if made.output is not None:
        made.output(made.model, made.batches[0])  # transformers leaves hooks of its own when asked for hidden states
    made.model.train()
    before, hooks = snapshot(made.model), count_hooks(made.model)
    measure(made, "per_example")
    assert all(module.training for module in made.model.modules())
    assert count_hooks(made.model) == hooks
    after = snapshot(made.model)
    assert before.keys() == after.keys()
    for tensor, (value, *state) in after.items():
        assert torch.equal(value, before[tensor][0]), tensor
        assert state == list(before[tensor][1:]), tensor


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
