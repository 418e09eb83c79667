"""Recording changes nothing, matching at scales of 1 neither, whatever is combined.

Every two values of the five factors below (callback, collator, optimizer, adapter, data) meet in at least one run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.optimization import Adafactor

from hf_flerm import FLeRMCallback, FLeRMConfig, FLeRMMixin, RateProfile
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.behavior import decayed_fractions
from hf_flerm.optimizer.param_groups import raw_optimizer, stepping_optimizers
from hf_flerm.transfer.mapping import ProfileMap
from tests.shared.architectures import llama as small_llama
from tests.shared.trainer_runs import all_ones
from tests.shared.training import Outcome, arguments, assert_identical, assert_same_run, flerm_callback, train
from tests.shared.wrapped_optimizers import Lookahead, Pair

VOCABULARY, LENGTH, ROWS, STEPS = 20, 6, 24, 3
MEASURED = (0, 2)
LEARNING_RATE = 2.0**-7
EPSILON = torch.finfo(torch.float32).eps


# Callbacks
# ---------


class Resets(TrainerCallback):
    """Merges a part of the weights into nothing and starts anew, as ReLoRA does."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                for parameter in _trained(kwargs["model"]):
                    parameter.mul_(0.5)


class Prunes(TrainerCallback):
    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        with torch.no_grad():
            for parameter in _trained(model):
                parameter[parameter.abs() < 1e-3] = 0.0


class Constrains(TrainerCallback):
    def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        with torch.no_grad():
            for parameter in _trained(model):
                parameter.clamp_(-0.5, 0.5)


class Averages(TrainerCallback):
    """Keeps a moving average of the weights, and evaluates and ends with it."""

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.mean = [parameter.detach().clone() for parameter in _trained(model)]

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        torch._foreach_lerp_(self.mean, [parameter.detach() for parameter in _trained(model)], 0.1)

    def on_train_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        for parameter, mean in zip(_trained(model), self.mean, strict=True):
            parameter.data = mean


class Indexes(TrainerCallback):
    """Sets the learning rate of one param group."""

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.count = len(optimizer.param_groups)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        assert len(groups) == self.count
        groups[-1]["lr"] = LEARNING_RATE / (1 + state.global_step)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


EVALUATED = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "save_total_limit": 1,
    "metric_for_best_model": "loss",
    "load_best_model_at_end": True,
}
CALLBACKS: dict[str, tuple[Callable[[], list[TrainerCallback]], dict[str, Any]]] = {
    "none": (list, {}),
    "resets": (lambda: [Resets()], {}),
    "prunes": (lambda: [Prunes()], {}),
    "constrains": (lambda: [Constrains()], {}),
    "averages": (lambda: [Averages()], {}),
    "indexes groups": (lambda: [Indexes()], {"lr_scheduler_type": "constant"}),
    "stops early": (lambda: [EarlyStoppingCallback(1, 1e3)], EVALUATED),
}


# Collators, of rows {"input_ids": tokens, "note": number}
# --------------------------------------------------------


def default(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = torch.stack([torch.as_tensor(example["input_ids"])[:LENGTH] for example in examples])
    return {"input_ids": ids, "labels": ids.clone()}


def pops(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The tokens of a row depend on whether its note was popped before."""
    shifts = torch.tensor([int(example.pop("note", 0)) for example in examples])
    batch = default(examples)
    ids = (batch["input_ids"] + shifts.unsqueeze(-1)) % VOCABULARY
    return {"input_ids": ids, "labels": ids}


def writes(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Masks another token of a row at every reading, for good."""
    for example in examples:
        place = int(torch.as_tensor(example["input_ids"])[:LENGTH].argmax())
        example["input_ids"][place] = 1
    return default(examples)


class Draws:
    """Replaces tokens at random, by a generator of its own that it makes at its first call."""

    generator: torch.Generator | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        self.generator = self.generator or torch.Generator().manual_seed(3)
        batch = default(examples)
        chosen = torch.rand(batch["input_ids"].shape, generator=self.generator) < 0.2
        return {**batch, "input_ids": batch["input_ids"].masked_fill(chosen, 2)}


def pads(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pads to the longest row of a batch, which the first token of a row tells."""
    rows = [torch.as_tensor(example["input_ids"]) for example in examples]
    rows = [row[: 2 + int(row[0]) % (LENGTH - 1)] for row in rows]
    ids, mask, labels = (
        nn.utils.rnn.pad_sequence([make(row) for row in rows], batch_first=True, padding_value=value)
        for make, value in ((torch.clone, 0), (torch.ones_like, 0), (torch.clone, -100))
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_extras(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds what only the loss knows of."""
    return {**default(examples), "loss_weights": torch.arange(1.0, 1.0 + len(examples))}


COLLATORS: dict[str, Callable[[], Callable[[list[Any]], dict[str, Any]]]] = {
    "default": lambda: default,
    "pops": lambda: pops,
    "writes": lambda: writes,
    "draws": Draws,
    "pads": lambda: pads,
    "extras": lambda: with_extras,
}


# Optimizers
# ----------


class Sam(Optimizer):
    """Takes the gradient a little off the weights, by a closure, and steps from where they were."""

    closure: Callable[[], Any]  # of the trainer

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base = base
        self.param_groups = base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        tensors = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in tensors]
        torch._foreach_add_(tensors, [p.grad.sign() for p in tensors], alpha=1e-3)
        with torch.enable_grad():
            self.closure()
        torch._foreach_copy_(tensors, before)
        self.base.step()


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Every second tensor decays."""
    parameters = _trained(model)
    return [
        {"params": parameters[::2], "weight_decay": 0.25, "lr": LEARNING_RATE},
        {"params": parameters[1::2], "weight_decay": 0.0, "lr": LEARNING_RATE},
    ]


def muon_and_adamw(model: nn.Module) -> Optimizer:
    """Of every two matrices Muon steps one."""
    matrices = [p for p in _trained(model) if p.ndim == 2][::2]
    others = [p for p in _trained(model) if all(p is not matrix for matrix in matrices)]
    return Pair([torch.optim.Muon(matrices, lr=LEARNING_RATE), AdamW(others, lr=LEARNING_RATE, foreach=True)])


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW, fused": lambda model: AdamW(two_groups(model), fused=True),
    "SGD": lambda model: SGD(two_groups(model), momentum=0.9, foreach=True),
    "Adafactor": lambda model: Adafactor(two_groups(model), scale_parameter=False, relative_step=False),
    "Muon and AdamW": muon_and_adamw,
    "Lookahead": lambda model: Lookahead(AdamW(two_groups(model), foreach=True)),
    "SAM": lambda model: Sam(SGD(two_groups(model), momentum=0.9)),
    "LoRA-FA": lambda model: create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=LEARNING_RATE, weight_decay=0.25),
    "Muon": lambda model: torch.optim.Muon(two_groups(model)),
    "8 bits": lambda model: bitsandbytes.optim.AdamW8bit(two_groups(model), min_8bit_size=16),
}
REFUSED = {"Lookahead"}


# Adapters
# --------


def base(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return small_llama(1, attention_dropout=0.1, **settings)


def adapted(config: Any, **settings: Any) -> nn.Module:
    model = base(**settings)
    torch.manual_seed(1)
    return get_peft_model(model, config)


def lora(targets: tuple[str, ...] = ("q_proj", "down_proj"), **settings: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), lora_dropout=0.1, **settings)


ADAPTERS: dict[str, Callable[[], nn.Module]] = {
    "none": base,
    "LoRA": lambda: adapted(lora()),
    "DoRA": lambda: adapted(lora(use_dora=True)),
    "tokens, tied": lambda: adapted(lora(trainable_token_indices=[1, 5, 7]), tie_word_embeddings=True),
    "tied adapters": lambda: adapted(
        lora(("q_proj", "embed_tokens"), ensure_weight_tying=True), tie_word_embeddings=True
    ),
    "VeRA": lambda: adapted(VeraConfig(r=4, target_modules=["q_proj", "down_proj"], vera_dropout=0.1)),
    "modules to save": lambda: adapted(lora(modules_to_save=["lm_head"])),
    "IA3": lambda: adapted(IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])),
}


# Data
# ----


class Kept(Dataset):
    """Hands out the very rows that it holds."""

    def __init__(self, as_lists: bool) -> None:
        tokens = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
        self.rows = [{"input_ids": row.tolist() if as_lists else row.clone(), "note": 1} for row in tokens]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


DATA: dict[str, Callable[[], Any]] = {"tensors": lambda: Kept(False), "lists": lambda: Kept(True).rows}


# Combinations
# ------------

FACTORS: dict[str, Mapping[str, Any]] = {
    "callback": CALLBACKS,
    "collator": COLLATORS,
    "optimizer": OPTIMIZERS,
    "adapter": ADAPTERS,
    "data": DATA,
}


def _possible(row: Mapping[str, str]) -> bool:
    optimizer, adapter = row.get("optimizer", ""), row.get("adapter", "LoRA")
    if optimizer == "LoRA-FA":
        return adapter == "LoRA"  # of what it steps in pairs, nothing else may have "lora" in its name
    if optimizer == "Muon":
        return adapter not in ("none", "DoRA", "VeRA")  # which train vectors
    return not (optimizer == "Muon and AdamW" and adapter == "VeRA")


def covering() -> Iterator[dict[str, str]]:
    """Rows of values in which every possible pair occurs, each chosen to cover as many as it can."""

    def pairs(row: Mapping[str, str]) -> set[frozenset[tuple[str, str]]]:
        return set(map(frozenset, combinations(row.items(), 2)))

    single = [(factor, value) for factor, values in FACTORS.items() for value in values]
    left = {
        frozenset(pair): dict(pair)
        for pair in combinations(single, 2)
        if pair[0][0] != pair[1][0] and _possible(dict(pair))
    }
    while left:
        row = next(iter(left.values()))
        for factor in sorted(FACTORS.keys() - row.keys(), key=list(FACTORS).index):
            candidates = [{**row, factor: value} for value in FACTORS[factor]]
            row = max(filter(_possible, candidates), key=lambda row: len(pairs(row) & left.keys()))
        for pair in pairs(row):
            left.pop(pair, None)
        yield {factor: row[factor] for factor in FACTORS}


COMBINATIONS = list(covering())


# Runs
# ----


class LossTrainer(Trainer):
    """Takes columns that the model does not know for its loss, and tells SAM how to take another gradient."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        weights = inputs.pop("loss_weights", None)
        outcome = super().compute_loss(model, inputs, *args, **kwargs)
        return outcome if weights is None or isinstance(outcome, tuple) else outcome * weights.mean()

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        optimizer = raw_optimizer(self.optimizer)
        if isinstance(optimizer, Sam):
            again = dict(inputs)
            step = super().training_step

            def closure() -> None:
                model.zero_grad()
                step(model, dict(again), *args, **kwargs)

            optimizer.closure = closure
        return super().training_step(model, inputs, *args, **kwargs)


class WithRates(FLeRMMixin, LossTrainer):
    """The same, with rates."""


class Moves(TrainerCallback):
    """Notes how far the first step of the optimizer moves every tensor, apart from weight decay.

    In the list twice: before the callbacks that change weights after the step, and behind those that do before it.
    """

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.moved: dict[str, Tensor] = {}
        self.largest: dict[str, float] = {}  # number in a tensor

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.before = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}

    def on_optimizer_step(self, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        if self.moved:
            return
        parameters, optimizer = trainable_parameters(model), raw_optimizer(optimizer)
        stepped = {name: p for name, p in parameters.items() if p.grad is not None}
        decays = decayed_fractions(optimizer, stepped)
        for name, parameter in parameters.items():
            start = self.before[name] * (1.0 - decays.get(name, 0.0))
            self.moved[name] = parameter.detach() - start
            self.largest[name] = float(torch.maximum(start.abs(), parameter.abs()).max())


def trainer_of(
    folder: Path,
    row: Mapping[str, str],
    flerm: FLeRMConfig | None = None,
    *,
    alone: bool = False,
    **options: Any,
) -> tuple[Trainer, Moves]:
    callbacks, own = CALLBACKS[row["callback"]]
    model = ADAPTERS[row["adapter"]]()
    moves = Moves()
    common: dict[str, Any] = {
        "model": model,
        "args": arguments(
            folder, per_device_train_batch_size=8, remove_unused_columns=False, **{"max_steps": STEPS, **own, **options}
        ),
        "train_dataset": DATA[row["data"]](),
        "eval_dataset": Kept(True).rows[:4],
        "data_collator": COLLATORS[row["collator"]](),
        "optimizers": (OPTIMIZERS[row["optimizer"]](model), None),
        "callbacks": [moves, *callbacks(), moves],
    }
    if flerm is None:
        return LossTrainer(**common), moves
    if alone:
        common["callbacks"].insert(0, FLeRMCallback(flerm))
        return LossTrainer(**common), moves
    return WithRates(flerm=flerm, **common), moves


Run = tuple[Outcome, list[dict[str, Any]]]  # and the states of the optimizers inside the optimizer


def run(trainer: Trainer) -> Run:
    outcome = train(trainer)
    return outcome, [each.state_dict() for each in stepping_optimizers(raw_optimizer(trainer.optimizer))]


@functools.cache
def plain_run(folder: Path, index: int) -> tuple[Run, dict[str, Tensor]]:
    trainer, moves = trainer_of(folder, COMBINATIONS[index])
    return run(trainer), moves.moved


def assert_same(actual: Run, expected: Run) -> None:
    assert_same_run(actual[0], expected[0])
    assert_identical(actual[1], expected[1], "inner optimizers")


def measured(trainer: Trainer) -> list[int]:
    return flerm_callback(trainer).rate_profile.steps.tolist()


IDS = ["-".join(row.values()) for row in COMBINATIONS]
each_combination = pytest.mark.parametrize("index", range(len(COMBINATIONS)), ids=IDS)


@each_combination
def test_recording_changes_nothing(folder: Path, index: int) -> None:
    plain, _ = plain_run(folder, index)
    # Every second run is one of a plain trainer with the callback.
    trainer, _ = trainer_of(folder, COMBINATIONS[index], FLeRMConfig(measure_steps=MEASURED), alone=bool(index % 2))
    assert_same(run(trainer), plain)
    assert measured(trainer) == [step for step in MEASURED if step < trainer.state.global_step]
    assert any(rates.any() for rates in flerm_callback(trainer).rate_profile.rates.values())


def matching(row: Mapping[str, str]) -> FLeRMConfig:
    """Matches a base of which only the names count: the tests set the scales."""
    model = ADAPTERS[row["adapter"]]()
    OPTIMIZERS[row["optimizer"]](model)  # LoRA-FA freezes tensors
    names = trainable_parameters(model)
    base = RateProfile([0], {name: [1.0] for name in names})
    return FLeRMConfig(mode="match", profile=base, granularity="tensor", measure_steps=MEASURED)


def refused(trainer: Trainer, row: Mapping[str, str]) -> bool:
    """Whether training is refused, which it must be before the first step."""
    if row["optimizer"] not in REFUSED:
        return False
    with pytest.raises(ValueError, match=row["optimizer"]):
        trainer.train()
    assert trainer.state.global_step == 0
    return True


@each_combination
def test_matching_at_scales_of_one_changes_nothing(folder: Path, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row = COMBINATIONS[index]
    plain, _ = plain_run(folder, index)  # before the trainer, which sets the random numbers of its run
    monkeypatch.setattr(ProfileMap, "tensor_scales", all_ones)
    trainer, _ = trainer_of(folder, row, matching(row), alone=not index % 2)
    if refused(trainer, row):
        return
    assert_same(run(trainer), plain)
    assert measured(trainer) == [step for step in MEASURED if step < trainer.state.global_step]


@each_combination
def test_a_scale_of_two_moves_every_tensor_twice_as_far(
    folder: Path, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the scales are there before the step or, in every second run, its measurement sets them."""
    row, redone = COMBINATIONS[index], bool(index % 2)

    def twos(mapped: ProfileMap, logs: Mapping[str, float]) -> dict[str, float]:
        scale = 1.0 if redone and not any(logs.values()) else 2.0
        return dict.fromkeys(mapped.shapes, scale)

    monkeypatch.setattr(ProfileMap, "tensor_scales", twos)
    config = replace(matching(row), measure_steps=(0,) if redone else (STEPS,))
    trainer, moves = trainer_of(folder, row, config, max_steps=1)
    if refused(trainer, row):
        return
    trainer.train()
    assert set(flerm_callback(trainer).scales.values()) == {2.0}
    _, once = plain_run(folder, index)
    for name, twice in moves.moved.items():
        error, allowed = (twice - 2 * once[name]).abs().max(), 4 * EPSILON * moves.largest[name]
        assert error <= allowed, f"{name}: {once[name].flatten()[:4]} became {twice.flatten()[:4]}"
