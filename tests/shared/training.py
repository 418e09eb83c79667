"""Tiny models, data and runs that the trainer's tests share."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from hf_flerm import FLeRMCallback, FLeRMConfig, FLeRMTrainer, RateProfile, Research
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.param_groups import raw_optimizer

VOCABULARY = 32
LENGTH = 8
BATCH = 4
STEPS = 6
MEASURED = [0, 1, 2, 4]  # what the default schedule measures of STEPS


class Rows(Dataset):
    """Random token rows; labels are the inputs."""

    def __init__(self, count: int = 16, seed: int = 0) -> None:
        self.tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Stream(IterableDataset):
    """The rows as a stream."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        yield from (Rows()[index] for index in range(len(Rows())))


def gpt2(dropout: float = 0.0, seed: int = 0, layers: int = 2, width: int = 16) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def lora(dropout: float = 0.0, seed: int = 0, *, init: bool | str = True) -> nn.Module:
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["attn.c_attn", "mlp.c_proj"],
        fan_in_fan_out=True,
        lora_dropout=dropout,
        init_lora_weights=init,
    )
    return get_peft_model(gpt2(dropout, seed), config)


MODELS = {"full": gpt2, "lora": lora}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def flerm_config(**options: Any) -> FLeRMConfig:
    """A config of options that may be fields of `FLeRMConfig` or of `Research`."""
    research = {entry.name: options.pop(entry.name) for entry in fields(Research) if entry.name in options}
    return FLeRMConfig(research=Research(**research), **options)


def make_trainer(
    folder: Path,
    model: nn.Module,
    flerm: FLeRMConfig | None = None,
    *,
    alone: bool = False,
    data: Any = None,
    probe_dataset: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """A plain `Trainer` (no `flerm`), a plain one with the callback (`alone`), or an `FLeRMTrainer`."""
    common = {
        "model": model,
        "args": arguments(folder, **options),
        "train_dataset": Rows() if data is None else data,
        **(extra or {}),
    }
    if flerm is None:
        return Trainer(**common, callbacks=[*callbacks])
    if alone:
        return Trainer(**common, callbacks=[FLeRMCallback(flerm, probe_dataset), *callbacks])
    return FLeRMTrainer(**common, callbacks=[*callbacks], flerm=flerm, probe_dataset=probe_dataset)


def flerm_callback(trainer: Trainer) -> FLeRMCallback:
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, FLeRMCallback))


@dataclass(frozen=True)
class Outcome:
    """All that a measurement might have disturbed."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    logs: list[dict[str, float]]
    random_state: list[Any]
    witnessed: list[Any]


class Witness(TrainerCallback):
    """Writes down, behind every other callback, what nobody may have touched."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._write(kwargs["model"])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._write(kwargs["model"])

    def _write(self, model: nn.Module) -> None:
        self.seen.append(
            {
                "modes": [module.training for module in model.modules()],
                "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
                "forwards": ["forward" in m.__dict__ for m in model.modules()],
                "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
                "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
                "random": random_state(),
            }
        )


def random_state() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [torch.get_rng_state(), random.getstate(), name, torch.from_numpy(keys.astype(np.int64)), rest]


def train(trainer: Trainer, **options: Any) -> Outcome:
    witness = Witness()
    trainer.add_callback(witness)
    trainer.train(**options)
    keys = ("step", "loss", "grad_norm", "learning_rate")
    return Outcome(
        weights=weights_of(trainer.model),
        optimizer=raw_optimizer(trainer.optimizer).state_dict(),
        logs=[{key: entry.get(key) for key in keys} for entry in trainer.state.log_history if "loss" in entry],
        random_state=random_state(),
        witnessed=witness.seen,
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_identical(actual: Any, expected: Any, where: str = "") -> None:
    """The same bits all the way down."""
    assert type(actual) is type(expected), where
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual, expected), f"{where} differs by {(actual - expected).abs().max():.3g}"
    elif isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_identical(actual[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for index, (left, right) in enumerate(zip(actual, expected, strict=True)):
            assert_identical(left, right, f"{where}[{index}]")
    else:
        assert actual == expected, f"{where}: {actual!r} is not {expected!r}"


def assert_same_run(actual: Outcome, expected: Outcome, *, same_groups: bool = True) -> None:
    """Two runs that must not differ in a bit; matching regroups, so there only the optimizer's state is compared."""
    for part in ("logs", "weights", "random_state", "witnessed"):
        assert_identical(getattr(actual, part), getattr(expected, part), part)
    for part in actual.optimizer.keys() | expected.optimizer.keys():
        if part != "param_groups" or same_groups:
            assert_identical(actual.optimizer[part], expected.optimizer[part], f"optimizer {part}")


def recorded(folder: Path, model: nn.Module, *, flerm: FLeRMConfig | None = None, **options: Any) -> RateProfile:
    """The profile of a short recording run."""
    trainer = make_trainer(folder, model, flerm or FLeRMConfig(), **options)
    trainer.train()
    return flerm_callback(trainer).rate_profile


def some_factors(model: nn.Module) -> dict[str, float]:
    """A scale for every tensor, all different, between 1/2 and 2."""
    names = list(trainable_parameters(model))
    return {name: 2.0 ** (2 * index / (len(names) - 1) - 1) for index, name in enumerate(names)}


def scaled(profile: RateProfile, factors: Mapping[str, float]) -> RateProfile:
    """The base that a run with `profile`'s rates must be scaled by `factors` to match."""
    rates = {name: rates * factors[name] for name, rates in profile.rates.items()}
    return RateProfile(profile.steps, rates, {"flerm": dict(profile.about.settings)})  # in the same metric
