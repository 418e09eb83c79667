"""What the field's rules say of a change between two models, and muP's param groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_flerm import RateProfile, RateProfileError, mup_param_groups
from hf_flerm.model.names import trainable_parameters
from hf_flerm.transfer.rules import RULES, Change, change_between
from tests.shared.plans import lora, recorded
from tests.shared.training import gpt2


@pytest.mark.parametrize(
    ("change", "factors"),
    [
        (Change(rank=16, scaling=1 / 16, base_adapter="LORA", target_adapter="LORA"), [1.0]),  # alpha / r
        (Change(rank=16, scaling=1 / 4, base_adapter="LORA", target_adapter="LORA"), [16**-0.25]),  # rsLoRA
        (Change(rank=16, base_adapter="LORA", target_adapter="LORA"), [0.25]),  # alpha grows with r
        (Change(base_adapter="LORA"), [0.1]),
        (Change(target_adapter="LORA"), [10.0]),
        (Change(width=4), [0.25]),
        (Change(depth=4), [0.5, 0.25]),  # depth-muP, and the equal split
        (Change(width=4, depth=9), [0.25, 1 / 3, 1 / 9]),
        (Change(base_optimizer="AdamW", target_optimizer="Lion"), [30**-0.5]),
        (Change(base_optimizer="Lion", target_optimizer="AdamW"), [30**0.5]),
        (Change(), []),
    ],
)
def test_rules_of_the_field(change: Change, factors: list[float]) -> None:
    assert [rule.factor(change) for rule in RULES if rule.applies(change)] == pytest.approx(factors)


def test_the_change_is_read_off_profile_and_model(tmp_path: Path) -> None:
    base = recorded(tmp_path, lora(lora_alpha=8))
    change = change_between(base, lora(rank=8, lora_alpha=8))
    assert change == Change(rank=4.0, scaling=0.25, base_adapter="LORA", target_adapter="LORA")
    assert change_between(base, lora(lora_alpha=8)) == Change(base_adapter="LORA", target_adapter="LORA")
    full = recorded(tmp_path, gpt2())
    assert change_between(full, gpt2(width=32)) == Change(width=2.0)
    assert change_between(full, gpt2(layers=6)) == Change(depth=3.0)


def test_mup_slows_down_the_matrices_of_blocks_alone(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    model = gpt2(width=64)
    groups = mup_param_groups(model, base, 1e-3, weight_decay=0.1)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in trainable_parameters(model).items():
        hidden = ".h." in name and parameter.ndim == 2
        assert rates[id(parameter)] == pytest.approx(1e-3 / 4 if hidden else 1e-3), name
    assert all(group["weight_decay"] == 0.1 for group in groups)


def test_mup_asks_for_the_bases_shapes(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    bare = RateProfile(base.steps, base.rates)
    with pytest.raises(RateProfileError, match=r"does not hold the shape that 'transformer\.wte\.weight'"):
        mup_param_groups(gpt2(width=64), bare, 1e-3)
    with pytest.raises(RateProfileError, match="does not hold the shape that 'base_model"):
        mup_param_groups(lora(), base, 1e-3)


def test_metadata_of_another_form_tell_no_change(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    hostile = {"shapes": [1], "adapters": [2]}
    assert change_between(RateProfile(base.steps, base.rates, hostile), gpt2(width=32)) == Change()
