"""What is reported when base and target were not trained in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_flerm import RateProfile
from hf_flerm.profile.metadata import ProfileMetadata
from hf_flerm.transfer.differences import differences
from tests.shared.trainer_runs import match
from tests.shared.training import BATCH, STEPS, Rows, gpt2, lora, make_trainer, recorded

METADATA: dict[str, Any] = {
    "optimizer": {"class": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8, "lr": 0.1, "fused": True},
    "training_arguments": {
        "learning_rate": 0.1,
        "lr_scheduler_type": "linear",
        "max_steps": 1000,
        "total_train_batch_size": 32,
        "warmup_steps": 100,
        "weight_decay": 0.01,
    },
    "model_config": {"n_layer": 2},
    "dataset_fingerprint": "abc",
}


def changed(**settings: Any) -> dict[str, Any]:
    """The metadata with other settings; those of an optimizer are named `optimizer_...`."""
    metadata = deepcopy(METADATA)
    for key, value in settings.items():
        entry, _, option = key.partition("optimizer_")
        metadata["training_arguments" if entry else "optimizer"][option or entry] = value
    return metadata


def told(base: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    return {each.what: (each.base, each.target) for each in differences(ProfileMetadata(base), ProfileMetadata(target))}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_rate": 0.3}, {"learning rate": ("0.1", "0.3")}),
        ({"optimizer_class": "Muon"}, {"optimizer": ("AdamW", "Muon")}),
        ({"optimizer_class": "Muon", "optimizer_eps": 1e-7}, {"optimizer": ("AdamW", "Muon")}),
        ({"optimizer_betas": [0.9, 0.95]}, {"the optimizer's betas": ("[0.9, 0.999]", "[0.9, 0.95]")}),
        ({"weight_decay": 0}, {"weight decay": ("0.01", "0")}),
        ({"total_train_batch_size": 64}, {"examples per step": ("32", "64")}),
        ({"lr_scheduler_type": "cosine"}, {"learning-rate schedule": ("linear", "cosine")}),
        ({"max_steps": 1200}, {"training steps": ("1000", "1200")}),
        ({"warmup_steps": 0}, {"warm-up steps": ("100", "0")}),
        ({"warmup_steps": 0.3}, {"warm-up steps": ("100", "300")}),
        ({"warmup_steps": 0, "max_steps": 10}, {"warm-up steps": ("100", "0"), "training steps": ("1000", "10")}),
    ],
    ids=str,
)
def test_a_difference_is_reported_with_both_values(
    settings: dict[str, Any], expected: dict[str, tuple[str, str]]
) -> None:
    assert told(METADATA, changed(**settings)) == expected
    assert told(changed(**settings), METADATA) == {what: pair[::-1] for what, pair in expected.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer_class": "PagedAdamW8bit"},
        {"optimizer_fused": False, "optimizer_lr": 0.2},
        {"warmup_steps": 0.1},
        {"max_steps": 1080, "warmup_steps": 108},
        {"learning_rate": 0.1 * (1 + 1e-9)},
        {"seed": 1},
    ],
    ids=str,
)
def test_what_makes_no_difference_is_not_reported(settings: dict[str, Any]) -> None:
    target = changed(**settings) | {"dataset_fingerprint": "other", "model_config": {"n_layer": 24}}
    assert told(METADATA, target) == told(target, METADATA) == {}


@pytest.mark.parametrize("entry", ["optimizer", "training_arguments"])
@pytest.mark.parametrize("value", [None, -1, "", [], {}])
def test_what_a_profile_lacks_is_never_a_difference(entry: str, value: Any) -> None:
    target = changed(learning_rate=1.0, optimizer_class="SGD", weight_decay=1.0, total_train_batch_size=1)
    everything = told(METADATA, target)
    for key in METADATA[entry]:
        unknown = deepcopy(METADATA)
        del unknown[entry][key]
        left = told(unknown, target)
        assert left.items() <= everything.items()
        assert told(unknown, METADATA) == {}
        if key not in ("betas", "eps", "weight_decay", "warmup_steps"):  # there, these values may be meant
            unknown[entry][key] = value
            assert told(unknown, target) == left, key
    assert told({}, target) == told(target, {}) == {}


def test_a_matched_run_warns_once_of_everything(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    base = recorded(tmp_path, gpt2())
    make_trainer(tmp_path, gpt2(width=32), match(base)).train()
    assert warnings_of() == []
    options = {"max_steps": 2 * STEPS, "warmup_steps": 0.25, "gradient_accumulation_steps": 2, "adam_beta2": 0.9}
    make_trainer(tmp_path, gpt2(), match(base), lr_scheduler_type="cosine", weight_decay=0.2, **options).train()
    (warning,) = warnings_of()
    first, *lines = warning.splitlines()
    assert first == "this run differs from the base of its profile in more than what is transferred across:"
    assert [line.partition(";")[0] for line in lines] == [
        "- the optimizer's betas: [0.9, 0.999] in the base, [0.9, 0.9] here",
        "- weight decay: 0.1 in the base, 0.2 here",
        f"- examples per step: {BATCH} in the base, {2 * BATCH} here",
        "- learning-rate schedule: linear in the base, cosine here",
        "- warm-up steps: 0 in the base, 3 here",
        f"- training steps: {STEPS} in the base, {2 * STEPS} here",
    ]


def test_epochs_are_resolved_to_steps(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    base = recorded(tmp_path, lora(), max_steps=8)
    make_trainer(tmp_path, lora(), match(base), max_steps=-1, num_train_epochs=2, data=Rows(4 * BATCH)).train()
    assert base.about.total_steps == 8
    assert warnings_of() == []


def test_weight_decay_is_the_optimizers_own(tmp_path: Path) -> None:
    """A user's optimizer does not know the weight decay in the training arguments."""
    net = gpt2()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.3)
    profile = recorded(tmp_path, net, max_steps=1, weight_decay=0.7, extra={"optimizers": (optimizer, None)})
    assert profile.about.weight_decay == 0.3


def test_other_data_are_mentioned_but_no_warning(
    tmp_path: Path, warnings_of: Callable[[], list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    def rows(seed: int) -> Dataset:
        tokens = Rows(seed=seed).tokens.tolist()
        return Dataset.from_dict({"input_ids": tokens, "labels": tokens})

    base = recorded(tmp_path, gpt2(), data=rows(0))
    caplog.set_level("INFO", "hf_flerm")
    make_trainer(tmp_path, gpt2(), match(base), data=rows(1)).train()
    assert [record.levelname for record in caplog.records if "fingerprints" in record.getMessage()] == ["INFO"]


def test_a_profile_of_an_older_version_is_compared_as_far_as_it_goes() -> None:
    older = {key: value for key, value in METADATA["training_arguments"].items() if key != "total_train_batch_size"}
    base = RateProfile([0], {"w": [1.0]}, METADATA | {"training_arguments": older | {"max_steps": -1}})
    target = ProfileMetadata(changed(total_train_batch_size=64, max_steps=10, lr_scheduler_type="cosine"))
    assert [each.what for each in differences(base.about, target)] == ["learning-rate schedule"]
