"""`plan`: what it recommends where the answer is known, and that it leaves no trace."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.optim import SGD, Optimizer
from training import LENGTH, VOCABULARY, Rows, gpt2
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, TrainingArguments
from typer.testing import CliRunner

from hf_flerm import FLeRMConfig, FLeRMTrainer, RateProfile, RateProfileError, mup_param_groups, plan
from hf_flerm.cli import app
from hf_flerm.names import trainable_parameters
from hf_flerm.planning import Multiplier, Plan
from hf_flerm.rules import RULES, Change, change_between

LEARNING_RATE = 1e-2


def lora(rank: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(gpt2(), LoraConfig(r=rank, target_modules=["c_attn"], fan_in_fan_out=True, **options))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": LEARNING_RATE, **options}
    return TrainingArguments(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **given)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=LEARNING_RATE)


def recorded(folder: Path, model: nn.Module, metric: str = "euclidean", **extra: Any) -> RateProfile:
    config = FLeRMConfig(probes=4, measure_steps=range(8), metric=metric)
    trainer = FLeRMTrainer(model=model, args=arguments(folder), train_dataset=Rows(), flerm=config, **extra)
    trainer.train()
    return trainer.rate_profile


def planned(folder: Path, model: nn.Module, base: RateProfile, **options: Any) -> Plan:
    return plan(model, arguments(folder), Rows(), base, steps=6, config=FLeRMConfig(probes=4), **options)


def test_a_model_is_told_to_keep_its_own_learning_rate(tmp_path: Path) -> None:
    base = recorded(tmp_path, lora())
    advice = planned(tmp_path, lora(), base)
    assert advice.learning_rate == pytest.approx(LEARNING_RATE)
    assert advice.overall.is_one
    assert advice.keeps
    assert "Keep your learning rate, 0.01" in str(advice)


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_a_known_factor_is_found(tmp_path: Path, factor: float) -> None:
    """A base whose rates are so many times the target's own wants so many times its learning rate."""
    model = gpt2()
    base = recorded(tmp_path, model, optimizers=(sgd(model), None))
    times = RateProfile(
        base.steps,
        {name: rates * factor for name, rates in base.rates.items()},
        base.metadata,
        {key: {path: rates * factor for path, rates in groups.items()} for key, groups in base.joint_rates.items()},
    )
    advice = planned(tmp_path, gpt2(), times, optimizer=sgd)
    assert abs(math.log(advice.overall.value / factor)) < 4 * advice.overall.error + 0.3
    assert advice.learning_rate == advice.base_learning_rate * advice.overall.value
    assert not advice.keeps
    for multiplier in advice.multipliers.values():
        assert 0.2 < multiplier.value / factor < 5.0


def test_measurements_count_by_learning_rate_and_step(tmp_path: Path) -> None:
    """Of a training that moves next to nothing: its first scales cannot act on what is measured later."""
    base = recorded(tmp_path, gpt2())
    told = {**base.metadata, "training_arguments": {**base.metadata["training_arguments"], "learning_rate": 1e-5}}
    steps, factor = 6, 9.0
    weights = [(step + 1) * (1 - step / 8) for step in range(steps)]  # of a linear schedule over 8 steps

    def times(step: int | None) -> RateProfile:
        by_step = torch.ones(len(base.steps), dtype=torch.float64)
        if step is not None:
            by_step[step] = factor
        joint = {key: {p: rates * by_step for p, rates in of.items()} for key, of in base.joint_rates.items()}
        return RateProfile(base.steps, {n: rates * by_step for n, rates in base.rates.items()}, told, joint)

    plain = planned(tmp_path, gpt2(), times(None)).overall.value
    for step in (0, steps - 1):
        found = math.log(planned(tmp_path, gpt2(), times(step)).overall.value / plain) / math.log(factor)
        assert found == pytest.approx(weights[step] / sum(weights), rel=0.15)


class Drawn(Rows):
    """Rows by random numbers of the data set's own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(7)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(self.generator.randrange(len(self)))


def test_planning_leaves_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = recorded(tmp_path / "base", lora())
    model, folder = lora(rank=4), tmp_path / "plan"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    args = arguments(folder, save_strategy="steps", save_steps=1)
    capsys.readouterr()
    plan(model, args, rows := Drawn(), base, steps=3)
    assert rows.generator.getstate() == Drawn().generator.getstate()
    assert capsys.readouterr().out == ""
    drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not folder.exists() or not any(folder.iterdir())
    assert (args.output_dir, args.learning_rate) == (str(folder), LEARNING_RATE)


def test_what_is_measured_is_what_the_profile_has(tmp_path: Path) -> None:
    base = recorded(tmp_path, lora(), metric="fisher")
    args = arguments(tmp_path)
    advice = plan(lora(rank=4), args, Rows(), base, steps=3)
    same = plan(lora(rank=4), args, Rows(), base, steps=3, config=FLeRMConfig(metric="fisher"))
    assert advice.to_dict() == same.to_dict()
    with pytest.raises(RateProfileError, match="recorded with metric='fisher', this run has 'euclidean'"):
        plan(lora(rank=4), args, Rows(), base, steps=3, config=FLeRMConfig())


def test_another_adapter_is_matched_by_module(tmp_path: Path) -> None:
    base = recorded(tmp_path, lora())
    advice = planned(tmp_path, lora(use_dora=True), base)
    assert set(advice.multipliers) == {"transformer.h.*.attn.c_attn"}
    assert advice.change.target_adapter == "DORA"


def test_the_average_of_runs_of_one_learning_rate_has_that_one(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    other = RateProfile(base.steps, base.rates, base.metadata | {"training_arguments": {}}, base.joint_rates)
    other.metadata["training_arguments"] = base.metadata["training_arguments"] | {"seed": 1}
    average = RateProfile.average([base, other])
    args = arguments(tmp_path, learning_rate=1.0)
    assert plan(gpt2(width=32), args, Rows(), average, steps=1).base_learning_rate == LEARNING_RATE


def test_a_training_that_is_shorter_or_begins_with_an_evaluation(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_on_start=True)
    assert plan(gpt2(width=32), args, Rows(), base, steps=6).steps == 2
    with pytest.raises(ValueError, match="steps is 0"):
        plan(gpt2(width=32), args, Rows(), base, steps=0)


def test_a_profile_without_a_learning_rate_that_moves_is_refused(tmp_path: Path) -> None:
    base = recorded(tmp_path, lora())
    args = arguments(tmp_path, warmup_steps=8, lr_scheduler_type="linear", max_steps=100)
    with pytest.raises(ValueError, match="nothing could be measured in 1 steps"):
        plan(lora(rank=4), args, Rows(), base, steps=1)


@pytest.mark.parametrize(
    ("value", "error", "is_one"),
    [(2.0, 0.4, True), (2.0, 0.3, False), (0.5, 0.4, True), (1.7, 0.0, True), (1.9, 0.0, False), (0.5, 0.0, False)],
)
def test_a_multiplier_is_one_within_two_standard_errors_or_what_the_method_misses_by(
    value: float, error: float, is_one: bool
) -> None:
    assert Multiplier(value, error).is_one == is_one


@pytest.mark.parametrize(
    ("change", "factors"),
    [
        (Change(rank=16, scaling=1 / 16, base_adapter="LORA", target_adapter="LORA"), [1.0]),  # alpha / r
        (Change(rank=16, scaling=1 / 4, base_adapter="LORA", target_adapter="LORA"), [16**-0.25]),  # rsLoRA
        (Change(rank=16, base_adapter="LORA", target_adapter="LORA"), [0.25]),  # alpha grows with r
        (Change(base_adapter="LORA"), [0.1]),
        (Change(target_adapter="LORA"), [10.0]),
        (Change(width=4), [0.25]),
        (Change(depth=4), [0.5]),
        (Change(width=4, depth=9), [0.25, 1 / 3]),
        (Change(), []),
    ],
)
def test_rules_of_the_field(change: Change, factors: list[float]) -> None:
    assert [rule.factor(change) for rule in RULES if rule.applies(change)] == pytest.approx(factors)


def test_the_change_is_read_off_profile_and_model(tmp_path: Path) -> None:
    base = recorded(tmp_path, lora(lora_alpha=8))
    change = change_between(base, lora(rank=8, lora_alpha=8))
    assert change == Change(rank=4.0, scaling=0.25, base_adapter="LORA", target_adapter="LORA")
    assert change_between(base, lora(lora_alpha=8)) == Change(base_adapter="LORA", target_adapter="LORA")
    full = recorded(tmp_path, gpt2())
    assert change_between(full, gpt2(width=32)) == Change(width=2.0)
    assert change_between(full, gpt2(layers=6)) == Change(depth=3.0)


def test_mup_slows_down_the_matrices_of_blocks_alone(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    model = gpt2(width=64)
    groups = mup_param_groups(model, base, 1e-3, weight_decay=0.1)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in trainable_parameters(model).items():
        hidden = ".h." in name and parameter.ndim == 2
        assert rates[id(parameter)] == pytest.approx(1e-3 / 4 if hidden else 1e-3), name
    assert all(group["weight_decay"] == 0.1 for group in groups)


def test_mup_asks_for_the_bases_shapes(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    bare = RateProfile(base.steps, base.rates)
    with pytest.raises(RateProfileError, match=r"does not tell what shape 'transformer\.wte\.weight'"):
        mup_param_groups(gpt2(width=64), bare, 1e-3)
    with pytest.raises(RateProfileError, match="does not tell what shape 'base_model"):
        mup_param_groups(lora(), base, 1e-3)


def test_metadata_of_another_form_tell_no_change(tmp_path: Path) -> None:
    base = recorded(tmp_path, gpt2())
    hostile = {"shapes": [1], "adapters": [2]}
    assert change_between(RateProfile(base.steps, base.rates, hostile), gpt2(width=32)) == Change()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_command_line_plans(
    tmp_path: Path, terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """As words, and as the same numbers in JSON; nothing else on standard output, and a bar where a terminal is."""
    base = recorded(tmp_path / "runs", gpt2())
    base.save_pretrained(tmp_path / "base")
    gpt2().save_pretrained(tmp_path / "model")
    data = Rows()
    Dataset.from_dict({"input_ids": data.tokens.tolist(), "labels": data.tokens.tolist()}).save_to_disk(
        tmp_path / "data"
    )
    words = ["plan", str(tmp_path / "model"), str(tmp_path / "data"), str(tmp_path / "base"), "--steps", "3"]
    words += ["--batch-size", "4", "--max-steps", "8", "--scheduler", "linear"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    capsys.readouterr()
    app(words, standalone_mode=False)
    text, bar = capsys.readouterr()
    assert ("3/3" in bar) == terminal
    app([*words, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    advice = plan(
        gpt2(),
        arguments(tmp_path / "other", lr_scheduler_type="linear"),
        Dataset.load_from_disk(tmp_path / "data"),
        base,
        steps=3,
    )
    assert text.strip() == str(advice).strip()
    assert found.keys() == advice.to_dict().keys()
    assert found["learning_rate"] == pytest.approx(advice.learning_rate, rel=1e-4)
    assert found["multipliers"] == {
        kind: {"value": pytest.approx(multiplier.value, rel=1e-4), "error": pytest.approx(multiplier.error, rel=1e-4)}
        for kind, multiplier in advice.multipliers.items()
    }
    lora().save_pretrained(tmp_path / "adapter")
    adapted = CliRunner().invoke(app, [*words, "--adapter", str(tmp_path / "adapter")])
    assert adapted.exit_code == 0, adapted.output
    assert "h.*.attn.c_attn" in adapted.output
    wrong = CliRunner().invoke(app, [*words[:3], str(tmp_path / "nowhere")])
    assert wrong.exit_code == 2


def test_the_command_says_the_same_of_a_seed(tmp_path: Path) -> None:
    """A model and an adapter without weights get them by the seed; pickled weights are refused, not left aside."""
    base = recorded(tmp_path / "runs", gpt2())
    folders = [str(tmp_path / name) for name in ("model", "data", "base")]
    base.save_pretrained(tmp_path / "base")
    gpt2(width=32).config.save_pretrained(tmp_path / "model")
    tokens = Rows().tokens.tolist()
    Dataset.from_dict({"input_ids": tokens, "labels": tokens}).save_to_disk(tmp_path / "data")
    words = ["plan", *folders, "--steps", "2", "--batch-size", "4", "--json"]
    first, same, other = (CliRunner().invoke(app, [*words, "--seed", seed]).stdout for seed in ("1", "1", "2"))
    assert json.loads(first) == json.loads(same) != json.loads(other)
    torch.save(gpt2(width=32).state_dict(), tmp_path / "model" / "pytorch_model.bin")
    assert CliRunner().invoke(app, words).exit_code == 2


def test_the_command_asks_for_a_profile_that_tells_its_learning_rate(tmp_path: Path) -> None:
    base = recorded(tmp_path / "runs", gpt2())
    arguments = base.metadata["training_arguments"]
    other = {**base.metadata, "training_arguments": {**arguments, "learning_rate": 2 * LEARNING_RATE}}
    twice = RateProfile(base.steps, base.rates, other, base.joint_rates)
    RateProfile.average([base, twice]).save_pretrained(tmp_path / "mean")
    gpt2().save_pretrained(tmp_path / "model")
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "model"), "no data", str(tmp_path / "mean")])
    assert result.exit_code == 2
    assert "does not tell the learning rate" in " ".join(result.output.replace("│", " ").split())


def test_steps_are_refused_by_their_own_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^steps is 0; it must be a whole number of at least 1"):
        plan(gpt2(), arguments(tmp_path), Rows(), "no profile", steps=0)


def test_the_command_plans_on_a_text_file(tmp_path: Path) -> None:
    """A process of its own, a model with its tokenizer, and text: what `plan` says of the same tokens."""
    base = recorded(tmp_path / "runs", gpt2())
    base.save_pretrained(tmp_path / "base")
    lines = [
        f"the {a} {b} sat on the {c}" for a in ("old", "big") for b in ("cat", "dog", "rat") for c in ("mat", "log")
    ]
    (tmp_path / "text.txt").write_text("\n".join(lines * 4))
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(lines, trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=["<unk>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
    target = gpt2(width=32)
    target.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    paths = [str(tmp_path / name) for name in ("model", "text.txt", "base")]
    options = ["--steps", "6", "--batch-size", "4", "--max-steps", "8", "--length", str(LENGTH)]
    result = subprocess.run(
        [sys.executable, "-c", "from hf_flerm.cli import app; app()", "plan", *paths, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        check=False,
    )
    assert result.returncode == 0, result.stderr

    ids = [token for line in lines * 4 for token in tokenizer(line)["input_ids"]]
    rows = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    advice = plan(
        target,
        arguments(tmp_path / "other", lr_scheduler_type="linear"),
        Dataset.from_dict({"input_ids": rows}),
        base,
        steps=6,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    assert result.stdout.strip() == str(advice).strip()
    assert not advice.overall.is_one
