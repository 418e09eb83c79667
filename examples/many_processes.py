"""A recording and a matched run on several processes; the same script with every engine of `accelerate launch`.

    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/many_processes.py
    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml examples/many_processes.py
    torchrun --nproc_per_node 2 examples/many_processes.py

A GPT-2 of width 32 is recorded, one of width 64 is matched to it, on single bytes of Python's help pages.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from collections import Counter
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from hf_flerm import FLeRMConfig, FLeRMTrainer

LENGTH = 64


class Text(Dataset):
    """Rows of single bytes."""

    def __init__(self) -> None:
        text = "\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
        self.rows = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).reshape(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train(folder: Path, width: int, steps: int, config: FLeRMConfig) -> FLeRMTrainer:
    """Train once and save the profile in `folder`."""
    torch.manual_seed(0)
    size = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "vocab_size": 128}
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = FLeRMTrainer(
        model=GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)),
        args=args,
        train_dataset=Text(),
        flerm=config,
    )
    trainer.train()
    return trainer


def main() -> None:
    """Record, match, and print the scales."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/many_processes"))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    base = train(options.output / "base", 32, options.steps, FLeRMConfig())
    PartialState().wait_for_everyone()
    target = train(
        options.output / "target", 64, options.steps, FLeRMConfig(mode="match", profile=options.output / "base")
    )
    if PartialState().is_main_process:
        kinds = Counter(type(parameter).__name__ for parameter in target.model.parameters())
        measured = target.flerm_callback.last_measurement
        print(f"{PartialState().num_processes} processes, {dict(kinds)}")
        print(f"base: {len(base.rate_profile.steps)} measurements, target: {len(target.rate_profile.steps)}")
        print(f"probes of the last one: {measured.num_probes}, relative error {measured.relative_error:.2f}")
        scales = sorted(target.flerm_callback.scales.values())
        print(f"scales from {scales[0]:.3g} to {scales[-1]:.3g}")


if __name__ == "__main__":
    main()
