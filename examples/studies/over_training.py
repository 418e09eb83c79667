"""Function-space rates over training, for each kind of tensor: do they fall, and which moves the function most?

    python examples/studies/over_training.py

A decoder is trained from scratch and measured densely. The paper (arXiv:2502.17405) found that rates fall all along
training, and that the second matrix of the feed-forward blocks moves the function most.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import models
import torch
from torch import Tensor
from workload import english_bytes, in_parallel, processes, quiet, trained

from hf_flerm import FLeRMConfig, RateProfile, Research

STEPS = 400
EVERY = 5
LEARNING_RATE = 0.01
WINDOW = 8  # measurements that are averaged before two neighbors are compared
MODEL = {"width": 64, "depth": 4, "norm": "pre"}
SECOND_MATRIX = "mlp.proj.weight"
MATRICES = ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.fc", "mlp.proj")


@dataclass
class Curves:
    """Rates in logits per unit learning rate: geometric means over seeds and over the blocks that have the tensor."""

    steps: list[int]
    rates: dict[str, list[float]]
    largest_second: float  # share of measurements, in blocks, at which the second matrix has the block's largest rate

    def smooth(self, kind: str) -> Tensor:
        """Geometric means over windows of measurements that do not overlap."""
        logs = torch.tensor(self.rates[kind], dtype=torch.float64).log()
        return logs[: len(logs) // WINDOW * WINDOW].view(-1, WINDOW).mean(1).exp()

    def falls(self, kind: str) -> tuple[int, int]:
        """How often the smoothed rate falls from one window to the next, of how many times."""
        changes = [later < earlier for earlier, later in pairwise(self.smooth(kind).tolist())]
        return sum(changes), len(changes)

    def table(self) -> str:
        """As Markdown, with what became of the two claims."""
        lines = [
            "| tensors of a kind | first rate | largest, at step | last rate | last / first | falls |",
            "|---|---|---|---|---|---|",
        ]
        for kind in sorted(self.rates, key=lambda kind: -self.smooth(kind).mean()):
            rates, smooth = torch.tensor(self.rates[kind]), self.smooth(kind)
            first, last = smooth[0].item(), smooth[-1].item()
            peak = f"{rates.max():.3g}, {self.steps[int(rates.argmax())]}"
            falls, times = self.falls(kind)
            lines.append(f"| {kind} | {first:.3g} | {peak} | {last:.3g} | {last / first:.2f} | {falls} of {times} |")
        matrices = [kind for kind in self.rates if any(kind.endswith(f"{name}.weight") for name in MATRICES)]
        counts = [self.falls(kind) for kind in self.rates]
        monotone = sum(falls == times for falls, times in counts)
        share = sum(falls for falls, _ in counts) / sum(times for _, times in counts)
        order = sorted(matrices, key=lambda kind: -self.smooth(kind).mean())
        return "\n".join(
            [
                *lines,
                "",
                f"- Rates fall all along? From window to window ({WINDOW * EVERY} steps) {share:.0%} of the changes "
                f"are falls; {monotone} of {len(counts)} kinds never rise.",
                f"- The second feed-forward matrix moves the function most? Of a block's six matrices it has the "
                f"largest rate in {self.largest_second:.0%} of the measurements. In order of their mean rates: "
                + ", ".join(kind.removesuffix(".weight").removeprefix("blocks.*.") for kind in order)
                + ".",
                "",
            ]
        )


def recorded(seed: int) -> RateProfile:
    """The profile of one training, measured every `EVERY` steps."""
    quiet()
    torch.set_num_threads(1)
    config = FLeRMConfig(measure_steps=range(0, STEPS, EVERY), research=Research(probes=8))
    _, trainer = trained(
        models.decoder(seed, **MODEL),
        english_bytes(),
        config,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        max_steps=STEPS,
        weight_decay=0.0,
        seed=seed,
        per_device_train_batch_size=8,
    )
    return trainer.rate_profile


def curves(profiles: list[RateProfile]) -> Curves:
    average = RateProfile.average(profiles)
    logs: dict[str, list[Tensor]] = {}
    for name, measured in average.rates.items():
        logs.setdefault(average.metadata["kinds"][name], []).append(measured.clamp(min=1e-30).log())
    rates = {kind: torch.stack(blocks).mean(0).exp().tolist() for kind, blocks in logs.items()}
    largest = []
    for block in range(MODEL["depth"]):
        names = [f"blocks.{block}.{matrix}.weight" for matrix in MATRICES]
        block_rates = torch.stack([average.rates[name] for name in names])
        largest.append(block_rates.argmax(0) == names.index(f"blocks.{block}.{SECOND_MATRIX}"))
    return Curves(average.steps.tolist(), rates, torch.stack(largest).double().mean().item())


def picture(found: Curves, path: Path) -> None:
    """Rates of matrices over training, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for kind, rates in found.rates.items():
        if kind.endswith("weight") and "norm" not in kind:
            panel.plot([step + 1 for step in found.steps], rates, label=kind.removesuffix(".weight"))
    panel.set(xscale="log", yscale="log", xlabel="step", ylabel="rate (logits per unit learning rate)")
    panel.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("runs/over_training"))
    options = parser.parse_args()
    quiet()
    with processes(options.workers) as pool:
        found = curves(in_parallel(pool, recorded, [(seed,) for seed in options.seeds], "seeds"))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "over_training.json").write_text(json.dumps(asdict(found), indent=1))
    (options.output / "over_training.md").write_text(found.table())
    picture(found, options.output / "over_training.png")
    print(found.table())


if __name__ == "__main__":
    main()
