"""The estimators from weight gradients: the literal Kronecker loop, and where each of them is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_flerm import measure_rates
from hf_flerm.rates.outputs import OutputValues
from hf_flerm.rates.probe import RateProbe
from hf_flerm.rates.reference import kronecker_rate
from tests.shared.cases import VOCABULARY, Wrap, case, changes, seeded
from tests.shared.reference import finite_difference, weight_gradient_products


@pytest.mark.parametrize("probes", [1, 3])
def test_kronecker_on_a_model_is_the_literal_loop(monkeypatch: pytest.MonkeyPatch, probes: int) -> None:
    drawn: list[Tensor] = []
    original = OutputValues.omega

    def omega(self: OutputValues, generator: torch.Generator) -> Tensor:
        drawn.append(original(self, generator))
        return drawn[-1]

    made = case("every kind")
    monkeypatch.setattr(OutputValues, "omega", omega)
    result = made.measure("kronecker", probes=probes)
    assert len(drawn) == probes * len(made.batches)
    batches = [batch for batch in made.batches for _ in range(probes)]
    masks = [batch["attention_mask"] for batch in batches]
    for weights, mask in zip(drawn, masks, strict=True):
        assert bool(((weights != 0) == mask.bool().unsqueeze(-1)).all()), "omega must leave padding out, and only it"
    num_outputs = sum(float(mask.sum()) for mask in masks) * VOCABULARY / len(masks)
    shapes = set()
    for name, update in made.updates.items():
        products = weight_gradient_products(made.model, name, update, batches, drawn, lambda m, b: m(**b))
        assert result.rates[name] == pytest.approx(kronecker_rate(products, num_outputs), rel=1e-4), name
        shapes.add(update.ndim)
    assert shapes == {0, 1, 2}


def test_kronecker_on_a_three_dimensional_tensor_is_the_literal_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case("custom bilinear")
    weights = torch.randn(3, 5, 3, generator=seeded(5))
    monkeypatch.setattr(OutputValues, "omega", lambda self, generator: weights)
    result = made.measure("kronecker")
    name = "inner.1.core"
    products = weight_gradient_products(
        made.model, name, made.updates[name], made.batches, [weights], lambda m, b: m(**b)
    )
    assert result.rates[name] == pytest.approx(kronecker_rate(products, weights.numel()), rel=1e-4)


def test_kronecker_is_full_where_the_products_have_rank_one() -> None:
    # One example, one position: the gradient is g x^T, and an update u v^T leaves Z of rank one.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    update = torch.outer(torch.randn(5), torch.randn(4))
    batch = {"input": torch.randn(1, 4)}
    one, same = (
        measure_rates(model, {"0.weight": update}, [batch], estimator=estimator, generator=seeded(0))
        for estimator in ("kronecker", "full")
    )
    assert one.rates["0.weight"] == pytest.approx(same.rates["0.weight"], rel=1e-5)
    change = finite_difference(model, {"0.weight": update}, [batch])
    many = measure_rates(
        model, {"0.weight": update}, [batch], estimator="kronecker", probes_per_batch=400, generator=seeded(1)
    )
    assert abs(many.rates["0.weight"] - change.rate) < 4 * many.standard_errors["0.weight"]


def test_iid_is_right_for_a_diagonal_and_wrong_elsewhere() -> None:
    # With one-hot inputs that occur once each, the entries of a layer's own gradient are independent.
    model = Wrap(nn.Linear(4, 3, bias=False), lambda m, x: m(x))
    update = {"inner.weight": torch.rand(3, 4, generator=seeded(0))}
    for inputs, right in [(torch.eye(4), True), (torch.ones(4, 4), False)]:
        batch = {"x": inputs}
        change = finite_difference(model, update, [batch])
        result = measure_rates(model, update, [batch], estimator="iid", probes_per_batch=200, generator=seeded(1))
        (rate,), (error,) = result.rates.values(), result.standard_errors.values()
        assert (abs(rate - change.rate) < 4 * error) == right


def test_kronecker_output_is_unbiased_for_the_output_layer_and_varies_less() -> None:
    made, expected = case("every kind"), changes("every kind")
    seeds, probes = 30, 4
    rates: dict[str, Tensor] = {}
    for estimator in ("kronecker", "kronecker_output"):
        probe = RateProbe(made.model, estimator=estimator, probes_per_batch=probes)
        results = [probe.measure(made.updates, made.batches, seeded(seed)) for seed in range(seeds)]
        rates[estimator] = torch.tensor([list(result.rates.values()) for result in results])
    names = list(results[0].rates)
    assert results[0].estimators == {
        name: "kronecker_output" if name.startswith("head.") else "kronecker" for name in names
    }
    for i, name in enumerate(names):
        plain, output = rates["kronecker"][:, i], rates["kronecker_output"][:, i]
        if name.startswith("head."):
            squares = output.square()
            assert abs(squares.mean() - expected[name].rate ** 2) < 4 * squares.std() / seeds**0.5
            assert output.std() < 0.7 * plain.std()
        else:
            assert torch.equal(plain, output)


def test_a_tied_head_is_no_output_layer() -> None:
    result = case("gpt2, tied, right padding").measure("kronecker_output")
    assert set(result.estimators.values()) == {"kronecker"}
