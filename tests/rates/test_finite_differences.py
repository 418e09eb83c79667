"""Estimators agree with finite differences, in value and in standard error.

Sizes are tiny; every random estimator has a fixed number of probes and a fixed seed, and its tolerance is a multiple of
the standard error that theory gives it, computed from the reference.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_flerm import measure_rates
from hf_flerm.choices import Estimator, values
from hf_flerm.rates.probe import RateProbe
from tests.shared.cases import CASES, Case, Wrap, case, changes, features, seeded
from tests.shared.reference import finite_difference

RANDOM = ("per_example", "full")
PROBES = {"per_example": 100, "full": 100}


@pytest.mark.parametrize("name", CASES)
def test_exact_is_the_derivative(name: str) -> None:
    expected = changes(name)
    result = case(name).measure("exact")
    assert set(result.rates) == set(expected)
    assert set(result.estimators.values()) == {"exact"}
    assert set(result.standard_errors.values()) == {0.0}
    for tensor, change in expected.items():
        assert result.rates[tensor] == pytest.approx(change.rate, rel=1e-4, abs=1e-9), tensor


@pytest.mark.parametrize("estimator", RANDOM)
@pytest.mark.parametrize("name", CASES)
def test_random_estimators_agree_with_the_derivative(name: str, estimator: str) -> None:
    made, expected = case(name), changes(name)
    result = made.measure(estimator, probes=PROBES[estimator])
    assert set(result.rates) == set(expected)
    assert result.num_probes == PROBES[estimator] * len(made.batches)
    assert result.estimators == {
        tensor: "kronecker" if tensor in made.fallback and estimator == "per_example" else estimator
        for tensor in expected
    }
    for tensor, change in expected.items():
        if result.estimators[tensor] == "kronecker":
            continue
        error = change.error(estimator, PROBES[estimator])
        assert abs(result.rates[tensor] - change.rate) <= 4 * error + 1e-9, (tensor, result.rates[tensor], change.rate)


@pytest.mark.parametrize("name", ["gpt2 gaussian", "llama gaussian"])
@pytest.mark.parametrize("estimator", values(Estimator))
def test_a_tensor_without_effect_has_rate_zero(name: str, estimator: str) -> None:
    result = case(name).measure(estimator, probes=2)
    for tensor, rate in result.rates.items():
        if "lora_A" in tensor:
            assert (rate, result.standard_errors[tensor]) == (0.0, 0.0), tensor
        else:
            assert rate > 0, tensor


@pytest.mark.parametrize(("estimator", "probes", "seeds"), [("per_example", 30, 150), ("full", 100, 100)])
def test_standard_errors_are_calibrated(estimator: str, probes: int, seeds: int) -> None:
    torch.manual_seed(0)
    made = Case(Wrap(nn.Linear(3, 4), lambda m, x: m(x)), [features(4, 2, 3)])
    expected = {name: finite_difference(made.model, {name: u}, made.batches) for name, u in made.updates.items()}
    probe = RateProbe(made.model, estimator=estimator, probes_per_batch=probes)
    z: dict[str, list[float]] = {name: [] for name in expected}
    for seed in range(seeds):
        result = probe.measure(made.updates, made.batches, seeded(seed))
        for name, change in expected.items():
            z[name].append((result.rates[name] - change.rate) / result.standard_errors[name])
    for name, deviations in z.items():
        spread = torch.tensor(deviations)
        # A standard error too large by sqrt(2) gives a variance of 0.5, too small by it 2; 100 draws know it to 0.15.
        assert 0.65 < spread.var() < 1.6, (name, spread.var())
        assert abs(spread.mean()) < 0.45, (name, spread.mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("examples", "positions"), [(1, 257), (700, 100)])
def test_outputs_are_counted_exactly_in_low_precision(examples: int, positions: int, dtype: torch.dtype) -> None:
    # 257 is no bfloat16 and 70,000 no float16. Every output is the weight, so it moves at the rate of 1.
    model = Wrap(nn.Linear(1, 1, bias=False), lambda m, x: m(x)).to(dtype)
    batch = {"x": torch.ones(examples, positions, 1, dtype=dtype)}
    result = measure_rates(model, {"inner.weight": torch.ones(1, 1)}, [batch], estimator="exact")
    assert result.rates["inner.weight"] == pytest.approx(1.0, rel=1e-6)
