"""`hf-flerm plan` says what `plan` says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_flerm import RateProfile, plan
from hf_flerm.cli import app
from tests.shared.plans import LEARNING_RATE, arguments, lora, recorded
from tests.shared.training import LENGTH, VOCABULARY, Rows, gpt2


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
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    capsys.readouterr()
    app(words, standalone_mode=False)
    text, bar = capsys.readouterr()
    assert ("steps on copies" in bar) == terminal
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
    assert text.startswith("Keep 0.01.")
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
    words = ["plan", *folders, "--steps", "2", "--json"]
    first, same, other = (CliRunner().invoke(app, [*words, "--seed", seed]).stdout for seed in ("1", "1", "2"))
    assert json.loads(first) == json.loads(same) != json.loads(other)
    torch.save(gpt2(width=32).state_dict(), tmp_path / "model" / "pytorch_model.bin")
    assert CliRunner().invoke(app, words).exit_code == 2


def test_the_command_asks_for_a_profile_that_tells_its_learning_rate(tmp_path: Path) -> None:
    base = recorded(tmp_path / "runs", gpt2())
    arguments = base.metadata["training_arguments"]
    groups = [{**group, "learning_rate": 2 * LEARNING_RATE} for group in base.metadata["param_groups"]]
    other = {
        **base.metadata,
        "param_groups": groups,
        "training_arguments": {**arguments, "learning_rate": 2 * LEARNING_RATE},
    }
    twice = RateProfile(base.steps, base.rates, other, base.joint_rates)
    RateProfile.average([base, twice]).save_pretrained(tmp_path / "mean")
    gpt2().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("The old cat sat on the mat.")
    result = CliRunner().invoke(app, ["plan", *(str(tmp_path / name) for name in ("model", "text", "mean"))])
    assert result.exit_code == 2
    assert "does not contain the learning rate" in " ".join(result.output.replace("│", " ").split())


def test_options_that_are_not_given_are_those_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = recorded(tmp_path / "runs", gpt2())
    base.metadata["training_arguments"] |= {
        "weight_decay": 0.3,
        "optim": "adafactor",
        "warmup_steps": 5,
        "adam_beta1": "x",
    }
    base.save_pretrained(tmp_path / "base")
    gpt2().save_pretrained(tmp_path / "model")
    tokens = Rows().tokens.tolist()
    Dataset.from_dict({"input_ids": tokens}).save_to_disk(tmp_path / "data")
    taken = []
    monkeypatch.setattr("hf_flerm.plan", lambda model, args, *_, **__: taken.append(args))
    words = ["plan", *(str(tmp_path / name) for name in ("model", "data", "base")), "--warmup-steps", "2"]
    CliRunner().invoke(app, words)
    (args,) = taken
    assert (args.per_device_train_batch_size, args.max_steps) == (4, 8), "the base's"
    assert (args.weight_decay, args.optim, args.adam_beta1) == (0.3, "adafactor", 0.9), "a text is no number"
    assert args.warmup_steps == 2


def test_the_profile_of_an_adapter_needs_one_for_the_target(tmp_path: Path) -> None:
    recorded(tmp_path / "runs", lora()).save_pretrained(tmp_path / "base")
    gpt2().save_pretrained(tmp_path / "model")
    tokens = Rows().tokens.tolist()
    Dataset.from_dict({"input_ids": tokens, "labels": tokens}).save_to_disk(tmp_path / "data")
    words = ["plan", *(str(tmp_path / name) for name in ("model", "data", "base")), "--steps", "2"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    text = " ".join(refused.output.replace("│", " ").split())
    assert "a run with the adapter LORA. Pass --adapter FOLDER" in text
    whole = CliRunner().invoke(app, [*words, "--adapter", "none"])
    assert whole.exit_code == 0, whole.output
    assert "full fine-tuning: a tenth of LoRA's learning rate" in whole.output


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
    options = ["--steps", "6", "--length", str(LENGTH)]
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
    assert advice.learning_rate != advice.base_learning_rate
