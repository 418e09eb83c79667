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

sys.path.insert(0, str(Path(__file__).parent.parent))
from workload import Run, fine_tune, quiet

from hf_flerm import FLeRMConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    quiet()
    run = Run(64, 1.8e-3, steps=options.steps)
    wall, cpu, shares = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        _, base = fine_tune(Run(4, 1.8e-3, steps=options.steps), FLeRMConfig(mode="record"))
        base.rate_profile.save_pretrained(folder)
        for _ in tqdm(range(options.pairs), unit="pair"):
            seconds, processor = [], []
            for config in (None, FLeRMConfig(mode="match", profile=folder)):
                start = time.process_time()
                _, trainer = fine_tune(run, config)
                processor.append(time.process_time() - start)
                seconds.append(trainer.state.log_history[0]["train_runtime"])
            shares.append(trainer.state.log_history[0]["flerm/seconds"] / seconds[1])
            wall.append(seconds[1] / seconds[0])
            cpu.append(processor[1] / processor[0])
    print(
        f"matched / plain, {options.steps} steps, {options.pairs} pairs: wall time {median(wall):.3f} "
        f"({min(wall):.3f} to {max(wall):.3f}), processor time {median(cpu):.3f} ({min(cpu):.3f} to {max(cpu):.3f}); "
        f"measuring took {100 * median(shares):.1f} % of the matched run"
    )


if __name__ == "__main__":
    main()
