"""What matching costs: matched runs beside plain ones, in turn, LoRA of rank 64 with default settings.

python examples/benchmarks/matched_run.py [--steps 1000] [--pairs 3]

Processor time is compared: on a shared machine it says more than the clock. What measuring takes is read off the
matched run's own clock, so that both sides of the quotient meet the same machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cases import gpt2, lora
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback, set_seed

sys.path.insert(0, str(Path(__file__).parent.parent))
from workload import VOCABULARY, Run, adapted, python_data, quiet, trained

from hf_flerm import FLeRMConfig

BASE, TARGET = 4, 64
WIDTH, LAYERS, LENGTH = 128, 4, 128


class ProcessorTime(TrainerCallback):
    """Processor time from the end of the trainer's making to the end of its training."""

    def on_init_end(self, *args: object, **kwargs: object) -> None:
        self.start = time.process_time()

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        self.seconds = time.process_time() - self.start


@cache
def random_tokens() -> Dataset:
    rows = torch.randint(VOCABULARY, (512, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def demo(rank: int) -> tuple[torch.nn.Module, tuple[Dataset, Dataset]]:
    return adapted(Run(rank, 0.0)), python_data()


def wider(rank: int) -> tuple[torch.nn.Module, tuple[Dataset, Dataset]]:
    set_seed(0)
    return lora(gpt2(WIDTH, LAYERS, VOCABULARY), rank), (random_tokens(), random_tokens().select(range(8)))


def timed(
    make: Callable[[int], tuple[torch.nn.Module, tuple[Dataset, Dataset]]],
    steps: int,
    rank: int,
    config: FLeRMConfig | None,
) -> tuple[float, Any]:
    timer = ProcessorTime()
    model, data = make(rank)
    _, trainer = trained(
        model, data, config, [timer], learning_rate=1.8e-3, max_steps=steps, per_device_train_batch_size=8
    )
    return timer.seconds, trainer


def compare(title: str, run: Callable[[int, FLeRMConfig | None], tuple[float, Any]], pairs: int) -> str:
    ratios, plain, shares = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        run(BASE, FLeRMConfig(mode="record"))[1].rate_profile.save_pretrained(folder)
        for _ in tqdm(range(pairs), title, unit="pair"):
            without, _ = run(TARGET, None)
            matched, trainer = run(TARGET, FLeRMConfig(mode="match", profile=folder))
            log = trainer.state.log_history[0]
            plain.append(without)
            ratios.append(matched / without)
            shares.append(log["flerm/seconds"] / (log["train_runtime"] - log["flerm/seconds"]))
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    return f"| {title} | {median(plain):.0f} | {100 * median(shares):.1f} % | {median(ratios):.3f} | {spread} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    quiet()
    models = {
        "the demo's, 4 layers, d = 96, 8 x 48 tokens": demo,
        f"GPT-2, {LAYERS} layers, d = {WIDTH}, 8 x {LENGTH} tokens": wider,
    }
    rows = [compare(title, partial(timed, make, options.steps), options.pairs) for title, make in models.items()]
    print(
        f"| {options.steps} steps, {options.pairs} pairs | plain, s | measuring / the rest | matched / plain | range |"
    )
    print("|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
