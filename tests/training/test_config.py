"""`FLeRMConfig` refuses what cannot work, says what would, and survives JSON."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_flerm import FLeRMConfig, RateProfile, Research
from hf_flerm.choices import Estimator, values
from hf_flerm.config import help_of
from tests.shared.training import flerm_config


def logits(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    return model(**batch).logits


@pytest.mark.parametrize(
    "config",
    [
        FLeRMConfig(),
        FLeRMConfig(
            mode="match",
            profile="runs/base",
            measure_every=7,
            measure_steps=(5, 0, 5),
            unmatched="freeze",
            granularity="module",
            max_scale=10.0,
            max_change=2,
            seed=11,
            research=Research(estimator="kronecker", pool="unit", beta=0.9, probes=3, probe_batch_size=2, depth="sqrt"),
        ),
    ],
    ids=["default", "every field"],
)
def test_json_round_trip(config: FLeRMConfig) -> None:
    text = config.to_json_string()
    assert FLeRMConfig.from_json_string(text) == config
    assert FLeRMConfig.from_json_string(text).to_json_string() == text


def test_json_is_sorted_and_holds_every_field() -> None:
    values = json.loads(FLeRMConfig().to_json_string())
    assert list(values) == sorted(FLeRMConfig.__dataclass_fields__)
    assert values["mode"] == "record"
    assert values["seed"] == 0


def test_json_writes_a_path_as_text(tmp_path: Path) -> None:
    text = FLeRMConfig(mode="match", profile=tmp_path).to_json_string()
    assert FLeRMConfig.from_json_string(text).profile == str(tmp_path)


@pytest.mark.parametrize(
    "config",
    [FLeRMConfig(mode="match", profile=RateProfile([0], {"w": [1.0]})), FLeRMConfig(output=logits)],
    ids=["profile object", "output callable"],
)
def test_what_has_no_json_form_is_refused(config: FLeRMConfig) -> None:
    with pytest.raises(ValueError, match="no JSON form"):
        config.to_json_string()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "JSON object, not list"),
        ('{"moed": "record"}', r"unknown fields \['moed'\]; known are \[.*'mode'.*\]"),
        ('{"mode": "watch"}', "mode is 'watch'; it must be one of record, match"),
        ("{", "Expecting"),
    ],
)
def test_bad_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FLeRMConfig.from_json_string(text)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mode", "watch", "mode is 'watch'; it must be one of record, match"),
        ("mode", None, "mode is None; it must be one of record, match"),
        ("estimator", "kfac", f"estimator is 'kfac'; it must be one of {', '.join(values(Estimator))}"),
        ("granularity", "row", "granularity is 'row'; it must be one of tensor, module, block, global"),
        ("pool", "layer", "pool is 'layer'; it must be one of kind, unit"),
        ("unmatched", "drop", "unmatched is 'drop'; it must be one of error, global, nominal, freeze"),
        ("unmatched", ["error"], r"unmatched is \['error'\]; it must be one of error, global, nominal, freeze"),
        ("measure_every", 0, "measure_every is 0; it must be a whole number of at least 1"),
        ("measure_every", 2.0, "measure_every is 2.0"),
        ("measure_every", True, "measure_every is True"),
        ("probes", 0, "probes is 0; it must be a whole number of at least 1"),
        ("probes", "3", "probes is '3'"),
        ("measure_every", None, "measure_every is None"),
        ("probe_batch_size", -1, "probe_batch_size is -1; it must be a whole number of at least 1"),
        ("beta", -0.1, "beta is -0.1; it must lie between 0 and 1"),
        ("beta", 1.5, "beta is 1.5"),
        ("beta", float("nan"), "beta is nan"),
        ("beta", float("inf"), "beta is inf"),
        ("beta", "0.9", "beta is '0.9'"),
        ("depth", "half", "depth is 'half'; it must be one of joint, equal, sqrt, copy"),
        ("max_scale", 0.5, "max_scale is 0.5; it must be a number of at least 1"),
        ("max_scale", float("nan"), "max_scale is nan"),
        ("max_change", "2", "max_change is '2'"),
        ("output", "loss", "output is 'loss'; it must be one of logits, log_probs, hidden or a callable"),
        ("positions", "all", "positions is 'all'; it must be one of attention_mask, labels"),
        ("metric", "kl", "metric is 'kl'; it must be one of euclidean, fisher"),
        ("probes", "many", "probes is 'many'; it must be a whole number of at least 1, or None, or 'auto'"),
        ("target_error", 0.0, "target_error is 0.0; it must be positive"),
        ("target_error", float("nan"), "target_error is nan; it must be positive"),
        ("max_probes", 0, "max_probes is 0; it must be a whole number of at least 1"),
        ("snapshot_device", "disk", "snapshot_device is 'disk'; it must be a device such as 'cpu'"),
        ("measure_steps", [], r"measure_steps is \[\]"),
        ("measure_steps", [0, -1], r"measure_steps is \[0, -1\]; it must hold whole numbers from 0"),
        ("measure_steps", [0.5], r"measure_steps is \[0.5\]"),
        ("measure_steps", [True], r"measure_steps is \[True\]"),
        ("measure_steps", "012", "measure_steps is"),
        ("measure_steps", 5, "measure_steps is 5"),
        ("seed", "one", "seed is 'one'"),
        ("seed", 1.5, "seed is 1.5"),
        ("seed", None, "seed is None"),
        ("seed", -1, "seed is -1; it must be a whole number of at least 0"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_bad_values_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flerm_config(**{field: value})


def test_match_needs_a_profile() -> None:
    with pytest.raises(ValueError, match="mode 'match' needs a profile"):
        FLeRMConfig(mode="match")


def test_record_takes_no_profile() -> None:
    with pytest.raises(ValueError, match="mode 'record' takes no profile"):
        FLeRMConfig(profile="runs/base")


def test_a_profile_that_is_no_place_is_refused() -> None:
    with pytest.raises(ValueError, match="profile is 5"):
        FLeRMConfig(mode="match", profile=5)  # type: ignore[arg-type]


def test_explicit_steps_are_sorted_and_distinct() -> None:
    assert FLeRMConfig(measure_steps=[7, 2, 7]).measure_steps == (2, 7)


def test_fields_of_version_0_1_are_taken_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match=r"FLeRMConfig\(beta=.*, probes=.*\) is deprecated: .*research=Research\("):
        old = FLeRMConfig(seed=3, beta=0.5, probes=2)
    assert old == FLeRMConfig(seed=3, research=Research(beta=0.5, probes=2))
    with pytest.warns(FutureWarning, match="estimator"):
        assert replace(old, estimator="full") == FLeRMConfig(
            seed=3, research=Research(estimator="full", beta=0.5, probes=2)
        )
    with pytest.warns(FutureWarning, match="beta"):
        assert old.beta == 0.5
    with pytest.warns(FutureWarning, match="pool"):
        assert FLeRMConfig.from_json_string('{"pool": "unit"}') == FLeRMConfig(research=Research(pool="unit"))
    assert not hasattr(old, "betas")


@pytest.mark.parametrize("cls", [FLeRMConfig, Research])
def test_every_option_is_documented(cls: type) -> None:
    for entry in fields(cls):
        assert help_of(entry)
        assert re.search(rf"^        {entry.name}: ", cls.__doc__ or "", re.MULTILINE)


def test_what_is_no_research_is_refused() -> None:
    with pytest.raises(ValueError, match=r"research is \{\}; it must be"):
        FLeRMConfig(research={})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown fields of research \['betas'\]; known are \['beta'"):
        FLeRMConfig.from_json_string('{"research": {"betas": 1}}')
