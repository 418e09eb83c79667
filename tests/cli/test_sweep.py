"""`hf-flerm sweep` says what `sweep` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from hf_flerm import sweep
from hf_flerm.cli import app
from tests.shared.plans import lora
from tests.shared.training import Rows, gpt2


def test_the_command_line_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As words, and as the same numbers in JSON from the finished runs; nothing else on standard output."""
    gpt2(layers=1).save_pretrained(tmp_path / "model")
    lora().save_pretrained(tmp_path / "adapter")
    for name, seed in (("data", 0), ("eval", 1)):
        tokens = Rows(seed=seed).tokens.tolist()
        Dataset.from_dict({"input_ids": tokens, "labels": tokens}).save_to_disk(tmp_path / name)
    given = ["--max-steps", "2", "--batch-size", "4", "--scheduler", "constant", "--around", "0.01", "--seed", "7"]
    folders = [str(tmp_path / "model"), str(tmp_path / "data"), "--eval", str(tmp_path / "eval")]
    words = ["sweep", *folders, *given, "-o", str(tmp_path / "kept")]
    capsys.readouterr()
    app(words, standalone_mode=False)
    text = capsys.readouterr().out
    app([*words, "--json"], standalone_mode=False)
    content = json.loads(capsys.readouterr().out)
    args = TrainingArguments(
        str(tmp_path / "other"), max_steps=2, per_device_train_batch_size=4, lr_scheduler_type="constant", seed=7
    )
    data, validation = (Dataset.load_from_disk(tmp_path / name) for name in ("data", "eval"))
    # In the same folder: the settings are the same, or it would be refused.
    found = sweep(gpt2(layers=1), args, data, validation, around=0.01, folder=tmp_path / "kept")
    assert content == found.to_dict()
    assert text == f"{found}\nThe profile at {found.best:g} is in {tmp_path / 'kept'}.\n"
    assert {(run["seed"], run["learning_rate"]) for run in content["runs"]} >= {(7, 0.01), (7, 0.0316228)}
    trainer = Trainer(model=gpt2(layers=1), args=args, train_dataset=data, eval_dataset=validation)
    args.learning_rate = found.best
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found.losses[found.best][0], rel=1e-6)
    other = CliRunner().invoke(app, [*words, "--adapter", str(tmp_path / "adapter")])
    assert other.exit_code == 2
    assert "a sweep with other settings" in " ".join(other.output.replace("│", " ").split())
