"""A profile of two kinds of tensor, and the name of a repository for it."""

from __future__ import annotations

from hf_flerm import RateProfile

REPO = "me/tuned"


def profile(rate: float = 1.0) -> RateProfile:
    kinds = {f"h.{layer}.{part}": f"h.*.{part}" for layer in range(2) for part in ("w", "b")}
    steps = [0, 1, 4]
    rates = {name: [rate * (i + 1) * (step + 1) ** -0.5 for step in steps] for i, name in enumerate(kinds)}
    return RateProfile(steps, rates, {"kinds": kinds, "training_arguments": {"learning_rate": 0.01}})
