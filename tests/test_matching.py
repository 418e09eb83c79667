"""Scales against closed forms."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from hf_flerm import Measurement, RateProfile, RateProfileError, match_rates
from hf_flerm.matching import POOLS, pooled_scales

KINDS = {"h.0.A": "h.*.A", "h.1.A": "h.*.A", "h.0.B": "h.*.B", "h.1.B": "h.*.B"}


def constant(value: float, steps: list[int], names: Mapping[str, str] = KINDS) -> RateProfile:
    return RateProfile(steps, {name: [value] * len(steps) for name in names})


def test_match_rates_is_base_over_measured() -> None:
    assert match_rates({"a": 3.0, "b": 0.5}, {"b": 2.0, "a": 4.0}) == {"a": 0.75, "b": 0.25}


def test_match_rates_takes_a_measurement() -> None:
    measured = Measurement({"a": 4.0}, {"a": 0.0}, {"a": "exact"}, 1, torch.ones(1, 1))
    assert match_rates({"a": 3.0}, measured) == {"a": 0.75}


@pytest.mark.parametrize("broken", [0.0, math.nan, math.inf, -1.0])
def test_match_rates_keeps_what_cannot_be_compared(broken: float) -> None:
    assert match_rates({"a": broken, "b": 1.0}, {"a": 2.0, "b": 4.0}) == {"a": 1.0, "b": 0.25}
    assert match_rates({"a": 2.0, "b": 1.0}, {"a": broken, "b": 4.0}) == {"a": 1.0, "b": 0.25}


def test_match_rates_names_both_set_differences() -> None:
    with pytest.raises(RateProfileError, match=r"only in the base \[a, b\]; only in the target \[d\]"):
        match_rates({"a": 1.0, "b": 1.0, "c": 1.0}, {"c": 1.0, "d": 1.0})


@pytest.mark.parametrize("pool", POOLS)
def test_nothing_measured_keeps_every_scale(pool: str) -> None:
    assert pooled_scales(constant(1.0, [0]), constant(1.0, []), KINDS, pool=pool) == dict.fromkeys(KINDS, 1.0)


def test_pooling_over_kinds_takes_the_geometric_mean() -> None:
    base = constant(1.0, [0])
    target = RateProfile([0], {"h.0.A": [2.0], "h.1.A": [8.0], "h.0.B": [0.5], "h.1.B": [0.125]})
    pooled = pooled_scales(base, target, KINDS, pool="kind")
    assert pooled == pytest.approx({"h.0.A": 1 / 4, "h.1.A": 1 / 4, "h.0.B": 4.0, "h.1.B": 4.0}, rel=1e-14)
    alone = pooled_scales(base, target, KINDS, pool="tensor")
    assert alone == pytest.approx({"h.0.A": 1 / 2, "h.1.A": 1 / 8, "h.0.B": 2.0, "h.1.B": 8.0}, rel=1e-14)


@pytest.mark.parametrize(
    ("beta", "log2_scale"),
    [
        (1.0, (1 + 2 + 6) / 3),
        (0.0, 6.0),
        (0.9, (0.81 * 1 + 0.9 * 2 + 6) / 2.71),
        (0.5, (0.25 * 1 + 0.5 * 2 + 6) / 1.75),
    ],
)
@pytest.mark.parametrize("pool", POOLS)
def test_averages_over_steps_with_decay(beta: float, log2_scale: float, pool: str) -> None:
    base = constant(1.0, [0])
    target = RateProfile([0, 1, 4], {name: [1 / 2, 1 / 4, 1 / 64] for name in KINDS})
    scales = pooled_scales(base, target, KINDS, pool=pool, beta=beta)
    assert scales == pytest.approx(dict.fromkeys(KINDS, 2**log2_scale), rel=1e-13)


@pytest.mark.parametrize(
    ("beta", "log2_scale"), [(1.0, (1 + 3) / 2), (0.0, 3.0), (0.9, (0.9 * 1 + 3) / 1.9)], ids=["mean", "last", "decay"]
)
def test_a_tensor_without_a_rate_yet_joins_when_it_has_one(beta: float, log2_scale: float) -> None:
    """LoRA's A moves nothing while B is 0: step 0 must not count for it, not even in the weights of the average."""
    base = RateProfile([0, 1, 2], {"h.0.A": [0.0, 4.0, 16.0], "h.0.B": [1.0, 1.0, 1.0]})
    target = RateProfile([0, 1, 2], {"h.0.A": [0.0, 2.0, 2.0], "h.0.B": [1.0, 1.0, 1.0]})
    first = RateProfile([0], {name: rates[:1] for name, rates in target.rates.items()})
    assert pooled_scales(base, first, KINDS, beta=beta) == {"h.0.A": 1.0, "h.0.B": 1.0}
    scales = pooled_scales(base, target, KINDS, beta=beta)
    assert scales == pytest.approx({"h.0.A": 2**log2_scale, "h.0.B": 1.0}, rel=1e-13)


def test_a_zero_rate_leaves_the_rest_of_its_kind_alone() -> None:
    base = RateProfile([0], {"h.0.A": [1.0], "h.1.A": [1.0]})
    target = RateProfile([0], {"h.0.A": [0.0], "h.1.A": [0.5]})
    assert pooled_scales(base, target, KINDS, pool="kind") == pytest.approx({"h.0.A": 2.0, "h.1.A": 2.0}, rel=1e-14)
    assert pooled_scales(base, target, KINDS, pool="tensor") == pytest.approx({"h.0.A": 1.0, "h.1.A": 2.0}, rel=1e-14)


def test_compares_with_the_base_at_the_same_step() -> None:
    base = RateProfile([0, 4], {"h.0.A": [1.0, 9.0]})
    target = RateProfile([1, 100], {"h.0.A": [1.0, 1.0]})
    assert pooled_scales(base, target, KINDS, beta=0.0)["h.0.A"] == pytest.approx(9.0, rel=1e-14)
    first = RateProfile([1], {"h.0.A": [1.0]})
    assert pooled_scales(base, first, KINDS)["h.0.A"] == pytest.approx(3.0, rel=1e-14)


def test_only_the_targets_names_get_scales() -> None:
    target = RateProfile([0], {"h.1.B": [0.25]})
    assert pooled_scales(constant(1.0, [0]), target, KINDS) == pytest.approx({"h.1.B": 4.0}, rel=1e-14)
