"""What is reported when base and target were not trained in the same way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_flerm import FLeRMConfig, RateProfile
from hf_flerm.profile.metadata import ProfileMetadata
from hf_flerm.transfer.differences import differences, instability
from tests.shared.trainer_runs import match
from tests.shared.training import BATCH, STEPS, Rows, gpt2, lora, make_trainer, recorded

METADATA: dict[str, Any] = {
    "optimizer": {"class": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8, "lr": 0.1, "fused": True},
    "param_groups": [{"optimizer": "AdamW", "learning_rate": 0.1, "weight_decay": 0.01, "names": ["h.0.w"]}],
    "training_arguments": {
        "lr_scheduler_type": "linear",
        "max_steps": 1000,
        "total_train_batch_size": 32,
        "warmup_steps": 100,
    },
    "kinds": {"h.0.w": "h.*.w"},
    "model_config": {"n_layer": 2},
    "dataset_fingerprint": "abc",
}


def changed(
    arguments: Mapping[str, Any] | None = None,
    group: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The metadata with other training arguments, another param group, or other defaults of the optimizer."""
    metadata = deepcopy(METADATA)
    metadata["training_arguments"].update(arguments or {})
    metadata["param_groups"][0].update(group or {})
    metadata["optimizer"].update(defaults or {})
    return metadata


def told(base: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    return {each.what: (each.base, each.target) for each in differences(ProfileMetadata(base), ProfileMetadata(target))}


DIFFERENT: list[tuple[dict[str, Any], dict[str, tuple[str, str]]]] = [
    (changed(group={"learning_rate": 0.3}), {"learning rate": ("0.1", "0.3")}),
    (changed(group={"optimizer": "Muon"}), {"optimizer": ("AdamW", "Muon")}),
    (changed(group={"optimizer": "Muon"}, defaults={"eps": 1e-7}), {"optimizer": ("AdamW", "Muon")}),
    (changed(defaults={"betas": [0.9, 0.95]}), {"the optimizer's betas": ("[0.9, 0.999]", "[0.9, 0.95]")}),
    (changed(group={"weight_decay": 0}), {"weight decay": ("0.01", "0")}),
    (changed({"total_train_batch_size": 64}), {"examples per step": ("32", "64")}),
    (changed({"lr_scheduler_type": "cosine"}), {"learning-rate schedule": ("linear", "cosine")}),
    (changed({"max_steps": 1200}), {"training steps": ("1000", "1200")}),
    (changed({"warmup_steps": 0}), {"warm-up steps": ("100", "0")}),
    (changed({"warmup_steps": 0.3}), {"warm-up steps": ("100", "300")}),
    (
        changed({"warmup_steps": 0, "max_steps": 10}),
        {"warm-up steps": ("100", "0"), "training steps": ("1000", "10")},
    ),
]


@pytest.mark.parametrize(("other", "expected"), DIFFERENT, ids=[" and ".join(told) for _, told in DIFFERENT])
def test_a_difference_is_reported_with_both_values(other: dict[str, Any], expected: dict[str, tuple[str, str]]) -> None:
    assert told(METADATA, other) == expected
    assert told(other, METADATA) == {what: pair[::-1] for what, pair in expected.items()}


@pytest.mark.parametrize(
    "other",
    [
        METADATA,
        changed(group={"optimizer": "PagedAdamW8bit"}),
        changed(defaults={"fused": False, "lr": 0.2}),
        changed({"warmup_steps": 0.1}),
        changed({"max_steps": 1080, "warmup_steps": 108}),
        changed(group={"learning_rate": 0.1 * (1 + 1e-9)}),
        changed({"seed": 1}),
    ],
    ids=["same", "8 bits", "implementation", "fraction", "length", "round-off", "seed"],
)
def test_what_makes_no_difference_is_not_reported(other: dict[str, Any]) -> None:
    target = {**other, "dataset_fingerprint": "other", "model_config": {"n_layer": 24}}
    assert told(METADATA, target) == told(target, METADATA) == {}


def test_what_a_profile_lacks_is_never_a_difference() -> None:
    target = changed(
        {"total_train_batch_size": 1, "lr_scheduler_type": "cosine", "max_steps": 7, "warmup_steps": 3},
        {"learning_rate": 1.0, "weight_decay": 1.0},
        {"eps": 1e-3},
    )
    everything = told(METADATA, target)
    assert len(everything) == 7
    for key in METADATA["training_arguments"]:
        unknown = deepcopy(METADATA)
        del unknown["training_arguments"][key]
        assert told(unknown, METADATA) == {}
        left = told(unknown, target)
        assert left.items() < everything.items()
        for value in (None, -1, "", [], {}):
            unknown["training_arguments"][key] = value
            assert told(unknown, target) == left
    for key in ("param_groups", "optimizer"):
        unknown = {name: value for name, value in METADATA.items() if name != key}
        assert told(unknown, METADATA) == {}
        assert told(unknown, target).items() < everything.items()
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
    older = {"lr_scheduler_type": "linear", "max_steps": -1, "warmup_steps": 0.1, "learning_rate": 0.1}
    rest = {key: value for key, value in METADATA.items() if key != "param_groups"}
    base = RateProfile([0], {"w": [1.0]}, rest | {"training_arguments": older})
    target = ProfileMetadata(changed({"lr_scheduler_type": "cosine"}, {"learning_rate": 0.3}))
    assert [each.what for each in differences(base.about, target)] == ["learning rate", "learning-rate schedule"]


@pytest.mark.parametrize(("change", "warns"), [(math.sqrt(2) * 1.01, True), (math.sqrt(2) * 0.99, False)])
def test_a_base_at_the_edge_of_stability_is_reported(change: float, warns: bool) -> None:
    metadata = {"largest_change": [3, change], "flerm": {"metric": "fisher"}}
    assert ("its step 3 changed the predictions by 1 nats" in instability(ProfileMetadata(metadata))) is warns
    for unknown in ({**metadata, "flerm": {"metric": "euclidean"}}, {"flerm": {"metric": "fisher"}}, {}):
        assert instability(ProfileMetadata(unknown)) == ""


def test_the_largest_change_is_the_learning_rate_times_the_joint_rate(tmp_path: Path) -> None:
    """The learning rate falls linearly to 0."""
    base = recorded(tmp_path, gpt2(), flerm=FLeRMConfig(metric="fisher", measure_steps=range(STEPS)))
    rates = base.joint_rates["global"][""].tolist()
    changes = [1e-2 * (1 - step / STEPS) * rate for step, rate in enumerate(rates)]
    assert base.about.largest_change == (changes.index(max(changes)), pytest.approx(max(changes), rel=1e-6))


def test_a_matched_run_warns_of_an_unstable_base(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    base = recorded(tmp_path, gpt2(), flerm=FLeRMConfig(metric="fisher"), learning_rate=1.0)
    assert warnings_of() == []
    make_trainer(tmp_path, gpt2(), match(base, metric="fisher"), learning_rate=1.0).train()
    assert "edge of stability" in warnings_of()[0]


def test_the_largest_change_survives_a_resume(tmp_path: Path) -> None:
    whole = recorded(tmp_path, gpt2(), save_strategy="steps", save_steps=3)
    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.rate_profile.about.largest_change == whole.about.largest_change
