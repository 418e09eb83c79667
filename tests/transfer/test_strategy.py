"""What a matched run does without options, by what changed since the base: priors, levels and gates in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer
from transformers import Trainer

from hf_flerm import FLeRMConfig, FLeRMTrainer, Measurement, RateProfile, Research, map_profile
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.param_groups import described_groups
from hf_flerm.transfer.evidence import Evidence
from hf_flerm.transfer.mapping import ProfileMap
from hf_flerm.transfer.rules import prior_scales
from hf_flerm.transfer.strategy import Strategy, choose_strategy, is_balanced, log_level, with_scales
from tests.shared.plans import arguments, lora, recorded
from tests.shared.training import Rows, gpt2


class Lion(SGD):
    """A class with the name of a known optimizer."""


TARGETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], type[Optimizer], str, str]] = {
    "nothing": (gpt2, gpt2, AdamW, "hold", "tensor"),
    "width": (gpt2, lambda: gpt2(width=64), AdamW, "hold", "tensor"),
    "depth": (gpt2, lambda: gpt2(layers=6), AdamW, "follow", "tensor"),
    "width and depth": (gpt2, lambda: gpt2(width=64, layers=6), AdamW, "hold", "tensor"),
    "rank": (lora, lambda: lora(rank=8), AdamW, "gate", "tensor"),
    "optimizer": (gpt2, gpt2, Adam, "level", "global"),
    "optimizer and width": (gpt2, lambda: gpt2(width=64), SGD, "level", "global"),
    "optimizer with a rule": (gpt2, gpt2, Lion, "hold", "tensor"),
    "adapter and optimizer with a rule": (lora, gpt2, Lion, "level", "global"),
    "adapter to all weights": (lora, gpt2, AdamW, "level", "global"),
    "all weights to adapter": (gpt2, lora, AdamW, "level", "global"),
    "DoRA": (lora, lambda: lora(use_dora=True), AdamW, "level", "global"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, RateProfile]:
    folder = tmp_path_factory.mktemp("bases")
    return {make: recorded(folder, make()) for make in (gpt2, lora)}


@pytest.mark.parametrize("case", TARGETS)
def test_the_policy_follows_from_what_changed(case: str, bases: Mapping[Any, RateProfile]) -> None:
    base, make, optimizer, policy, granularity = TARGETS[case]
    model = make()
    strategy = choose_strategy(bases[base], model, algorithms(model, optimizer(model.parameters(), lr=0.1)))
    assert (strategy.policy, strategy.granularity) == (policy, granularity), strategy.reason


def test_options_override_the_policy(bases: Mapping[Any, RateProfile]) -> None:
    model = gpt2(width=64)
    optimizer = algorithms(model, AdamW(model.parameters()))
    assert choose_strategy(bases[gpt2], model, optimizer, granularity="module").policy == "follow"
    level = choose_strategy(bases[gpt2], model, optimizer, policy="level")
    assert (level.policy, level.granularity) == ("level", "global")
    unruled = choose_strategy(bases[gpt2], model, optimizer, rules="none")
    assert (unruled.policy, unruled.prior) == ("follow", {})


def test_a_profile_without_shapes_is_followed(bases: Mapping[Any, RateProfile]) -> None:
    base = bases[gpt2]
    bare = RateProfile(base.steps, base.rates, {}, base.joint_rates)
    model = gpt2(width=64)
    strategy = choose_strategy(bare, model, algorithms(model, AdamW(model.parameters())))
    assert strategy.policy == "follow"
    assert set(strategy.prior.values()) == {1.0}


def algorithms(model: nn.Module, optimizer: Optimizer) -> dict[str, str]:
    groups = described_groups(optimizer, trainable_parameters(model))
    return {name: group["optimizer"] for group in groups for name in group["names"]}


def priors(base: RateProfile, model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, float]:
    return prior_scales(base, model, {} if optimizer is None else algorithms(model, optimizer))


def test_wider_matrices_in_blocks_start_at_mups_rate(bases: Mapping[Any, RateProfile]) -> None:
    model = gpt2(width=64)  # 4 times as wide
    found = priors(bases[gpt2], model)
    for name, tensor in trainable_parameters(model).items():
        assert found[name] == (0.25 if ".h." in name and tensor.ndim == 2 else 1.0), name


def test_deeper_blocks_start_at_their_share(bases: Mapping[Any, RateProfile]) -> None:
    found = priors(bases[gpt2], gpt2(layers=6))  # 3 times as deep
    assert {name: scale for name, scale in found.items() if ".h." in name} == pytest.approx(
        dict.fromkeys((name for name in found if ".h." in name), 1 / 3)
    )
    assert {scale for name, scale in found.items() if ".h." not in name} == {1.0}


def test_width_and_depth_multiply(bases: Mapping[Any, RateProfile]) -> None:
    model = gpt2(width=64, layers=6)
    found = priors(bases[gpt2], model)
    assert found["transformer.h.5.mlp.c_fc.weight"] == pytest.approx(0.25 / 3)
    assert found["transformer.h.5.mlp.c_fc.bias"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"rank": 8}, 1.0),  # alpha / r: scaling * rank stays
        ({"lora_alpha": 32}, 0.5),  # alpha from 8 to 32
        ({"rank": 8, "lora_alpha": 32}, 0.5),  # 4 times the rank at the same alpha / r
    ],
)
def test_adapters_start_at_muas_rate(options: dict[str, Any], factor: float, bases: Mapping[Any, RateProfile]) -> None:
    given = {"lora_alpha": 8, **options}
    assert [*priors(bases[lora], lora(**given)).values()] == pytest.approx([factor] * 4)


def test_between_adapter_and_all_weights_a_factor_of_ten(bases: Mapping[Any, RateProfile]) -> None:
    assert set(priors(bases[lora], gpt2()).values()) == {0.1}
    assert set(priors(bases[gpt2], lora()).values()) == {10.0}


def test_lion_starts_at_a_thirtieths_root(bases: Mapping[Any, RateProfile]) -> None:
    model = gpt2()
    found = priors(bases[gpt2], model, Lion(model.parameters(), lr=0.1))
    assert [*found.values()] == pytest.approx([30**-0.5] * len(found))


@pytest.mark.parametrize("adjustment", [None, "match_rms_adamw"])
def test_muon_starts_at_moonlights_step(adjustment: str | None, bases: Mapping[Any, RateProfile]) -> None:
    """With its prior as the learning rate, a step of `torch.optim.Muon` is as large as with `match_rms_adamw`."""
    model = lora()
    tensors = trainable_parameters(model)
    muon = Muon(tensors.values(), lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn=adjustment)
    adjusted = Muon(tensors.values(), lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}

    def step(optimizer: Optimizer) -> dict[str, torch.Tensor]:
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            tensor.grad = gradients[name].clone()
        optimizer.step()
        moved = {name: tensor.detach() - before[name] for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            tensor.data = before[name]
        return moved

    found, own, wanted = priors(bases[lora], model, muon), step(muon), step(adjusted)
    for name in tensors:
        torch.testing.assert_close(found[name] * own[name], wanted[name], rtol=1e-4, atol=1e-6)


class Adapted(nn.Module):
    """A matrix A and a matrix B, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3, 2))
        self.bias = nn.Parameter(torch.zeros(3))


NAMES = ("A", "B", "bias")


def mapped(granularity: str = "tensor", joint: float = 1.0) -> ProfileMap:
    base = RateProfile([0], {key: [1.0] for key in NAMES}, None, {"global": {"": [joint]}})
    return map_profile(base, Adapted(), granularity=granularity)


def measured(rates: Mapping[str, float]) -> Measurement:
    """Exact rates of tensors that do not interact."""
    inner = torch.tensor(list(rates.values()), dtype=torch.float64).square().diag()
    return Measurement(dict(rates), dict.fromkeys(rates, 0.0), dict.fromkeys(rates, "exact"), 1, inner)


def joint_evidence(levels: Mapping[int, float]) -> tuple[Evidence, ProfileMap]:
    """Evidence with log(base's joint rate / target's joint rate) at some steps."""
    found = mapped("global")
    evidence = Evidence.empty(found)
    for step, level in levels.items():
        rates = dict.fromkeys(NAMES, math.exp(-level) / 3**0.5)
        evidence = evidence.appended(step, found, measured(rates), in_force=dict.fromkeys(NAMES, 1.0))
    return evidence, found


def shrunk(mean: float, variance: float) -> float:
    return mean * max(0.0, 1 - (variance / mean**2) ** 2)


@pytest.mark.parametrize("level", [-2.0, -0.6, 0.55, 1.0, 3.0])
def test_a_level_is_shrunk_by_the_methods_error(level: float) -> None:
    evidence, _ = joint_evidence({16: level, 24: level})
    found, error = log_level(evidence)
    assert error == pytest.approx(0.5, rel=1e-6)
    assert found == pytest.approx(shrunk(level, 0.25), rel=1e-6)


@pytest.mark.parametrize("levels", [{0: 3.0, 8: 3.0, 15: 3.0}, {16: 0.5}, {16: -0.49, 32: -0.49}])
def test_early_steps_and_small_levels_move_nothing(levels: dict[int, float]) -> None:
    evidence, found = joint_evidence(levels)
    assert log_level(evidence)[0] == 0.0
    strategy = Strategy("level", "global", {}, "")
    assert with_scales(evidence, found, strategy).log_scales.tolist() == [0.0]


def test_later_levels_count_more_up_to_step_64() -> None:
    """Weights of 17^2, 65^2 and 65^2; the scatter between steps adds to the variance."""
    values = {16: 1.0, 64: 2.0, 1000: 2.5}
    evidence, _ = joint_evidence(values)
    w = torch.tensor([17.0**2, 65.0**2, 65.0**2], dtype=torch.float64)
    y = torch.tensor(list(values.values()), dtype=torch.float64)
    mean = (w @ y) / w.sum()
    scatter = (w @ (y - mean).square()) / (w.sum() - w.square().sum() / w.sum())
    variance = (w.square().sum() / w.sum() ** 2 * scatter).item() + 0.25
    found, error = log_level(evidence)
    assert error == pytest.approx(variance**0.5)
    assert found == pytest.approx(shrunk(mean.item(), variance))


def test_a_level_obeys_max_change_from_the_first_one_on() -> None:
    found, strategy = mapped("global"), Strategy("level", "global", {}, "")
    evidence, seen = Evidence.empty(found), []
    for step in (16, 24, 32):
        evidence = evidence.appended(
            step, found, measured(dict.fromkeys(NAMES, 1e-3)), in_force=dict.fromkeys(NAMES, 1.0)
        )
        evidence = with_scales(evidence, found, strategy, max_change=4.0)
        seen.append(math.exp(evidence.log_level))
    assert seen == pytest.approx([4.0, 16.0, 64.0])


def test_a_level_does_not_depend_on_the_scales_in_force() -> None:
    """Rates are per unit of each tensor's own learning rate; the joint rate counts every tensor at its scale."""
    found = mapped("global", joint=2.0)
    rates = {"A": 3.0, "B": 4.0, "bias": 0.0}
    scales = {"A": 0.5, "B": 2.0, "bias": 1.0}
    evidence = Evidence.empty(found).appended(16, found, measured(rates), in_force=scales)
    assert evidence.levels.tolist() == [pytest.approx(math.log(2.0 / math.hypot(0.5 * 3.0, 2.0 * 4.0)))]


def test_levels_survive_the_record() -> None:
    evidence, found = joint_evidence({4: 1.0, 16: 2.0})
    evidence = with_scales(evidence, found, Strategy("level", "global", {}, ""))
    again = Evidence.from_record(evidence.to_record(), found)
    assert (again.levels.tolist(), again.log_level) == (evidence.levels.tolist(), evidence.log_level)
    assert evidence.log_level > 0
    old = {key: value for key, value in evidence.to_record().items() if "level" not in key}  # of version 0.1
    assert Evidence.from_record(old, found).levels.isnan().all()


@pytest.mark.parametrize(
    ("rates", "balanced"),
    [
        ({"A": 1.0, "B": 1 / 2.6, "bias": 1.0}, True),  # what PEFT's default shows where nothing is wrong
        ({"A": 1.0, "B": 1 / 6.0, "bias": 1.0}, False),
        ({"A": 20.0, "B": 20.0, "bias": 1.0}, True),  # both alike: that is no balance
        ({"A": 1.0, "B": 1.0, "bias": 100.0}, True),  # vectors do not count
        ({"A": 0.0, "B": 1 / 32, "bias": 1.0}, False),  # the first step of a Gaussian A at 16 times the rank
        ({"A": 0.0, "B": 1 / 2.0, "bias": 1.0}, True),
    ],
)
def test_balance_is_judged_by_matrices_apart_from_what_they_share(rates: dict[str, float], balanced: bool) -> None:
    found = mapped()
    evidence = Evidence.empty(found).appended(0, found, measured(rates))
    assert is_balanced(evidence, found, Strategy("gate", "tensor", {}, "")) is balanced


@pytest.mark.parametrize(("rules", "prior"), [("published", 1 / 8), ("none", 1.0)])
def test_what_a_larger_scaling_asks_of_b_is_no_imbalance(
    rules: str, prior: float, bases: Mapping[Any, RateProfile]
) -> None:
    """At 64 times the scaling B moves the outputs 64 times as far, and A 64 lr times, as B has grown with lr."""
    base, model = bases[lora], lora(lora_alpha=16 * 64)
    found = map_profile(base, model)
    strategy = choose_strategy(base, model, algorithms(model, AdamW(model.parameters())), rules=rules)
    assert strategy.policy == "gate"
    rates = {name: base.rates[name][-1].item() for name in base.rates}
    kinds = {name: 64.0 if "lora_B" in name else 64.0 * prior for name in rates}
    step = int(base.steps[-1])
    grown = measured({name: rate * kinds[name] for name, rate in rates.items()})
    alike = measured({name: rate * 64.0 * prior for name, rate in rates.items()})
    assert is_balanced(Evidence.empty(found).appended(step, found, grown), found, strategy)
    assert is_balanced(Evidence.empty(found).appended(step, found, alike), found, strategy) is (rules == "none")


def test_a_gate_holds_the_prior_until_the_balance_is_lost_and_follows_from_then_on() -> None:
    found = mapped()
    prior = dict.fromkeys(NAMES, 0.5)
    strategy = Strategy("gate", "tensor", prior, "")
    evidence = Evidence.empty(found)
    seen = []
    even, uneven = dict.fromkeys(NAMES, 1.0), {"A": 1.0, "B": 1 / 200, "bias": 1.0}
    for step, rates in enumerate([even, *[uneven] * 4, *[even] * 8]):
        evidence = with_scales(evidence.appended(step, found, measured(rates)), found, strategy)
        seen.append(evidence.log_scales.exp().tolist())
    assert seen[0] == pytest.approx([0.5] * 3)
    assert is_balanced(evidence, found, strategy)  # all steps together
    assert seen[4][1] > 2.0
    assert all(scales[1] > 0.5 + 1e-3 for scales in seen[4:])


def trained(folder: Path, model: nn.Module, flerm: FLeRMConfig, optimizer: Optimizer) -> FLeRMTrainer:
    args = arguments(folder, max_steps=20)
    trainer = FLeRMTrainer(model=model, args=args, train_dataset=Rows(), flerm=flerm, optimizers=(optimizer, None))
    trainer.train()
    return trainer


def test_where_nothing_changed_training_is_bit_identical(tmp_path: Path, bases: Mapping[Any, RateProfile]) -> None:
    plain, matched = gpt2(), gpt2()
    optimizers = (AdamW(plain.parameters(), lr=1e-2), None)
    Trainer(plain, arguments(tmp_path, max_steps=20), train_dataset=Rows(), optimizers=optimizers).train()
    config = FLeRMConfig(mode="match", profile=bases[gpt2], metric="euclidean")
    trainer = trained(tmp_path, matched, config, AdamW(matched.parameters(), lr=1e-2))
    assert set(trainer.flerm_callback.scales.values()) == {1.0}
    for one, other in zip(plain.parameters(), matched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_optimizer_is_put_at_the_bases_level(tmp_path: Path, bases: Mapping[Any, RateProfile]) -> None:
    """SGD at AdamW's learning rate moves the outputs far too little; all tensors are raised by one factor."""
    model = gpt2()
    config = FLeRMConfig(
        mode="match", profile=bases[gpt2], metric="euclidean", max_change=1e6, research=Research(probes=4)
    )
    trainer = trained(tmp_path, model, config, SGD(model.parameters(), lr=1e-2))
    (scale,) = set(trainer.flerm_callback.scales.values())
    evidence = trainer.flerm_callback.evidence
    assert evidence is not None
    assert evidence.steps == (0, 1, 2, 4, 8, 12, 16)
    variance = 2 * evidence.level_errors[-1].item() ** 2 + 0.25
    assert scale == pytest.approx(math.exp(shrunk(evidence.levels[-1].item(), variance)))
    assert scale > 2.0
