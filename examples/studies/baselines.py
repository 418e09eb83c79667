"""Bases that are made up, to compare matching with."""

from __future__ import annotations

from pathlib import Path

import torch

from hf_flerm import RateProfile


def equal_rates(base: RateProfile | str | Path) -> RateProfile:
    """Give all tensors the same rate at every step: the root mean square of the base's rates above 0.

    As the base of a matched run it stands for Modula with a mass of 1 for every module. It has no joint rates.
    """
    base = RateProfile.from_pretrained(base)
    rows = torch.stack(list(base.rates.values()))
    mean = (rows.square().sum(0) / (rows > 0).sum(0).clamp(min=1)).sqrt()
    return RateProfile(base.steps, dict.fromkeys(base.rates, mean), base.metadata)
