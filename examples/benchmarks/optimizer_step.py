"""Cost of one learning rate per tensor in an optimizer step: 400 tensors, fused AdamW, side by side.

python examples/benchmarks/optimizer_step.py [--tensors 400] [--steps 200]
"""

from __future__ import annotations

import argparse
from statistics import median

import torch
from cases import seconds
from torch import nn

from hf_flerm.optimizer.step_scales import StepScales

SHAPE = (8, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [f"h.{i}.w" for i in range(options.tensors)]

    def made() -> dict[str, nn.Parameter]:
        parameters = {name: nn.Parameter(torch.randn(SHAPE, device=device)) for name in names}
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        return parameters

    def make(scales: dict[str, float] | None) -> torch.optim.Optimizer:
        parameters = made()
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, fused=True)
        if scales is not None:
            StepScales(optimizer, parameters).scales = scales
        return optimizer

    def grouped(scales: dict[str, float]) -> torch.optim.Optimizer:
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in made().items():
            groups.setdefault(scales[name], []).append(parameter)
        return torch.optim.AdamW([{"params": p, "lr": 1e-3 * scale} for scale, p in groups.items()], fused=True)

    kinds = {name: 1.0 + (i % 8) / 8 for i, name in enumerate(names)}
    optimizers = {
        "one group": make(None),
        "8 groups that torch was given": grouped(kinds),
        "one group, scales of 1": make(dict.fromkeys(names, 1.0)),
        "one group, 8 scales (`pool='kind'`)": make(kinds),
        "one group, 400 scales (`pool='unit'`)": make(
            {name: 1.0 + i / options.tensors for i, name in enumerate(names)}
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for optimizer in optimizers.values():
        optimizer.step()
    for _ in range(options.steps):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer.step))
    usual = median(times["one group"])
    print("| step of 400 tensors | ms | / one group |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {1e3 * median(values):.2f} | {median(values) / usual:.2f} |")


if __name__ == "__main__":
    main()
