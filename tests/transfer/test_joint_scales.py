"""Scales of several tensors together: when the first one is taken, and how far it may go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from torch import nn

from hf_flerm import FLeRMConfig, FLeRMTrainer, Measurement, RateProfile, Research, map_profile, plan
from hf_flerm.transfer.evidence import Evidence
from hf_flerm.transfer.mapping import ProfileMap
from tests.shared.training import Rows, arguments, flerm_callback, gpt2, make_trainer

NAMES = ("A", "B", "bias")


class Adapted(nn.Module):
    """Two blocks h.0 and h.1, each with matrices A and B and a bias."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"A": (2, 3), "B": (3, 2), "bias": (3,)}
        blocks = [{name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()} for _ in range(2)]
        self.h = nn.ModuleList(nn.ParameterDict(block) for block in blocks)


def measurement(**rates: float) -> Measurement:
    """Rates by the last part of the name, the same in both blocks, of tensors that do not interact."""
    by_name = {f"h.{block}.{part}": rate for block in range(2) for part, rate in rates.items()}
    inner_products = torch.tensor(list(by_name.values()), dtype=torch.float64).square().diag()
    return Measurement(by_name, dict.fromkeys(by_name, 0.0), dict.fromkeys(by_name, "exact"), 1, inner_products)


def mapped(granularity: str, rate: float = 1.0, **options: Any) -> ProfileMap:
    """A base with this rate of every tensor, module and block, and of everything."""
    names = [f"h.{block}.{name}" for block in range(2) for name in NAMES]
    blocks = {"h.0": [rate], "h.1": [rate]}
    joint = {"module": blocks, "block": blocks, "global": {"": [rate]}}
    base = RateProfile([0], {name: [rate] for name in names}, {}, joint)
    return map_profile(base, Adapted(), granularity=granularity, **options)


def scales(found: ProfileMap, history: Mapping[int, Measurement], **options: Any) -> list[float]:
    """Scales of the units after these measurements, by the latest one alone."""
    evidence = Evidence.empty(found)
    for step, measured in history.items():
        evidence = evidence.appended(step, found, measured).estimated(found, beta=0.0, **options)
    return evidence.log_scales.exp().tolist()


JOINT = ["module", "block", "global"]


@pytest.mark.parametrize("granularity", JOINT)
@pytest.mark.parametrize("still", ["A", "B"])
def test_no_joint_scale_is_taken_while_half_of_the_matrices_stand_still(granularity: str, still: str) -> None:
    found = mapped(granularity)
    first = measurement(**{"A": 0.01, "B": 0.01, "bias": 0.01, still: 0.0})
    then = measurement(A=0.3, B=0.4, bias=0.0)
    number = math.sqrt(2) if granularity == "global" else 1.0  # of blocks together that do not interact
    assert scales(found, {0: first}) == [1.0] * len(found.units)
    assert scales(found, {0: first, 1: then}) == pytest.approx([2.0 / number] * len(found.units))


@pytest.mark.parametrize("granularity", JOINT)
@pytest.mark.parametrize("rate", [0.01, 100.0])
def test_a_joint_scale_obeys_max_change_from_the_first_one_on(granularity: str, rate: float) -> None:
    found = mapped(granularity)
    measured = measurement(A=rate, B=rate, bias=0.0)
    change = 4.0 if rate < 1 else 0.25
    units = len(found.units)
    assert scales(found, {0: measured}, max_change=4.0) == pytest.approx([change] * units)
    assert scales(found, {0: measured, 1: measured}, max_change=4.0) == pytest.approx([change**2] * units)


def test_the_first_scale_of_a_single_tensor_may_be_large() -> None:
    found = mapped("tensor")
    measured = measurement(A=0.0, B=0.025, bias=1.0)
    by_unit = dict(zip(found.units, scales(found, {0: measured}, max_change=4.0), strict=True))
    assert by_unit == pytest.approx(
        {f"h.{block}.{n}": s for block in range(2) for n, s in zip(NAMES, (1, 40, 1), strict=True)}
    )


@pytest.mark.parametrize("granularity", JOINT)
def test_a_bias_that_never_moves_holds_nothing_up(granularity: str) -> None:
    """The bias of an attention's keys."""
    found = mapped(granularity)
    number = math.sqrt(2) if granularity == "global" else 1.0
    assert scales(found, {0: measurement(A=0.3, B=0.4, bias=0.0)}) == pytest.approx([2.0 / number] * len(found.units))


def test_vectors_count_where_there_are_only_vectors() -> None:
    """As in VeRA: one of the two vectors of a layer starts at 0."""

    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.d = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2))

    base = RateProfile([0], {"b": [1.0], "d": [1.0]}, {}, {"global": {"": [1.0]}})
    found = map_profile(base, Vectors(), granularity="global")
    inner_products = torch.tensor([[0.01, 0.0], [0.0, 0.0]], dtype=torch.float64)
    rates = {"b": 0.1, "d": 0.0}
    measured = Measurement(rates, dict.fromkeys(rates, 0.0), dict.fromkeys(rates, "exact"), 1, inner_products)
    assert scales(found, {0: measured}) == [1.0]


def test_what_still_stands_still_after_eight_steps_is_not_waited_for() -> None:
    """LoRA-FA trains B alone: its joint rate is that of B for good."""
    found = mapped("module")
    alone = measurement(A=0.0, B=0.5, bias=0.0)
    warm_up = 100  # steps before the first measurement
    assert scales(found, {warm_up: alone, warm_up + 7: alone}) == [1.0, 1.0]
    assert scales(found, {warm_up: alone, warm_up + 8: alone}) == pytest.approx([2.0, 2.0])


def test_a_resumed_run_waits_as_the_whole_run_does() -> None:
    found = mapped("module")
    alone = measurement(A=0.0, B=0.5, bias=0.0)
    evidence = Evidence.empty(found).appended(0, found, alone)
    resumed = Evidence.from_record(evidence.to_record(), found)
    for step, is_compared in ((4, False), (8, True)):
        logs, whole = (run.appended(step, found, alone).log_quotients for run in (resumed, evidence))
        assert bool(logs[-1].isfinite().all()) == is_compared
        assert logs[-1].nan_to_num().tolist() == whole[-1].nan_to_num().tolist()


def adapted(rank: int, kind: str = "lora", **options: Any) -> nn.Module:
    torch.manual_seed(1)
    targets: dict[str, Any] = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    makers: dict[str, Callable[[], Any]] = {
        "lora": lambda: LoraConfig(r=rank, **{**targets, **options}),
        "gaussian": lambda: LoraConfig(r=rank, init_lora_weights="gaussian", **{**targets, **options}),
        "dora": lambda: LoraConfig(r=rank, use_dora=True, **targets),
        "biases": lambda: LoraConfig(r=rank, bias="all", **targets),
        "embedding": lambda: LoraConfig(r=rank, target_modules=["wte"]),
        "adalora": lambda: AdaLoraConfig(init_r=rank, total_step=100, **targets),
        "vera": lambda: VeraConfig(r=rank, target_modules=["c_proj"], fan_in_fan_out=True),
    }
    return get_peft_model(gpt2(), makers[kind]())


def matched(folder: Path, base: nn.Module, target: nn.Module, steps: int = 2, **options: Any) -> FLeRMTrainer:
    """Both models learn from the first step on; every step is measured."""
    schedule = {"max_steps": steps, "lr_scheduler_type": "constant"}
    recording = make_trainer(folder / "base", base, FLeRMConfig(), **schedule)
    recording.train()
    profile = flerm_callback(recording).rate_profile
    trainer = make_trainer(folder / "target", target, FLeRMConfig(mode="match", profile=profile, **options), **schedule)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("kind", "granularity"),
    [
        ("lora", "module"),
        ("gaussian", "global"),
        ("dora", "block"),
        ("biases", "global"),
        ("embedding", "module"),  # here A is 0 and B random
        ("adalora", "global"),
        ("vera", "module"),
    ],
)
def test_runs_of_adapters_compare_no_joint_rate_of_their_first_step(
    tmp_path: Path, kind: str, granularity: str
) -> None:
    trainer = matched(tmp_path, adapted(2, kind), adapted(8, kind), granularity=granularity)
    callback = flerm_callback(trainer)
    units = map_profile(callback.config.profile, trainer.model, granularity=granularity).units
    assert any(unit.is_joint for unit in units.values())
    assert callback.evidence.log_quotients[0].isnan().all()
    assert callback.evidence.log_quotients[1].isfinite().all()
    assert max(abs(math.log(scale)) for scale in callback.scales.values()) <= math.log(4.0) * (1 + 1e-12)


def test_the_scale_of_everything_for_unmatched_tensors_waits_and_is_bounded(tmp_path: Path) -> None:
    base, target = adapted(2, "gaussian", target_modules=["c_attn"]), adapted(32, "gaussian")
    options: dict[str, Any] = {"unmatched": "global", "research": Research(beta=0.0)}
    first = matched(tmp_path / "1", base, target, steps=1, **options)
    scales = flerm_callback(first).scales
    assert {scale for name, scale in scales.items() if "c_proj" in name} == {1.0}
    assert max(scale for name, scale in scales.items() if "c_attn" in name) > 2.0, "single tensors do not wait"
    base, target = adapted(2, "gaussian", target_modules=["c_attn"]), adapted(32, "gaussian")
    (second,) = {
        scale
        for name, scale in flerm_callback(matched(tmp_path / "2", base, target, **options)).scales.items()
        if "c_proj" in name
    }
    assert 0.25 * (1 - 1e-12) <= second <= 4.0 * (1 + 1e-12)
    assert second != 1.0


def test_a_plan_of_one_step_says_that_adapters_need_more(tmp_path: Path) -> None:
    recording = make_trainer(tmp_path, adapted(2), FLeRMConfig(), max_steps=2)
    recording.train()
    profile = flerm_callback(recording).rate_profile
    with pytest.raises(ValueError, match=r"in 1 steps.*LoRA's A while B is 0.*Give more steps"):
        plan(adapted(4), arguments(tmp_path, max_steps=2), Rows(), profile, steps=1)
    found = plan(adapted(4), arguments(tmp_path, max_steps=2), Rows(), profile, steps=2)
    assert found.evidence.log_quotients[0].isnan().all()
