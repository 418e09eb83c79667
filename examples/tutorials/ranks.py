"""Transfer across LoRA ranks: sweep rank 2, train rank 32 at its best learning rate.

    python examples/tutorials/ranks.py

A small GPT-2 learns English byte by byte (Python's help pages), and is then fine-tuned with LoRA on Python source.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sysconfig
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from hf_flerm import FLeRMConfig, FLeRMTrainer, RateProfile, plan

LENGTH = 64
BASE, TARGET = 2, 32
RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]


def blocks(text: str) -> Dataset:
    """Rows of single bytes."""
    codes = text.encode("ascii", "replace")
    rows = [
        list(codes[start : start + LENGTH]) for start in range(0, len(codes) - LENGTH, LENGTH)
    ]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def python_source() -> str:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def arguments(folder: Path, learning_rate: float, steps: int) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        learning_rate=learning_rate,
        max_steps=steps,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def pretrained(folder: Path, steps: int) -> GPT2LMHeadModel:
    """A model to fine-tune."""
    set_seed(0)
    size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "vocab_size": 128}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    english = blocks("\n".join(pydoc_data.topics.topics.values()))
    Trainer(model=model, args=arguments(folder, 3e-3, steps), train_dataset=english).train()
    model.save_pretrained(folder)
    return model


def with_adapter(folder: Path, rank: int) -> torch.nn.Module:
    set_seed(rank)
    config = LoraConfig(
        r=rank,
        lora_alpha=32,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        init_lora_weights="gaussian",
    )
    return get_peft_model(GPT2LMHeadModel.from_pretrained(folder), config)


def fine_tuned(
    folder: Path,
    rank: int,
    learning_rate: float,
    steps: int,
    data: Dataset,
    held_out: Dataset,
    flerm: FLeRMConfig | None,
) -> tuple[float, Any]:
    """Fine-tune. Return the validation loss and the trainer."""
    common = {
        "model": with_adapter(folder, rank),
        "args": arguments(folder / "run", learning_rate, steps),
        "train_dataset": data,
        "eval_dataset": held_out,
    }
    trainer = Trainer(**common) if flerm is None else FLeRMTrainer(**common, flerm=flerm)
    trainer.train()
    return trainer.evaluate()["eval_loss"], trainer


def main(arguments_given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--output", type=Path, default=Path("runs/tutorials"))
    options = parser.parse_args(arguments_given)
    logging.set_verbosity_error()
    folder, steps = options.output / "pretrained", options.steps
    pretrained(folder, 3 * steps)
    source = blocks(python_source())
    data, held_out = (
        source.select(range(len(source) - 128)),
        source.select(range(len(source) - 128, len(source))),
    )

    # the base: a sweep, each run with its profile
    base: dict[float, tuple[float, RateProfile]] = {}
    for rate in options.rates:
        loss, trainer = fine_tuned(
            folder, BASE, rate, steps, data, held_out, FLeRMConfig(mode="record")
        )
        base[rate] = loss, trainer.rate_profile
    best = min(base, key=lambda rate: base[rate][0])
    profile = base[best][1]
    profile.save_pretrained(options.output / "base")
    # what does the target need?
    advice = plan(
        with_adapter(folder, TARGET),
        arguments(folder / "run", best, steps),
        data,
        profile,
        steps=min(32, steps),
    )
    # the target: matched at the base's best learning rate, and its own sweep to compare with
    matched, trainer = fine_tuned(
        folder, TARGET, best, steps, data, held_out, FLeRMConfig(mode="match", profile=profile)
    )
    trainer.rate_profile.save_pretrained(options.output / "target")
    own = {
        rate: fine_tuned(folder, TARGET, rate, steps, data, held_out, None)[0]
        for rate in options.rates
    }
    lines = [
        f"| learning rate | rank {BASE} | rank {TARGET}, `Trainer` | rank {TARGET}, `FLeRMTrainer` |",
        "|---|---|---|---|",
    ]
    for rate in options.rates:
        flerm = f"{matched:.3f}" if rate == best else ""
        lines.append(f"| {rate:g} | {base[rate][0]:.3f} | {own[rate]:.3f} | {flerm} |")
    lines += [
        "",
        f"`plan` asks for {advice.learning_rate:.2g}. Validation loss in nats per byte, one seed.",
        "",
    ]
    (options.output / "ranks.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
