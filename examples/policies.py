"""Which way of aggregating log-scales is best: validation losses at rank 64 and rank 4's best learning rate.

    python examples/policies.py [--demo runs/demo]

Uses the profiles and the losses that `examples/demo.py` left in its output folder.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
from pathlib import Path
from typing import Any

from demo import BASE_RANK, INITS, TARGET_RANK, profile_folder
from tqdm.auto import tqdm
from workload import Run, fine_tune, processes, quiet, spread

from hf_flerm import FLeRMConfig

EARLY = (0, 1, 2, 3, 4, 6, 8)
POLICIES: dict[str, dict[str, Any]] = {
    "once, at step 6 (the paper's LoRA runs)": {"measure_steps": (6,), "pool": "unit", "beta": 0.0},
    "steps 0 to 8, the latest alone": {"measure_steps": EARLY, "pool": "unit", "beta": 0.0},
    "steps 0 to 8, averaged over kinds": {"measure_steps": EARLY, "beta": 0.0},
    "steps 0 to 8, averaged over kinds and steps": {"measure_steps": EARLY, "beta": 1.0},
    "steps 0 to 32, averaged over steps": {"pool": "unit", "beta": 1.0},
    "steps 0 to 32, averaged over kinds, the latest alone": {"beta": 0.0},
    "steps 0 to 32, averaged over kinds, beta = 0.9 over steps": {"beta": 0.9},
    "steps 0 to 32, averaged over kinds and steps": {"beta": 1.0},
    "steps 0 to 32, kinds, and steps as the evidence supports (default)": {},
}


def train(policy: str, run: Run, profile: Path) -> float:
    quiet()
    return fine_tune(run, FLeRMConfig(mode="match", profile=profile, **POLICIES[policy]))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    results = json.loads((options.demo / "demo.json").read_text())
    matched = [Run(**result["run"]) for result in results if result["method"] == "flerm"]
    plain = {Run(**result["run"]): result["loss"] for result in results if result["method"] == "plain"}
    seeds = {run.seed for run in matched}
    rates = {run.init: run.learning_rate for run in matched}
    rows = {
        "`Trainer` at rank 4's best learning rate": {
            init: [plain[Run(TARGET_RANK, rates[init], seed, init)] for seed in seeds] for init in INITS
        },
        "`Trainer` at the best of rank 64's own sweep": {
            init: [min(loss for run, loss in plain.items() if (run.init, run.seed) == (init, seed)) for seed in seeds]
            for init in INITS
        },
    }
    jobs = [
        (policy, run, profile_folder(options.demo, Run(BASE_RANK, run.learning_rate, run.seed, run.init)))
        for policy in POLICIES
        for run in matched
    ]
    with processes() as pool:
        losses = list(tqdm(pool.map(train, *zip(*jobs, strict=True)), total=len(jobs), unit="run"))
    for (policy, run, _), loss in zip(jobs, losses, strict=True):
        rows.setdefault(policy, {init: [] for init in INITS})[run.init].append(loss)
    print("| | " + " | ".join(INITS.values()) + " |")
    print("|---|" + "---|" * len(INITS))
    for name, columns in rows.items():
        print(f"| {name} | " + " | ".join(spread(columns[init]) for init in INITS) + " |")


if __name__ == "__main__":
    main()
