"""Cost of matching: matched runs beside plain runs, LoRA of rank 64 with default settings.

python examples/benchmarks/matched_run.py [--steps 1000] [--pairs 3]

The two runs of a pair take turns of a few steps in one process, and the processor time of each is compared: so both
meet the same machine. On a shared one, runs one after the other differ by a tenth without a cause.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from statistics import median
from threading import Semaphore
from typing import Any

import torch
from cases import gpt2, lora
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).parent.parent))
from workload import VOCABULARY, Run, adapted, python_data, quiet, trained

from hf_flerm import FLeRMConfig

BASE, TARGET = 4, 64
TURN = 10  # steps
WIDTH, LAYERS, LENGTH = 128, 4, 128


class Turns(TrainerCallback):
    """One of two trainings in threads of which one runs at a time; its processor time from the trainer's making on.

    Args:
        mine: What this one waits for; whoever goes first has it from the start.
        theirs: What the other one waits for.
    """

    def __init__(self, mine: Semaphore, theirs: Semaphore) -> None:
        self.mine, self.theirs = mine, theirs

    def on_init_end(self, *args: object, **kwargs: object) -> None:
        self.start = time.thread_time()

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.change()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *rest: object, **kwargs: object) -> None:
        if state.global_step % TURN == 0:
            self.change()

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        self.seconds = time.thread_time() - self.start

    def change(self) -> None:
        self.theirs.release()
        self.mine.acquire()


@cache
def random_tokens() -> Dataset:
    rows = torch.randint(VOCABULARY, (512, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def demo(rank: int) -> tuple[torch.nn.Module, tuple[Dataset, Dataset]]:
    return adapted(Run(rank, 0.0)), python_data()


def wider(rank: int) -> tuple[torch.nn.Module, tuple[Dataset, Dataset]]:
    set_seed(0)
    return lora(gpt2(WIDTH, LAYERS, VOCABULARY), rank), (random_tokens(), random_tokens().select(range(8)))


Case = tuple[torch.nn.Module, tuple[Dataset, Dataset]]


def run(case: Case, steps: int, config: FLeRMConfig | None, callbacks: Sequence[TrainerCallback] = ()) -> Any:
    options = {"learning_rate": 1.8e-3, "max_steps": steps, "per_device_train_batch_size": 8}
    return trained(*case, config, callbacks, **options)[1]


def in_turn(turns: Turns, case: Case, steps: int, config: FLeRMConfig | None) -> Any:
    turns.mine.acquire()
    try:
        return run(case, steps, config, [turns])
    finally:
        turns.theirs.release(steps)  # the other one no longer waits


def pair(make: Callable[[int], Case], steps: int, profile: str) -> tuple[float, float, float]:
    """Seconds of a plain run, of a matched one, and what measuring took of these."""
    first, second = Semaphore(1), Semaphore(0)
    plain, matched = Turns(first, second), Turns(second, first)
    with redirect_stdout(StringIO()), ThreadPoolExecutor(2) as pool:
        cases = make(TARGET), make(TARGET)
        other = pool.submit(in_turn, plain, cases[0], steps, None)
        trainer = pool.submit(in_turn, matched, cases[1], steps, FLeRMConfig(mode="match", profile=profile)).result()
        other.result()
    return plain.seconds, matched.seconds, trainer.flerm_callback.run.seconds


def compare(title: str, make: Callable[[int], Case], steps: int, pairs: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        run(make(BASE), steps, FLeRMConfig(mode="record")).rate_profile.save_pretrained(folder)
        found = [pair(make, steps, folder) for _ in tqdm(range(pairs), title, unit="pair")]
    ratios = [matched / plain for plain, matched, _ in found]
    share = median(measuring / plain for plain, _, measuring in found)
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    plain = median(seconds for seconds, _, _ in found)
    return f"| {title} | {plain:.0f} | {100 * share:.1f} % | {median(ratios):.3f} | {spread} |"


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
    torch.set_num_threads(1)
    rows = [compare(title, make, options.steps, options.pairs) for title, make in models.items()]
    print(f"| {options.steps} steps, {options.pairs} pairs | plain, s | measuring / plain | matched / plain | range |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
