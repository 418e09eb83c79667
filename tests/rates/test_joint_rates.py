"""Joint rates and interactions, against finite differences of joint updates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_flerm.rates.outputs import MeasuredOutput
from hf_flerm.rates.probe import RateProbe
from tests.shared.cases import canonical, case, changes, features, seeded
from tests.shared.reference import Batch, finite_difference


def joint(name: str, tensors: list[str]) -> float:
    made = case(name)
    moved = {raw: update for raw, update in made.updates.items() if canonical(raw) in tensors}
    assert len(moved) == len(tensors)
    return finite_difference(made.model, moved, made.batches, made.output).rate


def inner_products(name: str) -> Tensor:
    values = torch.stack([change.values for change in changes(name).values()])
    return values @ values.T / values.shape[1]


JOINT = ["every kind", "gpt2, tied, left padding", "llama lora_bias"]


@pytest.mark.parametrize("name", JOINT)
def test_exact_joint_rates(name: str) -> None:
    result = case(name).measure("exact")
    tensors = list(result.rates)
    assert result.total == pytest.approx(joint(name, tensors), rel=1e-4)
    for group in (tensors[:2], tensors[1::3], tensors[-1:]):
        assert result.group_rate(group) == pytest.approx(joint(name, group), rel=1e-4)
    names, inner = result.interactions()
    assert names == list(changes(name))
    expected = inner_products(name)
    assert inner.dtype == torch.float64
    assert (inner - expected).abs().max() < 1e-4 * expected.diagonal().max()


@pytest.mark.parametrize(
    ("name", "estimator"),
    [*((name, "per_example") for name in JOINT), (JOINT[0], "full"), (JOINT[0], "kronecker"), (JOINT[2], "kronecker")],
)
def test_estimated_joint_rates(name: str, estimator: str) -> None:
    # M * rate^2 of a group is unbiased: its mean over repetitions must meet the finite difference of the joint update.
    repetitions, probes = 20, 6
    made = case(name)
    probe = RateProbe(made.model, estimator=estimator, probes_per_batch=probes, output=MeasuredOutput(made.output))
    results = [probe.measure(made.updates, made.batches, seeded(seed)) for seed in range(repetitions)]
    tensors = list(results[0].rates)
    for group in (tensors, tensors[:2], tensors[1::3]):
        squares = torch.tensor([result.group_rate(group) ** 2 for result in results])
        error = squares.std() / repetitions**0.5
        assert abs(squares.mean() - joint(name, group) ** 2) < 4 * error
        assert error < 0.25 * squares.mean()
    assert results[0].total == results[0].group_rate(tensors)
    inner = torch.stack([result.interactions()[1] for result in results])
    errors = inner.std(0) / repetitions**0.5
    # The number of pairs reaches 600: a bound of 5 where one number has 4.
    assert ((inner.mean(0) - inner_products(name)).abs() <= 5 * errors + 1e-12).all()


@pytest.mark.parametrize("estimator", ["per_example", "full", "exact"])
def test_squared_rates_are_on_the_diagonal(estimator: str) -> None:
    result = case("every kind").measure(estimator, probes=3)
    names, inner = result.interactions()
    torch.testing.assert_close(inner.diagonal().sqrt(), torch.tensor(list(result.rates.values()), dtype=torch.float64))
    for name in names:
        assert result.group_rate([name]) == pytest.approx(result.rates[name])


def test_joint_rates_of_tensors_with_different_estimators() -> None:
    # The head's input is detached from the batch's mixing, which only the body's weight gradient can follow.
    torch.manual_seed(0)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    def output(model: nn.Module, batch: Batch) -> Tensor:
        a, b = model(**batch)
        return (a - a.mean(0)) + b

    model, batch = Half(), features(3, 5, 4)
    updates = {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(4, 4)}
    joint_rate = finite_difference(model, updates, [batch], output).rate
    probe = RateProbe(model, probes_per_batch=10, output=MeasuredOutput(output))
    results = [probe.measure(updates, [batch], seeded(seed)) for seed in range(40)]
    assert results[0].estimators == {"a.weight": "kronecker", "b.weight": "per_example"}
    squares = torch.tensor([result.total**2 for result in results])
    assert abs(squares.mean() - joint_rate**2) < 4 * squares.std() / len(squares) ** 0.5
