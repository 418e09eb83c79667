"""From a base's rates and a target's to the scales of the target's learning rates: plain numbers, no modules."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from .estimators import Measurement, average_weights
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
    groups: dict[str, list[str]] = {}
    for name in target.rates:
        groups.setdefault(kinds[name] if pool == "kind" else name, []).append(name)
    history: dict[str, list[float]] = {group: [] for group in groups}
    for index, step in enumerate(target.steps.tolist()):
        expected = base.at(step)
        for group, names in groups.items():
            pairs = [(expected[name], float(target.rates[name][index])) for name in names]
            logs = [math.log(b / t) for b, t in pairs if _positive(b, t)]
            if logs:
                history[group].append(sum(logs) / len(logs))
    scales = {}
    for group, names in groups.items():
        weights = average_weights(len(history[group]), beta)
        log_scale = float(weights @ torch.tensor(history[group], dtype=torch.float64))
        scales.update(dict.fromkeys(names, math.exp(log_scale)))
    return scales


def _positive(*rates: float) -> bool:
    return all(math.isfinite(rate) and rate > 0 for rate in rates)
