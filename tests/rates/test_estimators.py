"""Estimators on plain tensors: against literal loops, closed forms and their own expectation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hf_flerm.choices import Estimator, values
from hf_flerm.rates.estimators import (
    WEIGHT_GRADIENT_ESTIMATORS,
    average_weights,
    combined,
    from_examples,
    from_weight_gradients,
    full_statistics,
    iid_statistics,
    kronecker_statistics,
    rates_from,
)
from hf_flerm.rates.measurement import Draws, Measurement, Samples
from hf_flerm.rates.reference import kronecker_rate

SHAPES = {"0-d": (), "1-D": (5,), "one": (1, 1), "2-D": (4, 3), "3-D": (2, 4, 3)}


def rate_from(estimator: str, products: Tensor, num_outputs: float = 1.0) -> tuple[float, float]:
    """Rate and standard error from Z [P, ...]."""
    rows = torch.stack([WEIGHT_GRADIENT_ESTIMATORS[estimator].statistics(z) for z in products])
    return rate_of(estimator, rows, num_outputs * len(products))


def rate_of(estimator: str, rows: Tensor, num_outputs: float) -> tuple[float, float]:
    totals, variance = from_weight_gradients(estimator, rows)
    size = torch.tensor([combined(estimator, totals)], dtype=torch.float64)
    rate, error = rates_from(size, variance.reshape(1), num_outputs)
    return rate.item(), error.item()


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kronecker_is_the_literal_loop(shape: tuple[int, ...], probes: int) -> None:
    products = torch.randn(probes, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rate, _ = rate_from("kronecker", products, 7.0)
    assert rate == pytest.approx(kronecker_rate(list(products), 7.0), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_kronecker_neither_under_nor_overflows(scale: float) -> None:
    products = torch.randn(2, 3, 4, 5, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rate, _ = rate_from("kronecker", products * scale)
    assert rate == pytest.approx(scale * kronecker_rate(list(products), 1.0), rel=1e-9)


def test_float32_products_are_reduced_in_float64() -> None:
    # In float32, 1e4^2 swallows the 1.
    products = torch.tensor([[1e4, 1.0], [-1e4, 1.0]])
    assert full_statistics(products).item() == 4.0
    assert iid_statistics(products).item() == 2e8 + 2
    assert kronecker_statistics(products).tolist() == [4.0, 1.0001e4**2 + 9999.0**2, 2e8 + 2]


def test_full_and_iid_by_hand() -> None:
    products = torch.tensor([[[1.0, 2.0], [3.0, -1.0]], [[1.0, 1.0], [0.0, -4.0]]])
    # Sums 5 and -2, sums of squares 15 and 18.
    assert rate_from("full", products, 10.0)[0] == pytest.approx(math.sqrt((25 + 4) / 2 / 10))
    assert rate_from("iid", products, 10.0)[0] == pytest.approx(math.sqrt((15 + 18) / 2 / 10))


@pytest.mark.parametrize("ndim", [2, 3])
def test_kronecker_is_full_where_the_products_have_rank_one(ndim: int) -> None:
    # Every combination of a few vectors: the vectors are exactly independent of each other, whatever their own law.
    generator = torch.Generator().manual_seed(0)
    sides = [[torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(3)] for size in (4, 3, 2)]
    letters = "abc"[:ndim]
    products = torch.stack(
        [torch.einsum(f"{','.join(letters)}->{letters}", *chosen) for chosen in itertools.product(*sides[:ndim])]
    )
    full, _ = rate_from("full", products)
    assert rate_from("kronecker", products)[0] == pytest.approx(full, rel=1e-12)
    assert abs(rate_from("iid", products)[0] / full - 1) > 0.05, "the case would not tell the estimators apart"


def test_kronecker_has_the_expectation_of_a_kronecker_covariance() -> None:
    generator = torch.Generator().manual_seed(2)
    left = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    right = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(4000, 4, 3, generator=generator, dtype=torch.float64)
    products = left @ noise @ right.T
    expected = math.sqrt((left.sum(0).square().sum() * right.sum(0).square().sum()).item())
    rate, error = rate_from("kronecker", products)
    assert error < 0.05 * expected
    assert abs(rate - expected) < 4 * error
    assert abs(rate_from("iid", products)[0] - expected) > 10 * error, "the case would not tell the estimators apart"


def test_independent_dimensions_make_kronecker_exact_there() -> None:
    # Rows are independent but differ in covariance: no Kronecker product, yet the rows' independence is known.
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(5, 3, 3, generator=generator, dtype=torch.float64)
    products = torch.einsum("rij,prj->pri", mixing, torch.randn(4000, 5, 3, generator=generator, dtype=torch.float64))
    expected = mixing.sum(1).square().sum().sqrt().item()
    rate, error = rate_from("kronecker_output", products)
    assert abs(rate - expected) < 4 * error
    assert error < 0.05 * expected
    by_hand = torch.stack([products.sum(2).square().sum(1), products.square().sum((1, 2))], 1)
    rows = torch.stack([kronecker_statistics(z, (0,)) for z in products])
    torch.testing.assert_close(rows, by_hand)


@pytest.mark.parametrize("dims", [(0,), (-1,)])
def test_an_independent_bias_is_summed_as_squares(dims: tuple[int, ...]) -> None:
    products = torch.tensor([[1.0, -2.0], [3.0, 1.0]], dtype=torch.float64)
    rows = torch.stack([kronecker_statistics(z, dims) for z in products])
    assert rate_of("kronecker_output", rows, 2.0 * 2)[0] == pytest.approx(math.sqrt(15 / 2 / 2))


@pytest.mark.parametrize("estimator", ["kronecker", "full", "iid"])
def test_standard_errors_match_the_spread_over_seeds(estimator: str) -> None:
    seeds, probes = 300, 60
    generator = torch.Generator().manual_seed(3)
    draws = torch.randn(seeds, probes, 4, 3, generator=generator, dtype=torch.float64) + torch.randn(
        seeds, probes, 4, 1, generator=generator, dtype=torch.float64
    )
    rates, errors = torch.tensor([rate_from(estimator, products, 5.0) for products in draws]).T
    ratio = (errors.square().mean().sqrt() / rates.std()).item()
    # The spread of 300 rates is known to 4 %; an error of a factor sqrt(2) or 2 lies far outside.
    assert 0.85 < ratio < 1.15


def test_one_probe_has_no_standard_error() -> None:
    products = torch.ones(1, 2, 2, dtype=torch.float64)
    assert math.isnan(rate_from("full", products)[1])
    assert rate_from("full", 0 * products) == (0.0, 0.0)
    assert rate_from("kronecker", 0 * products) == (0.0, 0.0)


def test_varying_numbers_of_outputs_weigh_by_outputs() -> None:
    rows = torch.tensor([[4.0], [9.0]], dtype=torch.float64)
    rate, _ = rate_of("full", rows, 1.0 + 3.0)
    assert rate == pytest.approx(math.sqrt((4 + 9) / (1 + 3)))


def test_from_examples_by_hand() -> None:
    values = torch.tensor([[1.0, -2.0, 3.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    rates, errors = rates_from(*from_examples(values), 7.0)
    assert rates.tolist() == pytest.approx([math.sqrt(14 / 7), 0.0])
    # sd of rate^2 = sqrt(2/3 (1 + 16 + 81)) / 7, over 2 rate.
    assert errors.tolist() == pytest.approx([math.sqrt(2 / 3 * 98) / 7 / (2 * math.sqrt(2)), 0.0])


def test_errors_of_from_examples_are_calibrated() -> None:
    # 600 seeds, 6 examples of unequal size, 30 probes each.
    scales = torch.tensor([0.2, 1.0, 1.0, 1.5, 2.0, 0.5], dtype=torch.float64).repeat(30)
    draws = scales * torch.randn(600, len(scales), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rates, errors = rates_from(*from_examples(draws), len(scales))
    z = (rates - scales.square().mean().sqrt()) / errors
    assert abs(z.mean()) < 0.2  # a rate is a concave function of its unbiased square, so slightly low
    assert (
        0.8 < z.var() < 1.3
    )  # sampling error of a variance of 600: 0.06; a factor sqrt(2) in the error gives 2 or 0.5


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_average_weights_are_the_bias_corrected_running_average(beta: float) -> None:
    values = torch.randn(6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    running = 0.0
    for value in values.tolist():
        running = beta * running + (1 - beta) * value
    expected = running / (1 - beta ** len(values))
    assert (average_weights(6, beta) @ values).item() == pytest.approx(expected, rel=1e-12)


def test_average_weights_at_beta_one_are_the_mean() -> None:
    assert average_weights(4, 1.0).tolist() == [0.25] * 4


def measurement() -> Measurement:
    inner = torch.tensor([[4.0, 1.0, 0.0], [1.0, 9.0, -3.0], [0.0, -3.0, 1.0]], dtype=torch.float64)
    names = ["a", "b", "c"]
    return Measurement(
        dict(zip(names, [2.0, 3.0, 1.0], strict=True)),
        dict.fromkeys(names, 0.0),
        dict.fromkeys(names, "exact"),
        1,
        inner,
    )


@pytest.mark.parametrize(
    ("names", "expected"), [(["a"], 4.0), (["b", "a"], 15.0), (["a", "a"], 4.0), (["a", "b", "c"], 10.0), ([], 0.0)]
)
def test_group_rate_sums_the_inner_products(names: list[str], expected: float) -> None:
    assert measurement().group_rate(names) == pytest.approx(math.sqrt(expected))
    assert measurement().total == pytest.approx(math.sqrt(10.0))


def test_group_rate_names_what_was_not_measured() -> None:
    with pytest.raises(ValueError, match=r"not measured: \[d, e\].*\[a, b, c\]"):
        measurement().group_rate(["a", "d", "e"])


def test_interactions_cannot_be_used_to_change_the_measurement() -> None:
    result = measurement()
    names, inner = result.interactions()
    inner.zero_()
    assert names == ["a", "b", "c"]
    assert result.total > 0


def test_samples_combine_both_kinds_of_tensor() -> None:
    samples = Samples(["w", "v"])
    for derivatives, products, outputs in [
        ([1.0, -3.0], [[1.0, 1.0], [0.0, 2.0]], 4.0),
        ([2.0, 2.0], [[-1.0, 0.0], [0.0, 3.0]], 6.0),
    ]:
        samples.add_derivatives({"v": torch.tensor(derivatives, dtype=torch.float64)}, {"v"})
        z = torch.tensor(products)
        samples.add_statistics("w", "full", torch.cat([z.sum().double().reshape(1), full_statistics(z)]))
        samples.count_outputs(outputs)
    result = samples.measurement()
    assert list(result.rates) == ["w", "v"]
    assert result.estimators == {"w": "full", "v": "per_example"}
    assert result.num_probes == 2
    assert result.rates["v"] == pytest.approx(math.sqrt((1 + 9 + 4 + 4) / 10))
    assert result.rates["w"] == pytest.approx(math.sqrt((16 + 4) / 10))
    # w's sums are 4 and 2, v's are -2 and 4.
    torch.testing.assert_close(
        result.interactions()[1], torch.tensor([[20.0, 0.0], [0.0, 18.0]], dtype=torch.float64) / 10
    )


def test_no_probe_is_an_error() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        Samples(["w"]).measurement()


def test_the_estimators_are_those_of_the_contract() -> None:
    assert {"per_example", *WEIGHT_GRADIENT_ESTIMATORS, "exact"} == set(values(Estimator))


def draws(derivatives: Tensor, sums: Tensor, by_example: list[bool], outputs: float = 1.0) -> Draws:
    """Of tensors [L], probes [P] with examples [N] each: derivatives [L, P, N], sums of the others [L, P]."""
    count, examples = derivatives.shape[1:]
    chosen = torch.tensor(by_example)
    return Draws(
        (derivatives * chosen[:, None, None]).flatten(1),
        chosen,
        torch.where(chosen.unsqueeze(1), derivatives.sum(2), sums),
        torch.arange(count).repeat_interleave(examples),
        torch.full((count,), outputs, dtype=torch.float64),
    )


@pytest.mark.parametrize("by_example", [[True, True, True], [True, False, True], [False, False, False]])
def test_errors_of_joint_rates_are_calibrated(by_example: list[bool]) -> None:
    # Correlated Gaussian derivatives, as omega gives them; the errors claimed must be the spread over repetitions.
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    index, repetitions, probes = torch.tensor([0, 1, 2]), 400, 30
    found, claimed = [], []
    for _ in range(repetitions):
        noise = torch.randn(3, probes, 4, generator=generator, dtype=torch.float64)
        values = torch.einsum("lm,mpn->lpn", mixing, noise)
        one = draws(values, values.sum(2), by_example)
        size = one.inner_products()[index][:, index].sum().reshape(1) * probes
        rate, error = rates_from(size, one.joint_variances(torch.ones(1, 3, dtype=torch.float64)), probes)
        found.append(rate[0])
        claimed.append(error.item())
    spread = torch.stack(found).std().item()
    assert sum(claimed) / repetitions == pytest.approx(spread, rel=4 / math.sqrt(2 * repetitions) + 0.03)


def test_one_probe_cannot_tell_the_error_of_a_joint_rate_of_weight_gradients() -> None:
    values = torch.ones(2, 1, 4, dtype=torch.float64)
    both = torch.ones(1, 2, dtype=torch.float64)
    assert draws(values, values.sum(2), [True, False]).joint_variances(both).isnan().all()
    assert (draws(values, values.sum(2), [True, True]).joint_variances(both) > 0).all()


def test_errors_of_joint_rates_of_a_measurement() -> None:
    assert measurement().group_standard_error(["a", "b"]) == 0.0
    with pytest.raises(ValueError, match=r"not measured: \[d\]"):
        measurement().group_standard_error(["d"])


@pytest.mark.parametrize(
    ("rates", "errors", "expected"),
    [({"a": 2.0, "b": 1.0}, [0.1, 0.2], 0.2), ({"a": 0.0, "b": 1.0}, [0.0, 0.2], 0.2), ({"a": 0.0}, [0.0], 0.0)],
)
def test_the_relative_error_is_the_largest(rates: dict[str, float], errors: list[float], expected: float) -> None:
    inner = torch.zeros(len(rates), len(rates))
    result = Measurement(rates, dict(zip(rates, errors, strict=True)), {}, 1, inner)
    assert result.relative_error == pytest.approx(expected)


def test_an_unknown_error_is_infinite() -> None:
    assert Measurement({"a": 1.0}, {"a": math.nan}, {}, 1, torch.zeros(1, 1)).relative_error == math.inf
