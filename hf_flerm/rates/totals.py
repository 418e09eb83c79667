"""What probes came to, before it is divided by anything: single draws, and sums that add up over probes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .estimators import combined, from_examples, rates_from

Group = frozenset[tuple[str, float]]  # canonical names, and how much of their updates is meant


def group_key(shares: Mapping[str, float]) -> Group:
    """What makes two groups of tensors the same.

    Args:
        shares: `{canonical name: how much of its update is meant}`.

    Returns:
        A key.
    """
    return frozenset(shares.items())


@dataclass(frozen=True)
class Draws:
    """What single probes gave, tensors in the order of the measurement.

    Attributes:
        derivatives: D phi_n of every probe and example, float64 [L, S]; 0 for a tensor measured by weight gradient.
        by_example: Which tensors are measured by example, bool [L].
        sums: D phi of every probe, float64 [L, P].
        probes: The probe of every example, int64 [S].
        num_outputs: M of every probe, float64 [P].
    """

    derivatives: Tensor
    by_example: Tensor
    sums: Tensor
    probes: Tensor
    num_outputs: Tensor

    def inner_products(self) -> Tensor:
        """Estimate <D_l f, D_m f> / M.

        Returns:
            Float64 [L, L]: by example where both tensors are, from the sums of whole probes elsewhere.
        """
        both = self.by_example.outer(self.by_example)
        by_example = self.derivatives @ self.derivatives.T
        return torch.where(both, by_example, self.sums @ self.sums.T) / self.num_outputs.sum()

    def joint_variances(self, weights: Tensor) -> Tensor:
        """Estimate the variances of M * (joint rate)^2, with M summed over the probes.

        Args:
            weights: How much of each tensor's update is in each group, float64 [G, L].

        Returns:
            The variances over omega, float64 [G]; nan where it takes more than one probe to tell.
        """
        values = weights @ self.derivatives
        _, variances = from_examples(values)
        mixed = (weights[:, ~self.by_example] != 0).any(1)
        if not mixed.any():
            return variances
        count = len(self.num_outputs)
        of_probe = torch.zeros(len(weights), count, dtype=values.dtype)
        squares = of_probe.index_add(1, self.probes, values.square())
        of_probe.index_add_(1, self.probes, values)
        sizes = (weights @ self.sums).square() - of_probe.square() + squares
        spread = sizes.var(1) if count > 1 else torch.full_like(variances, math.nan)
        return torch.where(mixed, spread * count, variances)


@dataclass(frozen=True)
class Totals:
    """Sums over probes, from which rates follow: they add up over probes and over processes.

    Attributes:
        num_probes: How many probes.
        num_outputs: M.
        sizes: M * rate^2 of every tensor as measured by example, float64 [L].
        variances: Of M * rate^2, float64 [L]; nan where it takes more than one probe to tell.
        factors: Of the tensors that were measured by weight gradient, the estimator and its factors, float64 [F].
    """

    num_probes: int = 0
    num_outputs: float = 0.0
    sizes: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    variances: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    factors: dict[str, tuple[str, Tensor]] = field(default_factory=dict)

    def rates(self, names: Iterable[str]) -> tuple[dict[str, float], dict[str, float]]:
        """Estimate the rates.

        Args:
            names: The tensors, in order.

        Returns:
            `{name: rate}` and `{name: standard error}`.
        """
        names, sizes = list(names), self.sizes.clone()
        for i, name in enumerate(names):
            if name in self.factors:
                sizes[i] += combined(*self.factors[name])
        rates, errors = rates_from(sizes, self.variances, self.num_outputs)
        return dict(zip(names, rates.tolist(), strict=True)), dict(zip(names, errors.tolist(), strict=True))
