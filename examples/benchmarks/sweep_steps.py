"""Training steps of `sweep` beside the full grid: the same learning rates, each trained to its end with each seed.

python examples/benchmarks/sweep_steps.py [--seeds 0] [--output runs/sweep_steps]

The base of the demo: GPT-2 with LoRA of rank 4, from the lowest learning rate of the demo. A run of the sweep that is
complete is also one of the full grid, because recording changes nothing; the others are trained by the plain `Trainer`.
An interrupted call goes on with the sweep that it was at.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "studies"))
from report import optimum
from workload import Run, adapted, arguments, pretrained, python_data, quiet, trained

from hf_flerm import Sweep, sweep

STEPS, BATCH = 100, 8
MIDDLE = 1e-3


def base(init: str) -> Any:
    return adapted(Run(rank=4, learning_rate=0.0, init=init))


def swept(init: str, seeds: list[int], output: Path) -> Sweep:
    args = arguments(str(output), max_steps=STEPS, per_device_train_batch_size=BATCH, per_device_eval_batch_size=64)
    train, validation = python_data()
    return sweep(base(init), args, train, validation, folder=output / init, around=MIDDLE, seeds=seeds)


def loss_of(init: str, learning_rate: float, seed: int) -> float:
    """Trained to the end."""
    options = {"learning_rate": learning_rate, "max_steps": STEPS, "per_device_train_batch_size": BATCH, "seed": seed}
    return trained(base(init), python_data(), **options)[0]


def row(init: str, seeds: list[int], output: Path) -> str:
    found = swept(init, seeds, output)
    rates = sorted({run.learning_rate for run in found.runs})
    complete = {(run.learning_rate, run.seed): run.loss for run in found.runs if run.end == "complete"}
    full = {
        rate: [complete.get((rate, seed)) or loss_of(init, rate, seed) for seed in seeds]
        for rate in tqdm(rates, "full grid", leave=False)
    }
    best, steps = optimum(full), len(rates) * len(seeds) * STEPS
    cells = [
        f"`{init}`" if init == "gaussian" else init,
        f"{len(seeds)}",
        ", ".join(f"{rate:.2g}" for rate in rates),
        f"{best:.3g} ({min(map(mean, full.values())):.3f})",
        f"{found.learning_rate:.3g} ({mean(found.losses[found.best]):.3f})",
        f"{math.exp(abs(math.log(found.learning_rate / best))):.3f}",
        f"{found.steps} of {steps} ({100 * found.steps / steps:.0f} %)",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/sweep_steps"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    quiet()
    pretrained()
    lines = [
        "| LoRA init | seeds | learning rates | full grid: optimum (best loss) | `sweep`: optimum (best loss) "
        "| factor between them | steps of `sweep` |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [row(init, options.seeds, options.output) for init in tqdm(("gaussian", "default"), "sweeps")]
    (options.output / "sweep_steps.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
