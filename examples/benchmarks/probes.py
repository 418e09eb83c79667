"""Cost and accuracy of a probe: time and memory against a training step, and error at equal time.

    python examples/benchmarks/probes.py [--repeats 5] [--skip-large]

Cost: one `per_example` probe on as many examples as a training step takes, AdamW, random tokens. Error: the demo's
model (a 4-layer GPT-2, d = 96, pretrained on English) a few steps into learning Python with LoRA r = 8;
root-mean-square log error of its 32 rates against `exact`, in the time that so many `kronecker` probes take.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import torch
from cases import LEARNING_RATE, Training, gpt2, llama, lora, on_random_tokens, peak_memory, seconds, synchronize
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from workload import Run, adapted, python_data, quiet

from hf_flerm.engines.engine import MasterWeights
from hf_flerm.optimizer.step import Snapshot
from hf_flerm.rates.probe import RateProbe

SMALL = {
    "GPT-2, 4 layers, d = 128, LoRA r = 8": lambda: on_random_tokens(lora(gpt2(128, 4, 4096), 8), 8, 128),
    "GPT-2, 4 layers, d = 128": lambda: on_random_tokens(gpt2(128, 4, 4096), 8, 128),
    "Llama, 4 layers, d = 128, LoRA r = 8": lambda: on_random_tokens(lora(llama(128, 4, 4096), 8), 8, 128),
    "Llama, 4 layers, d = 128": lambda: on_random_tokens(llama(128, 4, 4096), 8, 128),
}
LARGE = {
    "cpu": {
        "GPT-2 small (124M), LoRA r = 8": lambda: on_random_tokens(lora(gpt2(768, 12, 50257), 8), 8, 128),
        "GPT-2 small (124M)": lambda: on_random_tokens(gpt2(768, 12, 50257), 8, 128),
        "Llama, 12 layers, d = 768, 32k words (134M)": lambda: on_random_tokens(llama(768, 12, 32000), 8, 128),
    },
    "cuda": {
        "Llama, 24 layers, d = 1024, 32k words (346M), LoRA r = 8": lambda: on_random_tokens(
            lora(llama(1024, 24, 32000), 8), 8, 512
        ),
        "Llama, 24 layers, d = 1024, 32k words (346M)": lambda: on_random_tokens(llama(1024, 24, 32000), 8, 512),
    },
}
BUDGETS = (1, 2, 5, 10, 20, 40)
COUNTS = {  # of probes, by estimator and probes per forward pass
    ("kronecker", 1): BUDGETS,
    ("per_example", 1): (1, 2, 3, 4, 5, 7, 10, 20, 30),
    ("per_example", 2): (2, 4, 6, 8, 10, 20, 40),
    ("full", 1): (1, 5, 10, 40),
    ("iid", 1): (1, 5, 10, 40),
}


def cost(name: str, make: Callable[[], Training], repeats: int) -> str:
    training = make()
    training.step()
    probe = RateProbe(training.model)
    several = RateProbe(training.model, probes_per_batch=2)
    first: list[float] = []
    steps, probes, shared = [], [], []

    def measure(updates: object) -> None:
        first.append(seconds(lambda: probe.measure(updates, [training.probe_batch])))

    for _ in range(2):  # LoRA's A has no effect, and cannot be verified, before B has moved
        training.measured(measure)
    several.measure({n: torch.zeros_like(p) for n, p in training.parameters.items()}, [training.probe_batch])
    before = Snapshot(MasterWeights(training.parameters))
    training.update()
    for _ in range(repeats):
        steps.append(seconds(training.step))
        with before.put_back(dict.fromkeys(training.parameters, LEARNING_RATE)) as updates:
            probes.append(seconds(lambda: probe.measure(updates, [training.probe_batch])))
            several.measure(updates, [training.probe_batch])
            shared.append(seconds(lambda: several.measure(updates, [training.probe_batch])) / 2)
    del before
    half = {key: value[: len(value) // 2] for key, value in training.probe_batch.items()}
    plain = training.held + peak_memory(training.step)
    measured = training.held + peak_memory(lambda: training.measured(lambda updates: probe.measure(updates, [half])))
    step = median(steps)
    return (
        f"| {name} | {1e3 * step:.0f} | {median(probes) / step:.2f} | {median(shared) / step:.2f} | "
        f"{sum(first) / step:.1f} | {measured / plain:.2f} | {(plain + training.trained) / plain:.2f} |"
    )


def errors(examples: int, repeats: int) -> tuple[list[str], str]:
    quiet()
    rows = torch.tensor(python_data()[0]["input_ids"][: 2 * examples])
    training = Training(adapted(Run(8, LEARNING_RATE)), rows[:examples], rows[examples:])
    for _ in range(3):
        training.step()
    before = Snapshot(MasterWeights(training.parameters))
    training.update()
    squares: dict[tuple[tuple[str, int], int], list[float]] = {}
    spent: dict[tuple[str, int], list[float]] = {}
    with before.put_back(dict.fromkeys(training.parameters, LEARNING_RATE)) as updates:
        exact = RateProbe(training.model, estimator="exact").measure(updates, [training.probe_batch])
        truth = torch.tensor(list(exact.rates.values()))
        probes = {way: RateProbe(training.model, estimator=way[0], probes_per_batch=way[1]) for way in COUNTS}
        for probe in probes.values():
            probe.measure(updates, [training.probe_batch])
        for repeat in tqdm(range(repeats), unit="repeat", desc=f"{examples} examples"):
            for way, probe in probes.items():  # side by side: the machine's load changes
                for count in COUNTS[way]:
                    generator = torch.Generator(training.device).manual_seed(1000 * count + repeat)
                    synchronize()
                    start = time.perf_counter()
                    rates = probe.measure(updates, [training.probe_batch] * (count // way[1]), generator).rates
                    synchronize()
                    spent.setdefault(way, []).append((time.perf_counter() - start) / count)
                    error = (torch.tensor(list(rates.values())) / truth).log().square().mean().item()
                    squares.setdefault((way, count), []).append(error)
    found = {key: mean(values) ** 0.5 for key, values in squares.items()}
    times = {way: median(values) for way, values in spent.items()}
    unit = times["kronecker", 1]
    lines = []
    for way, counts in COUNTS.items():
        cells = []
        for budget in BUDGETS:
            affordable = int(budget * unit / times[way] + 0.1)
            best = max((count for count in counts if count <= affordable), default=None)
            cells.append("" if best is None else f"{found[way, best]:.2f} ({best})")
        name = f"`{way[0]}`" + (f", {way[1]} a forward" if way[1] > 1 else "")
        lines.append(f"| {name} | {examples} | {1e3 * times[way]:.0f} | " + " | ".join(cells) + " |")
    target = found[("kronecker", 1), 40]
    verdict = f"{examples} examples: the error of 40 `kronecker` probes is {target:.3f}. `per_example` "
    for way in (way for way in COUNTS if way[0] == "per_example"):
        enough = next((count for count in COUNTS[way] if found[way, count] <= target), COUNTS[way][-1])
        share = 40 * unit / (enough * times[way])
        verdict += (
            f"with {way[1]} a forward pass: {found[way, enough]:.3f} with {enough}, in 1/{share:.1f} of the time"
            + (". " if way[1] > 1 else "; ")
        )
    return lines, verdict.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-large", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [(name, make, 4 * options.repeats) for name, make in SMALL.items()]
    if not options.skip_large:
        cases += [(name, make, options.repeats) for name, make in LARGE[device].items()]
    lines = [cost(name, make, repeats) for name, make, repeats in tqdm(cases, unit="model")]
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} {platform.machine()}"
    print(f"Cost ({machine}{'' if device == 'cuda' else ' cores'}):\n")
    print("| model | step, ms | probe / step | 2 draws a forward | verifying, steps | peak memory / step's | bound |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    print("\nError in the time of so many `kronecker` probes (and how many fit into it):\n", flush=True)
    print("| estimator | examples | ms per probe | " + " | ".join(map(str, BUDGETS)) + " |")
    print("|---|---|---|" + "---|" * len(BUDGETS))
    tables = [errors(8, 4 * options.repeats), errors(32, options.repeats)]
    print("\n".join(row for rows, _ in tables for row in rows))
    print("\n" + "\n".join(f"- {verdict}" for _, verdict in tables))


if __name__ == "__main__":
    main()
