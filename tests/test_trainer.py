"""`FLeRMTrainer` and `FLeRMCallback`: recording leaves no trace, matching does what it says, bad input never starts."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import training
from peft.optimizers import create_loraplus_optimizer
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset
from training import (
    BATCH,
    MEASURED,
    MODELS,
    STEPS,
    Outcome,
    Rows,
    arguments,
    assert_identical,
    assert_same_run,
    flerm_callback,
    gpt2,
    lora,
    make_trainer,
    recorded,
    scaled,
    some_factors,
    train,
    weights_of,
)
from transformers import (
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from hf_flerm import (
    FLeRMArguments,
    FLeRMCallback,
    FLeRMConfig,
    FLeRMTrainer,
    RateProfile,
    RateProfileError,
    measure_rates,
)
from hf_flerm.mapping import ProfileMap
from hf_flerm.names import canonical_names, tensor_kinds, trainable_parameters
from hf_flerm.optimizer import learning_rates, raw_optimizer
from hf_flerm.probes import RateProbe
from hf_flerm.rate_profile import PROFILE_NAME

DROPOUT = 0.1
# Dropout, a decaying schedule (the Trainer's default) and accumulation, under each of these.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw-fused": {"optim": "adamw_torch_fused"},
    "adamw-foreach": {"extra": {"optimizer_cls_and_kwargs": (AdamW, {"lr": 1e-2, "foreach": True})}},
    "sgd-momentum": {"extra": {"optimizer_cls_and_kwargs": (SGD, {"lr": 1e-1, "momentum": 0.9})}},
    "adafactor": {"optim": "adafactor"},
}


def llama(dropout: float = 0.0, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=training.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=training.LENGTH,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


@functools.cache
def plain_run(folder: Path, model: str, optimizer: str) -> Outcome:
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS[optimizer]}
    return train(make_trainer(folder, MODELS[model](DROPOUT), **options))


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """The Trainer collects garbage whenever it starts; the imported libraries need not be searched every time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For runs that write nothing."""
    return tmp_path_factory.mktemp("runs")


class Stop(TrainerCallback):
    """Ends training early, as a preempted job would after its last checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


class CountSteps(TrainerCallback):
    """Counts the optimizer steps."""

    def __init__(self) -> None:
        self.steps = 0

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


class SpyRates(TrainerCallback):
    """The learning rate of every tensor: inside each `optimizer.step`, and at three events around it."""

    def __init__(self) -> None:
        self.inside: list[dict[str, float]] = []
        self.outside: list[dict[str, float]] = []
        self.optimizer: Optimizer | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.optimizer is None:
            self.optimizer = raw_optimizer(kwargs["optimizer"])
            self.parameters = trainable_parameters(kwargs["model"])
            self.optimizer.register_step_pre_hook(lambda *_: self.inside.append(self._rates()))
        self.outside.append(self._rates())

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.outside.append(self._rates())

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.outside.append(self._rates())

    def _rates(self) -> dict[str, float]:
        assert self.optimizer is not None
        return learning_rates(self.optimizer, self.parameters)


class Tracker(TrainerCallback):
    """What an experiment tracker is told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


# --- recording changes nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_recording_changes_nothing(folder: Path, model: str, optimizer: str) -> None:
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS[optimizer]}
    trainer = make_trainer(folder, MODELS[model](DROPOUT), FLeRMConfig(), **options)
    outcome = train(trainer)
    assert trainer.rate_profile.steps.tolist() == MEASURED
    assert_same_run(outcome, plain_run(folder, model, optimizer))


def test_these_runs_can_tell_one_bit(folder: Path) -> None:
    """The comparison sees what it must: another seed, another random stream, a weight one bit off."""
    plain = plain_run(folder, "full", "adamw-fused")
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS["adamw-fused"]}
    other = train(make_trainer(folder, gpt2(DROPOUT), seed=1, **options))
    with pytest.raises(AssertionError):
        assert_same_run(other, plain)
    twin = train(make_trainer(folder, gpt2(DROPOUT), **options))
    assert_same_run(twin, plain)
    weight = twin.weights["transformer.h.0.mlp.c_fc.weight"].view(-1)
    weight[3] = torch.nextafter(weight[3], torch.tensor(math.inf))
    with pytest.raises(AssertionError, match=r"h\.0\.mlp\.c_fc\.weight"):
        assert_same_run(twin, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"max_grad_norm": 0.0},
        {"eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=["bf16", "checkpointing", "unclipped", "evaluating"],
)
def test_recording_changes_nothing_whatever_else_goes_on(folder: Path, options: dict[str, Any]) -> None:
    options = {"extra": {"eval_dataset": Rows(seed=1)}, **options}
    plain = train(make_trainer(folder, llama(DROPOUT), **options))
    trainer = make_trainer(folder, llama(DROPOUT), FLeRMConfig(), **options)
    assert_same_run(train(trainer), plain)
    assert trainer.rate_profile.steps.tolist() == MEASURED


@pytest.mark.parametrize("estimator", ["kronecker", "full", "exact"])
def test_recording_changes_nothing_with_any_estimator(folder: Path, estimator: str) -> None:
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS["adamw-fused"]}
    trainer = make_trainer(folder, lora(DROPOUT), FLeRMConfig(estimator=estimator), **options)
    assert_same_run(train(trainer), plain_run(folder, "lora", "adamw-fused"))
    assert trainer.rate_profile.steps.tolist() == MEASURED


def test_recording_changes_nothing_with_a_collator_that_draws(folder: Path) -> None:
    """Masking collators use the global random streams, all three of them."""

    calls = []

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        calls.append(len(rows))
        batch = default_data_collator(rows)
        hit = torch.rand(batch["input_ids"].shape) < 0.3
        batch["input_ids"][hit] = random.randrange(training.VOCABULARY)
        batch["input_ids"][0, 0] = np.random.randint(training.VOCABULARY)
        return batch

    extra = {"data_collator": collate}
    plain = train(make_trainer(folder, gpt2(DROPOUT), extra=extra))
    by_training = len(calls)
    trainer = make_trainer(folder, gpt2(DROPOUT), FLeRMConfig(probes=2, probe_batch_size=3), extra=extra)
    assert_same_run(train(trainer), plain)
    assert trainer.rate_profile.steps.tolist() == MEASURED
    assert len(calls) == 2 * by_training + 1 + 2 * len(MEASURED), "one before training, to see whether it can be probed"
    assert calls.count(3) == 1 + 2 * len(MEASURED)


class Masking:
    """A collator that masks by a generator of its own, made at once or when it is first needed."""

    def __init__(self, make: Callable[[], Any], draw: Callable[[Any], float], *, at_once: bool) -> None:
        self.make, self.draw = make, draw
        self.generator = make() if at_once else None

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.generator = self.make() if self.generator is None else self.generator
        batch = default_data_collator(rows)
        batch["input_ids"][:, int(self.draw(self.generator) * training.LENGTH) :] = 0
        return batch


class MaskedRows(Rows):
    """Rows whose masks are drawn by a generator of the data set."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        hidden = range(self.generator.randrange(training.LENGTH), training.LENGTH)
        return {**row, "input_ids": row["input_ids"].index_fill(0, torch.tensor([*hidden]), 0)}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(0), lambda generator: torch.rand((), generator=generator).item()),
        (lambda: np.random.default_rng(0), lambda generator: generator.random()),
        (lambda: np.random.RandomState(0), lambda generator: generator.rand()),
        (lambda: random.Random(0), lambda generator: generator.random()),
    ],
    ids=["torch", "numpy", "older numpy", "python"],
)
def test_recording_changes_nothing_with_a_collator_that_has_a_seed(
    folder: Path, make: Callable[[], Any], draw: Callable[[Any], float], at_once: bool
) -> None:
    """`DataCollatorForLanguageModeling(seed=...)` is one; the `Trainer` puts it into another that removes columns."""
    own, plainly = ({"data_collator": Masking(make, draw, at_once=at_once)} for _ in range(2))
    plain = train(make_trainer(folder, gpt2(), extra=plainly))
    trainer = make_trainer(folder, gpt2(), FLeRMConfig(), extra=own)
    assert_same_run(train(trainer), plain)
    assert trainer.rate_profile.steps.tolist() == MEASURED


def test_recording_changes_nothing_with_a_data_set_that_has_a_seed(folder: Path) -> None:
    plain = train(make_trainer(folder, gpt2(), data=MaskedRows()))
    assert_same_run(train(make_trainer(folder, gpt2(), FLeRMConfig(), data=MaskedRows())), plain)


def test_recording_leaves_the_param_groups_alone(folder: Path) -> None:
    trainer = make_trainer(folder, gpt2(), FLeRMConfig(), max_steps=1)
    trainer.train()
    groups = raw_optimizer(trainer.optimizer).param_groups
    assert len(groups) == 2
    assert not any("flerm_name" in group for group in groups)


# --- a probe that raises ------------------------------------------------------------------------------------------

PLACES = {
    "examples": (Rows, "__getitem__"),
    "inside the model": (GPT2MLP, "forward"),
    "after the forward": (GPT2LMHeadModel, "forward"),
    "after the backward": (torch.autograd, "grad"),
    "after the measurement": (RateProbe, "measure"),
}


def break_measurements(patch: pytest.MonkeyPatch, place: str, failing: range, message: str) -> None:
    """Let some measurements, counted from 0, raise where `place` is done; the training's own calls go through."""
    count, armed = itertools.count(), [False]
    owner, name = PLACES[place]

    def breaking(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # the Trainer reads the signature of a model's forward
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if armed[0]:
                raise RuntimeError(message)
            return result

        return call

    def arming(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            armed[0] = next(count) in failing
            try:
                return function(*args, **kwargs)
            finally:
                armed[0] = False

        return call

    patch.setattr(owner, name, breaking(getattr(owner, name)))
    patch.setattr(RateProbe, "measure", arming(RateProbe.measure))


@pytest.mark.parametrize(
    ("place", "model"), [*((place, "full") for place in PLACES), ("inside the model", "lora")], ids=[*PLACES, "lora"]
)
def test_a_probe_that_raises_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, warnings_of: Callable[[], list[str]], place: str, model: str
) -> None:
    message = f"broken at {place} of {model}"
    break_measurements(monkeypatch, place, range(2, 3), message)
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS["adamw-fused"]}
    trainer = make_trainer(folder, MODELS[model](DROPOUT), FLeRMConfig(probes=2), **options)
    outcome = train(trainer)
    assert_same_run(outcome, plain_run(folder, model, "adamw-fused"))
    assert trainer.rate_profile.steps.tolist() == [0, 1, 3, 4]
    (warning,) = warnings_of()
    assert message in warning
    assert "step 2" in warning


@pytest.mark.parametrize("place", ["inside the model", "after the measurement"])
def test_a_probe_that_keeps_raising_is_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, warnings_of: Callable[[], list[str]], place: str
) -> None:
    break_measurements(monkeypatch, place, range(1, 100), f"broken for good at {place}")
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS["adamw-fused"]}
    trainer = make_trainer(folder, gpt2(DROPOUT), FLeRMConfig(), **options)
    assert_same_run(train(trainer), plain_run(folder, "full", "adamw-fused"))
    assert trainer.rate_profile.steps.tolist() == [0]
    first, last = warnings_of()
    assert "failed at step 1" in first
    assert "3 measurements failed in a row" in last


@pytest.mark.parametrize("again", ["new trainer", "same trainer"])
def test_every_run_reports_its_own_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, warnings_of: Callable[[], list[str]], again: str
) -> None:
    """A notebook's second run must not fail silently because the first one failed in the same way."""
    trainer = make_trainer(folder, gpt2(), FLeRMConfig(), max_steps=3)
    for run in (1, 2):
        with monkeypatch.context() as patch:
            break_measurements(patch, "after the measurement", range(1, 2), "broken in every run")
            trainer.train()
        assert len(warnings_of()) == run
        if again == "new trainer":
            trainer = make_trainer(folder, gpt2(), FLeRMConfig(), max_steps=3)


def test_a_probe_that_raises_leaves_the_scales_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matched run goes on as if the measurement had been asked for a step later."""
    base = known_base(folder, gpt2)
    config = {"mode": "match", "profile": base, "pool": "unit", "beta": 1.0}
    expected = train(make_trainer(folder, gpt2(), FLeRMConfig(**config, measure_steps=(0, 2, 3))))
    break_measurements(monkeypatch, "after the measurement", range(1, 2), "broken while matching")
    trainer = make_trainer(folder, gpt2(), FLeRMConfig(**config, measure_steps=(0, 1, 3)))
    assert_same_run(train(trainer), expected)
    assert trainer.rate_profile.steps.tolist() == [0, 2, 3]


# --- matching with scales of 1 ------------------------------------------------------------------------------------


def all_ones(mapped: ProfileMap, logs: Mapping[str, float]) -> dict[str, float]:
    return dict.fromkeys(mapped.shapes, 1.0)


@pytest.mark.parametrize(
    ("optimizer", "alone"),
    [*((name, False) for name in OPTIMIZERS), ("adamw-fused", True)],
    ids=[*OPTIMIZERS, "callback"],
)
@pytest.mark.parametrize("model", MODELS)
def test_matching_with_scales_of_one_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, optimizer: str, alone: bool
) -> None:
    names = trainable_parameters(MODELS[model]())
    config = FLeRMConfig(mode="match", profile=RateProfile([0], {name: [1.0] for name in names}))
    monkeypatch.setattr(ProfileMap, "tensor_scales", all_ones)
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS[optimizer]}
    trainer = make_trainer(folder, MODELS[model](DROPOUT), config, alone=alone, **options)
    outcome = train(trainer)
    assert flerm_callback(trainer).rate_profile.steps.tolist() == MEASURED
    assert_same_run(outcome, plain_run(folder, model, optimizer), same_groups=False)


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_a_users_own_optimizer_and_scheduler_go_through(
    folder: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    def own(model: nn.Module) -> dict[str, Any]:
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        optimizer = AdamW([{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "lr": 1e-3}], lr=1e-2)
        return {"optimizers": (optimizer, LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]))}

    model = gpt2(DROPOUT)
    plain = train(make_trainer(folder, model, extra=own(model)))
    model = gpt2(DROPOUT)
    config = FLeRMConfig(mode="match", profile=RateProfile([0], {name: [1.0] for name in trainable_parameters(gpt2())}))
    monkeypatch.setattr(ProfileMap, "tensor_scales", all_ones)
    trainer = make_trainer(folder, model, config, alone=alone, extra=own(model))
    outcome = train(trainer)
    assert_same_run(outcome, plain, same_groups=False)
    names = set(trainable_parameters(model))
    decays = weight_decays(raw_optimizer(trainer.optimizer), model)
    assert decays == {name: 0.3 if model.get_parameter(name).ndim > 1 else 0.01 for name in names}


@pytest.mark.parametrize("model", MODELS)
def test_matching_a_run_with_itself_changes_nothing(folder: Path, model: str) -> None:
    """Nothing is patched: with the same probes as the base, the measured rates are the base's, and every scale is 1."""
    base = recorded(folder, MODELS[model](DROPOUT), gradient_accumulation_steps=2, optim="adamw_torch_fused")
    config = FLeRMConfig(mode="match", profile=base)
    options = {"gradient_accumulation_steps": 2, **OPTIMIZERS["adamw-fused"]}
    trainer = make_trainer(folder, MODELS[model](DROPOUT), config, **options)
    outcome = train(trainer)
    assert flerm_callback(trainer).scales == dict.fromkeys(base.names, 1.0)
    assert trainer.rate_profile.rates.keys() == base.rates.keys()
    assert_identical(trainer.rate_profile.rates, {name: base.rates[name] for name in trainer.rate_profile.names})
    assert_same_run(outcome, plain_run(folder, model, "adamw-fused"), same_groups=False)


@pytest.mark.parametrize("model", ["full", "lora"])
def test_matching_a_run_with_itself_by_other_probes_is_as_exact_as_its_noise(folder: Path, model: str) -> None:
    """Base and target draw their own omega on the same examples, so the standard errors are the whole difference.

    sd(log scale) = sqrt((se / rate)^2 of base + of target). The tensors share omega, so nothing better is assumed of
    the mean over tensors than full correlation: its sd is at most the mean of theirs.
    """
    # LoRA's A would have rate 0 at the first step with the default init.
    make = {"full": gpt2, "lora": lambda: lora(init=False)}[model]
    probe_dataset = Rows(1024, seed=5)
    options = {"probe_dataset": probe_dataset, "max_steps": 1}
    shared = {"measure_steps": (0,), "probes": 16, "probe_batch_size": len(probe_dataset)}
    base = make_trainer(folder, make(), FLeRMConfig(**shared), **options)
    base.train()
    profile = base.rate_profile
    target = make_trainer(
        folder, make(), FLeRMConfig(mode="match", profile=profile, pool="unit", seed=1, **shared), **options
    )
    target.train()
    scales = flerm_callback(target).scales
    assert scales.keys() == profile.rates.keys()

    def relative_errors(trainer: Trainer) -> dict[str, float]:
        measurement = flerm_callback(trainer).last_measurement
        return {name: measurement.standard_errors[name] / rate for name, rate in measurement.rates.items()}

    of_base, of_target = relative_errors(base), relative_errors(target)
    sd = {name: math.hypot(of_base[name], of_target[name]) for name in scales}
    logs = {name: math.log(scale) for name, scale in scales.items()}
    assert any(logs.values()), "the two runs must not share their random numbers"
    assert {name: logs[name] / sd[name] for name in logs if abs(logs[name]) > 4 * sd[name]} == {}
    mean_sd = sum(sd.values()) / len(sd)
    assert 3 * mean_sd < math.log(1.03), "too few probes: three standard deviations must fit into 3 %"
    assert abs(sum(logs.values()) / len(logs)) < math.log(1.03)


# --- scales that are not 1 ----------------------------------------------------------------------------------------


def known_base(folder: Path, make: Callable[[], nn.Module], **options: Any) -> RateProfile:
    """A base that a run of `make()` matches with the scales `some_factors`: its own rates, seen by the same probes."""
    config = FLeRMConfig(measure_steps=(0,))
    return scaled(recorded(folder, make(), flerm=config, **{"max_steps": 1, **options}), some_factors(make()))


def match_known(base: RateProfile, **changes: Any) -> FLeRMConfig:
    return FLeRMConfig(
        **{"mode": "match", "profile": base, "pool": "unit", "beta": 1.0, "measure_steps": (0,), **changes}
    )


def plain_sgd(lr: float = 0.5) -> dict[str, Any]:
    return {"extra": {"optimizer_cls_and_kwargs": (SGD, {"lr": lr})}, "learning_rate": lr, "weight_decay": 0.0}


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_measured_steps_are_redone_at_their_scales(folder: Path, alone: bool) -> None:
    """With plain SGD, weights after a measured step are W - lr(t) * s(t) * gradient; here s is new at either step."""
    lr = 0.5
    data = Rows(BATCH)  # one batch, whatever its order
    options = {**plain_sgd(lr), "data": data, "max_steps": 2, "max_grad_norm": 0.0, "alone": alone}
    first = some_factors(gpt2())
    second = dict(zip(first, reversed(first.values()), strict=True))
    config = {"measure_steps": (0, 1), "beta": 0.0}
    # The first step's scales decide what the second's rates are; a run that has them tells the base to ask for.
    probe = make_trainer(folder, gpt2(), match_known(known_base(folder, gpt2, **options), **config), **options)
    probe.train()
    seen = flerm_callback(probe).rate_profile
    wanted = {name: [rates[0] * first[name], rates[1] * second[name]] for name, rates in seen.rates.items()}
    trainer = make_trainer(folder, gpt2(), match_known(RateProfile([0, 1], wanted), **config), **options)
    trainer.train()
    assert flerm_callback(trainer).scales == pytest.approx(second, rel=1e-3)

    reference = gpt2().double().train()
    parameters = trainable_parameters(reference)
    moved = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for rate, scales in ((lr, first), (lr / 2, second)):
        reference.zero_grad()
        # The Trainer divides the summed loss by the number of labels.
        reference(input_ids=data.tokens, labels=data.tokens, num_items_in_batch=data.tokens.numel()).loss.backward()
        with torch.no_grad():
            for name, parameter in parameters.items():
                update = rate * scales[name] * parameter.grad
                parameter -= update
                moved[name] += update.abs()
    after = trainable_parameters(trainer.model)
    for name, parameter in parameters.items():
        # A weight of size w carries a rounding error of 2^-24 w from each of three operations in either step.
        rounding = 6 * 2**-24 * parameter.abs().max()
        error = (after[name].double() - parameter).abs().max()
        assert bool(error <= 1e-3 * moved[name].max() + rounding), name
        assert bool(moved[name].max() > 20 * rounding), "an update this small would show nothing"


def test_scales_act_like_learning_rates_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end: weights and rates of a run whose param groups have lr * s baked in, under the same schedule."""
    model = gpt2()
    factors = some_factors(model)
    parameters = trainable_parameters(model)
    optimizer = SGD([{"params": [p], "lr": 0.5 * factors[name]} for name, p in parameters.items()])
    start = weights_of(model)
    baked = make_trainer(folder, model, FLeRMConfig(), extra={"optimizers": (optimizer, None)}, weight_decay=0.0)
    baked.train()
    base = RateProfile([0], {name: [1.0] for name in factors})
    monkeypatch.setattr(ProfileMap, "tensor_scales", lambda mapped, logs: dict(factors))
    matched = make_trainer(folder, gpt2(), FLeRMConfig(mode="match", profile=base), **plain_sgd())
    matched.train()
    expected, actual = weights_of(model), weights_of(matched.model)
    for name in expected:
        torch.testing.assert_close(actual[name] - start[name], expected[name] - start[name], rtol=1e-3, atol=2e-6)
    assert matched.rate_profile.steps.tolist() == baked.rate_profile.steps.tolist() == MEASURED
    for name, rates in baked.rate_profile.rates.items():
        torch.testing.assert_close(matched.rate_profile.rates[name], rates, rtol=2e-3, atol=0.0)


def test_a_base_that_was_matched_itself_is_refused_where_its_rates_do_not_tell_how_far_it_moved(folder: Path) -> None:
    base = recorded(folder, gpt2())
    matched = [
        recorded(folder, gpt2(), flerm=FLeRMConfig("match", profile))
        for profile in (base, scaled(base, some_factors(gpt2())))
    ]
    recorded(folder, gpt2(), flerm=FLeRMConfig("match", matched[0]))  # all scales were 1
    for profile, by in ((matched[1], r"scaled by 0\.\d+ to \d"), (RateProfile.average(matched), "scaled, and")):
        with pytest.raises(RateProfileError, match=f"that of a run that was matched itself.*{by}"):
            recorded(folder, gpt2(), flerm=FLeRMConfig("match", profile))


class Snapshots(TrainerCallback):
    """The weights before every step, and after the last."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(weights_of(kwargs["model"]))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(weights_of(kwargs["model"]))


def test_recorded_rates_are_those_of_the_steps_that_were_made(folder: Path) -> None:
    """Each step's own learning rate under a decaying schedule, each tensor's own (LoRA+), weights from before it."""
    data, snapshots, spy = Rows(BATCH), Snapshots(), SpyRates()
    options = {"data": data, "max_steps": 4, "gradient_accumulation_steps": 1}

    def loraplus(model: nn.Module) -> dict[str, Any]:
        return {"optimizers": (create_loraplus_optimizer(model, AdamW, lr=1e-2, loraplus_lr_ratio=4), None)}

    model = lora()
    make_trainer(folder, model, extra=loraplus(model), callbacks=[snapshots, spy], **options).train()
    model = lora()
    profile = recorded(
        folder,
        model,
        flerm=FLeRMConfig(estimator="exact", probe_batch_size=BATCH, measure_steps=range(4)),
        extra=loraplus(model),
        **options,
    )
    assert profile.steps.tolist() == [0, 1, 2, 3]
    raw = {name: path for path, name in canonical_names(model).items()}
    for step, (before, after) in enumerate(itertools.pairwise(snapshots.weights)):
        updates = {name: (after[raw[name]] - before[raw[name]]) / rate for name, rate in spy.inside[step].items()}
        for name, parameter in model.named_parameters():
            parameter.data = before[name]
        batch = {"input_ids": data.tokens}
        expected = measure_rates(model, updates, [batch], estimator="exact").rates
        assert profile.at(step) == pytest.approx(expected, rel=1e-5)
    assert len(set(spy.inside[0].values())) == 2
    assert spy.inside[0] != spy.inside[3]


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
@pytest.mark.parametrize("model", MODELS)
def test_scales_are_seen_by_the_step_and_by_nobody_else(folder: Path, model: str, alone: bool) -> None:
    spies = SpyRates(), SpyRates()
    make_trainer(folder, MODELS[model](), callbacks=[spies[0]]).train()
    base = known_base(folder, MODELS[model])
    trainer = make_trainer(folder, MODELS[model](), match_known(base), alone=alone, callbacks=[spies[1]])
    trainer.train()
    scales = flerm_callback(trainer).scales
    moved = [name for name, rates in base.rates.items() if rates[0] > 0]  # not LoRA's A
    factors = some_factors(MODELS[model]())
    assert scales == pytest.approx({name: factors[name] if name in moved else 1.0 for name in scales}, rel=1e-9)
    assert len(set(scales.values())) > len(moved) // 2
    assert spies[1].outside == spies[0].outside
    assert len(spies[1].inside) == STEPS
    assert spies[1].inside[0] == spies[0].inside[0]  # made before anything was measured, then redone
    for inside, nominal in zip(spies[1].inside[1:], spies[0].inside[1:], strict=True):
        assert inside == {name: rate * scales[name] for name, rate in nominal.items()}


def test_no_hook_stays_on_the_optimizer(folder: Path) -> None:
    trainer = make_trainer(folder, gpt2(), match_known(known_base(folder, gpt2)), max_steps=2)
    trainer.train()
    optimizer = raw_optimizer(trainer.optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_training_twice_scales_once(folder: Path) -> None:
    trainer = make_trainer(folder, gpt2(), match_known(known_base(folder, gpt2)))
    trainer.train()
    spy = SpyRates()
    trainer.add_callback(spy)
    trainer.train()
    scales = flerm_callback(trainer).scales
    assert trainer.rate_profile.steps.tolist() == [0]
    nominal = spy.outside[1::3]
    assert spy.inside[1] == {name: rate * scales[name] for name, rate in nominal[1].items()}


SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 2},
    # Their metric never improves, so both lower the rate at every evaluation.
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 0},
    "greedy": {"factor": 0.5, "patience": 0},
}


@pytest.mark.parametrize("schedule", [kind.value for kind in SchedulerType])
def test_every_schedule_is_logged_as_the_plain_trainer_logs_it(folder: Path, schedule: str) -> None:
    options: dict[str, Any] = {
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": SCHEDULES.get(schedule),
        "warmup_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "constant",
        "extra": {"eval_dataset": Rows(BATCH, seed=1), "compute_metrics": lambda prediction: {"constant": 1.0}},
    }
    plain_spy = SpyRates()
    plain = make_trainer(folder, lora(), callbacks=[plain_spy], **options)
    logged = [entry["learning_rate"] for entry in train(plain).logs]
    assert len(logged) == STEPS
    assert (len(set(logged)) > 1) == (schedule != "constant")
    base = known_base(folder, lora)
    for alone in (False, True):
        spy = SpyRates()
        config = match_known(base, measure_steps=(0, 1))
        trainer = make_trainer(folder, lora(), config, alone=alone, callbacks=[spy], **options)
        assert [entry["learning_rate"] for entry in train(trainer).logs] == logged
        assert spy.outside == plain_spy.outside
        scales = flerm_callback(trainer).scales
        assert any(abs(math.log(scale)) > 0.1 for scale in scales.values())
        last = plain_spy.inside[-1]
        assert spy.inside[-1] == {name: rate * scales[name] for name, rate in last.items()}
        assert all(map(math.isfinite, (float(w.sum()) for w in weights_of(trainer.model).values())))


# --- param groups -------------------------------------------------------------------------------------------------


def weight_decays(optimizer: Optimizer, model: nn.Module) -> dict[str, float]:
    by_id = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in trainable_parameters(model).items()}


@pytest.mark.parametrize("make", [gpt2, llama, lora], ids=["gpt2", "llama", "lora"])
def test_matching_gives_every_tensor_a_group_of_its_own(folder: Path, make: Callable[[], nn.Module]) -> None:
    plain = make_trainer(folder, make(), max_steps=1)
    plain.train()
    names = set(trainable_parameters(make()))
    base = RateProfile([0], {name: [1.0] for name in names})
    trainer = make_trainer(folder, make(), FLeRMConfig(mode="match", profile=base), max_steps=1)
    trainer.train()
    optimizer = raw_optimizer(trainer.optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1] * len(names)
    parameters = trainable_parameters(trainer.model)
    assert {g["flerm_name"]: id(g["params"][0]) for g in optimizer.param_groups} == {
        name: id(parameter) for name, parameter in parameters.items()
    }
    decays = weight_decays(optimizer, trainer.model)
    assert decays == weight_decays(raw_optimizer(plain.optimizer), plain.model)
    assert set(decays.values()) == ({0.1} if make is lora else {0.0, 0.1})


@pytest.mark.parametrize("make", [gpt2, lora], ids=["gpt2", "lora"])
def test_the_callback_alone_leaves_the_param_groups_as_they_are(folder: Path, make: Callable[[], nn.Module]) -> None:
    plain = make_trainer(folder, make(), max_steps=2)
    plain.train()
    trainer = make_trainer(folder, make(), match_known(known_base(folder, make)), alone=True, max_steps=2)
    trainer.train()
    assert any(scale != 1.0 for scale in flerm_callback(trainer).scales.values())
    groups = [raw_optimizer(it.optimizer).state_dict()["param_groups"] for it in (trainer, plain)]
    assert_identical(*groups)


def test_groups_with_learning_rates_of_their_own_keep_them(folder: Path) -> None:
    """LoRA+ trains B at a multiple of A's learning rate."""

    def loraplus(model: nn.Module) -> dict[str, Any]:
        optimizer = create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=16)
        return {"optimizers": (optimizer, None)}

    model = lora()
    base = RateProfile([0], {name: [1.0] for name in trainable_parameters(model)})
    spy = SpyRates()
    make_trainer(
        folder,
        model,
        FLeRMConfig(mode="match", profile=base),
        callbacks=[spy],
        extra=loraplus(model),
        lr_scheduler_type="constant",
    ).train()
    expected = {name: 16e-3 if "lora_B" in name else 1e-3 for name in base.names}
    assert spy.outside[0] == pytest.approx(expected, rel=1e-12)
    assert all(rates == spy.outside[0] for rates in spy.outside)


# --- the callback alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["record", "match"])
@pytest.mark.parametrize("model", MODELS)
def test_the_callback_alone_does_what_the_trainer_does(tmp_path: Path, model: str, mode: str) -> None:
    config = FLeRMConfig()
    if mode == "match":
        config = FLeRMConfig(mode="match", profile=known_base(tmp_path, MODELS[model]))
    outcomes, profiles, scales = [], [], []
    for alone in (False, True):
        trainer = make_trainer(
            tmp_path / str(alone), MODELS[model](DROPOUT), config, alone=alone, gradient_accumulation_steps=2
        )
        outcomes.append(train(trainer))
        profiles.append(flerm_callback(trainer).rate_profile.to_bytes())
        scales.append(flerm_callback(trainer).scales)
        assert (tmp_path / str(alone) / PROFILE_NAME).read_bytes() == profiles[-1]
    assert_same_run(outcomes[1], outcomes[0], same_groups=mode == "record")
    assert profiles[1] == profiles[0]
    assert scales[1] == scales[0]
    assert (set(scales[0].values()) == {1.0}) == (mode == "record")


# --- logs ---------------------------------------------------------------------------------------------------------


def geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
@pytest.mark.parametrize("log_by", ["kind", "tensor"])
@pytest.mark.parametrize("mode", ["record", "match"])
def test_rates_errors_and_scales_are_logged(folder: Path, mode: str, log_by: str, alone: bool) -> None:
    measured = (0, 2, 3)
    config = FLeRMConfig(measure_steps=measured, log_by=log_by)
    if mode == "match":
        base = scaled(recorded(folder, lora()), some_factors(lora()))
        config = replace(config, mode="match", profile=base, beta=1.0)
    tracker = Tracker()
    trainer = make_trainer(folder, lora(), config, alone=alone, callbacks=[tracker])
    trainer.train()
    profile = flerm_callback(trainer).rate_profile
    known_kinds = tensor_kinds(trainer.model)
    kinds = {name: known_kinds[name] if log_by == "kind" else name for name in profile.names}
    history = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    for step in range(STEPS):
        entry = {key: value for key, value in history[step + 1].items() if key.startswith("flerm/")}
        seen = {key: value for key, value in tracker.logs[step].items() if key.startswith("flerm/")}
        assert seen == entry
        if step not in measured:
            assert entry == {}
            continue
        by_kind: dict[str, list[float]] = {}
        for name, rate in profile.at(step).items():
            if rate > 0:
                by_kind.setdefault(f"flerm/rate/{kinds[name]}", []).append(rate)
        positive = len(set(kinds.values())) // (2 if step == 0 else 1)  # A has no rate at step 0
        assert len(by_kind) == positive
        errors = {key for key in entry if key.startswith("flerm/relative_error/")}
        assert {key.replace("relative_error", "rate") for key in errors} == by_kind.keys()
        if step == measured[-1]:
            known = flerm_callback(trainer).last_measurement.relative_errors
            for key in errors:
                mine = [error for name, error in known.items() if key == f"flerm/relative_error/{kinds[name]}"]
                assert entry[key] == pytest.approx(geometric(mine), rel=1e-12)
        for key in errors:
            assert 0 < entry.pop(key) < math.inf
        expected = {kind: geometric(rates) for kind, rates in by_kind.items()}
        assert {key: entry.pop(key) for key in expected} == pytest.approx(expected, rel=1e-12)
        assert entry.pop("flerm/rate/total") > 0
        assert entry.pop("flerm/seconds", 1.0) > 0
        assert set(entry) == ({f"flerm/scale/{kinds[name]}" for name in profile.names} if mode == "match" else set())
    if mode == "match":
        scales = flerm_callback(trainer).scales
        last = {f"flerm/scale/{kinds[name]}": scale for name, scale in scales.items()}
        logged = {key: value for key, value in history[measured[-1] + 1].items() if key in last}
        assert logged == pytest.approx(last, rel=1e-12)
        assert len(set(logged.values())) == 4


def test_sparse_logs_hold_the_latest_measurement(folder: Path) -> None:
    trainer = make_trainer(folder, gpt2(), FLeRMConfig(measure_steps=(0, 1)), logging_steps=3)
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    rate = trainer.rate_profile.at(1)["transformer.wte.weight"]
    assert first["flerm/rate/transformer.wte.weight"] == pytest.approx(rate, rel=1e-12)
    assert not any(key.startswith("flerm/") for key in second)


def test_the_metrics_of_an_evaluation_stay_as_they_are(folder: Path) -> None:
    """A hyperparameter search adds up all metrics that it is given; rates must not be among them."""

    class Metrics(TrainerCallback):
        def __init__(self) -> None:
            self.keys: list[set[str]] = []

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            self.keys.append(set(kwargs["metrics"]))

    seen = Metrics(), Metrics()
    options = {"extra": {"eval_dataset": Rows(BATCH, seed=1)}, "eval_strategy": "steps", "eval_steps": 1}
    for callback, flerm in zip(seen, (None, FLeRMConfig()), strict=True):
        make_trainer(folder, gpt2(), flerm, callbacks=[callback], max_steps=3, logging_steps=2, **options).train()
    assert len(seen[0].keys) == 3
    assert seen[1].keys == seen[0].keys


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_every_checkpoint_holds_the_profile_so_far(tmp_path: Path, alone: bool) -> None:
    config = FLeRMConfig(measure_steps=(0, 1, 3, 5))
    trainer = make_trainer(tmp_path, gpt2(), config, alone=alone, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    steps = {name: RateProfile.from_pretrained(tmp_path / name).steps.tolist() for name in checkpoints}
    assert steps == {"checkpoint-2": [0, 1], "checkpoint-4": [0, 1, 3], "checkpoint-6": [0, 1, 3, 5]}
    assert RateProfile.from_pretrained(tmp_path) == flerm_callback(trainer).rate_profile
    assert not list(tmp_path.rglob("_*"))


def test_save_model_writes_the_profile_beside_the_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "out", gpt2(), FLeRMConfig(), max_steps=2)
    trainer.train()
    (tmp_path / "out" / PROFILE_NAME).unlink()
    trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    for folder in ("out", "elsewhere"):
        assert (tmp_path / folder / "model.safetensors").is_file()
        assert (tmp_path / folder / PROFILE_NAME).read_bytes() == trainer.rate_profile.to_bytes()


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_a_folder_that_is_used_again_gets_the_new_profile(tmp_path: Path, alone: bool) -> None:
    options = {"alone": alone, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    for seed in (0, 1):
        trainer = make_trainer(tmp_path, gpt2(seed=seed), FLeRMConfig(seed=seed), **options)
        trainer.train()
        assert RateProfile.from_pretrained(tmp_path / "checkpoint-2") == flerm_callback(trainer).rate_profile


@pytest.mark.parametrize("data", ["rows", "datasets"])
@pytest.mark.parametrize("make", [gpt2, lora], ids=["full", "lora"])
def test_the_same_run_gives_the_same_bytes(tmp_path: Path, make: Callable[..., nn.Module], data: str) -> None:
    files = []
    for name in ("first", "second"):
        rows = Rows()
        if data == "datasets":
            rows = datasets.Dataset.from_dict({"input_ids": rows.tokens.tolist(), "labels": rows.tokens.tolist()})
        make_trainer(tmp_path / name, make(DROPOUT), FLeRMConfig(), data=rows, max_steps=2).train()
        files.append((tmp_path / name / PROFILE_NAME).read_bytes())
    assert files[0] == files[1]
    assert str(tmp_path).encode() not in files[0]


def test_provenance(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"input_ids": Rows().tokens.tolist(), "labels": Rows().tokens.tolist()})
    config = FLeRMConfig(probes=2, probe_batch_size=3, seed=7)
    trainer = make_trainer(tmp_path, lora(), config, data=data, max_steps=1, warmup_steps=0, seed=5)
    trainer.train()
    metadata = trainer.rate_profile.metadata
    assert set(metadata) == {
        "packages",
        "model",
        "model_config",
        "adapters",
        "optimizer",
        "training_arguments",
        "flerm",
        "dataset_fingerprint",
        "shapes",
        "kinds",
    }
    packages = ("hf_flerm", "torch", "transformers", "peft", "accelerate")
    assert metadata["packages"] == {name: version(name) for name in packages}
    assert metadata["model"] == "PeftModel"
    assert metadata["model_config"]["n_embd"] == 16
    assert metadata["adapters"]["default"]["r"] == 2
    assert metadata["adapters"]["default"]["target_modules"] == ["attn.c_attn", "mlp.c_proj"]
    assert metadata["optimizer"]["class"] == "AdamW"
    assert metadata["optimizer"]["lr"] == 1e-2
    known = metadata["training_arguments"]
    assert (known["learning_rate"], known["lr_scheduler_type"], known["seed"]) == (1e-2, "linear", 5)
    assert {key: metadata["flerm"][key] for key in ("mode", "estimator", "probes", "probe_batch_size", "seed")} == {
        "mode": "record",
        "estimator": "per_example",
        "probes": 2,
        "probe_batch_size": 3,
        "seed": 7,
    }
    parameters = trainable_parameters(trainer.model)
    assert metadata["shapes"] == {name: list(parameter.shape) for name, parameter in parameters.items()}
    assert metadata["kinds"] == {name: kind for name, kind in tensor_kinds(trainer.model).items() if name in parameters}
    with safe_open(tmp_path / PROFILE_NAME, framework="pt") as file:
        written = json.loads(file.metadata()["hf_flerm"])
    joint = {
        key: {path: row.tolist() for path, row in rows.items()}
        for key, rows in trainer.rate_profile.joint_rates.items()
    }
    assert written == {"schema_version": 1, "joint_rates": joint, **metadata}


def test_the_fingerprint_tells_data_sets_apart(folder: Path) -> None:
    def fingerprint(seed: int) -> str:
        tokens = Rows(seed=seed).tokens.tolist()
        data = datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})
        return recorded(folder, gpt2(), data=data, max_steps=1).metadata["dataset_fingerprint"]

    assert fingerprint(0) == fingerprint(0) != fingerprint(1)


def test_the_profile_is_there_only_after_training_began(folder: Path) -> None:
    trainer = make_trainer(folder, gpt2(), FLeRMConfig())
    with pytest.raises(RateProfileError, match="nothing is recorded yet"):
        _ = trainer.rate_profile


# --- stop and go on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "mode", "alone"),
    [
        ("full", "record", False),
        ("full", "match", False),
        ("full", "match", True),
        ("lora", "record", True),
        ("lora", "match", False),
    ],
    ids=["full-record", "full-match", "full-match-callback", "lora-record-callback", "lora-match"],
)
def test_a_resumed_run_ends_like_one_that_never_stopped(tmp_path: Path, model: str, mode: str, alone: bool) -> None:
    config = FLeRMConfig()
    if mode == "match":
        config = FLeRMConfig(mode="match", profile=known_base(tmp_path / "base", MODELS[model]))
    options = {"alone": alone, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", MODELS[model](DROPOUT), config, **options)
    expected = train(whole)
    stopped = make_trainer(tmp_path / "parts", MODELS[model](DROPOUT), config, callbacks=[Stop(3)], **options)
    stopped.train()
    assert stopped.state.global_step == 3
    assert flerm_callback(stopped).rate_profile.steps.tolist() == [0, 1, 2]
    resumed = make_trainer(tmp_path / "parts", MODELS[model](DROPOUT), config, **options)
    outcome = train(resumed, resume_from_checkpoint=True)
    assert len(outcome.witnessed) == len(expected.witnessed) // 2
    assert_identical(outcome.weights, expected.weights)
    assert_identical(outcome.optimizer, expected.optimizer)
    assert_identical(outcome.logs, expected.logs)
    assert_identical(outcome.random_state, expected.random_state)
    assert flerm_callback(resumed).scales == flerm_callback(whole).scales
    assert (set(flerm_callback(whole).scales.values()) == {1.0}) == (mode == "record")
    for name in (PROFILE_NAME, f"checkpoint-6/{PROFILE_NAME}"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_resumes_from_another_folders_checkpoint(tmp_path: Path) -> None:
    """The scales of steps that were measured before the checkpoint are those that the run goes on with."""
    config = match_known(known_base(tmp_path, gpt2), measure_steps=(0, 1))
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", gpt2(), config, **options)
    expected = train(whole)
    resumed = make_trainer(tmp_path / "other", gpt2(), config, **options)
    outcome = train(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_identical(outcome.weights, expected.weights)
    assert flerm_callback(resumed).scales == flerm_callback(whole).scales
    assert resumed.rate_profile == whole.rate_profile


def test_recording_may_begin_at_a_plain_checkpoint(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    plain = train(make_trainer(tmp_path, gpt2(DROPOUT), **options))
    trainer = make_trainer(tmp_path / "resumed", gpt2(DROPOUT), FLeRMConfig(), **options)
    outcome = train(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_identical(outcome.weights, plain.weights)
    assert_identical(outcome.optimizer, plain.optimizer)
    assert trainer.rate_profile.steps.tolist() == [3, 4]
    (warning,) = warnings_of()
    assert f"no {PROFILE_NAME} in {tmp_path / 'checkpoint-3'}: rates are measured from step 3" in warning


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("first", ["plain", "matched"])
def test_plain_and_matched_runs_go_on_from_each_others_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, first: str
) -> None:
    """With scales of 1, half a plain run and half a matched one make a whole plain one, in either order."""
    monkeypatch.setattr(ProfileMap, "tensor_scales", all_ones)
    base = RateProfile([0], {name: [1.0] for name in trainable_parameters(MODELS[model]())})
    matched = FLeRMConfig(mode="match", profile=base)
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = train(make_trainer(tmp_path / "whole", MODELS[model](DROPOUT), **options))
    order = (None, matched) if first == "plain" else (matched, None)
    make_trainer(tmp_path, MODELS[model](DROPOUT), order[0], callbacks=[Stop(3)], **options).train()
    outcome = train(make_trainer(tmp_path, MODELS[model](DROPOUT), order[1], **options), resume_from_checkpoint=True)
    assert_identical(outcome.weights, whole.weights)
    assert_identical(outcome.optimizer["state"], whole.optimizer["state"])
    assert_identical(outcome.logs, whole.logs)


# --- warm-up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["record", "match"])
def test_a_step_at_learning_rate_zero_is_not_measured(
    folder: Path, warnings_of: Callable[[], list[str]], mode: str
) -> None:
    config = FLeRMConfig() if mode == "record" else match_known(known_base(folder, gpt2), measure_steps=None)
    spy = SpyRates()
    plain = train(make_trainer(folder, gpt2(DROPOUT), warmup_steps=2))
    trainer = make_trainer(folder, gpt2(DROPOUT), config, callbacks=[spy], warmup_steps=2)
    outcome = train(trainer)
    assert set(spy.inside[0].values()) == {0.0}
    assert trainer.rate_profile.steps.tolist() == [1, 2, 4]
    assert all(bool((rates > 0).all()) for rates in trainer.rate_profile.rates.values())
    assert warnings_of() == []
    if mode == "record":
        assert_same_run(outcome, plain)
    else:
        scales = flerm_callback(trainer).scales
        assert any(abs(math.log(scale)) > 0.1 for scale in scales.values())


# --- probe data ---------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """The rows as a stream."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from (Rows()[index] for index in range(len(Rows())))


def test_a_stream_is_recorded_with_a_probe_dataset(folder: Path) -> None:
    plain = train(make_trainer(folder, gpt2(DROPOUT), data=Stream()))
    trainer = make_trainer(folder, gpt2(DROPOUT), FLeRMConfig(), data=Stream(), probe_dataset=Rows(8, seed=3))
    assert_same_run(train(trainer), plain)
    assert trainer.rate_profile.steps.tolist() == MEASURED


def probed(folder: Path, patch: pytest.MonkeyPatch, data: Rows, config: FLeRMConfig, **options: Any) -> list[Tensor]:
    """The token batches of every probe of a run of two steps."""
    seen: list[Tensor] = []
    measure = RateProbe.measure

    def spying(probe: RateProbe, updates: Mapping[str, Tensor], batches: Iterator[Any], *rest: Any, **more: Any) -> Any:
        batches = list(batches)
        seen.extend(batch["input_ids"] for batch in batches)
        return measure(probe, updates, batches, *rest, **more)

    with patch.context() as context:
        context.setattr(RateProbe, "measure", spying)
        make_trainer(folder, gpt2(), config, probe_dataset=data, max_steps=2, **options).train()
    return seen


def test_probes_draw_from_the_probe_dataset_by_their_own_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Rows(7, seed=3)
    config = FLeRMConfig(probes=3, probe_batch_size=5)
    batches = probed(folder, monkeypatch, data, config)
    assert [len(batch) for batch in batches] == [5] * 6
    rows = [[tuple(row) for row in batch.tolist()] for batch in batches]
    assert {row for batch in rows for row in batch} == {tuple(row) for row in data.tokens.tolist()}
    assert all(len(set(batch)) == 5 for batch in rows), "an example came twice in one batch"
    assert len({tuple(batch) for batch in rows}) == 6, "steps or probes share their batch"
    assert_identical(probed(folder, monkeypatch, data, config, seed=1), batches)
    other = probed(folder, monkeypatch, data, FLeRMConfig(probes=3, probe_batch_size=5, seed=1))
    assert not any(torch.equal(left, right) for left, right in zip(other, batches, strict=True))


@pytest.mark.parametrize(
    ("batch", "accumulation", "probe_batch", "probes"),
    [(1, 1, 1, 1), (4, 1, 1, 1), (4, 2, 2, 1), (2, 8, 2, 2), (3, 5, 3, 2), (12, 4, 4, 1)],
)
def test_a_measurement_draws_half_as_often_as_a_step_sees_examples(
    folder: Path, monkeypatch: pytest.MonkeyPatch, batch: int, accumulation: int, probe_batch: int, probes: int
) -> None:
    """Twice per example, rounded up to whole batches no larger than the training's, and at most 8 draws."""
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    batches = probed(folder, monkeypatch, Rows(12, seed=3), FLeRMConfig(measure_steps=(0,)), **options)
    assert [len(rows) for rows in batches] == [probe_batch] * probes


def test_columns_that_the_model_does_not_take_are_left_out_of_probes(
    folder: Path, warnings_of: Callable[[], list[str]]
) -> None:
    """The Trainer drops them from a training set; the same data set must do as a probe data set."""
    tokens = Rows().tokens.tolist()
    ragged = [list(range(index)) for index in range(len(tokens))]  # no collator could make a tensor of these
    data = datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens, "source": ragged})
    trainer = make_trainer(folder, gpt2(), FLeRMConfig(), data=data, probe_dataset=data, max_steps=2)
    trainer.train()
    assert warnings_of() == []
    assert trainer.rate_profile.steps.tolist() == [0, 1]


# --- bad input ----------------------------------------------------------------------------------------------------


def frozen() -> nn.Module:
    model = gpt2()
    model.requires_grad_(False)
    return model


def one_parameter_optimizer(model: nn.Module) -> dict[str, Any]:
    kept = [
        p for name, p in model.named_parameters() if name not in ("transformer.wpe.weight", "transformer.ln_f.bias")
    ]
    return {"optimizers": (SGD(kept, lr=0.1), None)}


def ones(model: nn.Module) -> dict[str, list[float]]:
    return {name: [1.0] for name in trainable_parameters(model)}


def other_model() -> RateProfile:
    rates = ones(gpt2())
    del rates["transformer.ln_f.bias"]
    return RateProfile([0], {**rates, "lm_head.weight": [1.0]})


def match(profile: Any, **changes: Any) -> FLeRMConfig:
    return FLeRMConfig(mode="match", profile=profile, **changes)


class Headless(nn.Module):
    """A model that makes its loss by itself, and shows nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Embedding(training.VOCABULARY, 1)

    def score(self, batch: Mapping[str, Any]) -> Tensor:
        return self.head(batch["input_ids"]).mean(1)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": self.score({"input_ids": input_ids}).square().mean()}


BAD_INPUT: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "profile of another model": (
        lambda: {"flerm": match(other_model())},
        r"only in the profile \[lm_head.weight\]; only in the model \[transformer.ln_f.bias\].*unmatched=.*'nominal'",
    ),
    "profile of nothing in the model": (
        lambda: {"flerm": match(RateProfile([0], {"encoder.weight": [1.0]}), unmatched="nominal")},
        r"share no tensor by name: the profile has \[encoder.weight\]",
    ),
    "profile without steps": (
        lambda: {"flerm": match(RateProfile([], {name: [] for name in ones(gpt2())}))},
        "holds no step",
    ),
    "nothing to train, record": (lambda: {"model": frozen(), "flerm": FLeRMConfig()}, "no trainable parameters"),
    "nothing to train, match": (
        lambda: {"model": frozen(), "flerm": match(RateProfile([0], ones(gpt2())))},
        "no trainable parameters",
    ),
    "empty probe dataset": (
        lambda: {"flerm": FLeRMConfig(), "probe_dataset": Rows(0)},
        "probe data set has 0 examples, a batch to probe with needs 1",
    ),
    "probe dataset smaller than a batch": (
        lambda: {"flerm": FLeRMConfig(probe_batch_size=4), "probe_dataset": Rows(3)},
        "probe data set has 3 examples, a batch to probe with needs 4",
    ),
    "training set smaller than a probe batch": (
        lambda: {"flerm": FLeRMConfig(probe_batch_size=17)},
        "probe data set has 16 examples, a batch to probe with needs 17",
    ),
    "stream": (lambda: {"flerm": FLeRMConfig(), "data": Stream()}, "stream .* pass probe_dataset"),
    "stream of the datasets library": (
        lambda: {
            "flerm": FLeRMConfig(),
            "data": datasets.Dataset.from_dict(
                {"input_ids": Rows().tokens.tolist(), "labels": Rows().tokens.tolist()}
            ).to_iterable_dataset(),
        },
        "stream .* pass probe_dataset",
    ),
    "model without logits": (
        lambda: {"model": Headless(), "flerm": FLeRMConfig()},
        "Headless returned dict without logits.*Pass output='hidden' or output=",
    ),
    "metric of classes without any": (
        lambda: {
            "model": Headless(),
            "flerm": FLeRMConfig(metric="fisher", output=lambda model, batch: model.score(batch)),
        },
        "metric 'fisher' needs the logits of at least two classes",
    ),
    "probe dataset of texts": (
        lambda: {"flerm": FLeRMConfig(), "probe_dataset": datasets.Dataset.from_dict({"text": ["a"] * 8})},
        r"no batch can be made of the probe data set: no tensor is in \{\}.*Prepare it as the training set is",
    ),
    "no labels to probe with": (
        lambda: {
            "flerm": FLeRMConfig(positions="labels"),
            "probe_dataset": [{"input_ids": tokens} for tokens in Rows().tokens],
        },
        r"positions 'labels' needs labels; a probe batch has \['input_ids'\]",
    ),
    "stream to probe with": (
        lambda: {"flerm": FLeRMConfig(), "probe_dataset": Stream()},
        "probe_dataset",
    ),
}


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_before_the_first_step(folder: Path, case: str, alone: bool) -> None:
    build, message = BAD_INPUT[case]
    refused(folder, message, alone=alone, **build())


@pytest.mark.parametrize("mode", ["record", "match"])
@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_an_optimizer_that_lacks_parameters_is_refused(folder: Path, mode: str, alone: bool) -> None:
    model = gpt2()
    config = FLeRMConfig() if mode == "record" else match(RateProfile([0], ones(model)))
    message = r"SGD does not hold the trainable parameters \[transformer.ln_f.bias, transformer.wpe.weight\]"
    refused(folder, message, model=model, flerm=config, alone=alone, extra=one_parameter_optimizer(model))


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_a_training_has_one_callback(folder: Path, alone: bool) -> None:
    model = gpt2()
    before = weights_of(model)
    second = FLeRMCallback(match(RateProfile([0], ones(model))))
    trainer = make_trainer(folder, model, second.config, alone=alone, callbacks=[second])
    with pytest.raises(ValueError, match="two FLeRMCallbacks: scales would be applied twice"):
        trainer.train()
    assert_identical(weights_of(model), before)
    trainer.remove_callback(second)
    trainer.train()
    assert trainer.state.global_step == STEPS


@pytest.mark.parametrize("given", [{"mode": "record"}, FLeRMConfig, FLeRMArguments(), None], ids=repr)
@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_what_is_no_config_is_refused(folder: Path, given: Any, alone: bool) -> None:
    with pytest.raises(
        ValueError, match=r"is no FLeRMConfig: pass FLeRMConfig\(\.\.\.\), or the config of FLeRMArguments"
    ):
        FLeRMCallback(given) if alone else FLeRMTrainer(model=gpt2(), flerm=given)


def test_another_learning_rate_than_the_bases_is_told(folder: Path, warnings_of: Callable[[], list[str]]) -> None:
    base = recorded(folder, gpt2())
    make_trainer(folder, gpt2(), match(base)).train()
    assert warnings_of() == []
    make_trainer(folder, gpt2(), match(base), learning_rate=5e-2).train()
    (warning,) = warnings_of()
    assert warning.startswith("the base's learning rate was 0.01, this run's is 0.05: outputs will move 5 times as far")


def test_a_schedule_that_asks_for_no_step_is_told(folder: Path, warnings_of: Callable[[], list[str]]) -> None:
    make_trainer(folder, gpt2(), FLeRMConfig(measure_steps=(STEPS,))).train()
    assert warnings_of() == [f"nothing was measured: measure_steps=({STEPS},) asks for none of the {STEPS} steps."]


def refused(folder: Path, message: str, *, model: nn.Module | None = None, **options: Any) -> None:
    model = gpt2() if model is None else model
    before, counter = weights_of(model), CountSteps()
    trainer = make_trainer(folder, model, callbacks=[counter], **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert counter.steps == 0
    assert trainer.state.global_step == 0
    assert_identical(weights_of(model), before)
    assert not trainer.optimizer or not raw_optimizer(trainer.optimizer).state


@pytest.mark.parametrize("kind", ["trainer", "callback"])
@pytest.mark.parametrize("state", ["missing", "truncated"])
def test_a_profile_that_cannot_be_read_is_refused_at_once(tmp_path: Path, kind: str, state: str) -> None:
    if state == "truncated":
        file = RateProfile([0], ones(gpt2())).save_pretrained(tmp_path)
        file.write_bytes(file.read_bytes()[:-8])
    message = {"missing": f"no {PROFILE_NAME} in .*{tmp_path.name}", "truncated": "not a whole safetensors file"}[state]
    start = {
        "trainer": lambda: FLeRMTrainer(gpt2(), arguments(tmp_path), flerm=match(tmp_path)),
        "callback": lambda: FLeRMCallback(match(tmp_path)),
    }[kind]
    with pytest.raises(RateProfileError, match=message) as caught:
        start()
    assert str(tmp_path) in str(caught.value)


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
