"""Estimators of function-space learning rates (defined in `reference.py`).

Symbols: f[n, k] are the network's outputs (n an example, k one of its outputs), M the number of all (n, k),
omega[n, k] ~ N(0, 1) independent, phi_n = sum_k omega[n, k] f[n, k], phi their sum, W a tensor, U its unit update,
G = d phi / d W, Z = U * G elementwise. D f[n, k] is the first-order change of f[n, k] caused by U, D phi_n that of
phi_n. With rate = sqrt(sum_nk (D f[n, k])^2 / M) and D phi = sum Z:

    estimator      M * rate^2 =                                          bias     relative sd of rate^2, one probe
    per_example    sum_n (D phi_n)^2                                     none     about sqrt(2 / N)
    full           (sum Z)^2                                             none     1.41
    iid            sum Z^2                                               large    low
    kronecker      prod_d E[sum (sum_d Z)^2] / E[sum Z^2]^(D - 1)        5 %      low

Source: Milsom, Anson, Aitchison, "Function-Space Learning Rates" (arXiv 2502.17405); `per_example` is new here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


def full_statistics(products: Tensor) -> Tensor:
    """Reduce Z (any shape) to (sum Z)^2, float64 [1]: an unbiased sample of M * rate^2."""
    return products.sum(dtype=torch.float64).square().reshape(1)


def iid_statistics(products: Tensor) -> Tensor:
    """Reduce Z (any shape) to sum Z^2, float64 [1]: correct only if the entries of Z are uncorrelated."""
    return products.double().square().sum().reshape(1)


def kronecker_statistics(products: Tensor, independent_dims: Sequence[int] = ()) -> Tensor:
    """Reduce Z to the factors of the paper's Kronecker estimator.

    Args:
        products: Z, any shape; a scalar counts as one-dimensional.
        independent_dims: Dimensions along which Z is known to be uncorrelated. The model's output layer has one: its
            weight gradient is sum_n omega[n, i] x[n, j], independent over the outputs i.

    Returns:
        Float64 [D + 1]: sum (sum_d Z)^2 for each of the D other dimensions d, then sum Z^2.
    """
    z = products.double()
    z = z.reshape(1) if z.ndim == 0 else z
    free = {d % z.ndim for d in independent_dims}
    sums = [z.sum(d).square().sum() for d in range(z.ndim) if d not in free]
    return torch.stack([*sums, z.square().sum()])


def combine_one(factors: Tensor) -> Tensor:
    """Return M * rate^2 of `full` and `iid`, which have a single factor; `factors` are float64 [1]."""
    return factors[0]


def combine_kronecker(factors: Tensor) -> Tensor:
    """Combine averaged factors: prod_d E[sum (sum_d Z)^2] / E[sum Z^2]^(D - 1), in the log domain.

    Args:
        factors: Float64 [D + 1] from `kronecker_statistics`, averaged over probes.

    Returns:
        M * rate^2, a float64 scalar; 0 if a factor is 0.
    """
    if bool((factors <= 0).any()):
        return factors.new_zeros(())
    logs = factors.log()
    return (logs[:-1].sum() - (len(logs) - 2) * logs[-1]).exp()


@dataclass(frozen=True)
class WeightGradientEstimator:
    """An estimator that needs only the weight gradient G.

    Attributes:
        statistics: Z of one probe -> float64 [F], its factors.
        combine: Mean of the factors over probes, float64 [F] -> M * rate^2.
    """

    statistics: Callable[[Tensor], Tensor]
    combine: Callable[[Tensor], Tensor]


WEIGHT_GRADIENT_ESTIMATORS = {
    "kronecker": WeightGradientEstimator(kronecker_statistics, combine_kronecker),
    # For the output layer only; its outputs lie along dimension 0 of the weight.
    "kronecker_output": WeightGradientEstimator(
        partial(kronecker_statistics, independent_dims=(0,)), combine_kronecker
    ),
    "full": WeightGradientEstimator(full_statistics, combine_one),
    "iid": WeightGradientEstimator(iid_statistics, combine_one),
}
FALLBACK_ESTIMATOR = "kronecker"  # for tensors that `per_example` or `kronecker_output` cannot measure


def num_factors(estimator: str, ndim: int) -> int:
    """Return F, the number of factors of an estimator for a tensor.

    Args:
        estimator: One of `hf_flerm.choices.Estimator`.
        ndim: The number of dimensions of Z.

    Returns:
        F; 0 for `exact`. For `per_example` and `kronecker_output` it is F of their fallback, which has the most.
    """
    falls_back = estimator in ("per_example", "kronecker_output")
    found = WEIGHT_GRADIENT_ESTIMATORS.get(FALLBACK_ESTIMATOR if falls_back else estimator)
    return len(found.statistics(torch.zeros((1,) * ndim))) if found else 0


def from_weight_gradients(estimator: str, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the statistics of several probes.

    Args:
        estimator: A key of `WEIGHT_GRADIENT_ESTIMATORS`.
        statistics: Float64 [P, F], one row per probe.

    Returns:
        The factors summed over probes, float64 [F], and the variance of the estimate of M * rate^2 that `combined`
        computes from them (delta method; nan for one probe). M is summed over probes as well, which is consistent
        because every `combine` is homogeneous of degree 1.
    """
    totals = statistics.sum(0)
    if not combined(estimator, totals):
        return totals, totals.new_zeros(())
    if len(statistics) < 2:
        return totals, totals.new_full((), math.nan)
    with torch.enable_grad():
        leaf = totals.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(WEIGHT_GRADIENT_ESTIMATORS[estimator].combine(leaf), leaf)
    return totals, ((statistics - statistics.mean(0)) @ gradient).var() * len(statistics)


def combined(estimator: str, totals: Tensor) -> float:
    """Compute M * rate^2 from the factors of a weight-gradient estimator; both are sums over probes."""
    return WEIGHT_GRADIENT_ESTIMATORS[estimator].combine(totals).item()


def from_examples(values: Tensor) -> tuple[Tensor, Tensor]:
    """Add up squared per-example derivatives: M * rate^2 is the mean over probes of sum_n (D phi_n)^2.

    Args:
        values: D phi_n of every probe and example, float64 [L, S]; Gaussian over omega, independent over S.

    Returns:
        M * rate^2, with M summed over the probes, and its variance over omega, float64 [L] each.
        Var(v^2) = 2 E[v^2]^2 = (2/3) E[v^4].
    """
    squares = values.square()
    return squares.sum(1), squares.square().sum(1) * 2 / 3


def rates_from(squares: Tensor, variances: Tensor, num_outputs: float) -> tuple[Tensor, Tensor]:
    """Turn sums over probes into rates.

    Args:
        squares: M * rate^2, summed over the probes, float64 [L]. An unbiased estimate may be negative; its rate is 0.
        variances: Variances of `squares`, [L].
        num_outputs: M, summed over the probes.

    Returns:
        Rates and their standard errors, float64 [L] each; nan where they cannot be estimated.
    """
    rates = (squares.clamp(min=0) / num_outputs).sqrt()
    errors = variances.sqrt() / (2 * rates * num_outputs)
    return rates, torch.where(variances == 0, 0.0, torch.where(rates > 0, errors, math.nan))


def average_weights(count: int, beta: float) -> Tensor:
    """Weights of a bias-corrected running average over `count` values, oldest first.

    Args:
        count: Number of values.
        beta: Decay. 0 keeps the latest value only, 0.9 is the paper's, 1 is the plain mean.

    Returns:
        Float64 [count], summing to 1.
    """
    weights = torch.tensor(float(beta), dtype=torch.float64) ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
    return weights / weights.sum()
