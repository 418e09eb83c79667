"""Bases in every form, of other learning rates, and of other tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_flerm import RateProfile
from tests.shared.trainer_runs import SpyRates, known_base, match, match_known
from tests.shared.training import flerm_callback, gpt2, make_trainer, recorded, some_factors


def test_another_learning_rate_than_the_bases_is_told(folder: Path, warnings_of: Callable[[], list[str]]) -> None:
    base = recorded(folder, gpt2())
    make_trainer(folder, gpt2(), match(base)).train()
    assert warnings_of() == []
    make_trainer(folder, gpt2(), match(base), learning_rate=5e-2).train()
    (warning,) = warnings_of()
    assert "\n- learning rate: 0.01 in the base, 0.05 here; this run's updates will change the outputs 5 " in warning
    assert len(warning.splitlines()) == 2


@pytest.mark.parametrize("source", ["object", "folder", "file", "text"])
def test_a_profile_may_be_given_in_any_form(tmp_path: Path, source: str) -> None:
    base = known_base(tmp_path, gpt2)
    file = base.save_pretrained(tmp_path / "base")
    profile = {"object": base, "folder": file.parent, "file": file, "text": str(file.parent)}[source]
    trainer = make_trainer(tmp_path, gpt2(), match_known(profile), max_steps=1)
    trainer.train()
    assert flerm_callback(trainer).scales == pytest.approx(some_factors(gpt2()), rel=1e-9)


def test_unmatched_nominal_leaves_what_the_profile_lacks_at_its_learning_rate(folder: Path) -> None:
    base = known_base(folder, gpt2)
    lacking = {"transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"}
    rates = {name: values for name, values in base.rates.items() if name not in lacking}
    config = match_known(RateProfile(base.steps, {**rates, "not.in.the.model": [1.0]}), unmatched="nominal")
    spy = SpyRates()
    trainer = make_trainer(folder, gpt2(), config, callbacks=[spy])
    trainer.train()
    factors = some_factors(gpt2())
    expected = {name: 1.0 if name in lacking else factor for name, factor in factors.items()}
    assert flerm_callback(trainer).scales == pytest.approx(expected, rel=1e-9)
    assert {name for name in factors if spy.inside[1][name] == spy.outside[4][name]} >= lacking
    assert set(trainer.rate_profile.names) == set(factors)


def test_a_tensor_that_was_never_scaled_is_reported(folder: Path, warnings_of: Callable[[], list[str]]) -> None:
    base = known_base(folder, gpt2)
    rates = {**base.rates, "transformer.ln_f.bias": torch.zeros_like(base.rates["transformer.ln_f.bias"])}
    make_trainer(folder, gpt2(), match_known(RateProfile(base.steps, rates))).train()
    (warning,) = warnings_of()
    assert "[transformer.ln_f.bias] were not scaled" in warning
