"""Matrices by Muon and the rest by AdamW in one run, each with its own learning rate and weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.utils.data import DataLoader

from hf_flerm import FLeRMConfig, FLeRMRun, RateProfile, Research, measure_rates, plan
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.behavior import weight_decays
from hf_flerm.optimizer.step_scales import StepScales
from hf_flerm.profile.metadata import other_algorithms
from tests.shared.training import (
    BATCH,
    STEPS,
    Rows,
    arguments,
    assert_identical,
    assert_same_run,
    gpt2,
    make_trainer,
    train,
    weights_of,
)
from tests.shared.wrapped_optimizers import Pair, SingleDeviceMuonWithAuxAdam

MUON: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
ADAMW: dict[str, Any] = {"lr": 3e-4, "weight_decay": 0.01}
Make = Callable[[nn.Module], Optimizer]


def parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices in the blocks, and the rest."""
    named = list(model.named_parameters())
    return (
        [p for name, p in named if p.ndim == 2 and ".h." in name],
        [p for name, p in named if p.ndim != 2 or ".h." not in name],
    )


def is_hidden(name: str) -> bool:
    return ".h." in name and "ln_" not in name and name.endswith("weight")


def two_classes(model: nn.Module, adjust_lr_fn: str | None = None) -> Optimizer:
    matrices, rest = parts(model)
    return Pair([Muon(matrices, **MUON, adjust_lr_fn=adjust_lr_fn), AdamW(rest, **ADAMW)])


def moonlight(model: nn.Module) -> Optimizer:
    return two_classes(model, "match_rms_adamw")


def one_class(model: nn.Module) -> Optimizer:
    matrices, rest = parts(model)
    groups = [{"params": matrices, "use_muon": True, **MUON}, {"params": rest, "use_muon": False, **ADAMW}]
    return SingleDeviceMuonWithAuxAdam(groups)


class Factory:
    """What `optimizer_cls_and_kwargs` of a Trainer takes for optimizers that need the model."""

    def __call__(self, model: nn.Module) -> Optimizer:
        return two_classes(model)


WAYS: dict[str, Make] = {"two classes": two_classes, "Moonlight": moonlight, "one class": one_class}


def trainer_of(folder: Path, make: Make | None, flerm: FLeRMConfig | None, **options: Any) -> Any:
    model = options.pop("model", None) or gpt2()
    extra: dict[str, Any] = (
        {"optimizer_cls_and_kwargs": (Factory, {})} if make is None else {"optimizers": (make(model), None)}
    )
    return make_trainer(folder, model, flerm, extra=extra, learning_rate=3e-4, **options)


def config(**options: Any) -> FLeRMConfig:
    research = Research(estimator="exact", probe_batch_size=BATCH, pool="unit", beta=1.0)
    return FLeRMConfig(research=research, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RateProfile:
    trainer = trainer_of(tmp_path_factory.mktemp("base"), two_classes, config())
    trainer.train()
    profile: RateProfile = trainer.rate_profile
    return profile


@pytest.mark.parametrize("way", [*WAYS, "factory"])
def test_recording_and_scales_of_one_change_no_bit(tmp_path: Path, way: str) -> None:
    make = WAYS.get(way)
    plain = train(trainer_of(tmp_path, make, None))
    recorder = trainer_of(tmp_path, make, config())
    assert_same_run(train(recorder), plain)
    matcher = trainer_of(tmp_path, make, config(mode="match", profile=recorder.rate_profile))
    assert_same_run(train(matcher), plain)
    assert set(matcher.flerm_callback.scales.values()) == {1.0}


@pytest.mark.parametrize("way", WAYS)
def test_rates_are_per_unit_of_the_learning_rate_of_each_part(tmp_path: Path, way: str) -> None:
    """Joint rates are those of the joint update, per unit of Muon's learning rate, the larger one."""
    model, data = gpt2(), Rows(BATCH)  # one batch is the whole data set
    before = weights_of(model)
    trainer = trainer_of(
        tmp_path,
        WAYS[way],
        config(measure_steps=[0], metric="euclidean"),
        model=model,
        data=data,
        max_steps=1,
        lr_scheduler_type="constant",
    )
    trainer.train()
    updates = {}
    for name, after in weights_of(model).items():
        options = MUON if is_hidden(name) else ADAMW
        rate = options["lr"]
        updates[name] = (after - before[name] * (1 - rate * options["weight_decay"])) / rate
        model.get_parameter(name).data = before[name]
    batch = {"input_ids": data.tokens}
    profile = trainer.rate_profile
    assert profile.at(0) == pytest.approx(measure_rates(model, updates, [batch], estimator="exact").rates, rel=1e-4)
    joint = {name: update * (1.0 if is_hidden(name) else ADAMW["lr"] / MUON["lr"]) for name, update in updates.items()}
    expected = measure_rates(model, joint, [batch], estimator="exact")
    assert float(profile.joint_rates["global"][""][0]) == pytest.approx(expected.total, rel=1e-4)
    vectors = ["transformer.ln_f.weight", "transformer.ln_f.bias"]  # both by AdamW: per unit of its learning rate
    alone = measure_rates(model, {name: updates[name] for name in vectors}, [batch], estimator="exact").total
    assert float(profile.joint_rates["module"]["transformer.ln_f"][0]) == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_scale_of_two_doubles_every_step_and_no_decay(way: str) -> None:
    """From the same state, with the learning-rate adjustment of Muon."""

    def third_step(scale: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = gpt2().double()
        optimizer = WAYS[way](model)
        scales = StepScales(optimizer, trainable_parameters(model))
        for step in range(3):
            if step == 2:
                before = weights_of(model)
                scales.scales = dict.fromkeys(before, scale)
            model.zero_grad()
            model(input_ids=Rows(seed=step).tokens, labels=Rows(seed=step).tokens).loss.backward()
            optimizer.step()
        decays = weight_decays(optimizer, trainable_parameters(model))
        assert decays == {name: (MUON if is_hidden(name) else ADAMW)["weight_decay"] for name in before}
        rates = {name: (MUON if is_hidden(name) else ADAMW)["lr"] for name in before}
        start = {name: weights * (1 - rates[name] * decays[name]) for name, weights in before.items()}
        return before, {name: after - start[name] for name, after in weights_of(model).items()}

    (before, once), (same, twice) = third_step(1.0), third_step(2.0)
    assert_identical(same, before)
    for name in once:
        assert once[name].norm() > 0
        torch.testing.assert_close(twice[name], 2 * once[name], rtol=1e-9, atol=1e-15, msg=name)


@pytest.mark.parametrize("way", [*WAYS, "factory"])
def test_the_metadata_say_what_stepped_what_at_which_learning_rate(tmp_path: Path, way: str) -> None:
    trainer = trainer_of(tmp_path, WAYS.get(way), config(measure_steps=[0]), max_steps=1, warmup_steps=1)
    trainer.train()
    about = trainer.rate_profile.about
    names = list(weights_of(trainer.model))
    muon = "Muon (match_rms_adamw)" if way == "Moonlight" else "Muon"  # its steps are as large as AdamW's
    assert about.algorithms == {name: muon if is_hidden(name) else "AdamW" for name in names}
    assert about.learning_rates == {name: (MUON if is_hidden(name) else ADAMW)["lr"] for name in names}
    assert about.learning_rate == MUON["lr"]  # not TrainingArguments' 0.0003
    if way != "one class":
        assert [part["class"] for part in about.optimizer["parts"]] == ["Muon", "AdamW"]


def test_an_adamw_base_is_matched_and_differences_are_named(
    tmp_path: Path, warnings_of: Callable[[], list[str]]
) -> None:
    trainer: Any = make_trainer(tmp_path, gpt2(), config(), optim="adamw_torch", learning_rate=3e-4)
    trainer.train()
    adamw = trainer.rate_profile
    matcher = trainer_of(tmp_path, two_classes, config(mode="match", profile=adamw, measure_steps=[0]))
    matcher.train()
    own = matcher.rate_profile
    found = {message for message in warnings_of() if "learning rate" in message}
    assert len(found) == 1
    assert "0.0003 in the base, 0.02 here" in found.pop()
    hidden = {about for name, about in own.about.kinds.items() if is_hidden(name)}
    assert other_algorithms(adamw.about, own.about) == dict.fromkeys(hidden, ("AdamW", "Muon"))
    assert other_algorithms(own.about, own.about) == {}
    moving = [name for name in own.names if own.at(0)[name] > 0 and adamw.at(0)[name] > 0]
    scales = matcher.flerm_callback.scales
    assert {name: scales[name] for name in moving} == pytest.approx(
        {name: adamw.at(0)[name] / own.at(0)[name] for name in moving}, rel=1e-6
    )


@pytest.mark.parametrize("mode", ["record", "match"])
@pytest.mark.parametrize("way", ["two classes", "one class"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(tmp_path: Path, base: RateProfile, mode: str, way: str) -> None:
    half = RateProfile(base.steps, {name: rates / 2 for name, rates in base.rates.items()}, base.metadata)
    flerm = config(mode=mode, profile=half if mode == "match" else None)
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path / "whole", WAYS[way], flerm, **saving)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", WAYS[way], flerm, model=gpt2(seed=9), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_identical(weights_of(resumed.model), weights_of(whole.model))
    assert_identical(resumed.optimizer.state_dict(), whole.optimizer.state_dict())
    assert resumed.flerm_callback.scales == whole.flerm_callback.scales
    assert (set(whole.flerm_callback.scales.values()) == {1.0}) == (mode == "record")
    assert resumed.rate_profile.to_bytes() == whole.rate_profile.to_bytes()


def loop(flerm: FLeRMConfig | None, *, together: bool) -> tuple[dict[str, Tensor], FLeRMRun | None]:
    """A loop with two optimizers, each stepped by itself or behind one face."""
    model = gpt2()
    pair: Any = two_classes(model)
    loader = DataLoader(Rows(BATCH * STEPS), BATCH)
    given = pair if together else pair.optimizers
    run = None if flerm is None else FLeRMRun(model, given, flerm, loader)
    for batch in loader:
        model(**batch).loss.backward()
        if run is None:
            pair.step()
        else:
            with run.step():
                for optimizer in [pair] if together else pair.optimizers:
                    optimizer.step()
        pair.zero_grad()
    if run is not None:
        run.close()
    return weights_of(model), run


def test_a_loop_may_have_two_optimizers() -> None:
    plain, _ = loop(None, together=True)
    weights, recorded = loop(config(), together=False)
    assert recorded is not None
    assert_identical(weights, plain)
    half = RateProfile(recorded.profile.steps, {n: rates / 2 for n, rates in recorded.profile.rates.items()})
    (one, of_one), (two, of_two) = (
        loop(config(mode="match", profile=half), together=together) for together in (True, False)
    )
    assert of_one is not None
    assert of_two is not None
    assert of_two.scales == of_one.scales
    assert min(of_two.scales.values()) < 0.6
    assert_identical(two, one)


def test_one_of_two_optimizers_is_not_enough() -> None:
    model = gpt2()
    pair: Any = two_classes(model)
    with pytest.raises(ValueError, match="several optimizers, give FLeRMRun the list of them"):
        FLeRMRun(model, pair.optimizers[0], FLeRMConfig(), DataLoader(Rows(), BATCH))


def test_a_plan_trains_at_the_learning_rates_of_the_base(tmp_path: Path, base: RateProfile) -> None:
    made: list[Any] = []

    def other(model: nn.Module) -> Optimizer:
        pair: Any = two_classes(model)
        for group in pair.param_groups:
            group["lr"] *= 50
        made.append(pair)
        optimizer: Optimizer = pair
        return optimizer

    args = arguments(tmp_path, lr_scheduler_type="constant")
    found = plan(gpt2(), args, Rows(), base, steps=3, optimizer=other, config=config())
    assert [group["initial_lr"] for group in made[0].param_groups] == pytest.approx([MUON["lr"], ADAMW["lr"]])
    assert abs(math.log(found.overall.value)) < 0.1
    assert str(found).startswith("Keep 0.02 (Muon) and 0.0003 (AdamW).")
