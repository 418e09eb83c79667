"""The slow reference is right by itself, and the fast path gives its numbers for the same omega."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_flerm import measure_rates
from hf_flerm.rates.reference import (
    fisher_rate,
    joint_rate,
    kronecker_rate,
    output_change,
    per_example_derivatives,
    per_example_rate,
    rate,
)
from tests.shared.cases import EveryKind, seeded

EVERYTHING = torch.ones(())


class Narrow(nn.Module):
    """A model with a tensor of every kind, in float64, that puts out the tanh of its logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = EveryKind().double()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids).tanh()


def narrow() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """The model, an update of each of its tensors, and a batch of 3."""
    model = Narrow()
    updates = {
        n: torch.randn(p.shape, generator=seeded(i), dtype=p.dtype) for i, (n, p) in enumerate(model.named_parameters())
    }
    return model, updates, {"input_ids": torch.randint(20, (3, 5), generator=seeded(9))}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_output_change_of_a_linear_map_is_the_map_of_the_update() -> None:
    x, weight, update = (torch.randn(n, 3, generator=seeded(n), dtype=torch.float64) for n in (5, 4, 4))
    change = output_change(lambda: x @ weight.T, {"w": weight}, {"w": update})
    assert torch.allclose(change, x @ update.T, rtol=1e-9)
    assert rate(change, EVERYTHING) == pytest.approx((x @ update.T).square().mean().sqrt().item(), rel=1e-9)


def test_output_change_puts_the_weights_back_to_the_bit() -> None:
    model, updates, batch = narrow()
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    output_change(lambda: model(**batch), weights_of(model), updates)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def test_output_change_is_the_derivative_that_autograd_gives() -> None:
    model, updates, batch = narrow()
    names = list(updates)

    def f(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (), batch)

    derivative = torch.func.jvp(f, tuple(weights_of(model).values()), tuple(updates.values()))[1]
    assert torch.allclose(output_change(lambda: model(**batch), weights_of(model), updates), derivative, atol=1e-6)


def test_only_outputs_that_count_do() -> None:
    change, counts = torch.tensor([[3.0, 4.0], [100.0, 100.0]]), torch.tensor([[1.0], [0.0]])
    assert rate(change, counts) == pytest.approx(12.5**0.5)


def test_fisher_rate_is_the_divergence_of_a_small_step() -> None:
    logits, change = (torch.randn(4, 6, generator=seeded(seed), dtype=torch.float64) for seed in range(2))
    step = 1e-4
    before, after = logits.log_softmax(-1), (logits + step * change).log_softmax(-1)
    divergence = F.kl_div(after, before, log_target=True, reduction="batchmean").item()
    assert fisher_rate(change, EVERYTHING, logits) ** 2 * step**2 / 2 == pytest.approx(divergence, rel=1e-3)


def test_a_probe_is_the_change_weighted_by_omega() -> None:
    model, updates, batch = narrow()
    omega = torch.randn(3, 5, 20, generator=seeded(0), dtype=torch.float64)
    found = per_example_derivatives(lambda: model(**batch), dict(model.named_parameters()), updates, omega)
    for name, update in updates.items():
        change = output_change(lambda: model(**batch), weights_of(model), {name: update})
        assert torch.allclose(found[name], (omega * change).flatten(1).sum(1), atol=1e-6), name


def test_the_expected_square_of_a_probe_is_the_squared_rate() -> None:
    change = torch.randn(3, 7, generator=seeded(0), dtype=torch.float64)
    omegas = torch.randn(20_000, 3, 7, generator=seeded(1), dtype=torch.float64)
    squares = torch.tensor([per_example_rate({"w": d}, 21.0) ** 2 for d in (omegas * change).sum(-1)])
    error = squares.std().item() / len(squares) ** 0.5
    # The sum over a whole batch, as `full` takes it, would have the same mean and three times the variance or more.
    assert squares.mean().item() == pytest.approx(rate(change, EVERYTHING) ** 2, abs=4 * error)


def test_joint_rates_add_up_before_they_are_squared() -> None:
    one = torch.tensor([[1.0, 2.0]])
    assert joint_rate({"a": one, "b": one}, EVERYTHING) == pytest.approx(2 * rate(one, EVERYTHING))
    assert joint_rate({"a": one, "b": -one}, EVERYTHING) == 0.0


def test_kronecker_rate_of_an_outer_product_is_its_sum() -> None:
    a, b = (torch.randn(n, generator=seeded(n), dtype=torch.float64) for n in (3, 4))
    assert kronecker_rate([a.outer(b)], 2.0) == pytest.approx((a.sum() * b.sum()).abs().item() / 2**0.5)


@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_exact_rates_are_the_reference(metric: str) -> None:
    model, updates, batch = narrow()
    result = measure_rates(model, updates, [batch], estimator="exact", metric=metric)
    changes = {n: output_change(lambda: model(**batch), weights_of(model), {n: u}) for n, u in updates.items()}
    logits = model(**batch).detach()
    for name, change in changes.items():
        expected = rate(change, EVERYTHING) if metric == "euclidean" else fisher_rate(change, EVERYTHING, logits)
        assert result.rates[name] == pytest.approx(expected, rel=1e-5), name
    if metric == "euclidean":
        assert result.total == pytest.approx(joint_rate(changes, EVERYTHING), rel=1e-5)


def test_gates_read_the_derivatives_of_the_literal_probe() -> None:
    model, updates, batch = narrow()
    result = measure_rates(model, updates, [batch], generator=seeded(5))
    omega = torch.randn(3, 5, 20, generator=seeded(5), dtype=torch.float64)
    literal = per_example_derivatives(lambda: model(**batch), dict(model.named_parameters()), updates, omega)
    assert set(result.estimators.values()) == {"per_example"}
    for name, expected, found in zip(literal, literal.values(), result.draws.derivatives, strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12), name
        assert result.rates[name] == pytest.approx(per_example_rate({name: expected}, 3 * 5 * 20), rel=1e-9)
    assert result.total == pytest.approx(per_example_rate(literal, 3 * 5 * 20), rel=1e-9)
