"""Metadata are read with types: what a run writes comes back, and whatever else stands in a file never raises."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from hf_flerm import FLeRMConfig, RateProfile, RateProfileError
from hf_flerm.model.names import tensor_kinds, trainable_parameters
from hf_flerm.profile.metadata import Adapter, ProfileMetadata
from hf_flerm.show.card import updated_card
from hf_flerm.show.figures import multiplier_series, rate_curves
from hf_flerm.show.summary import describe
from hf_flerm.transfer.rules import change_between
from tests.shared import ROOT
from tests.shared.training import flerm_callback, gpt2, lora, make_trainer, recorded

PROPERTIES = [name for name, value in vars(ProfileMetadata).items() if isinstance(value, property)]
HUGE = 10**400  # JSON has whole numbers of any length
HOSTILE = (None, True, -1, 0, HUGE, 1e308, "", "text", "²", [], [[]], [HUGE, HUGE], [[HUGE, HUGE]], {}, {"a": HUGE})
EVERYTHING = {
    "adapters": {"default": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/base"}},
    "averaged_over": 3,
    "dataset_fingerprint": "abc",
    "flerm": {"output": "logits", "positions": "labels", "metric": "fisher", "mode": "match", "probes": 4},
    "largest_change": [4, 1.5],
    "kinds": {"h.0.w": "h.*.w", "h.1.w": "h.*.w"},
    "matching": {
        "base": "0",
        "scales": {"h.0.w": math.log(2.0), "h.1.w": 0.0},
        "logs": {"h.0.w": [math.log(2.0), None, math.log(8.0)], "h.1.w": [None, None, 1.0]},
    },
    "model": "Model",
    "model_config": {"model_type": "gpt2", "n_layer": 2},
    "optimizer": {"class": "AdamW"},
    "packages": {"torch": "2"},
    "shapes": {"h.0.w": [4, 8], "h.1.w": []},
    "sweep": [[0.1, 2.5], [1, None]],
    "sweep_optimum": 0.2,
    "sweep_runs": [
        {"learning_rate": 0.01, "seed": 0, "end": "stopped", "loss": None, "steps": 3},
        {"learning_rate": 0.1, "seed": 0, "end": "complete", "loss": 2.0, "steps": 9},
        {"learning_rate": 0.1, "seed": 1, "end": "complete", "loss": 3, "steps": 9},
        {"learning_rate": 1, "seed": 0, "end": "diverged", "loss": None, "steps": 1},
    ],
    "training_arguments": {"learning_rate": 0.1, "per_device_train_batch_size": 8},
}


def test_what_a_run_writes_comes_back(tmp_path: Path) -> None:
    model = lora()
    about = recorded(tmp_path, model).about
    assert about.learning_rate == 0.01
    assert about.units == {"output": "logits", "positions": "attention_mask", "metric": "fisher"}
    parameters = trainable_parameters(model)
    assert about.shapes == {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    assert about.kinds == {name: kind for name, kind in tensor_kinds(model).items() if name in parameters}
    config = model.peft_config["default"]
    (adapter,) = about.adapters
    assert (adapter.method, adapter.scaling) == ("LORA", config.lora_alpha / config.r)
    assert not about.is_matched
    assert about.matching is None
    assert about.matched_scales == about.matched_quotients == about.sweep == {}


def test_what_a_matched_run_writes_comes_back(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    trainer = make_trainer(tmp_path, gpt2(width=32), FLeRMConfig("match", base))
    trainer.train()
    about, run = trainer.rate_profile.about, flerm_callback(trainer)
    assert about.is_matched
    assert about.matched_scales == pytest.approx({name: run.scales[name] for name in base.names})
    logs = dict(zip(run.evidence.units, run.evidence.log_quotients.T, strict=True))
    for name, (level, error) in about.matched_quotients.items():
        seen = logs[name][logs[name].isfinite()]
        assert math.log(level) == pytest.approx(float(seen.mean()))
        assert error == pytest.approx(float(seen.std()) / len(seen) ** 0.5 if len(seen) > 1 else 0.0)


def test_every_entry_is_read_with_its_type() -> None:
    about = ProfileMetadata(EVERYTHING)
    assert about.config_units == {"output": "logits", "positions": "labels", "metric": "fisher"}
    assert about.model_name == "gpt2"
    assert about.base_models == ("org/base",)
    assert (about.averaged_over, about.dataset_fingerprint) == (3, "abc")
    assert about.largest_change == (4, 1.5)
    assert about.shapes == {"h.0.w": (4, 8), "h.1.w": ()}
    assert {rate: str(loss) for rate, loss in about.sweep.items()} == {0.1: "2.5", 1.0: "nan"}
    assert (about.sweep_losses, about.sweep_optimum) == ({0.1: (2.0, 3.0), 1.0: (math.inf,)}, 0.2)
    only_means = ProfileMetadata({"sweep": EVERYTHING["sweep"]})
    assert (only_means.sweep_losses, only_means.sweep_optimum) == ({0.1: (2.5,), 1.0: (math.inf,)}, None)
    assert about.matched_scales == pytest.approx({"h.0.w": 2.0, "h.1.w": 1.0})
    level, error = about.matched_quotients["h.0.w"]
    assert level == pytest.approx(4.0)
    assert error == pytest.approx(math.log(2.0))  # of two logarithms that differ by d: d / sqrt(2) / sqrt(2)
    assert about.matched_quotients["h.1.w"] == pytest.approx((math.e, 0.0))


def test_an_output_that_was_a_function_is_a_unit_but_nothing_to_configure() -> None:
    about = ProfileMetadata({"flerm": {"output": "callable", "metric": "euclidean", "positions": None}})
    assert about.units == {"output": "callable", "metric": "euclidean"}
    assert about.config_units == {"metric": "euclidean"}


@pytest.mark.parametrize(
    ("config", "method", "scaling"),
    [
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 8}, "LORA", 2.0),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True}, "LORA", 4.0),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True}, "DORA", 2.0),
        ({"peft_type": "IA3"}, "IA3", 1.0),
        ({"peft_type": "LORA", "r": 0, "lora_alpha": 8}, "LORA", 1.0),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": HUGE}, "LORA", 1.0),
        ({"peft_type": "LORA", "r": "4", "lora_alpha": True}, "LORA", 1.0),
    ],
)
def test_an_adapters_method_and_scaling(config: dict[str, Any], method: str, scaling: float) -> None:
    assert (Adapter(config).method, Adapter(config).scaling) == (method, scaling)


@pytest.mark.parametrize("wrong", [None, "0.1", True, 0, -0.1, HUGE, math.inf, math.nan, [0.1]])
def test_a_learning_rate_is_a_positive_number_or_unknown(wrong: object) -> None:
    assert ProfileMetadata({"training_arguments": {"learning_rate": wrong}}).learning_rate is None
    assert ProfileMetadata({"training_arguments": {"learning_rate": 1}}).learning_rate == 1.0


def mutations(tree: Any) -> Iterator[Any]:
    """The tree with each of its nodes replaced by each hostile value."""
    yield from HOSTILE
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in items:
        for other in mutations(value):
            changed = deepcopy(tree)
            changed[key] = other
            yield changed


def test_wrong_types_anywhere_never_raise() -> None:
    count = 0
    for metadata in mutations(EVERYTHING):
        if not isinstance(metadata, dict):
            continue
        about = ProfileMetadata(metadata)
        for name in PROPERTIES:
            getattr(about, name)
        assert all(isinstance(kind, str) for kind in about.kinds.values())
        assert all(type(size) is int and size > 0 for shape in about.shapes.values() for size in shape)
        assert all(isinstance(number, float) for pair in about.sweep.items() for number in pair)
        assert all(type(loss) is float for losses in about.sweep_losses.values() for loss in losses)
        assert all(0 <= scale <= math.inf for scale in about.matched_scales.values())
        assert about.learning_rate is None or 0 < about.learning_rate < math.inf
        count += 1
    assert count > 500


def test_whatever_profile_is_made_can_be_shown_and_compared() -> None:
    model = gpt2()
    names = {name: [1.0, 0.5] for name in ("h.0.w", "h.1.w")}
    made = 0
    for metadata in mutations(EVERYTHING):
        if not isinstance(metadata, dict):
            continue
        try:
            profile = RateProfile([0, 1], names, metadata)
        except RateProfileError:
            continue
        assert all(isinstance(text, str) for text in describe(profile).values())
        assert rate_curves(profile)
        for series in multiplier_series(profile):
            assert all(0 < multiplier < math.inf for multiplier in series.multipliers)
        assert change_between(profile, model).scaling > 0
        assert updated_card(profile, "org/repo").text
        made += 1
    assert made > 500


@pytest.mark.parametrize("key", ["flerm", "kinds", "matching", "training_arguments"])
@pytest.mark.parametrize("wrong", [None, 1, "text", [1]])
def test_main_entries_that_are_no_objects_are_refused(key: str, wrong: object) -> None:
    with pytest.raises(RateProfileError, match=f"'{key}' in the metadata must be an object"):
        RateProfile([0], {"w": [1.0]}, {key: wrong})


def test_metadata_too_deep_for_json_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RateProfileError, match="cannot be written as JSON"):
        RateProfile([0], {"w": [1.0]}, {"deep": deep})


FILES = sorted((ROOT / "profiles").glob("*/rate_profile.safetensors"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_a_file_of_todays_schema_is_read_and_saved_again_byte_for_byte(file: Path, tmp_path: Path) -> None:
    profile = RateProfile.from_pretrained(file)
    assert profile.to_bytes() == file.read_bytes()
    assert profile.save_pretrained(tmp_path).read_bytes() == file.read_bytes()
    about = profile.about
    assert about.learning_rate in about.sweep
    assert about.kinds.keys() == about.shapes.keys() == profile.rates.keys()
    assert about.units == {"output": "logits", "positions": "attention_mask", "metric": "euclidean"}
    lora_rank = profile.metadata["adapters"].get("default", {}).get("r")
    assert [adapter.config["r"] for adapter in about.adapters] == ([lora_rank] if lora_rank else [])
    assert json.loads(json.dumps(profile.metadata)) == profile.metadata
