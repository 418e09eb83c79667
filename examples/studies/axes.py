"""The axes of transfer: for each a small base, a larger or different target, and what the literature says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import models
import workload
from datasets import Dataset
from optimizers import OPTIMIZERS
from torch import nn
from torch.optim import Optimizer

BLOCK = re.compile(r"(^|\.)(h|blocks)\.\d+\.")


def grid_rate(index: int) -> float:
    """Four learning rates per decade: 0.001, 0.00178, 0.00316, 0.00562, 0.01, ..."""
    return float(f"{10 ** (index / 4):.3g}")


def grid_index(rate: float) -> int:
    return round(4 * math.log10(rate))


def grid(first: float, last: float) -> tuple[float, ...]:
    return tuple(grid_rate(index) for index in range(grid_index(first), grid_index(last) + 1))


@dataclass(frozen=True)
class Rule:
    """A published rule: a factor on the learning rate of each tensor, from its name and shape."""

    text: str
    factor: Callable[[str, nn.Parameter], float]


@dataclass(frozen=True)
class Side:
    """The base or the target of an axis: a model, its optimizer, and where the sweep of learning rates begins."""

    model: Callable[..., nn.Module]
    options: Mapping[str, Any]
    rates: tuple[float, ...]
    optimizer: str = "adamw"

    def build(self, seed: int) -> nn.Module:
        return self.model(seed, **self.options)

    def make_optimizer(self, model: nn.Module, learning_rate: float, rule: Rule | None = None) -> Optimizer:
        """The optimizer of this side, with a group for every factor of `rule`."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(rule.factor(name, parameter) if rule else 1.0, []).append(parameter)
        scaled = [{"params": params, "lr": learning_rate * factor} for factor, params in groups.items()]
        return OPTIMIZERS[self.optimizer](scaled, learning_rate)

    def settings(self) -> dict[str, Any]:
        return {"model": self.model.__name__, **self.options, "optimizer": self.optimizer}


@dataclass(frozen=True)
class Axis:
    """One axis of transfer. `claim` is what the literature says about it."""

    name: str
    base: Side
    target: Side
    claim: str
    rule: Rule | None = None
    data: Callable[[], tuple[Dataset, Dataset]] = workload.english_bytes
    steps: int = 150
    warmup: int = 20
    batch_size: int = 8
    flerm: Mapping[str, Any] = field(default_factory=dict)  # options that every method of matching needs on this axis

    @property
    def changes_depth(self) -> bool:
        return self.base.options.get("depth") != self.target.options.get("depth")

    def settings(self) -> dict[str, Any]:
        return {"data": self.data.__name__, "warmup": self.warmup, "batch_size": self.batch_size}


def everywhere(text: str, factor: float) -> Rule:
    return Rule(text, lambda name, parameter: factor)


def in_blocks(text: str, factor: float, matrices_only: bool = False) -> Rule:
    def of(name: str, parameter: nn.Parameter) -> float:
        return factor if BLOCK.search(name) and (parameter.ndim >= 2 or not matrices_only) else 1.0

    return Rule(text, of)


def _rms_of_adamw(name: str, parameter: nn.Parameter) -> float:
    rows, columns = parameter.shape
    return 0.2 * max(rows, columns) ** 0.5 / max(1.0, rows / columns) ** 0.5


def wider(ratio: int) -> Rule:
    return in_blocks(f"muP: matrices in blocks at lr / {ratio}", 1 / ratio, matrices_only=True)


def deeper(ratio: int) -> Rule:
    return in_blocks(f"blocks at lr / sqrt({ratio})", ratio**-0.5)


WIDER, DEEPER = wider(4), deeper(4)
RANKS = (4, 8, 16, 32, 64)
BY_MODULE = {"granularity": "module", "unmatched": "global"}
SCRATCH = grid(1e-3, 1.78e-2)
SHORT = grid(5.62e-3, 3.16e-2)
ADAPTER = grid(1e-3, 1e-2)


def _grown(
    name: str,
    model: Callable[..., nn.Module],
    claim: str,
    rule: Rule | None,
    small: Mapping[str, Any],
    grown: Mapping[str, Any],
    rates: tuple[float, ...] = SCRATCH,
    **options: Any,
) -> Axis:
    """An axis from scratch: a small model, and the same model with some options changed."""
    return Axis(name, Side(model, small, rates), Side(model, {**small, **grown}, rates), claim, rule, **options)


def _decoder(
    name: str,
    claim: str,
    rule: Rule | None,
    grown: Mapping[str, Any],
    rates: tuple[float, ...] = SCRATCH,
    **both: Any,
) -> Axis:
    return _grown(f"decoder-{name}", models.decoder, claim, rule, {"width": 32, "depth": 2, **both}, grown, rates)


def _lora(
    name: str,
    claim: str,
    rule: Rule | None = None,
    target: Side | None = None,
    flerm: Mapping[str, Any] | None = None,
    ranks: tuple[int, int] = (4, 64),
    rates: tuple[float, ...] = ADAPTER,
    **both: Any,
) -> Axis:
    """An axis from one LoRA rank to another, or from rank 8 to `target`."""
    small = Side(workload.lora, {"rank": 8 if target else ranks[0], **both}, rates)
    bigger = target or Side(workload.lora, {"rank": ranks[1], **both}, rates)
    return Axis(name, small, bigger, claim, rule, workload.python_data, steps=100, flerm=flerm or {})


def _optimizer(name: str, claim: str, first: float, last: float, rule: Rule | None = None) -> Axis:
    target = Side(workload.lora, {"rank": 8}, grid(first, last), name)
    return _lora(f"adamw-{name}", claim, rule, target=target)


def _axes() -> list[Axis]:
    return [
        _grown(
            "gpt2-width",
            models.gpt2,
            "muP: under standard parametrization the best lr falls with width",
            WIDER,
            {"width": 32, "depth": 2},
            {"width": 128},
        ),
        _grown(
            "gpt2-depth",
            models.gpt2,
            "depth-muP: the best lr falls with depth, as 1 / sqrt(depth)",
            DEEPER,
            {"width": 48, "depth": 2},
            {"depth": 8},
        ),
        _decoder("width-pre", "muP: the best lr falls with width", WIDER, {"width": 128}),
        _decoder("width-x8", "muP: the best lr falls with width", wider(8), {"width": 128}, SHORT, width=16),
        _decoder("depth-pre", "the best lr falls with depth", DEEPER, {"depth": 8}),
        _decoder("depth-x16", "the best lr falls with depth", deeper(16), {"depth": 16}, SHORT, width=16, depth=1),
        _decoder("depth-post", "the best lr falls with depth, fast: post-norm", DEEPER, {"depth": 8}, norm="post"),
        _decoder(
            "depth-pre_post_mod",
            "normalized branches / sqrt(depth), as in the FLeRM paper, are meant to keep the best lr",
            DEEPER,
            {"depth": 8},
            norm="pre_post_mod",
        ),
        _decoder("depth-qk", "normalized queries and keys keep large lrs stable", DEEPER, {"depth": 8}, qk_norm=True),
        _decoder("init", "bigger weights want a bigger lr", None, {"init_scale": 4.0}),
        *(
            _grown(
                f"resmlp-{name}",
                models.resmlp,
                claim,
                rule,
                {"width": 32, "depth": 2},
                grown,
                data=models.context_data,
                steps=300,
                batch_size=128,
            )
            for name, grown, claim, rule in (
                ("width", {"width": 128}, "muP: the best lr falls with width", WIDER),
                ("depth", {"depth": 8}, "the best lr falls with depth", DEEPER),
            )
        ),
        _lora(
            "lora-gaussian",
            "muA (arXiv:2602.06204), alpha / r: r^0, so plain; but A starts at 1 / r",
            init_lora_weights="gaussian",
        ),
        _lora("lora-default", "muA, alpha / r: r^0, so plain"),
        *(
            _lora(
                f"lora-{name}-2-{rank}",
                claim,
                ranks=(2, rank),
                rates=grid(1.78e-3, 1e-2),
                **options,
            )
            for name, claim, options in (
                ("gaussian", "A starts at 1 / r: the best lr rises with r", {"init_lora_weights": "gaussian"}),
                ("default", "muA, alpha / r: r^0, so plain", {}),
            )
            for rank in RANKS
        ),
        _lora("lora-pissa", "muA, alpha / r: r^0, so plain; A and B start from the weights", init_lora_weights="pissa"),
        _lora(
            "lora-rslora",
            "muA, alpha / sqrt(r): best lr as r^(-1/4)",
            everywhere("lr * 16^(-1/4)", 16**-0.25),
            use_rslora=True,
        ),
        _lora(
            "lora-dora",
            "the same modules, so LoRA's lr",
            target=Side(workload.lora, {"rank": 8, "use_dora": True}, ADAPTER),
            flerm=BY_MODULE,
        ),
        _lora(
            "lora-full",
            "LoRA Without Regret: LoRA's best lr is 10 times that of full fine-tuning",
            everywhere("lr / 10", 0.1),
            target=Side(models.full, {}, grid(3.16e-4, 5.62e-3)),
            flerm=BY_MODULE,
        ),
        _optimizer("sgd", "no common scale", 1e-1, 1e1),
        _optimizer(
            "lion",
            "Lion paper: lr 3 to 10 times smaller than AdamW's",
            3.16e-4,
            3.16e-3,
            everywhere("lr / sqrt(30)", 30**-0.5),
        ),
        _optimizer(
            "muon",
            "Moonlight: scaled by 0.2 sqrt(max(rows, columns)), Muon takes AdamW's lr",
            3.16e-3,
            1e-1,
            Rule("0.2 sqrt(max(rows, columns)), as torch's match_rms_adamw", _rms_of_adamw),
        ),
    ]


AXES: dict[str, Axis] = {axis.name: axis for axis in _axes()}
