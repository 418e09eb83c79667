"""Unnormalized results of probes: `Draws` (each draw) and `Totals` (sums over probes; processes add theirs up).

Axes: l a tensor of L, p a probe of P, s an example of a probe, over all probes S of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .estimators import combined, from_examples, rates_from

Combination = frozenset[tuple[str, float]]  # a linear combination of updates: pairs (canonical name, factor)


def combination_key(shares: Mapping[str, float]) -> Combination:
    """Return a hashable key of a combination `{canonical name: factor on its update}`."""
    return frozenset(shares.items())


@dataclass(frozen=True)
class Draws:
    """Derivatives for each draw of omega, tensors in the order of the measurement.

    Attributes:
        derivatives: D phi_n of every probe and example, float64 [L, S]; 0 for a tensor measured by weight gradient.
        by_example: Which tensors are measured per example, bool [L].
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
        """Estimate <D_l f, D_m f> / M, float64 [L, L].

        For two tensors measured per example it is sum_s D_l phi_s D_m phi_s. Any other pair has only the sums over
        probes, whose product has the same expectation and a larger variance.
        """
        both = self.by_example.outer(self.by_example)
        by_example = self.derivatives @ self.derivatives.T
        return torch.where(both, by_example, self.sums @ self.sums.T) / self.num_outputs.sum()

    def joint_variances(self, weights: Tensor) -> Tensor:
        """Estimate the variances of M * (joint rate)^2, with M summed over the probes.

        Args:
            weights: Factor on each tensor's update in each combination, float64 [G, L].

        Returns:
            The variances over omega, float64 [G]; nan where one probe is not enough to estimate them.
        """
        values = weights @ self.derivatives
        _, variances = from_examples(values)
        mixed = (weights[:, ~self.by_example] != 0).any(1)  # combinations with a tensor measured by weight gradient
        if not mixed.any():
            return variances
        count = len(self.num_outputs)
        of_probe = torch.zeros(len(weights), count, dtype=values.dtype)
        by_example = of_probe.index_add(1, self.probes, values.square())
        of_probe.index_add_(1, self.probes, values)
        # For each probe, (sum over all tensors)^2, with the per-example part replaced by its lower-variance estimate.
        squares = (weights @ self.sums).square() - of_probe.square() + by_example
        # M * (joint rate)^2 is a sum over independent probes: its variance is the variance of one, times their number.
        spread = squares.var(1) if count > 1 else torch.full_like(variances, math.nan)
        return torch.where(mixed, spread * count, variances)


@dataclass(frozen=True)
class Totals:
    """Sums over probes from which rates are computed; the sums of several processes are added.

    Attributes:
        num_probes: P.
        num_outputs: M.
        squares: M * rate^2 of the tensors measured per example, 0 for the others, float64 [L].
        variances: Variances of M * rate^2, float64 [L]; nan where one probe is not enough to estimate them.
        factors: `{name: (estimator, factors)}` of the tensors measured by weight gradient, float64 [F] each.
    """

    num_probes: int = 0
    num_outputs: float = 0.0
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    variances: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    factors: dict[str, tuple[str, Tensor]] = field(default_factory=dict)

    def rates(self, names: Iterable[str]) -> tuple[dict[str, float], dict[str, float]]:
        """Return `{name: rate}` and `{name: standard error}`; `names` are all tensors, in order."""
        names, squares = list(names), self.squares.clone()
        for i, name in enumerate(names):
            if name in self.factors:
                squares[i] += combined(*self.factors[name])
        rates, errors = rates_from(squares, self.variances, self.num_outputs)
        return dict(zip(names, rates.tolist(), strict=True)), dict(zip(names, errors.tolist(), strict=True))
