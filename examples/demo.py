"""The demo: tune the learning rate at LoRA rank 4, train at rank 64 with the same number.

    python examples/demo.py [--seeds 0 1 2] [--output runs/demo]

Pretrains a small GPT-2 on English (once; it is cached) and fine-tunes it on Python source with LoRA, for PEFT's
`gaussian` and for its default initialization: a sweep at rank 4 (recorded), then rank 64 at rank 4's best learning
rate with `Trainer` and with `FLeRMTrainer`, beside rank 64's own sweep. Writes a table, a picture and the numbers.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

from workload import Run, fine_tune, in_parallel, pretrained, processes, quiet, spread, standard_error

from hf_flerm import FLeRMConfig

INITS = {"gaussian": "`gaussian`", "default": "default"}
BASE_RANK, TARGET_RANK = 4, 64
BASE_RATES = [1e-3, 1.8e-3, 3.2e-3, 5.6e-3, 1e-2]
TARGET_RATES = [1.8e-3, 3.2e-3, 5.6e-3, 1e-2, 1.8e-2]


@dataclass
class Result:
    """The result of one run."""

    method: str
    run: Run
    loss: float
    seconds: float
    measuring_seconds: float = 0.0
    scales: dict[str, float] = field(default_factory=dict)


def profile_folder(output: Path, run: Run) -> Path:
    return output / "profiles" / f"{run.init}-rank{run.rank}-lr{run.learning_rate:g}-seed{run.seed}"


def train(method: str, run: Run, output: Path) -> Result:
    """Train once: `base` records a profile, `flerm` is matched to it."""
    quiet()
    base = Run(BASE_RANK, run.learning_rate, run.seed, run.init)
    config = {
        "base": FLeRMConfig(mode="record"),
        "plain": None,
        "flerm": FLeRMConfig(mode="match", profile=profile_folder(output, base)) if method == "flerm" else None,
    }[method]
    loss, trainer = fine_tune(run, config)
    result = Result(method, run, loss, trainer.state.log_history[0]["train_runtime"])
    if method == "base":
        trainer.rate_profile.save_pretrained(profile_folder(output, run))
    if method == "flerm":
        logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
        result.measuring_seconds = logged["flerm/seconds"]
        prefix = "flerm/scale/transformer.h.*."
        result.scales = {key.removeprefix(prefix): value for key, value in logged.items() if key.startswith(prefix)}
    return result


def train_all(jobs: list[tuple[str, Run]], output: Path, title: str) -> list[Result]:
    with processes() as pool:
        return in_parallel(pool, train, [(method, run, output) for method, run in jobs], title)


def best_rate(results: list[Result], method: str, init: str) -> float:
    losses: dict[float, list[float]] = defaultdict(list)
    for result in results:
        if (result.method, result.run.init) == (method, init):
            losses[result.run.learning_rate].append(result.loss)
    return min(losses, key=lambda rate: mean(losses[rate]))


def table(results: list[Result], seeds: list[int]) -> str:
    """Validation losses and regrets (loss minus the best of rank 64's own sweep, same seed) as Markdown."""
    lines = [
        f"| LoRA init | rank {BASE_RANK}'s best lr | `Trainer` at that lr: loss | regret "
        f"| `FLeRMTrainer` at that lr: loss | regret | rank {TARGET_RANK}'s own sweep: best lr | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    multipliers = ["| tensor kind | " + " | ".join(INITS.values()) + " |", "|---|" + "---|" * len(INITS)]
    by_kind: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    shares = []
    for init, label in INITS.items():
        rate = best_rate(results, "base", init)
        losses: dict[str, list[float]] = defaultdict(list)
        for seed in seeds:
            own = [r for r in results if (r.run.init, r.run.seed) == (init, seed)]
            best = min(r.loss for r in own if r.method == "plain")
            (plain,) = [r for r in own if r.method == "plain" and r.run.learning_rate == rate]
            (flerm,) = [r for r in own if r.method == "flerm"]
            for key, value in (("best", best), ("plain", plain.loss), ("flerm", flerm.loss)):
                losses[key].append(value)
                losses[f"{key} regret"].append(value - best)
            for kind, scale in flerm.scales.items():
                by_kind[kind][init].append(scale)
            shares.append(flerm.measuring_seconds / (flerm.seconds - flerm.measuring_seconds))
        lines.append(
            f"| {label} | {rate:g} | {spread(losses['plain'])} | {spread(losses['plain regret'])} "
            f"| {spread(losses['flerm'])} | **{spread(losses['flerm regret'])}** "
            f"| {best_rate(results, 'plain', init):g} | {spread(losses['best'])} |"
        )
    for kind, columns in sorted(by_kind.items()):
        multipliers.append(f"| `{kind}` | " + " | ".join(spread(columns[init], 2) for init in INITS) + " |")
    note = (
        f"Mean ± standard error over seeds {', '.join(map(str, seeds))}. Measuring took {100 * mean(shares):.1f} % of "
        f"the training time of these {results[0].run.steps}-step runs."
    )
    return "\n".join([*lines, "", "Learning-rate multipliers that matching chose:", "", *multipliers, "", note, ""])


def picture(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(INITS), figsize=(10, 4), sharey=True, layout="constrained")
    for panel, (init, label) in zip(panels, INITS.items(), strict=True):
        rate = best_rate(results, "base", init)
        curves = {
            "base": (f"rank {BASE_RANK}, Trainer", "o--", "#999999"),
            "plain": (f"rank {TARGET_RANK}, Trainer", "s-", "#0072b2"),
            "flerm": (f"rank {TARGET_RANK}, FLeRMTrainer at rank {BASE_RANK}'s best", "*", "#d55e00"),
        }
        for method, (name, style, color) in curves.items():
            points: dict[float, list[float]] = defaultdict(list)
            for result in results:
                if (result.method, result.run.init) == (method, init):
                    points[result.run.learning_rate].append(result.loss)
            rates = sorted(points)
            losses = [mean(points[r]) for r in rates]
            errors = [standard_error(points[r]) for r in rates]
            panel.errorbar(
                rates,
                losses,
                errors,
                fmt=style,
                color=color,
                label=name,
                capsize=2,
                markersize=15 if method == "flerm" else 5,
                zorder=3 if method == "flerm" else 2,
            )
        panel.axvline(rate, color="#999999", linestyle=":", linewidth=1)
        panel.set(xscale="log", xlabel="learning rate", title=f"LoRA init: {label.strip('`')}")
    best = min(result.loss for result in results)
    panels[0].set(ylabel="validation loss (nats per token)", ylim=(best - 0.03, best + 0.45))
    panels[0].legend(fontsize="small", loc="upper center")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    quiet()
    pretrained(progress=True)
    every = [(init, seed) for seed in options.seeds for init in INITS]
    base = [("base", Run(BASE_RANK, rate, seed, init)) for init, seed in every for rate in BASE_RATES]
    results = train_all(base, options.output, f"rank {BASE_RANK}")
    best = {init: best_rate(results, "base", init) for init in INITS}
    target = [("flerm", Run(TARGET_RANK, best[init], seed, init)) for init, seed in every]
    target += [
        ("plain", Run(TARGET_RANK, rate, seed, init))
        for init, seed in every
        for rate in sorted({*TARGET_RATES, best[init]})
    ]
    results += train_all(target, options.output, f"rank {TARGET_RANK}")
    report = table(results, options.seeds)
    (options.output / "demo.md").write_text(report)
    (options.output / "demo.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    picture(results, options.output / "demo.png")
    print(f"\n{report}\nWritten to {options.output}: demo.md, demo.png, demo.json")


if __name__ == "__main__":
    main()
