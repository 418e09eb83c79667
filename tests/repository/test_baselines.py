"""The made-up bases of the studies."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hf_flerm import FLeRMConfig, RateProfile, Research
from tests.shared import ROOT
from tests.shared.training import flerm_callback, gpt2, make_trainer, recorded

sys.path.insert(0, str(ROOT / "examples" / "studies"))

import baselines


def test_equal_rates_are_the_root_mean_square_of_those_above_zero() -> None:
    equal = baselines.equal_rates(RateProfile([0, 1], {"a": [3.0, 0.0], "b": [4.0, 2.0]}))
    assert equal.rates["a"].tolist() == equal.rates["b"].tolist() == pytest.approx([12.5**0.5, 2.0])


def test_a_run_that_is_matched_to_equal_rates_has_them(tmp_path: Path) -> None:
    base = baselines.equal_rates(recorded(tmp_path, gpt2()))
    research = Research(depth="copy", pool="unit", beta=0.0)
    config = FLeRMConfig(mode="match", profile=base, max_change=1e9, max_scale=1e12, research=research)
    trainer = make_trainer(tmp_path, gpt2(layers=4), config)
    trainer.train()
    measured, scales = flerm_callback(trainer).last_measurement, flerm_callback(trainer).scales
    assert measured is not None
    rate = base.at(int(trainer.rate_profile.steps[-1]))["transformer.wte.weight"]
    products = [scales[name] * measured.rates[name] for name in scales if measured.rates[name] > 0]
    assert products == pytest.approx([rate] * len(products), rel=1e-9)
