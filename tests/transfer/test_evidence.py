"""Scales against closed forms."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from hf_flerm import Measurement, RateProfile, RateProfileError, map_profile
from hf_flerm.choices import Pool, values
from hf_flerm.transfer.evidence import Evidence, random_effects_mean
from hf_flerm.transfer.mapping import ProfileMap


class Blocks(nn.Module):
    """Tensors h.0.A, h.0.B, h.1.A, ..."""

    def __init__(self, depth: int = 2, names: str = "AB") -> None:
        super().__init__()
        block = {name: nn.Parameter(torch.zeros(2)) for name in names}
        self.h = nn.ModuleList(nn.ParameterDict(block) for _ in range(depth))
        for part in self.h:
            for name in names:
                part[name] = nn.Parameter(torch.zeros(2))


def mapped(base: Mapping[str, list[float]], steps: list[int] | None = None, **options: str) -> ProfileMap:
    count = len(next(iter(base.values())))
    return map_profile(RateProfile(steps or list(range(count)), base), Blocks(), **options)


def measurement(rates: Mapping[str, float], error: float = 0.0) -> Measurement:
    """Tensors that do not interact, measured with a relative standard error."""
    errors = {name: error * rate for name, rate in rates.items()}
    inner = torch.tensor(list(rates.values()), dtype=torch.float64).square().diag()
    return Measurement(dict(rates), errors, dict.fromkeys(rates, "exact"), 1, inner)


def scales(found: ProfileMap, history: Mapping[int, Mapping[str, float]], **options: Any) -> dict[str, float]:
    """Scales of tensors after measurements: `{step: rates}`."""
    evidence = Evidence.empty(found)
    for step, rates in history.items():
        evidence = evidence.appended(step, found, measurement(rates, 0.1)).estimated(found, **options)
    return found.tensor_scales(dict(zip(evidence.units, evidence.log_scales.tolist(), strict=True)))


ONES = {name: [1.0] for name in ("h.0.A", "h.0.B", "h.1.A", "h.1.B")}


@pytest.mark.parametrize("broken", [0.0, math.nan, math.inf, -1.0])
def test_a_rate_that_is_no_rate_is_not_compared(broken: float) -> None:
    found = mapped(ONES)
    rates = {"h.0.A": broken, "h.0.B": 4.0, "h.1.A": 1.0, "h.1.B": 0.5}
    evidence = Evidence.empty(found).appended(0, found, measurement(rates)).estimated(found, pool="unit", beta=0.0)
    logs = dict(zip(evidence.units, evidence.log_scales.tolist(), strict=True))
    assert found.tensor_scales(logs) == pytest.approx({"h.0.A": 1.0, "h.0.B": 0.25, "h.1.A": 1.0, "h.1.B": 2.0})


@pytest.mark.parametrize("pool", values(Pool))
@pytest.mark.parametrize("beta", [None, 0.0, 0.9, 1.0])
def test_nothing_measured_keeps_every_scale(pool: str, beta: float | None) -> None:
    found = mapped(ONES)
    evidence = Evidence.empty(found)
    assert evidence.estimated(found, pool=pool, beta=beta).log_scales.tolist() == [0.0] * 4


def test_pooling_over_kinds_takes_the_geometric_mean() -> None:
    rates = {"h.0.A": 2.0, "h.1.A": 8.0, "h.0.B": 0.5, "h.1.B": 0.125}
    pooled = scales(mapped(ONES), {0: rates}, pool="kind", beta=1.0)
    assert pooled == pytest.approx({"h.0.A": 1 / 4, "h.1.A": 1 / 4, "h.0.B": 4.0, "h.1.B": 4.0}, rel=1e-14)
    alone = scales(mapped(ONES), {0: rates}, pool="unit", beta=1.0)
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
@pytest.mark.parametrize("pool", values(Pool))
def test_averages_over_steps_with_decay(beta: float, log2_scale: float, pool: str) -> None:
    history = {step: dict.fromkeys(ONES, rate) for step, rate in ((0, 1 / 2), (1, 1 / 4), (4, 1 / 64))}
    found = scales(mapped(ONES), history, pool=pool, beta=beta)
    assert found == pytest.approx(dict.fromkeys(ONES, 2**log2_scale), rel=1e-13)


@pytest.mark.parametrize(
    ("beta", "log2_scale"), [(1.0, (1 + 3) / 2), (0.0, 3.0), (0.9, (0.9 * 1 + 3) / 1.9)], ids=["mean", "last", "decay"]
)
def test_a_tensor_without_a_rate_yet_joins_when_it_has_one(beta: float, log2_scale: float) -> None:
    """LoRA's A moves nothing while B is 0: step 0 must not count for it, not even in the weights of the average."""
    moving, still = [0.0, 4.0, 16.0], [1.0, 1.0, 1.0]
    found = mapped({"h.0.A": moving, "h.0.B": still, "h.1.A": moving, "h.1.B": still})
    history = {
        step: {"h.0.A": rate, "h.0.B": 1.0, "h.1.A": rate, "h.1.B": 1.0}
        for step, rate in ((0, 0.0), (1, 2.0), (2, 2.0))
    }
    assert scales(found, {0: history[0]}, beta=beta) == dict.fromkeys(ONES, 1.0)
    assert scales(found, {0: history[0]}) == dict.fromkeys(ONES, 1.0)
    wanted = {name: 2**log2_scale if name.endswith("A") else 1.0 for name in ONES}
    assert scales(found, history, beta=beta) == pytest.approx(wanted, rel=1e-13)


def test_a_zero_rate_leaves_the_rest_of_its_kind_alone() -> None:
    rates = {"h.0.A": 0.0, "h.0.B": 1.0, "h.1.A": 0.5, "h.1.B": 1.0}
    pooled = scales(mapped(ONES), {0: rates}, pool="kind", beta=1.0)
    assert (pooled["h.0.A"], pooled["h.1.A"]) == pytest.approx((2.0, 2.0), rel=1e-14)
    alone = scales(mapped(ONES), {0: rates}, pool="unit", beta=1.0)
    assert (alone["h.0.A"], alone["h.1.A"]) == pytest.approx((1.0, 2.0), rel=1e-14)


def test_compares_with_the_base_at_the_same_step() -> None:
    found = mapped({name: [1.0, 9.0] for name in ONES}, steps=[0, 4])
    assert scales(found, {1: dict.fromkeys(ONES, 1.0)}, beta=0.0)["h.0.A"] == pytest.approx(3.0, rel=1e-14)
    history = {1: dict.fromkeys(ONES, 1.0), 100: dict.fromkeys(ONES, 1.0)}
    assert scales(found, history, beta=0.0)["h.0.A"] == pytest.approx(9.0, rel=1e-14)


def test_a_scale_moves_only_as_far_as_it_is_known() -> None:
    """One measurement of one unit: variance 2 error^2, so log s = log(quotient) (1 - 2 error^2 / log(quotient)^2)."""
    found = mapped(ONES)
    evidence = Evidence.empty(found)
    rates = {"h.0.A": 0.5, "h.0.B": 0.9, "h.1.A": 1.0, "h.1.B": 2.0}
    for error in (0.0, 0.1, 0.2):
        result = evidence.appended(0, found, measurement(rates, error)).estimated(found, pool="unit")
        logs = {name: -math.log(rate) for name, rate in rates.items()}
        expected = {name: log * max(0.0, 1 - 2 * error**2 / log**2) if log else 0.0 for name, log in logs.items()}
        assert dict(zip(result.units, result.log_scales.tolist(), strict=True)) == pytest.approx(expected, abs=1e-10)


def test_a_scale_changes_by_a_factor_at_most_once_it_is_known() -> None:
    history = {step: dict.fromkeys(ONES, rate) for step, rate in ((0, 1 / 100), (1, 1.0))}
    assert scales(mapped(ONES), {0: history[0]}, beta=0.0, max_change=4.0)["h.0.A"] == pytest.approx(100.0)
    assert scales(mapped(ONES), history, beta=0.0, max_change=4.0)["h.0.A"] == pytest.approx(25.0)


def test_scales_are_held_in_limits_and_named() -> None:
    found = mapped(ONES)
    rates = {"h.0.A": 1e-3, "h.0.B": 1e3, "h.1.A": 0.5, "h.1.B": 1.0}
    evidence = Evidence.empty(found).appended(0, found, measurement(rates))
    evidence = evidence.estimated(found, pool="unit", beta=0.0, max_scale=10.0)
    held = {"h.0.A": 10.0, "h.0.B": 0.1, "h.1.A": 2.0, "h.1.B": 1.0}
    assert dict(zip(evidence.units, evidence.log_scales.exp().tolist(), strict=True)) == pytest.approx(held)
    assert evidence.at_limit(10.0) == ["h.0.A", "h.0.B"]
    assert evidence.at_limit(11.0) == []


def test_evidence_survives_its_record_exactly() -> None:
    found = mapped(ONES)
    rates = {"h.0.A": 0.0, "h.0.B": 1 / 3, "h.1.A": math.pi, "h.1.B": 1e-9}
    evidence = Evidence.empty(found).appended(3, found, measurement(rates, 0.1)).estimated(found)
    again = Evidence.from_record(json.loads(json.dumps(evidence.to_record())), found)
    assert (again.units, again.steps) == (evidence.units, (3,))
    for name in ("log_quotients", "errors", "log_scales"):
        assert torch.equal(getattr(again, name).nan_to_num(7.0), getattr(evidence, name).nan_to_num(7.0))


def test_evidence_of_other_units_is_refused() -> None:
    record = Evidence.empty(mapped(ONES)).to_record()
    other = map_profile(RateProfile([0], {name: [1.0] for name in ("h.0.A", "h.1.A")}), Blocks(names="A"))
    with pytest.raises(RateProfileError, match=r"only in what the checkpoint matched \[h.0.B, h.1.B\]"):
        Evidence.from_record(record, other)


def test_matching_a_base_against_itself_does_nothing() -> None:
    base = {"h.0.A": [0.0, 3.0], "h.0.B": [1.0, 2.0], "h.1.A": [0.0, 1.0], "h.1.B": [5.0, 4.0]}
    history = {step: {name: rates[step] for name, rates in base.items()} for step in (0, 1)}
    assert scales(mapped(base), history) == dict.fromkeys(ONES, 1.0)


def test_the_mean_of_equal_errors_is_plain_and_its_variance_the_scatters() -> None:
    values = torch.tensor([[1.0, 0.0], [3.0, 1.0], [8.0, math.nan]], dtype=torch.float64)
    mean, variance = random_effects_mean(values, torch.zeros_like(values), torch.ones(3))
    scatter = ((3.0**2 + 1.0**2 + 4.0**2) + 2 * 0.5**2) / 3  # of both quantities, 2 + 1 degrees of freedom
    assert mean.tolist() == pytest.approx([4.0, 0.5])
    assert variance.tolist() == pytest.approx([scatter / 3, scatter / 2])


def test_without_scatter_measurements_count_by_their_precision() -> None:
    values = torch.tensor([[1.0], [1.1]], dtype=torch.float64)
    known = torch.tensor([[0.04], [0.01]], dtype=torch.float64)
    mean, variance = random_effects_mean(values, known, torch.ones(2))
    assert mean.item() == pytest.approx((1.0 / 0.04 + 1.1 / 0.01) / 125)
    assert variance.item() == pytest.approx(1 / 125)


def test_measurements_count_by_their_weights() -> None:
    values, weights = torch.tensor([[1.0], [4.0]], dtype=torch.float64), torch.tensor([1.0, 3.0])
    mean, variance = random_effects_mean(values, torch.zeros(2, 1), weights)
    scatter = (1 * 2.25**2 + 3 * 0.75**2) / (4 - 10 / 4)  # unbiased for weights 1 and 3
    assert mean.item() == pytest.approx((1.0 + 3 * 4.0) / 4)
    assert variance.item() == pytest.approx(scatter * (1 + 9) / 16)
    found = mapped(ONES)
    evidence = Evidence.empty(found)
    for step, rate, weight in ((0, 1.0, 0.01), (1, 0.25, 1.0)):
        evidence = evidence.appended(step, found, measurement(dict.fromkeys(ONES, rate)), weight)
    assert evidence.mean_log_scales(found, "kind")["h.*.A"][0] == pytest.approx(math.log(4.0) / 1.01)


def test_what_was_never_measured_is_not_known() -> None:
    mean, variance = random_effects_mean(torch.full((2, 1), math.nan), torch.zeros(2, 1), torch.ones(2))
    assert mean.isnan().all()
    assert variance.isinf().all()


def test_means_and_their_errors_are_calibrated() -> None:
    """Simulated: known errors of two sizes, and scatter beyond them; means hit the truth within their errors."""
    generator = torch.Generator().manual_seed(0)
    truth, repeats = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64), 500
    known = torch.tensor([0.01, 0.04] * 5, dtype=torch.float64).unsqueeze(1).expand(10, 4)
    weights = torch.linspace(0.1, 1.0, 10, dtype=torch.float64)
    squares = []
    for _ in range(repeats):
        noise = torch.randn(10, 4, generator=generator, dtype=torch.float64) * (known + 0.05).sqrt()
        mean, variance = random_effects_mean(truth + noise, known, weights)
        squares.append(((mean - truth).square() / variance).mean())
    assert torch.stack(squares).mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / (4 * repeats)) + 0.05)


def test_units_are_compared_by_their_joint_rate() -> None:
    """Two base blocks to four: the copies' joint rate, with their interaction, is what is compared."""
    base = RateProfile([0], {"h.0.A": [6.0], "h.1.A": [1.0]})
    found = map_profile(base, Blocks(4, "A"), depth="joint")
    inner = torch.eye(4, dtype=torch.float64)
    inner[0, 1] = inner[1, 0] = 1.0  # the first two reinforce each other fully: 2 together; the others: sqrt(2)
    rates = {f"h.{i}.A": 1.0 for i in range(4)}
    measured = Measurement(rates, dict.fromkeys(rates, 0.0), dict.fromkeys(rates, "exact"), 1, inner)
    evidence = Evidence.empty(found).appended(0, found, measured).estimated(found, pool="unit", beta=0.0)
    logs = dict(zip(evidence.units, evidence.log_scales.tolist(), strict=True))
    assert found.tensor_scales(logs) == pytest.approx(
        {"h.0.A": 3.0, "h.1.A": 3.0, "h.2.A": 2**-0.5, "h.3.A": 2**-0.5}, rel=1e-12
    )


BROKEN_RECORDS = {
    "no weights": lambda record: record.pop("weights"),
    "too many steps": lambda record: record["steps"].append(9),
    "a step that is no number": lambda record: record.update(steps=["first"]),
    "a weight of 0": lambda record: record.update(weights=[0.0]),
    "a log that is text": lambda record: record["logs"].update({"h.0.A": ["x"]}),
    "logs within logs": lambda record: record.update(logs={name: [[0.1]] for name in ONES}),
    "a scale without end": lambda record: record["scales"].update({"h.0.A": math.inf}),
    "a weight without end": lambda record: record.update(weights=[math.inf]),
    "a huge log": lambda record: record["logs"].update({"h.0.A": [10**400]}),
    "logs of different lengths": lambda record: record["logs"].update({"h.0.A": [0.1, 0.2]}),
    "errors of another length": lambda record: record.update(errors={name: [0.1, 0.2] for name in ONES}),
    "a unit without errors": lambda record: record["errors"].pop("h.1.B"),
    "a scale that is a list": lambda record: record["scales"].update({"h.0.A": [1.0]}),
    "a scale that is not known": lambda record: record["scales"].update({"h.0.A": None}),
    "scales that are lists": lambda record: record.update(scales={name: [0.1, 0.2] for name in ONES}),
    "scales that are no object": lambda record: record.update(scales=[0.0]),
}


@pytest.mark.parametrize("case", BROKEN_RECORDS)
def test_a_broken_record_is_refused_as_such(case: str) -> None:
    found = mapped(ONES)
    evidence = Evidence.empty(found).appended(0, found, measurement(dict.fromkeys(ONES, 2.0), 0.1))
    record = json.loads(json.dumps(evidence.estimated(found).to_record()))
    BROKEN_RECORDS[case](record)
    with pytest.raises(RateProfileError, match=r"record of the matching .* is damaged.*another checkpoint"):
        Evidence.from_record(record, found)


@pytest.mark.parametrize("record", ["x", [], 3, {}])
def test_a_record_of_another_form_is_refused(record: Any) -> None:
    with pytest.raises(RateProfileError, match="is damaged"):
        Evidence.from_record(record, mapped(ONES))


def test_rates_whose_quotient_no_float_holds_are_compared() -> None:
    for wanted, rate in ((1e200, 1e-200), (1e-200, 1e200)):
        found = mapped({name: [wanted] for name in ONES})
        evidence = Evidence.empty(found).appended(0, found, measurement(dict.fromkeys(ONES, rate)))
        expected = math.log(wanted) - math.log(rate)
        assert evidence.log_quotients.tolist() == [[pytest.approx(expected, rel=1e-14)] * 4]


def test_an_error_that_is_not_known_is_taken_to_be_the_others_of_its_kind() -> None:
    """A kind with errors e and unknown has the variance of two errors e: 2 e^2 / 2, and not half of that."""
    found, error = mapped(ONES), 0.2
    rates = dict.fromkeys(ONES, 0.5)
    known, partly = measurement(rates, error), measurement(rates, error)
    partly.standard_errors.update({"h.1.A": math.nan, "h.1.B": math.nan})
    results = [Evidence.empty(found).appended(0, found, one).mean_log_scales(found, "kind") for one in (known, partly)]
    assert results[0] == results[1]
    assert results[0]["h.*.A"] == pytest.approx((math.log(2.0), error))


def test_a_share_of_a_tensor_has_that_share_of_its_rate() -> None:
    """Four base blocks to two: half of each target block's update has the rate of one base block."""
    rates = {"h.0.A": [1.0], "h.1.A": [4.0], "h.2.A": [3.0], "h.3.A": [3.0]}
    found = map_profile(RateProfile([0], rates), Blocks(2, "A"), depth="joint")
    measured = measurement({"h.0.A": 0.5, "h.1.A": 2.0})
    evidence = Evidence.empty(found).appended(0, found, measured).estimated(found, pool="unit", beta=0.0)
    logs = dict(zip(evidence.units, evidence.log_scales.tolist(), strict=True))
    wanted = {"h.0.A": 1.0 / 0.25, "h.1.A": 4.0 / 0.25, "h.2.A": 3.0, "h.3.A": 3.0}
    assert {name: math.exp(log) for name, log in logs.items()} == pytest.approx(wanted, rel=1e-12)
    assert found.tensor_scales(logs) == pytest.approx({"h.0.A": math.sqrt(4.0 * 16.0), "h.1.A": 3.0}, rel=1e-12)


def test_scales_of_a_run_do_not_weigh_measurements_by_the_learning_rate() -> None:
    found = mapped(ONES)
    results = []
    for weights in ((1.0, 1.0), (1e-3, 1.0)):
        evidence = Evidence.empty(found)
        for step, rate in enumerate((0.9, 0.4)):
            evidence = evidence.appended(step, found, measurement(dict.fromkeys(ONES, rate), 0.1), weights[step])
        results.append(evidence.estimated(found).log_scales.tolist())
    assert results[0] == results[1]
    assert results[0][0] > 0


def test_mean_log_scales_leave_out_what_could_not_be_compared() -> None:
    found = mapped(ONES)
    rates = {"h.0.A": 0.0, "h.1.A": 0.0, "h.0.B": 0.5, "h.1.B": 0.5}
    means = Evidence.empty(found).appended(0, found, measurement(rates, 0.1)).mean_log_scales(found, "kind")
    assert set(means) == {"h.*.B"}


def test_scatter_beyond_the_known_errors_adds_to_them() -> None:
    """Two measurements, 0 and 2, of known variances 0.1 and 0.5, that count 1 and 3: every step by hand."""
    values = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    known = torch.tensor([[0.1], [0.5]], dtype=torch.float64)
    mean, variance = random_effects_mean(values, known, torch.tensor([1.0, 3.0], dtype=torch.float64))
    scatter = (1 * 1.5**2 + 3 * 0.5**2) / (4 - 10 / 4)
    beyond = scatter - (1 * 0.1 + 3 * 0.5) / 4
    precisions = [1 / (0.1 + beyond), 3 / (0.5 + beyond)]
    assert mean.item() == pytest.approx(2 * precisions[1] / sum(precisions), rel=1e-12)
    spread = (precisions[0] ** 2 * (0.1 + beyond) + precisions[1] ** 2 * (0.5 + beyond)) / sum(precisions) ** 2
    assert variance.item() == pytest.approx(spread, rel=1e-12)


def test_known_errors_alone_are_averaged_as_well_as_by_their_inverse_variances() -> None:
    """Simulated without scatter, where the best mean is known: the mean squared error is its variance, 1 / sum(1/v)."""
    generator, repeats, count = torch.Generator().manual_seed(0), 2000, 30
    known = torch.tensor([0.01, 0.09] * (count // 2), dtype=torch.float64).unsqueeze(1).expand(count, 8)
    squares = []
    for _ in range(repeats):
        noise = torch.randn(count, 8, generator=generator, dtype=torch.float64) * known.sqrt()
        mean, _ = random_effects_mean(noise, known, torch.ones(count))
        squares.append(mean.square().mean())
    best = 1 / (1 / known[:, 0]).sum().item()
    plain = known[:, 0].sum().item() / count**2
    loss = torch.stack(squares)
    error = (loss.std() / math.sqrt(repeats)).item()
    assert best - 4 * error < loss.mean().item() < (best + plain) / 2, "the plain mean would have the variance `plain`"
