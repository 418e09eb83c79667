"""What else a `Trainer` can do: each feature with recording beside it, bit for bit as without."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.trainer import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

from hf_flerm import FLeRMArguments, FLeRMCallback, FLeRMConfig, FLeRMTrainer, RateProfile, Research
from hf_flerm.config import help_of
from tests.shared.training import (
    BATCH,
    MEASURED,
    STEPS,
    VOCABULARY,
    Rows,
    assert_identical,
    assert_same_run,
    flerm_callback,
    gpt2,
    make_trainer,
    recorded,
    scaled,
    some_factors,
    train,
    weights_of,
)


def doubled_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits[:, :-1].reshape(-1, VOCABULARY)
    return 2 * nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1))


FEATURES: dict[str, dict[str, Any]] = {
    "neftune": {"neftune_noise_alpha": 5.0},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "own loss": {"extra": {"compute_loss_func": doubled_loss}},
    "model_init": {"extra": {"model": None, "model_init": lambda: gpt2(0.1)}},
    "early stopping": {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "extra": {"eval_dataset": Rows(seed=1)},
    },
}


@pytest.mark.parametrize("feature", FEATURES)
def test_recording_changes_nothing(tmp_path: Path, feature: str) -> None:
    def stopping() -> list[Any]:
        return [EarlyStoppingCallback(2)] if feature == "early stopping" else []

    options = FEATURES[feature]
    plain = train(make_trainer(tmp_path, gpt2(0.1), callbacks=stopping(), **options))
    trainer = make_trainer(tmp_path, gpt2(0.1), FLeRMConfig(), callbacks=stopping(), **options)
    assert_same_run(train(trainer), plain)
    assert trainer.rate_profile.steps.tolist() == MEASURED[: len(trainer.rate_profile.steps)]
    assert len(trainer.rate_profile.steps) == len(MEASURED) or trainer.state.global_step < STEPS
    assert all(rates.all() for rates in trainer.rate_profile.rates.values())


def test_noise_on_embeddings_is_no_part_of_the_function(tmp_path: Path) -> None:
    """A probe sees the model in eval mode: at the first step the rates are those of equal updates without noise."""
    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig(measure_steps=(0,)), neftune_noise_alpha=0.0)
    noisy = make_trainer(tmp_path, gpt2(), FLeRMConfig(measure_steps=(0,)), neftune_noise_alpha=1e-6)
    trainer.train()
    noisy.train()
    for name, rates in trainer.rate_profile.rates.items():
        torch.testing.assert_close(noisy.rate_profile.rates[name], rates, rtol=0.02, atol=1e-6)


def test_a_sequence_to_sequence_trainer(tmp_path: Path) -> None:
    def made(**more: Any) -> Seq2SeqTrainer:
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
        args = Seq2SeqTrainingArguments(
            str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            predict_with_generate=True,
            eval_strategy="steps",
            eval_steps=2,
            generation_max_length=4,
        )
        return Seq2SeqTrainer(
            T5ForConditionalGeneration(config), args, train_dataset=Rows(), eval_dataset=Rows(4, seed=1), **more
        )

    plain = train(made())
    trainer = made(callbacks=[FLeRMCallback(FLeRMConfig())])
    outcome = train(trainer)
    assert_identical(outcome.weights, plain.weights)
    assert_identical(outcome.logs, plain.logs)
    profile = flerm_callback(trainer).rate_profile
    assert profile.steps.tolist() == MEASURED
    base = scaled(profile, some_factors(trainer.model))
    matched = made(callbacks=[FLeRMCallback(FLeRMConfig(mode="match", profile=base))])
    matched.train()
    assert len(set(flerm_callback(matched).scales.values())) > 1


def test_a_batch_that_does_not_fit_is_halved_for_training_and_probes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto_find_batch_size` starts the training anew."""
    step = FLeRMTrainer.training_step

    def small(self: Any, model: nn.Module, inputs: dict[str, Tensor], *args: Any) -> Tensor:
        if len(inputs["input_ids"]) > BATCH:
            raise RuntimeError("CUDA out of memory.")
        return step(self, model, inputs, *args)

    monkeypatch.setattr(FLeRMTrainer, "training_step", small)
    base = recorded(tmp_path, gpt2(seed=1))
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 2 * BATCH}
    config = FLeRMConfig(mode="match", profile=base, research=Research(policy="follow"))
    trainer = make_trainer(tmp_path, gpt2(), config, data=Rows(32), **options)
    trainer.train()
    assert set(flerm_callback(trainer).scales.values()) != {1.0}
    assert trainer.state.train_batch_size == BATCH
    assert trainer.rate_profile.steps.tolist() == MEASURED
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks  # none of a run that was given up


class _Trials:
    """What a search library does with a Trainer."""

    def ensure_available(self) -> None: ...

    @staticmethod
    def default_hp_space(trial: Any) -> dict[str, float]:
        return {"learning_rate": trial.params["learning_rate"]}

    def run(self, trainer: Any, n_trials: int, direction: str, **_: Any) -> list[float]:
        losses = []
        for number in range(n_trials):
            trainer.objective = None
            trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": 10.0 ** (-2 - number)}))
            losses.append(trainer.evaluate()["eval_loss"])
        return losses


def test_a_search_at_the_base_leaves_a_profile_with_every_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, _Trials)
    monkeypatch.setattr(Trainer, "_report_to_hp_search", lambda *_: None)  # prunes trials
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    extra = {"model": None, "model_init": lambda: gpt2(), "eval_dataset": Rows(seed=1)}
    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig(), extra=extra, save_strategy="steps", save_steps=STEPS)
    losses = trainer.hyperparameter_search(n_trials=2, backend="optuna")
    assert losses[0] != losses[1]
    for number in range(2):
        profile = RateProfile.from_pretrained(tmp_path / f"run-{number}" / f"checkpoint-{STEPS}")
        assert profile.metadata["training_arguments"]["learning_rate"] == pytest.approx(10.0 ** (-2 - number))
        assert profile.steps.tolist() == MEASURED
    assert not list(tmp_path.glob("checkpoint-*"))


def test_choices_from_the_command_line_and_from_yaml(tmp_path: Path) -> None:
    parser = HfArgumentParser((TrainingArguments, FLeRMArguments))
    given = [
        "--output_dir",
        "x",
        "--seed",
        "3",
        "--flerm_mode",
        "match",
        "--flerm_profile",
        "base",
        "--flerm_seed",
        "5",
    ]
    given += ["--flerm_measure_steps", "20,0", "--flerm_probes", "4", "--flerm_beta", "0.5", "--flerm_output", "hidden"]
    args, flerm = parser.parse_args_into_dataclasses(given)
    assert args.seed == 3
    assert flerm.config == FLeRMConfig(
        mode="match",
        profile="base",
        seed=5,
        measure_steps=(0, 20),
        output="hidden",
        research=Research(probes=4, beta=0.5),
    )
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"output_dir": "x", "flerm_measure_steps": [0, 20], "flerm_probes": "auto"}))
    assert parser.parse_yaml_file(file)[1].config == FLeRMConfig(
        measure_steps=(0, 20), research=Research(probes="auto")
    )
    file.write_text("output_dir: x\nflerm_max_scale: 1e3\nflerm_beta: 5e-1\n")  # which PyYAML reads as text
    assert parser.parse_yaml_file(file)[1].config == FLeRMConfig(max_scale=1e3, research=Research(beta=0.5))
    file.write_text("output_dir: x\nflerm_max_scale: wide\n")
    with pytest.raises(ValueError, match=r"max_scale is 'wide'; it must be a number of at least 1"):
        _ = parser.parse_yaml_file(file)[1].config
    assert FLeRMArguments().config == FLeRMConfig()
    shown = "".join(parser.format_help().split())
    options = [entry for entry in (*fields(FLeRMConfig), *fields(Research)) if entry.name != "research"]
    assert all("".join(help_of(entry).split()) in shown for entry in options)
    with pytest.raises(ValueError, match="mode is 'watch'; it must be one of record, match"):
        FLeRMArguments(flerm_mode="watch").config  # noqa: B018


def test_two_trainings_of_one_trainer(tmp_path: Path) -> None:
    """`model_init` makes a new model each time; nothing of the first training is left."""
    extra = {"model": None, "model_init": lambda: gpt2()}
    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig(), extra=extra)
    trainer.train()
    first, weights = trainer.rate_profile, weights_of(trainer.model)
    trainer.train()
    assert_identical(weights_of(trainer.model), weights)
    assert trainer.rate_profile == first
