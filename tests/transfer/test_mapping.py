"""Profiles on other models: which rates stand for which tensors, and that totals are kept."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_flerm import RateProfile, RateProfileError, Research, map_profile, measure_rates
from hf_flerm.choices import Depth, Granularity, Unmatched, values
from hf_flerm.model.names import tensor_places, trainable_parameters
from hf_flerm.transfer.mapping import joint_groups


class Stacks(nn.Module):
    """Blocks in stacks of any name, each with a weight and a bias, between an input and an output."""

    def __init__(self, **depths: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(3, 3)
        for name, depth in depths.items():
            self.add_module(name, nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(3, 3)}) for _ in range(depth)))


def llama(layers: int = 2, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=32,
        )
    )


def lora(rank: int = 2, layers: int = 2, name: str = "default", **options: object) -> nn.Module:
    config = LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], **options)
    return get_peft_model(llama(layers), config, adapter_name=name)


def profile(model: nn.Module, steps: int = 2) -> RateProfile:
    """Different rates everywhere; joint rates as if tensors did not interact."""
    generator = torch.Generator().manual_seed(0)
    rates = {
        name: torch.rand(steps, generator=generator, dtype=torch.float64) + 0.1 for name in trainable_parameters(model)
    }
    joint = {
        granularity: {path: sum(rates[name] ** 2 for name in names) ** 0.5 for path, names in groups.items()}
        for granularity, groups in joint_groups(model, rates).items()
    }
    return RateProfile(
        range(steps),
        rates,
        {"shapes": {name: list(parameter.shape) for name, parameter in trainable_parameters(model).items()}},
        joint,
    )


def kind_totals(found: RateProfile, power: int, part: str) -> torch.Tensor:
    return sum(rates**power for name, rates in found.rates.items() if part in name and "weight" in name)


@pytest.mark.parametrize("depth", values(Depth))
@pytest.mark.parametrize("granularity", values(Granularity))
def test_a_model_stands_for_itself(granularity: str, depth: str) -> None:
    base = profile(Stacks(layers=3))
    found = map_profile(base, Stacks(layers=3), granularity=granularity, depth=depth)
    wanted = base.rates if granularity == "tensor" else base.joint_rates[granularity]
    assert {unit.name: unit.rates.tolist() for unit in found.units.values()} == {
        n: r.tolist() for n, r in wanted.items()
    }
    shares = [share for unit in found.units.values() for share in unit.shares.values()]
    assert shares == [1.0] * len(trainable_parameters(Stacks(layers=3)))
    assert (found.unmatched, found.unused) == ((), ())


@pytest.mark.parametrize(("depth", "power"), [("equal", 1), ("sqrt", 2)])
@pytest.mark.parametrize(("before", "after"), [(2, 4), (2, 3), (3, 2), (4, 2), (1, 5), (5, 3)])
def test_splitting_keeps_the_total_of_every_kind(before: int, after: int, depth: str, power: int) -> None:
    base = profile(Stacks(layers=before))
    split = map_profile(base, Stacks(layers=after), depth=depth).profile
    torch.testing.assert_close(
        kind_totals(split, power, "layers"), kind_totals(base, power, "layers"), rtol=1e-12, atol=0
    )
    assert torch.equal(split.rates["inputs.weight"], base.rates["inputs.weight"])


def test_a_block_is_split_equally_unless_said_otherwise() -> None:
    base, model = profile(Stacks(layers=2)), Stacks(layers=4)
    units = map_profile(base, model).units
    assert units.keys() == trainable_parameters(model).keys()
    assert torch.equal(units["layers.3.fc.bias"].rates, base.rates["layers.1.fc.bias"] / 2)
    assert Research().depth == map_profile(base, model).depth


@pytest.mark.parametrize(("depth", "power"), [("equal", 1), ("sqrt", 2)])
def test_whole_multiples_keep_the_total_of_every_base_block(depth: str, power: int) -> None:
    base = profile(Stacks(layers=2))
    split = map_profile(base, Stacks(layers=6), depth=depth).profile
    for block in range(2):
        copies = [split.rates[f"layers.{3 * block + copy}.fc.weight"] for copy in range(3)]
        assert all(torch.equal(copy, copies[0]) for copy in copies)
        total = sum(copy**power for copy in copies) ** (1 / power)
        torch.testing.assert_close(total, base.rates[f"layers.{block}.fc.weight"], rtol=1e-12, atol=0)


def test_a_block_between_two_base_blocks_has_half_of_each() -> None:
    base = profile(Stacks(layers=2))
    first, second = (base.rates[f"layers.{block}.fc.weight"] for block in range(2))
    split = map_profile(base, Stacks(layers=3), depth="equal").profile
    for block, expected in enumerate((first * 2 / 3, (first + second) / 3, second * 2 / 3)):
        torch.testing.assert_close(split.rates[f"layers.{block}.fc.weight"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("depth", ["equal", "sqrt", "copy"])
@pytest.mark.parametrize("factor", [2, 3])
def test_there_and_back_returns_the_profile(depth: str, factor: int) -> None:
    base = profile(Stacks(layers=4))
    there = map_profile(base, Stacks(layers=4 * factor), depth=depth).profile
    back = map_profile(there, Stacks(layers=4), depth=depth).profile
    for name, rates in base.rates.items():
        torch.testing.assert_close(back.rates[name], rates, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("before", "after"), [(2, 4), (2, 3), (3, 2), (4, 2), (1, 5)])
def test_jointly_matched_blocks_belong_to_base_blocks_in_whole(before: int, after: int) -> None:
    base = profile(Stacks(layers=before))
    found = map_profile(base, Stacks(layers=after), depth="joint")
    totals: dict[str, float] = {}
    for unit in found.units.values():
        assert torch.equal(unit.rates, base.rates[unit.name])
        for name, share in unit.shares.items():
            totals[name] = totals.get(name, 0.0) + share
    assert totals == pytest.approx(dict.fromkeys(trainable_parameters(Stacks(layers=after)), 1.0))
    logs = dict.fromkeys(found.units, 0.5)
    assert found.tensor_scales(logs) == pytest.approx(dict.fromkeys(totals, math.exp(0.5)))


def test_copies_that_move_together_have_the_base_tensors_rate() -> None:
    """With the scales applied, the exact joint rate of the copies is the base tensor's."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.layers = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(4))
    model.forward = lambda x: x + sum(torch.tanh(layer(x)) for layer in model.layers)
    model.double()
    base = RateProfile([0], {"layers.0.weight": [0.7], "layers.1.weight": [0.2]})
    found = map_profile(base, model, depth="joint")
    updates = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    batch = [{"x": torch.randn(6, 5, dtype=torch.float64)}]

    def measured(scaled: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
        result = measure_rates(model, scaled, batch, estimator="exact", output=lambda model, batch: model(**batch))
        return result.joint_rates({unit.name: unit.shares for unit in found.units.values()})

    logs = {name: (found.units[name].rates[0] / rate).log().item() for name, (rate, _) in measured(updates).items()}
    scales = found.tensor_scales(logs)
    rates = measured({name: update * scales[name] for name, update in updates.items()})
    assert {name: rate for name, (rate, _) in rates.items()} == pytest.approx(
        {"layers.0.weight": 0.7, "layers.1.weight": 0.2}, rel=1e-10
    )


def test_stacks_of_one_model_have_ratios_of_their_own() -> None:
    base = profile(Stacks(encoder=2, decoder=3))
    split = map_profile(base, Stacks(encoder=4, decoder=3), depth="equal").profile
    torch.testing.assert_close(split.rates["encoder.3.fc.bias"], base.rates["encoder.1.fc.bias"] / 2)
    assert torch.equal(split.rates["decoder.2.fc.bias"], base.rates["decoder.2.fc.bias"])


def test_stacks_within_stacks() -> None:
    def t5(layers: int) -> nn.Module:
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "vocab_size": 16}
        return T5ForConditionalGeneration(T5Config(num_layers=layers, num_decoder_layers=2, **sizes))

    base = profile(t5(2))
    found = map_profile(base, t5(4), depth="equal", unmatched="nominal")
    split = found.profile if not found.unmatched else None
    assert split is not None
    assert found.unused == ()
    for name in ("layer.0.SelfAttention.q.weight", "layer.1.DenseReluDense.wo.weight"):
        torch.testing.assert_close(split.rates[f"encoder.block.3.{name}"], base.rates[f"encoder.block.1.{name}"] / 2)
    for name in ("layer.1.EncDecAttention.q.weight", "layer.2.DenseReluDense.wo.weight"):
        assert torch.equal(split.rates[f"decoder.block.1.{name}"], base.rates[f"decoder.block.1.{name}"])


def test_blocks_are_ranked_among_those_that_have_the_tensor() -> None:
    base = profile(lora(layers=4, layers_to_transform=[2, 3]))
    found = map_profile(base, lora(layers=6, layers_to_transform=[4, 5])).units
    sources = {unit.sources for unit in found.values()}
    assert all(list(unit.shares.values()) == [1.0] for unit in found.values())
    prefix = "base_model.model.model.layers"
    for unit in found.values():
        (source,), (name,) = unit.sources, unit.shares
        assert source.replace(f"{prefix}.2.", f"{prefix}.4.").replace(f"{prefix}.3.", f"{prefix}.5.") == name
    assert len(sources) == len(base.rates)


def test_in_stacks_that_are_alike_a_missing_tensor_stays_missing() -> None:
    base = profile(Stacks(layers=3))
    rates = {name: rates for name, rates in base.rates.items() if name != "layers.1.fc.bias"}
    found = map_profile(RateProfile(base.steps, rates), Stacks(layers=3), unmatched="nominal")
    assert found.unmatched == ("layers.1.fc.bias",)
    assert found.units["layers.2.fc.bias"].shares == {"layers.2.fc.bias": 1.0}


@pytest.mark.parametrize(
    "other",
    [
        lambda: lora(rank=8),
        lambda: lora(name="other"),
        lambda: torch.compile(lora()),
        lambda: nn.ModuleDict({"module": lora()}),
    ],
    ids=["rank", "adapter's name", "compiled", "wrapped"],
)
def test_rank_adapter_name_and_wrappers_do_not_matter(other: Callable[[], nn.Module]) -> None:
    base = profile(lora())
    found = map_profile(base, other()).profile
    assert {name: rates.tolist() for name, rates in found.rates.items()} == {
        n: r.tolist() for n, r in base.rates.items()
    }


@pytest.mark.parametrize(
    ("target", "per_module"),
    [
        (lambda: lora(use_dora=True), 3),
        (lambda: get_peft_model(llama(), VeraConfig(r=2, target_modules=["q_proj"])), 2),
        (lambda: get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])), 1),
        (llama, 1),
    ],
    ids=["DoRA", "VeRA", "IA3", "full"],
)
def test_a_module_is_matched_whatever_is_trained_of_it(target: Callable[[], nn.Module], per_module: int) -> None:
    base = profile(lora())
    model = target()
    found = map_profile(base, model, granularity="module", unmatched="nominal")
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    unit = found.units[path.removeprefix("base_model.model.")]
    assert torch.equal(unit.rates, base.joint_rates["module"][path])
    assert len(unit.shares) == per_module
    assert all("layers.0.self_attn.q_proj" in name for name in unit.shares)


def test_lora_to_module_to_lora_returns_the_joint_rates() -> None:
    base = profile(lora())
    full = map_profile(base, llama(), granularity="module", unmatched="nominal")
    weights = {name: unit.rates for unit in full.units.values() for name in unit.shares}
    modules = {tensor_places(llama())[name].module: rates for name, rates in weights.items()}
    between = RateProfile(base.steps, weights, joint_rates={"module": modules})
    back = map_profile(between, lora(), granularity="module")
    for unit in back.units.values():
        assert torch.equal(unit.rates, base.joint_rates["module"][f"base_model.model.{unit.name}"])
        assert len(unit.shares) == 2


def test_modules_to_save_are_modules() -> None:
    base = profile(lora(modules_to_save=["lm_head"]))
    found = map_profile(base, llama(), granularity="module", unmatched="nominal")
    assert found.units["lm_head"].shares == {"lm_head.weight": 1.0}


def test_both_set_differences_are_named() -> None:
    base = profile(Stacks(layers=2))
    with pytest.raises(RateProfileError, match=r"only in the profile \[layers.*only in the model \[blocks.*'freeze'"):
        map_profile(base, Stacks(blocks=2))
    with pytest.raises(RateProfileError, match=r"no tensor name in common.*has \[fc.weight\].*by granularity='module'"):
        map_profile(RateProfile([0], {"fc.weight": [1.0]}), Stacks(blocks=2), unmatched="nominal")


def test_joint_rates_that_are_missing_are_asked_for() -> None:
    bare = RateProfile([0], {name: [1.0] for name in trainable_parameters(Stacks(layers=1))})
    with pytest.raises(RateProfileError, match=r"no joint rates by module.*Record it again"):
        map_profile(bare, Stacks(layers=1), granularity="module")
    partly = RateProfile([0], {"inputs.weight": [1.0]})
    with pytest.raises(RateProfileError, match="no joint rates by global"):
        map_profile(partly, Stacks(layers=1), unmatched="global")


@pytest.mark.parametrize(
    ("policy", "expected"), [("global", 2.0), ("nominal", 1.0), ("freeze", 0.0)], ids=["global", "nominal", "freeze"]
)
def test_tensors_without_a_rate_follow_the_policy(policy: str, expected: float) -> None:
    base = profile(Stacks(layers=1))
    bigger = Stacks(layers=1, more=1)
    found = map_profile(base, bigger, unmatched=policy)
    logs = dict.fromkeys(found.measured_units, torch.tensor(2.0).log().item())
    scales = found.tensor_scales(logs)
    assert scales == pytest.approx({name: expected if "more" in name else 2.0 for name in trainable_parameters(bigger)})
    if policy == "global":
        assert found.measured_units[""].shares == dict.fromkeys(trainable_parameters(bigger), 1.0)
        assert torch.equal(found.measured_units[""].rates, base.joint_rates["global"][""])


def test_what_is_several_tensors_together_has_no_rate_of_its_own() -> None:
    base = profile(Stacks(layers=2))
    with pytest.raises(RateProfileError, match=r"joint rate of several tensors.*depth='equal'"):
        _ = map_profile(base, Stacks(layers=4), depth="joint").profile


def test_the_report_says_what_stands_for_what() -> None:
    base = profile(lora(layers=2))
    report = str(map_profile(base, lora(rank=8, layers=4), depth="joint"))
    assert "2 x 2x16  4 x 8x16  joint rate: model.layers.*.self_attn.q_proj.lora_A.weight" in report
    missing = str(map_profile(profile(Stacks(layers=1)), Stacks(more=1), unmatched="nominal"))
    assert "not in the base: [more.0.fc.bias, more.0.fc.weight]" in missing
    assert "not in the target: [layers.0.fc.bias, layers.0.fc.weight]" in missing


@pytest.mark.parametrize(
    ("name", "allowed"), [("granularity", Granularity), ("depth", Depth), ("unmatched", Unmatched)]
)
def test_bad_choices_are_refused(name: str, allowed: Any) -> None:
    message = f"{name} is 'some'; it must be one of {', '.join(values(allowed))}."
    with pytest.raises(ValueError, match=re.escape(message)):
        map_profile(profile(Stacks(layers=1)), Stacks(layers=1), **{name: "some"})


@pytest.mark.parametrize("name", ["layers.00.fc.weight", "layers.\u0663.fc.weight", f"layers.{10**30}.fc.weight"])
def test_only_plain_indices_are_blocks(name: str) -> None:
    """A name from a file may hold any digits; two names of one block would be mistaken for each other."""
    rates = {**profile(Stacks(layers=1)).rates, name: torch.full((2,), 7.0)}
    found = map_profile(RateProfile([0, 1], rates), Stacks(layers=1), unmatched="nominal")
    assert found.unused == (name,)
    assert found.units["layers.0.fc.weight"].rates.tolist() == rates["layers.0.fc.weight"].tolist()


def test_a_name_with_and_without_pefts_prefix_is_refused() -> None:
    base = RateProfile([0], {"inputs.weight": [1.0], "base_model.model.inputs.weight": [2.0]})
    with pytest.raises(RateProfileError, match=r"the profile has 'inputs.weight' twice"):
        map_profile(base, Stacks(layers=1), unmatched="nominal")


@pytest.mark.parametrize("joint", [{}, {"global": {}}, {"global": {"encoder": [1.0]}}])
def test_a_joint_rate_of_everything_must_be_there(joint: dict[str, dict[str, list[float]]]) -> None:
    base = RateProfile([0], {"inputs.weight": [1.0]}, {}, joint)
    for options in ({"unmatched": "global"}, {"granularity": "global"}):
        with pytest.raises(RateProfileError, match="no joint rates by global"):
            map_profile(base, Stacks(layers=1), **options)


@pytest.mark.parametrize(
    "shapes", [None, "x", 3, [1], {"inputs.weight": 3}, {"inputs.weight": [[3], {}]}, {"inputs.weight": ["3"]}]
)
def test_the_report_does_without_shapes_that_make_no_sense(shapes: object) -> None:
    base = RateProfile([0], {"inputs.weight": [1.0]}, {"shapes": shapes})
    assert "1 x ?  1 x 3x3  unchanged: inputs.weight" in str(map_profile(base, Stacks(layers=1), unmatched="nominal"))


@pytest.mark.parametrize("place", ["folder", "file", "text"])
def test_a_profile_may_be_given_by_its_place(tmp_path: Path, place: str) -> None:
    base = profile(Stacks(layers=2))
    file = base.save_pretrained(tmp_path)
    found = map_profile({"folder": tmp_path, "file": file, "text": str(tmp_path)}[place], Stacks(layers=2))
    assert found.base == base
    with pytest.raises(RateProfileError, match="is not a folder, a file or a repository"):
        map_profile(tmp_path / "missing", Stacks(layers=2))


class Nested(nn.Module):
    """outer.i.inner.j.weight, with inner stacks of the depths given."""

    def __init__(self, *depths: int) -> None:
        super().__init__()
        stacks = (nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(depth)) for depth in depths)
        self.outer = nn.ModuleList(nn.ModuleDict({"inner": stack}) for stack in stacks)


def test_stacks_within_stacks_have_ratios_of_their_own() -> None:
    found = map_profile(profile(Nested(1, 2)), Nested(2, 4), depth="joint").units
    assert {
        name.removeprefix("outer."): {n.removeprefix("outer."): share for n, share in unit.shares.items()}
        for name, unit in found.items()
    } == {
        "0.inner.0.weight": {"0.inner.0.weight": 1.0, "0.inner.1.weight": 1.0},
        "1.inner.0.weight": {"1.inner.0.weight": 1.0, "1.inner.1.weight": 1.0},
        "1.inner.1.weight": {"1.inner.2.weight": 1.0, "1.inner.3.weight": 1.0},
    }


@pytest.mark.parametrize(("depth", "power"), [("equal", 1), ("sqrt", 2)])
@pytest.mark.parametrize(("before", "after"), [((1, 2), (2, 4)), ((2, 2), (3,)), ((1, 3), (2, 2, 2))])
def test_totals_are_kept_in_stacks_within_stacks(
    before: tuple[int, ...], after: tuple[int, ...], depth: str, power: int
) -> None:
    base = profile(Nested(*before))
    split = map_profile(base, Nested(*after), depth=depth).profile
    torch.testing.assert_close(
        kind_totals(split, power, "outer"), kind_totals(base, power, "outer"), rtol=1e-12, atol=0
    )
    joint = map_profile(base, Nested(*after), depth="joint")
    totals = dict.fromkeys(joint.shapes, 0.0)
    for unit in joint.units.values():
        for name, share in unit.shares.items():
            totals[name] += share
    assert totals == pytest.approx(dict.fromkeys(totals, 1.0))


def test_copies_have_the_rate_itself_and_a_block_of_two_their_mean() -> None:
    base = profile(Stacks(layers=2))
    first, second = (base.rates[f"layers.{block}.fc.weight"] for block in range(2))
    copied = map_profile(base, Stacks(layers=3), depth="copy").profile
    for block, expected in enumerate((first, (first + second) / 2, second)):
        torch.testing.assert_close(copied.rates[f"layers.{block}.fc.weight"], expected, rtol=1e-12, atol=0)
    (merged,) = (
        unit.rates
        for name, unit in map_profile(base, Stacks(layers=1), depth="copy").units.items()
        if name == "layers.0.fc.weight"
    )
    torch.testing.assert_close(merged, (first + second) / 2, rtol=1e-12, atol=0)


def test_a_block_is_all_that_lies_in_it() -> None:
    base = profile(Stacks(layers=2))
    assert set(base.joint_rates["block"]) == {"inputs", "layers.0", "layers.1"}
    found = map_profile(base, Stacks(layers=4), granularity="block", depth="joint").units
    assert {name: list(unit.shares.values()) for name, unit in found.items()} == {
        "inputs": [1.0] * 2,
        "layers.0": [1.0] * 4,
        "layers.1": [1.0] * 4,
    }
    assert set(found["layers.1"].shares) == {f"layers.{i}.fc.{part}" for i in (2, 3) for part in ("weight", "bias")}


def test_what_only_one_side_has_is_an_error_too() -> None:
    with pytest.raises(RateProfileError, match=r"only in the profile \[\]; only in the model \[more"):
        map_profile(profile(Stacks(layers=1)), Stacks(layers=1, more=1))
    with pytest.raises(RateProfileError, match=r"only in the profile \[more.*\]; only in the model \[\]"):
        map_profile(profile(Stacks(layers=1, more=1)), Stacks(layers=1))


def test_everything_is_needed_only_for_what_is_unmatched() -> None:
    bare = RateProfile([0], {name: [1.0] for name in trainable_parameters(Stacks(layers=1))})
    found = map_profile(bare, Stacks(layers=1), unmatched="global")
    assert set(found.measured_units) == set(found.units) == set(bare.rates)


def test_names_are_taken_by_the_letter() -> None:
    """No part of a name is a pattern, and no name stands for one that goes on after it."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = nn.ModuleList(
                nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in ("w+", "a", "a2")}) for _ in range(2)
            )

    base = profile(Odd())
    found = map_profile(base, Odd())
    assert {name: unit.sources for name, unit in found.units.items()} == {name: (name,) for name in base.rates}


def test_the_report_names_the_split() -> None:
    report = str(map_profile(profile(Stacks(layers=2)), Stacks(layers=4), depth="sqrt"))
    assert "2 x 3x3  4 x 3x3  sqrt split: layers.*.fc.weight" in report
    assert "1 x 3x3  1 x 3x3  unchanged: inputs.weight" in report


def test_conv1d_adapters_of_other_depth_and_rank() -> None:
    def adapted(rank: int, layers: int) -> nn.Module:
        sizes = {"n_embd": 8, "n_head": 2, "vocab_size": 16, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
        config = LoraConfig(r=rank, target_modules=["c_attn"], fan_in_fan_out=True)
        return get_peft_model(GPT2LMHeadModel(GPT2Config(n_layer=layers, **sizes)), config)

    base = profile(adapted(2, 2))
    found = map_profile(base, adapted(4, 4), depth="joint")
    prefix = "base_model.model.transformer.h"
    assert {unit.sources: set(unit.shares) for unit in found.units.values()} == {
        (f"{prefix}.{i}.attn.c_attn.lora_{side}.weight",): {
            f"{prefix}.{2 * i + copy}.attn.c_attn.lora_{side}.weight" for copy in range(2)
        }
        for i in range(2)
        for side in "AB"
    }


def test_what_is_no_model_or_no_profile_is_refused() -> None:
    base = RateProfile([0], {"weight": [1.0]})
    with pytest.raises(ValueError, match=r"model is 'base'; it must be a torch module.*`hf-flerm map` takes folders"):
        map_profile(base, "base")  # type: ignore[arg-type]
    with pytest.raises(RateProfileError, match=r"Linear\(.*\) is not a profile: it must be a RateProfile, a folder"):
        map_profile(nn.Linear(1, 1), nn.Linear(1, 1))  # type: ignore[arg-type]
