"""From a base's rates and a target's to the scales of the target's learning rates: plain numbers, no modules."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from .estimators import average_weights
from .measurement import Measurement
from .rate_profile import RateProfile, check_names

POOLS = ("kind", "tensor")


def match_rates(base: Mapping[str, float], measured: Mapping[str, float] | Measurement) -> dict[str, float]:
    """Scales that make every tensor move the outputs as far per unit learning rate as it did in the base run.

    Args:
        base: `{canonical name: rate}` of the base run.
        measured: The target's rates, with the same names.

    Returns:
        `{name: base rate / measured rate}`; 1 where either is 0 or not finite (LoRA's A while B is still 0).

    Raises:
        RateProfileError: If the names differ.
    """
    rates = measured.rates if isinstance(measured, Measurement) else measured
    check_names(base, rates, "the base", "the target")
    return {name: base[name] / rates[name] if _positive(base[name], rates[name]) else 1.0 for name in base}


def pooled_scales(
    base: RateProfile, target: RateProfile, kinds: Mapping[str, str], *, pool: str = "kind", beta: float = 1.0
) -> dict[str, float]:
    """Scales from everything that the target has measured so far.

    Single log-scales are noisy, and base and target drift apart after the first steps, so they are averaged: over the
    tensors of one kind at each step, and over steps.

    Args:
        base: Profile of the base run.
        target: Rates that the target measured so far, for names that the base has.
        kinds: `{name: kind}` of the target's tensors.
        pool: `kind` averages over the tensors of one kind, `tensor` leaves each on its own.
        beta: Decay of the bias-corrected running average over steps: 1 is the plain mean, 0.9 the paper's, 0 takes the
            latest measurement alone.

    Returns:
        `{name: scale}` for the names of `target`; 1 for a tensor for which nothing could be compared yet.
    """
    steps, names = target.steps.tolist(), list(target.rates)
    if not steps:
        return dict.fromkeys(names, 1.0)
    own = torch.stack(list(target.rates.values()), 1)  # [S, L]
    expected = torch.tensor([[rates[name] for name in names] for rates in map(base.at, steps)], dtype=torch.float64)
    logs = torch.where((own > 0) & (expected > 0), (expected / own).log(), math.nan)
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(kinds[name] if pool == "kind" else name, []).append(index)
    scales: dict[str, float] = {}
    for members in groups.values():
        history = logs[:, members].nanmean(1)
        history = history[history.isfinite()]
        scale = float((average_weights(len(history), beta) @ history).exp())
        scales.update((names[index], scale) for index in members)
    return scales


def _positive(*rates: float) -> bool:
    return all(math.isfinite(rate) and rate > 0 for rate in rates)
