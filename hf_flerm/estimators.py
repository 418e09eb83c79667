"""Estimators of function-space learning rates: tensors in, numbers out.

Symbols: f[n, k] are the network's outputs (n an example, k one of its outputs), M the number of all (n, k),
omega[n, k] ~ N(0, 1) independent, phi = sum_nk omega f, G = d phi / d W, U the unit update of W, Z = U * G.
D f[n, k] is the first-order change of f[n, k] caused by U, and the rate is sqrt(sum_nk (D f[n, k])^2 / M).
Source: Milsom, Anson, Aitchison, "Function-Space Learning Rates" (arXiv 2502.17405); `per_example` is this package's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .names import preview


def full_statistics(products: Tensor, independent_dims: Sequence[int] = ()) -> Tensor:
    """Reduce Z to (sum Z)^2, an unbiased sample of M * rate^2.

    Args:
        products: Z = U * G, any shape.
        independent_dims: Not used: nothing is assumed about Z.

    Returns:
        Float64 [1].
    """
    return products.sum(dtype=torch.float64).square().reshape(1)


def iid_statistics(products: Tensor, independent_dims: Sequence[int] = ()) -> Tensor:
    """Reduce Z to sum Z^2: right only if the entries of Z are uncorrelated.

    Args:
        products: Z = U * G, any shape.
        independent_dims: Not used: all are taken to be independent.

    Returns:
        Float64 [1].
    """
    return products.double().square().sum().reshape(1)


def kronecker_statistics(products: Tensor, independent_dims: Sequence[int] = ()) -> Tensor:
    """Reduce Z to the factors of the paper's Kronecker estimator.

    Args:
        products: Z = U * G, any shape; a scalar counts as one-dimensional.
        independent_dims: Dimensions along which Z is known to be uncorrelated. The network's output layer has one:
            its weight gradient is sum_n omega[n, i] x[n, j], independent over the outputs i.

    Returns:
        Float64 [D + 1]: sum (sum_d Z)^2 for each of the D other dimensions d, then sum Z^2.
    """
    z = products.double()
    z = z.reshape(1) if z.ndim == 0 else z
    free = {d % z.ndim for d in independent_dims}
    sums = [z.sum(d).square().sum() for d in range(z.ndim) if d not in free]
    return torch.stack([*sums, z.square().sum()])


def combine_one(factors: Tensor) -> Tensor:
    """Take the only factor: M * rate^2 of `full` and `iid`.

    Args:
        factors: Float64 [1], averaged over probes.

    Returns:
        Float64 scalar.
    """
    return factors[0]


def combine_kronecker(factors: Tensor) -> Tensor:
    """Combine averaged factors: prod_d E[sum (sum_d Z)^2] / E[sum Z^2]^(D - 1), in the log domain.

    Args:
        factors: Float64 [D + 1] from `kronecker_statistics`, averaged over probes before they get here.

    Returns:
        M * rate^2, a float64 scalar; 0 if a factor is 0.
    """
    if bool((factors <= 0).any()):
        return factors.new_zeros(())
    logs = factors.log()
    return (logs[:-1].sum() - (len(logs) - 2) * logs[-1]).exp()


@dataclass(frozen=True)
class WeightGradientEstimator:
    """An estimator that needs only the gradient of phi with respect to the tensor.

    Attributes:
        statistics: Z (and the dimensions along which it is uncorrelated) to float64 [F], one per probe.
        combine: The mean of these over probes to M * rate^2.
    """

    statistics: Callable[[Tensor, Sequence[int]], Tensor]
    combine: Callable[[Tensor], Tensor]


WEIGHT_GRADIENT_ESTIMATORS = {
    "kronecker": WeightGradientEstimator(kronecker_statistics, combine_kronecker),
    "kronecker_output": WeightGradientEstimator(kronecker_statistics, combine_kronecker),
    "full": WeightGradientEstimator(full_statistics, combine_one),
    "iid": WeightGradientEstimator(iid_statistics, combine_one),
}
ESTIMATORS = ("per_example", *WEIGHT_GRADIENT_ESTIMATORS, "exact")


def from_weight_gradients(estimator: str, statistics: Tensor, num_outputs: Tensor) -> tuple[float, float]:
    """Estimate a rate from the statistics of several probes.

    Args:
        estimator: A key of `WEIGHT_GRADIENT_ESTIMATORS`.
        statistics: Float64 [P, F], one row per probe.
        num_outputs: M of each probe, float64 [P].

    Returns:
        The rate and its standard error (delta method over probes; nan for one probe).
    """
    mean = statistics.mean(0)
    combine = WEIGHT_GRADIENT_ESTIMATORS[estimator].combine
    squared = combine(mean) / num_outputs.mean()
    rate = math.sqrt(squared.item())
    if len(statistics) < 2 or rate == 0.0:
        return rate, math.nan if rate else 0.0
    with torch.enable_grad():
        leaf = mean.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(combine(leaf), leaf)
    influence = (statistics - mean) @ gradient / num_outputs.mean()
    return rate, (influence.std() / math.sqrt(len(statistics)) / (2 * rate)).item()


def from_examples(values: Tensor, num_outputs: float) -> tuple[Tensor, Tensor]:
    """Estimate rates from per-example derivatives: M * rate^2 is the mean over probes of sum_n (D phi_n)^2.

    Args:
        values: D phi_n of every probe and example, float64 [L, S]; Gaussian over omega, independent over S.
        num_outputs: M summed over the probes.

    Returns:
        Rates and their standard errors over omega, float64 [L] each. Var(v^2) = 2 E[v^2]^2 = (2/3) E[v^4].
    """
    squares = values.square()
    total = squares.sum(1)
    rates = (total / num_outputs).sqrt()
    variance = squares.square().sum(1) * 2 / 3
    errors = torch.where(total > 0, variance.sqrt() / (2 * (total * num_outputs).sqrt()), 0.0)
    return rates, errors


def average_weights(count: int, beta: float) -> Tensor:
    """Weights of a bias-corrected running average over `count` values, oldest first.

    Args:
        count: Number of values.
        beta: Decay. 0 keeps the latest value alone, 0.9 is the paper's, 1 is the plain mean.

    Returns:
        Float64 [count], summing to 1.
    """
    weights = torch.tensor(float(beta), dtype=torch.float64) ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
    return weights / weights.sum()


@dataclass(frozen=True)
class Measurement:
    """Function-space learning rates of some tensors, in output units per unit learning rate.

    Attributes:
        rates: `{canonical name: rate}`.
        standard_errors: Of the rates, over omega, for the examples that were probed. 0 for `exact`; nan for a
            weight-gradient estimator with one probe.
        estimators: `{canonical name: the estimator that gave this rate}`.
        num_probes: Number of probes that were averaged; for `exact`, of batches.
        inner_products: <D_l f, D_m f> / M, float64 [L, L], tensors in the order of `rates`.
    """

    rates: dict[str, float]
    standard_errors: dict[str, float]
    estimators: dict[str, str]
    num_probes: int
    inner_products: Tensor = field(repr=False)

    def group_rate(self, names: Iterable[str]) -> float:
        """Estimate the joint rate of some tensors: how far they move the outputs when they move together.

        Args:
            names: Canonical names, each at most once.

        Returns:
            The RMS over outputs of the sum of the tensors' output changes. Its estimate is unbiased (in the square)
            for every estimator; for `kronecker` and `iid` it comes from the sums of Z, as in `full`.

        Raises:
            ValueError: If a name was not measured.
        """
        order = {name: i for i, name in enumerate(self.rates)}
        chosen = dict.fromkeys(names)
        unknown = [name for name in chosen if name not in order]
        if unknown:
            raise ValueError(f"not measured: {preview(unknown)}. Measured: {preview(order)}.")
        index = torch.tensor([order[name] for name in chosen], dtype=torch.long)
        return math.sqrt(max(self.inner_products[index][:, index].sum().item(), 0.0))

    def interactions(self) -> tuple[list[str], Tensor]:
        """Inner products of the tensors' output changes.

        Returns:
            The names, and <D_l f, D_m f> / M as float64 [L, L]. The diagonal holds squared rates; where the rate is
            `kronecker`'s or `iid`'s it holds `full`'s.
        """
        return list(self.rates), self.inner_products.clone()

    @property
    def total(self) -> float:
        """The joint rate of all measured tensors."""
        return self.group_rate(self.rates)


class Samples:
    """Collects the samples of several probes and makes a `Measurement` of them.

    Args:
        names: The tensors, in the order of the result.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._num_outputs: list[float] = []
        self._examples: dict[str, list[Tensor]] = {name: [] for name in self._names}
        self._statistics: dict[str, list[Tensor]] = {name: [] for name in self._names}
        self._sums: dict[str, list[Tensor]] = {name: [] for name in self._names}
        self._estimators: dict[str, str] = {}
        self._gram: Tensor | None = None

    def add_derivatives(self, derivatives: Mapping[str, Tensor]) -> None:
        """Add one probe's D phi_n for some tensors.

        Args:
            derivatives: `{name: [N]}`.
        """
        for name, values in derivatives.items():
            self._estimators[name] = "per_example"
            self._examples[name].append(values.double())
            self._sums[name].append(values.double().sum())

    def add_products(self, name: str, products: Tensor, estimator: str, independent_dims: Sequence[int] = ()) -> None:
        """Add one probe's Z for one tensor.

        Args:
            name: The tensor.
            products: Z = U * G.
            estimator: A key of `WEIGHT_GRADIENT_ESTIMATORS`.
            independent_dims: Dimensions along which Z is known to be uncorrelated.
        """
        statistics = WEIGHT_GRADIENT_ESTIMATORS[estimator].statistics(products, independent_dims)
        if self._examples[name]:  # not verified until now, because it moved no output before
            self._examples[name].clear()
            self._statistics[name] = [torch.zeros_like(statistics)] * len(self._num_outputs)
        self._estimators[name] = estimator
        self._statistics[name].append(statistics)
        self._sums[name].append(products.sum(dtype=torch.float64))

    def add_tangents(self, tangents: Tensor) -> None:
        """Add the exact output changes of all tensors for one batch.

        Args:
            tangents: D f, [L, ...], tensors in the order of `names`, 0 where an output does not count.
        """
        flat = tangents.double().flatten(1)
        gram = flat @ flat.T
        self._gram = gram if self._gram is None else self._gram + gram

    def count_outputs(self, num_outputs: float) -> None:
        """Close a probe.

        Args:
            num_outputs: Its M.
        """
        self._num_outputs.append(num_outputs)

    def measurement(self) -> Measurement:
        """Combine what was added.

        Returns:
            The measurement.

        Raises:
            ValueError: If nothing was added.
        """
        if not self._num_outputs:
            raise ValueError("there was no probe batch: batches is empty.")
        total = sum(self._num_outputs)
        if self._gram is not None:
            inner = (self._gram / total).cpu()
            rates = dict(zip(self._names, inner.diagonal().sqrt().tolist(), strict=True))
            exact = dict.fromkeys(self._names, "exact")
            return Measurement(rates, dict.fromkeys(self._names, 0.0), exact, len(self._num_outputs), inner)
        sums = torch.stack([torch.stack(self._sums[name]) for name in self._names]).cpu()  # [L, P]
        inner = sums @ sums.T / total
        estimates: dict[str, tuple[float, float]] = {}
        by_example = [name for name in self._names if self._examples[name]]
        if by_example:
            values = torch.stack([torch.cat(self._examples[name]) for name in by_example]).cpu()  # [L', S]
            rates_, errors = from_examples(values, total)
            estimates = dict(zip(by_example, zip(rates_.tolist(), errors.tolist(), strict=True), strict=True))
            index = torch.tensor([i for i, name in enumerate(self._names) if self._examples[name]])
            inner[index.unsqueeze(1), index] = values @ values.T / total
        num_outputs = torch.tensor(self._num_outputs, dtype=torch.float64)
        for name in self._names:
            if self._statistics[name]:
                statistics = torch.stack(self._statistics[name]).cpu()
                estimates[name] = from_weight_gradients(self._estimators[name], statistics, num_outputs)
        return Measurement(
            {name: estimates[name][0] for name in self._names},
            {name: estimates[name][1] for name in self._names},
            {name: self._estimators[name] for name in self._names},
            len(self._num_outputs),
            inner,
        )
