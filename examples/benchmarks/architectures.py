"""Table of the estimator that each tensor gets, for the models and adapters of the test matrix.

python examples/benchmarks/architectures.py
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))
from hf_flerm import measure_rates
from tests.shared.adapters import ADAPTERS
from tests.shared.architectures import ARCHITECTURES


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    print("| model, all of its tensors | `per_example` | others |\n|---|---|---|")
    for name, make in ARCHITECTURES.items():
        row(name, make)
    print("\n| adapter, all that it trains | `per_example` | others |\n|---|---|---|")
    for name, make in ADAPTERS.items():
        row(name, make)


def row(name: str, make: object) -> None:
    torch.manual_seed(0)
    case = make()
    measured = measure_rates(case.model, case.updates, case.batches, output=case.output)
    counts = Counter(measured.estimators.values())
    others = [
        f"{tensor}: `{estimator}`" for tensor, estimator in measured.estimators.items() if estimator != "per_example"
    ]
    print(f"| {name} | {counts['per_example']} of {len(measured.estimators)} | {', '.join(others)} |")


if __name__ == "__main__":
    main()
