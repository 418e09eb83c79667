"""A measurement is the same however its work is split, and follows its generator, its updates and the weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from hf_flerm import measure_rates
from hf_flerm.choices import Estimator, values
from hf_flerm.rates.probe import RateProbe
from tests.shared.cases import Case, case, mlp, perturb, seeded, text
from tests.shared.reference import Batch


def test_exact_does_not_depend_on_how_the_batch_is_split() -> None:
    made = case("gpt2 lora")
    (batch,) = made.batches
    parts = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    whole = made.measure("exact")
    split = measure_rates(made.model, made.updates, parts, estimator="exact")
    assert split.num_probes == 3
    for name, rate in whole.rates.items():
        assert split.rates[name] == pytest.approx(rate, rel=1e-4), name


@pytest.mark.parametrize("estimator", [e for e in values(Estimator) if e != "exact"])
def test_probes_of_one_forward_are_probes_of_several(estimator: str) -> None:
    made = case("llama lora")
    together = made.measure(estimator, probes=3)
    apart = measure_rates(made.model, made.updates, made.batches * 3, estimator=estimator, generator=seeded(0))
    assert together.num_probes == apart.num_probes == 3
    for name, rate in together.rates.items():
        assert apart.rates[name] == pytest.approx(rate, rel=1e-4), name


@pytest.mark.parametrize("estimator", [e for e in values(Estimator) if e != "exact"])
def test_a_generator_makes_a_measurement_reproducible(estimator: str) -> None:
    made = case("llama lora")
    first, again, other = (made.measure(estimator, seed=seed) for seed in (3, 3, 4))
    assert first.rates == again.rates
    assert torch.equal(first.inner_products, again.inner_products)
    assert all(first.rates[name] != other.rates[name] for name in first.rates)


def test_a_generator_goes_on_where_it_stopped() -> None:
    made, generator = case("llama lora"), seeded(0)
    first, second = (measure_rates(made.model, made.updates, made.batches, generator=generator) for _ in range(2))
    assert all(first.rates[name] != second.rates[name] for name in first.rates)


def test_without_a_generator_the_global_stream_decides() -> None:
    made = case("llama lora")
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(measure_rates(made.model, made.updates, made.batches).rates)
    assert results[0] == results[1]
    assert all(results[0][name] != results[2][name] for name in results[0])


def test_the_order_and_choice_of_tensors_do_not_matter() -> None:
    made = case("every kind")
    whole = made.measure("per_example", probes=2).rates
    chosen = ["gain", "head.bias", "conv.weight", "head.weight"]  # the head's tensors decide if it is skipped
    some = measure_rates(
        made.model,
        {name: made.updates[name] for name in chosen},
        made.batches,
        probes_per_batch=2,
        generator=seeded(0),
    ).rates
    assert list(some) == chosen
    for name in chosen:
        assert some[name] == pytest.approx(whole[name], rel=1e-4)


@pytest.mark.parametrize("estimator", values(Estimator))
def test_rates_are_linear_in_the_update(estimator: str) -> None:
    made = case("every kind")
    once = made.measure(estimator)
    tenfold = measure_rates(
        made.model,
        {name: -10 * update for name, update in made.updates.items()},
        made.batches,
        estimator=estimator,
        generator=seeded(0),
    )
    for name, rate in once.rates.items():
        assert tenfold.rates[name] == pytest.approx(10 * rate, rel=1e-4)


def test_probes_stop_at_the_target_error() -> None:
    made = case("llama lora")
    taken = []

    def batches() -> Iterator[Batch]:
        for seed in range(50):
            taken.append(seed)
            yield text("right", seed)

    few = measure_rates(made.model, made.updates, batches(), target_error=0.2, generator=seeded(0))
    assert few.num_probes == len(taken) < 50
    assert few.relative_error <= 0.2
    before = measure_rates(made.model, made.updates, [text("right", seed) for seed in taken[:-1]], generator=seeded(0))
    assert before.relative_error > 0.2
    taken.clear()
    many = measure_rates(made.model, made.updates, batches(), target_error=1e-6, generator=seeded(0))
    assert many.num_probes == len(taken) == 50
    with pytest.raises(ValueError, match="target_error is 0"):
        measure_rates(made.model, made.updates, batches(), target_error=0)


def test_a_probe_measures_again_at_new_weights() -> None:
    torch.manual_seed(0)
    made = Case(mlp(nn.Tanh()), [{"input": torch.randn(3, 4)}])
    probe = RateProbe(made.model)
    first = probe.measure(made.updates, made.batches, seeded(0)).rates
    perturb(made.model, size=0.5)
    second = probe.measure(made.updates, made.batches, seeded(0)).rates
    assert second == made.measure("per_example").rates
    assert all(first[name] != second[name] for name in ("0.weight", "0.bias", "2.weight"))
