"""`plan`: what it recommends where the answer is known, and that it leaves no trace."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_flerm import FLeRMConfig, RateProfile, RateProfileError, plan
from hf_flerm.planning.plan import Multiplier, advise
from hf_flerm.transfer.rules import Change
from hf_flerm.transfer.strategy import Strategy
from tests.shared.plans import LEARNING_RATE, arguments, lora, planned, recorded, sgd
from tests.shared.training import Rows, gpt2


def test_a_model_is_told_to_keep_its_own_learning_rate(tmp_path: Path) -> None:
    base = recorded(tmp_path, lora())
    advice = planned(tmp_path, lora(), base)
    assert advice.learning_rate == pytest.approx(LEARNING_RATE)
    assert advice.advised.value == 1.0
    assert advice.keeps
    assert advice.decision == "keep"
    assert str(advice).startswith("Keep 0.01.\nNeither size, adapter nor optimizer changed (the measured factor")


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_a_known_factor_is_found(tmp_path: Path, factor: float) -> None:
    """A base whose rates are so many times the target's own wants so many times its learning rate."""
    model = gpt2()
    base = recorded(tmp_path, model, optimizers=(sgd(model), None))
    times = RateProfile(
        base.steps,
        {name: rates * factor for name, rates in base.rates.items()},
        base.metadata,
        {key: {path: rates * factor for path, rates in groups.items()} for key, groups in base.joint_rates.items()},
    )
    advice = planned(tmp_path, gpt2(), times, optimizer=sgd)
    assert abs(math.log(advice.overall.value / factor)) < 4 * advice.overall.error + 0.3
    assert advice.learning_rate == advice.base_learning_rate * advice.advised.value
    assert advice.decision == "one"
    assert 0.5 < advice.advised.value / factor < 2.0
    for multiplier in advice.multipliers.values():
        assert 0.2 < multiplier.value / factor < 5.0


def test_measurements_count_by_learning_rate_and_step(tmp_path: Path) -> None:
    """Of a training that moves next to nothing: its first scales cannot act on what is measured later."""
    base = recorded(tmp_path, gpt2())
    groups = [{**group, "learning_rate": 1e-5} for group in base.metadata["param_groups"]]
    told = {**base.metadata, "param_groups": groups}
    steps, factor = 6, 9.0
    weights = [(step + 1) * (1 - step / 8) for step in range(steps)]  # of a linear schedule over 8 steps

    def times(step: int | None) -> RateProfile:
        by_step = torch.ones(len(base.steps), dtype=torch.float64)
        if step is not None:
            by_step[step] = factor
        joint = {key: {p: rates * by_step for p, rates in of.items()} for key, of in base.joint_rates.items()}
        return RateProfile(base.steps, {n: rates * by_step for n, rates in base.rates.items()}, told, joint)

    plain = planned(tmp_path, gpt2(), times(None)).overall.value
    for step in (0, steps - 1):
        found = math.log(planned(tmp_path, gpt2(), times(step)).overall.value / plain) / math.log(factor)
        assert found == pytest.approx(weights[step] / sum(weights), rel=0.15)


class Drawn(Rows):
    """Rows by random numbers of the data set's own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(7)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(self.generator.randrange(len(self)))


def test_planning_leaves_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = recorded(tmp_path / "base", lora())
    model, folder = lora(rank=4), tmp_path / "plan"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    args = arguments(folder, save_strategy="steps", save_steps=1)
    capsys.readouterr()
    plan(model, args, rows := Drawn(), base, steps=3)
    assert rows.generator.getstate() == Drawn().generator.getstate()
    assert capsys.readouterr().out == ""
    drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not folder.exists() or not any(folder.iterdir())
    assert (args.output_dir, args.learning_rate) == (str(folder), LEARNING_RATE)


def test_what_is_measured_is_what_the_profile_has(tmp_path: Path) -> None:
    base = recorded(tmp_path, lora(), metric="fisher")
    args = arguments(tmp_path)
    advice = plan(lora(rank=4), args, Rows(), base, steps=3)
    same = plan(lora(rank=4), args, Rows(), base, steps=3, config=FLeRMConfig(metric="fisher"))
    assert advice.to_dict() == same.to_dict()
    with pytest.raises(RateProfileError, match="recorded with metric='fisher', this run has 'euclidean'"):
        plan(lora(rank=4), args, Rows(), base, steps=3, config=FLeRMConfig(metric="euclidean"))


def test_another_adapter_is_matched_by_module(tmp_path: Path) -> None:
    base = recorded(tmp_path, lora())
    advice = planned(tmp_path, lora(use_dora=True), base)
    assert set(advice.multipliers) == {"transformer.h.*.attn.c_attn"}
    assert advice.change.target_adapter == "DORA"


def test_the_average_of_runs_of_one_learning_rate_has_that_one(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    other = RateProfile(base.steps, base.rates, base.metadata | {"training_arguments": {}}, base.joint_rates)
    other.metadata["training_arguments"] = base.metadata["training_arguments"] | {"seed": 1}
    average = RateProfile.average([base, other])
    args = arguments(tmp_path, learning_rate=1.0)
    assert plan(gpt2(width=32), args, Rows(), average, steps=1).base_learning_rate == LEARNING_RATE


def test_a_training_that_is_shorter_or_begins_with_an_evaluation(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_on_start=True)
    assert plan(gpt2(width=32), args, Rows(), base, steps=6).steps == 2
    with pytest.raises(ValueError, match="steps is 0"):
        plan(gpt2(width=32), args, Rows(), base, steps=0)


def test_a_profile_without_a_learning_rate_that_moves_is_refused(tmp_path: Path) -> None:
    base = recorded(tmp_path, lora())
    args = arguments(tmp_path, warmup_steps=8, lr_scheduler_type="linear", max_steps=100)
    with pytest.raises(ValueError, match="nothing could be measured in 1 steps"):
        plan(lora(rank=4), args, Rows(), base, steps=1)


LORA = Change(rank=4.0, scaling=0.25, base_adapter="LORA", target_adapter="LORA")


def gated(value: float, variance: float) -> float:
    log = math.log(value)
    return math.exp(log * max(0.0, 1 - (variance / log**2) ** 2))


@pytest.mark.parametrize(
    ("change", "policy", "value", "advised"),
    [
        (Change(), "hold", 0.5, 1.0),  # within a factor of 2, the method's error where nothing changed
        (Change(), "hold", 10.0, gated(10.0, 0.7**2 + 0.1**2)),
        (Change(width=4.0), "hold", 1.0, 0.5),  # between muP's 1/4 and 1
        (Change(width=4.0), "hold", 0.25, 0.25),
        (Change(depth=3.0), "follow", math.e, math.exp(1 / (1 + 0.4**2 + 0.1**2))),
        (LORA, "gate", 1.5, 1.0),
        (LORA, "gate", 12.0, gated(12.0, 0.4**2 + 0.1**2)),
        (Change(base_optimizer="AdamW", target_optimizer="SGD"), "level", 16.0, gated(16.0, 0.4**2 + 0.1**2)),
    ],
)
def test_advice_in_closed_form(change: Change, policy: str, value: float, advised: float) -> None:
    found = advise(Multiplier(value, 0.1), change, policy)
    assert found.value == pytest.approx(advised)
    assert found.error == pytest.approx(math.hypot(0.1, 0.25))


@pytest.mark.parametrize(
    ("policy", "prior", "balanced", "value", "decision"),
    [
        ("gate", 1.0, True, 1.1, "keep"),
        ("gate", 1.0, True, 5.0, "one"),
        ("gate", 1.0, False, 1.1, "match"),
        ("level", 1.0, True, 5.0, "one"),
        ("level", 1.0, False, 1.1, "keep"),  # one factor for all is what a matched run takes, too
        ("follow", 1.0, True, 1.1, "match"),
        ("hold", 1.0, True, 1.1, "keep"),
        ("hold", 0.25, True, 1.1, "match"),  # of one tensor alone
    ],
)
def test_the_decision_is_what_a_matched_run_does(
    policy: str, prior: float, balanced: bool, value: float, decision: str, tmp_path: Path
) -> None:
    found = planned(tmp_path, lora(rank=4), recorded(tmp_path, lora()))
    names = list(found.strategy.prior)
    strategy = Strategy(policy, "tensor", {**dict.fromkeys(names, 1.0), names[0]: prior}, "it is so")
    found = replace(found, strategy=strategy, is_balanced=balanced, overall=Multiplier(value, 0.1))
    assert found.decision == found.to_dict()["decision"] == decision
    assert found.keeps == (decision == "keep")


def test_the_text_begins_with_decision_reason_range_and_rule(tmp_path: Path) -> None:
    found = planned(tmp_path, gpt2(width=32), recorded(tmp_path, gpt2()))
    assert found.decision == "match"
    level = replace(found, strategy=Strategy("level", "global", {}, "the optimizer changed"))
    keep, use = (replace(level, overall=Multiplier(value, 0.1)) for value in (1.1, 0.25))
    first, reason, spread, *rules = str(keep).splitlines()[:6]
    assert first == "Keep 0.01."
    assert reason == keep.reason
    low, high = (0.01 * math.exp(sign * math.hypot(0.1, 0.25)) for sign in (-1, 1))
    assert keep.range == pytest.approx((low, high))
    assert spread == f"68 % range of the learning rate for all tensors: {low:.3g} to {high:.3g}."
    assert rules[0].startswith("A published rule says 0.005: muP: hidden matrices at lr / width (AdamW)")
    assert str(use).splitlines()[:2] == [f"Use {use.learning_rate:.3g} for all tensors.", use.reason]
    assert "would change the outputs 4 times as much as in the base run" in use.reason
    assert str(found).splitlines()[0] == "Match: one number cannot do it, kinds differ by 2x."
    assert found.reason.startswith("The width changed, where muP's rule predicts better than rates; without matching,")


def test_steps_are_refused_by_their_own_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^steps is 0; it must be a whole number of at least 1"):
        plan(gpt2(), arguments(tmp_path), Rows(), "no profile", steps=0)
