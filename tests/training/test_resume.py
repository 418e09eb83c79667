"""A training that is stopped at a checkpoint goes on, bit for bit, as if it had not been."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from hf_flerm import FLeRMConfig, RateProfile, RateProfileError, Research
from hf_flerm.profile.rate_profile import PROFILE_NAME
from tests.shared.training import (
    Rows,
    assert_identical,
    flerm_callback,
    flerm_config,
    gpt2,
    make_trainer,
    recorded,
    scaled,
    some_factors,
    train,
)

DROPOUT = 0.1
SAVING = {"save_strategy": "steps", "save_steps": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RateProfile:
    return scaled(recorded(tmp_path_factory.mktemp("base"), gpt2()), some_factors(gpt2()))


def config(mode: str, base: RateProfile, **options: Any) -> FLeRMConfig:
    return flerm_config(mode=mode, profile=base if mode == "match" else None, **options)


def whole_and_resumed(
    folder: Path, flerm: FLeRMConfig, then: FLeRMConfig | None = None, **options: Any
) -> tuple[Trainer, Trainer]:
    """A run, and one that goes on from its third step's checkpoint, in a folder of its own."""
    whole = make_trainer(folder / "whole", gpt2(DROPOUT), flerm, **SAVING, **options)
    whole.train()
    resumed = make_trainer(folder / "resumed", gpt2(DROPOUT, seed=9), then or flerm, **SAVING, **options)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    return whole, resumed


def assert_same_end(resumed: Trainer, whole: Trainer) -> None:
    assert_identical(resumed.model.state_dict(), whole.model.state_dict(), "weights")
    assert_identical(resumed.optimizer.state_dict(), whole.optimizer.state_dict(), "optimizer")
    assert flerm_callback(resumed).scales == flerm_callback(whole).scales
    assert resumed.rate_profile.to_bytes() == whole.rate_profile.to_bytes()


@pytest.mark.parametrize("mode", ["record", "match"])
@pytest.mark.parametrize("steps", [(0, 1), (2, 3), (0, 4)], ids=str)
def test_whatever_was_measured_before_and_after(tmp_path: Path, base: RateProfile, mode: str, steps: Any) -> None:
    whole, resumed = whole_and_resumed(tmp_path, config(mode, base, measure_steps=steps))
    assert_same_end(resumed, whole)
    assert whole.rate_profile.steps.tolist() == list(steps)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_running_averages_go_on(tmp_path: Path, base: RateProfile, beta: float) -> None:
    whole, resumed = whole_and_resumed(tmp_path, config("match", base, beta=beta, measure_every=1, pool="unit"))
    assert_same_end(resumed, whole)
    assert set(flerm_callback(whole).scales.values()) != {1.0}


@pytest.mark.parametrize("mode", ["record", "match"])
def test_what_was_owed_at_the_checkpoint_is_paid_after_it(tmp_path: Path, base: RateProfile, mode: str) -> None:
    """The learning rate is 0 for four steps; the checkpoint lies between what is asked for and what can be measured."""

    def run(folder: Path, resume: Path | None = None) -> Trainer:
        model = gpt2(DROPOUT)
        optimizer = AdamW(model.parameters(), lr=1e-2)
        schedule = LambdaLR(optimizer, lambda step: float(step >= 4))
        trainer = make_trainer(
            folder,
            model,
            config(mode, base, measure_steps=(1,)),
            extra={"optimizers": (optimizer, schedule)},
            **SAVING,
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3")
    assert_same_end(resumed, whole)
    assert whole.rate_profile.steps.tolist() == [4]


@pytest.mark.parametrize("mode", ["record", "match"])
def test_the_best_model_may_be_loaded_at_the_end(tmp_path: Path, base: RateProfile, mode: str) -> None:
    options = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "extra": {"eval_dataset": Rows(seed=1)},
    }
    whole, resumed = whole_and_resumed(tmp_path, config(mode, base), **options)
    assert_same_end(resumed, whole)
    assert whole.rate_profile.steps.tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("flerm", [None, FLeRMConfig()], ids=["plain", "record"])
def test_a_checkpoint_of_the_model_alone_goes_on_as_the_plain_trainer_lets_it(
    tmp_path: Path, flerm: FLeRMConfig | None
) -> None:
    """Without the optimizer's state the run is another one: the same other one as the plain Trainer's."""
    ends = []
    for name, config in (("plain", None), ("own", flerm)):
        options = {"save_only_model": True, **SAVING}
        make_trainer(tmp_path / name, gpt2(DROPOUT), config, **options).train()
        resumed = make_trainer(tmp_path / name, gpt2(DROPOUT), config, **options)
        ends.append(train(resumed, resume_from_checkpoint=str(tmp_path / name / "checkpoint-3")))
        if config is not None:
            assert resumed.rate_profile.steps.tolist() == [0, 1, 2, 4]
    assert_identical(ends[1].weights, ends[0].weights)
    assert_identical(ends[1].logs, ends[0].logs)


@pytest.mark.parametrize("mode", ["record", "match"])
def test_a_training_may_be_made_longer(tmp_path: Path, base: RateProfile, mode: str) -> None:
    """What a longer run measures after the checkpoint goes with what the shorter one measured before it."""
    flerm = config(mode, base, measure_every=1)
    constant = {"lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path / "whole", gpt2(DROPOUT), flerm, max_steps=8, **constant)
    whole.train()
    make_trainer(tmp_path / "short", gpt2(DROPOUT), flerm, max_steps=3, **SAVING, **constant).train()
    longer = make_trainer(tmp_path / "short", gpt2(DROPOUT), flerm, max_steps=8, **constant)
    longer.train(resume_from_checkpoint=True)
    assert_same_end(longer, whole)
    assert longer.rate_profile.steps.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("before", "after", "measured"),
    [
        ((0, 1), (0, 1, 2, 5), [0, 1, 3, 5]),  # 2 was asked for and never measured: it is made up for at once
        ((0, 2), (0, 1, 2, 5), [0, 2, 5]),  # 1 was asked for before the last that was measured
        ((0, 1, 2), (4,), [0, 1, 2, 4]),
    ],
)
def test_another_schedule_counts_from_the_last_measurement(
    tmp_path: Path, before: Any, after: Any, measured: list[int]
) -> None:
    _, resumed = whole_and_resumed(tmp_path, FLeRMConfig(measure_steps=before), FLeRMConfig(measure_steps=after))
    assert resumed.rate_profile.steps.tolist() == measured


# --- what does not belong together --------------------------------------------------------------------------------


def test_other_settings_are_named_and_used(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    _, resumed = whole_and_resumed(
        tmp_path, FLeRMConfig(), FLeRMConfig(research=Research(estimator="kronecker", probes=3))
    )
    (warning,) = warnings_of()
    assert "measured with {'estimator': 'per_example', 'probes': 1} before" in warning
    assert "now with {'estimator': 'kronecker', 'probes': 3}" in warning
    assert resumed.rate_profile.metadata["flerm"]["estimator"] == "kronecker"


def test_other_outputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RateProfileError, match="the checkpoint's profile was recorded with output='logits'"):
        whole_and_resumed(tmp_path, FLeRMConfig(), FLeRMConfig(output="hidden"))


def test_another_base_starts_anew(tmp_path: Path, base: RateProfile, warnings_of: Callable[[], list[str]]) -> None:
    other = scaled(base, dict.fromkeys(base.rates, 2.0))
    first, then = config("match", base), config("match", other, measure_steps=(5,), pool="unit", beta=0.0)
    _, resumed = whole_and_resumed(tmp_path, first, then)
    assert any("matched to another profile; its scales are not used" in warning for warning in warnings_of())
    assert flerm_callback(resumed).evidence.steps == (5,)


def test_a_recorded_run_may_go_on_matching(tmp_path: Path, base: RateProfile) -> None:
    _, resumed = whole_and_resumed(tmp_path, FLeRMConfig(), config("match", base))
    assert resumed.rate_profile.steps.tolist() == [0, 1, 2, 4]
    assert flerm_callback(resumed).evidence.steps == (4,)


def test_a_profile_of_a_later_checkpoint_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, gpt2(), FLeRMConfig(), **SAVING).train()
    later = (tmp_path / "checkpoint-6" / PROFILE_NAME).read_bytes()
    (tmp_path / "checkpoint-3" / PROFILE_NAME).write_bytes(later)
    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig(), **SAVING)
    with pytest.raises(RateProfileError, match=r"holds step 4, .* from step 3: it belongs to another checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_model_of_other_tensors_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path, gpt2(), FLeRMConfig(), **SAVING).train()
    model = gpt2()
    model.transformer.h[0].ln_1.requires_grad_(False)
    trainer = make_trainer(tmp_path, model, FLeRMConfig(), **SAVING)
    with pytest.raises((RateProfileError, ValueError), match=r"parameter group|only in"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def shuffled(seed: int) -> nn.Module:
    """The same model; its tensors are listed in another order, but that its tied head stays the second."""
    model = gpt2()
    numbers = random.Random(seed)
    for module in model.transformer.modules():
        for own in (module._modules, module._parameters):
            items = list(own.items())
            if not isinstance(module, nn.ModuleList):
                numbers.shuffle(items)
                own.clear()
                own.update(items)
    return model


def test_a_checkpoint_of_an_old_matched_run_goes_on(tmp_path: Path, base: RateProfile) -> None:
    """Version 0.1 wrote a name for every tensor into the param groups."""
    whole = make_trainer(tmp_path / "whole", gpt2(), config("match", base), **SAVING)
    expected = train(whole)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for group in state["param_groups"]:
        group["flerm_names"] = [f"tensor.{index}" for index in group["params"]]
    torch.save(state, checkpoint / "optimizer.pt")
    resumed = make_trainer(tmp_path / "resumed", gpt2(), config("match", base), **SAVING)
    actual = train(resumed, resume_from_checkpoint=str(checkpoint))
    assert_identical(actual.weights, expected.weights)
    assert_identical(actual.optimizer, expected.optimizer)


# --- how the work is split does not matter ------------------------------------------------------------------------


def rates_of(folder: Path, model: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    options = {"per_device_train_batch_size": 8, "max_steps": 3, "lr_scheduler_type": "constant", **options}
    return recorded(folder, model, data=Rows(32), flerm=FLeRMConfig(measure_every=1), **options).rates


SPLITS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "accumulation": (gpt2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    "checkpointing": (gpt2, {"gradient_checkpointing": True}),
    "order of the tensors": (lambda: shuffled(2), {}),
    "workers": (gpt2, {"dataloader_num_workers": 2}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("split", SPLITS)
def test_rates_do_not_depend_on_how_the_work_is_split(tmp_path: Path, split: str) -> None:
    make, options = SPLITS[split]
    expected, actual = rates_of(tmp_path, gpt2()), rates_of(tmp_path, make(), **options)
    assert actual.keys() == expected.keys()
    for name, rates in expected.items():
        torch.testing.assert_close(
            actual[name], rates, rtol=1e-3, atol=0.0, msg=lambda text, name=name: f"{name}: {text}"
        )
