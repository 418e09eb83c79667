"""What matching costs: wall time of matched runs over plain ones, in turn, on the demo's LoRA model.

python examples/measuring_cost.py [--steps 300] [--pairs 5]
"""

from __future__ import annotations

import argparse
import tempfile
from statistics import median

from tqdm.auto import tqdm
from workload import Run, fine_tune, quiet

from hf_flerm import FLeRMConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    quiet()
    run = Run(64, 1.8e-3, steps=options.steps)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        _, base = fine_tune(Run(4, 1.8e-3, steps=options.steps), FLeRMConfig(mode="record"))
        base.rate_profile.save_pretrained(folder)
        for _ in tqdm(range(options.pairs), unit="pair"):
            seconds = []
            for config in (None, FLeRMConfig(mode="match", profile=folder)):
                _, trainer = fine_tune(run, config)
                seconds.append(trainer.state.log_history[0]["train_runtime"])
            ratios.append(seconds[1] / seconds[0])
    print(
        f"matched / plain, {options.steps} steps, {options.pairs} pairs: "
        f"median {median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
