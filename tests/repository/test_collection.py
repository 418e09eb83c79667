"""`profiles/`: manifest and files agree, each profile is valid and fits its model, and one is recorded again."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from hf_flerm import FLeRMConfig, RateProfile, Research
from hf_flerm.model.name_text import without_prefix
from hf_flerm.transfer.mapping import map_profile
from tests.shared import ROOT

sys.path.insert(0, str(ROOT / "examples"))

import collection

MANIFEST = collection.manifest(ROOT / "profiles")
AGAIN = "llama-pretrain-adamw"
# Without AVX its rates differ by 4.5e-5 of themselves from those with AVX-512, and not at all where nothing changed.
TOLERANCE = 1e-3
VERSIONS = {"packages", "transformers_version", "peft_version"}


def profile(name: str) -> RateProfile:
    return RateProfile.from_pretrained(ROOT / "profiles" / name)


def without(value: Any, keys: set[str]) -> Any:
    """Nested objects without these keys."""
    return (
        {key: without(item, keys) for key, item in value.items() if key not in keys}
        if isinstance(value, dict)
        else value
    )


def test_the_folder_holds_what_the_manifest_says_and_nothing_else() -> None:
    assert MANIFEST.keys() == collection.ENTRIES.keys()
    files = {
        path.relative_to(ROOT / "profiles").as_posix() for path in (ROOT / "profiles").rglob("*") if path.is_file()
    }
    described = {f"{name}/{file}" for name, about in MANIFEST.items() for file in about["sha256"]}
    assert files == described | {"manifest.json", "README.md"}
    for name, about in MANIFEST.items():
        assert about["sha256"].keys() == {"rate_profile.safetensors", "rate_profile.png", "README.md"}
        for file, digest in about["sha256"].items():
            assert hashlib.sha256((ROOT / "profiles" / name / file).read_bytes()).hexdigest() == digest, (name, file)
    assert sum(path.stat().st_size for path in (ROOT / "profiles").rglob("*")) < 1.5e6


@pytest.mark.parametrize("name", collection.ENTRIES)
def test_every_profile_fits_its_model_and_was_recorded_at_the_best_of_its_sweep(name: str) -> None:
    found, about, entry = profile(name), MANIFEST[name], collection.ENTRIES[name]
    mapped = map_profile(found, collection.build(entry))
    assert (mapped.unmatched, mapped.unused) == ((), ())
    assert set(mapped.units) == set(map(without_prefix, found.names))
    losses = found.about.sweep
    rates = list(losses)
    assert about["learning_rate"] == found.metadata["training_arguments"]["learning_rate"]
    assert about["learning_rate"] == collection.best_rate(losses)
    assert rates[0] < about["learning_rate"] < rates[-1]
    assert about["loss"] == losses[about["learning_rate"]]
    assert about["command"] == f"python examples/collection.py {name}"
    card = ModelCard.load(ROOT / "profiles" / name / "README.md")
    assert f'profile="profiles/{name}"' in card.text
    assert f"{about['learning_rate']:g}: loss {about['loss']:g}" in card.text


def within(values: Any, known: Any) -> Any:
    """The part of some metadata that older metadata have, too."""
    if not isinstance(known, dict):
        return values
    return {key: within(values.get(key), value) for key, value in known.items()}


def test_one_is_recorded_again() -> None:
    loss, again = collection.record(collection.ENTRIES[AGAIN], MANIFEST[AGAIN]["learning_rate"], None)
    found = profile(AGAIN)
    assert loss == pytest.approx(MANIFEST[AGAIN]["loss"], rel=TOLERANCE)
    assert torch.equal(again.steps, found.steps)
    expected = {key: value for key, value in found.metadata.items() if key != "sweep"}
    found_again = within(without(again.metadata, VERSIONS), without(expected, VERSIONS))
    assert found_again == without(expected, VERSIONS)
    assert set(again.names) == set(found.names)
    for name, rates in found.rates.items():
        torch.testing.assert_close(again.rates[name], rates, rtol=TOLERANCE, atol=0.0, msg=name)
    assert again.joint_rates.keys() == found.joint_rates.keys()
    for granularity, groups in found.joint_rates.items():
        for path, rates in groups.items():
            torch.testing.assert_close(again.joint_rates[granularity][path], rates, rtol=TOLERANCE, atol=0.0)


def test_the_run_that_was_recorded_asks_for_scales_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the profile's address in the card; the run's first update is the same, so its rates are."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(collection.STEPS, "pretrain", 2)
    flerm = FLeRMConfig(mode="match", profile=f"profiles/{AGAIN}", measure_steps=(0,), research=Research(probes=8))
    _, trainer = collection.run(collection.ENTRIES[AGAIN], MANIFEST[AGAIN]["learning_rate"], flerm=flerm)
    logs = trainer.flerm_callback.evidence.log_quotients
    assert logs.shape == (1, len(profile(AGAIN).names))
    torch.testing.assert_close(logs, torch.zeros_like(logs), rtol=0.0, atol=TOLERANCE)
