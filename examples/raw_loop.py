"""A recording and a matched training in a loop of one's own; no Trainer. It runs as it is, or on several processes.

    python examples/raw_loop.py
    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/raw_loop.py
    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml examples/raw_loop.py

A GPT-2 of width 32 is recorded, one of width 64 is matched to it, on single bytes of Python's help pages.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from many_processes import LENGTH, Text
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from hf_flerm import FLeRMConfig, FLeRMRun


def train(accelerator: Accelerator, folder: Path, width: int, steps: int, config: FLeRMConfig) -> FLeRMRun:
    """Train once and save the profile in `folder`."""
    torch.manual_seed(0)
    size = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "vocab_size": 128}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    loader = DataLoader(Text(), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    run = FLeRMRun(model, optimizer, config, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            with run.step():
                optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()
        if run.steps == steps:
            break
    if accelerator.is_main_process:
        run.save(folder)
    run.close()
    return run


def main() -> None:
    """Record, match, and print the scales."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/raw_loop"))
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    train(accelerator, options.output, 32, options.steps, FLeRMConfig())
    accelerator.wait_for_everyone()
    run = train(
        accelerator, options.output / "target", 64, options.steps, FLeRMConfig(mode="match", profile=options.output)
    )
    scales = sorted(run.scales.values())
    engine = accelerator.distributed_type.value
    accelerator.print(f"{accelerator.num_processes} processes ({engine}), {len(run.profile.steps)} measurements")
    accelerator.print(f"scales from {scales[0]:.3g} to {scales[-1]:.3g}")


if __name__ == "__main__":
    main()
