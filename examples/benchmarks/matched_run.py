"""What matching costs: matched runs beside plain ones, in turn, on the demo's LoRA model with default settings.

python examples/benchmarks/matched_run.py [--steps 1000] [--pairs 3]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tqdm.auto import tqdm
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent))
from workload import Run, fine_tune, quiet

from hf_flerm import FLeRMConfig


class StepTimes(TrainerCallback):
    """The time of every step; where a machine is shared, its median says more than the whole run's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    quiet()
    run = Run(64, 1.8e-3, steps=options.steps)
    wall, steps, shares = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        _, base = fine_tune(Run(4, 1.8e-3, steps=options.steps), FLeRMConfig(mode="record"))
        base.rate_profile.save_pretrained(folder)
        for _ in tqdm(range(options.pairs), unit="pair"):
            seconds, times = [], []
            for config in (None, FLeRMConfig(mode="match", profile=folder)):
                timer = StepTimes()
                _, trainer = fine_tune(run, config, [timer])
                seconds.append(trainer.state.log_history[0]["train_runtime"])
                times.append(median(timer.seconds))
            shares.append(trainer.state.log_history[0]["flerm/seconds"] / (options.steps * times[0]))
            wall.append(seconds[1] / seconds[0])
            steps.append(times[1] / times[0])
    print(
        f"matched / plain, {options.steps} steps, {options.pairs} pairs: whole run {median(wall):.3f} "
        f"({min(wall):.3f} to {max(wall):.3f}), median step {median(steps):.3f} "
        f"({min(steps):.3f} to {max(steps):.3f}); measuring took {100 * median(shares):.1f} % of the plain run"
    )


if __name__ == "__main__":
    main()
