"""`Measurement`: the rates of some tensors and how they add up; and how probes become one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .estimators import from_examples, from_weight_gradients
from .names import preview

UNUSED = "unused"


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

    def joint_errors(self, weights: Tensor) -> Tensor:
        """Estimate the standard errors of joint rates.

        Args:
            weights: How much of each tensor's update is in each group, float64 [G, L].

        Returns:
            The errors over omega, float64 [G]; nan where it takes more than one probe to tell.
        """
        values = weights @ self.derivatives
        errors = from_examples(values, self.num_outputs.sum().item())[1]
        mixed = (weights[:, ~self.by_example] != 0).any(1)
        if not mixed.any():
            return errors
        count = len(self.num_outputs)
        of_probe = torch.zeros(len(weights), count, dtype=values.dtype)
        squares = of_probe.index_add(1, self.probes, values.square())
        of_probe.index_add_(1, self.probes, values)
        sizes = (weights @ self.sums).square() - of_probe.square() + squares
        rates = (sizes.sum(1).clamp(min=0) / self.num_outputs.sum()).sqrt()
        spread = sizes.std(1) if count > 1 else torch.full_like(rates, math.nan)
        over_probes = spread / math.sqrt(count) / (2 * rates * self.num_outputs.mean())
        return torch.where(mixed, torch.where(rates > 0, over_probes, math.nan), errors)


@dataclass(frozen=True)
class Measurement:
    """Function-space learning rates of some tensors, in output units per unit learning rate.

    Attributes:
        rates: `{canonical name: rate}`.
        standard_errors: Of the rates, over omega, for the examples that were probed. 0 for `exact`; nan for a
            weight-gradient estimator with one probe.
        estimators: `{canonical name: the estimator that gave this rate}`; `unused` for a tensor that took no part in
            the outputs (its rate is 0).
        num_probes: Number of probes that were averaged; for `exact`, of batches.
        inner_products: <D_l f, D_m f> / M, float64 [L, L], tensors in the order of `rates`.
        draws: What single probes gave; None for `exact`.
    """

    rates: dict[str, float]
    standard_errors: dict[str, float]
    estimators: dict[str, str]
    num_probes: int
    inner_products: Tensor = field(repr=False)
    draws: Draws | None = field(default=None, repr=False)

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
        return self.joint_rates({"": dict.fromkeys(names, 1.0)})[""][0]

    def group_standard_error(self, names: Iterable[str]) -> float:
        """Estimate the standard error of a joint rate.

        Args:
            names: As for `group_rate`.

        Returns:
            The error over omega, for the examples that were probed; 0 for `exact`, nan where one probe cannot tell.

        Raises:
            ValueError: If a name was not measured.
        """
        return self.joint_rates({"": dict.fromkeys(names, 1.0)})[""][1]

    def joint_rates(self, groups: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[float, float]]:
        """Estimate the joint rates of several groups of tensors at once.

        Args:
            groups: `{group: {canonical name: how much of its update is meant}}`.

        Returns:
            `{group: (rate, standard error)}`, as `group_rate` and `group_standard_error` estimate them.

        Raises:
            ValueError: If a name was not measured.
        """
        order = {name: i for i, name in enumerate(self.rates)}
        unknown = {name for group in groups.values() for name in group} - order.keys()
        if unknown:
            raise ValueError(f"not measured: {preview(unknown)}. Measured: {preview(order)}.")
        weights = torch.zeros(len(groups), len(order), dtype=torch.float64)
        for row, group in zip(weights, groups.values(), strict=True):
            for name, share in group.items():
                row[order[name]] = share
        rates = ((weights @ self.inner_products) * weights).sum(1).clamp(min=0).sqrt()
        errors = torch.zeros_like(rates) if self.draws is None else self.draws.joint_errors(weights)
        return dict(zip(groups, zip(rates.tolist(), errors.tolist(), strict=True), strict=True))

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

    @property
    def relative_error(self) -> float:
        """The largest standard error of a rate, relative to that rate; inf where one cannot be told."""
        errors = [error / self.rates[name] for name, error in self.standard_errors.items() if self.rates[name]]
        return math.inf if any(math.isnan(error) for error in errors) else max(errors, default=0.0)


class Samples:
    """Collects the samples of several probes and makes a `Measurement` of them.

    Args:
        names: The tensors, in the order of the result.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._num_outputs: list[float] = []
        self._num_examples: list[int] = []
        self._derivatives: dict[str, list[Tensor]] = {name: [] for name in self._names}
        self._statistics: dict[str, list[Tensor | None]] = {name: [] for name in self._names}
        self._first = dict.fromkeys(self._names, 0)  # the first probe that counts for a tensor
        self._estimators = dict.fromkeys(self._names, UNUSED)
        self._gram: Tensor | None = None

    def add_derivatives(self, derivatives: Mapping[str, Tensor], used: Set[str]) -> None:
        """Add one probe's D phi_n for all tensors that are measured by example.

        Args:
            derivatives: `{name: float64 [N]}`.
            used: Those of them that take part in the outputs.
        """
        for name, values in derivatives.items():
            self._derivatives[name].append(values)
            if name in used:
                self._estimators[name] = "per_example"
        self._num_examples.append(max(map(len, derivatives.values()), default=0))

    def add_statistics(self, name: str, estimator: str, statistics: Tensor | None) -> None:
        """Add one probe's statistics of the weight gradient of one tensor.

        Args:
            name: The tensor.
            estimator: A key of `WEIGHT_GRADIENT_ESTIMATORS`.
            statistics: Float64 [1 + F]: the sum of Z, then what the estimator makes of Z; None if the tensor takes no
                part in the outputs.
        """
        if self._derivatives[name]:  # not verified until now, or refuted only now: what gates said does not count
            if any(bool(values.any()) for values in self._derivatives[name]):
                self._first[name] = len(self._num_outputs)
            self._derivatives[name].clear()
            self._statistics[name] = [None] * len(self._num_outputs)
        self._statistics[name].append(statistics)
        if statistics is not None:
            self._estimators[name] = estimator

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
        count = len(self._num_outputs)
        if not count:
            raise ValueError("there was no probe batch: batches is empty.")
        if self._gram is not None:
            inner = (self._gram / sum(self._num_outputs)).cpu()
            rates = dict(zip(self._names, inner.diagonal().sqrt().tolist(), strict=True))
            return Measurement(rates, dict.fromkeys(rates, 0.0), dict.fromkeys(rates, "exact"), count, inner)
        draws = self._draws()
        total = draws.num_outputs.sum().item()
        found = torch.stack(from_examples(draws.derivatives, total)).T.tolist()
        for i, name in enumerate(self._names):
            statistics = [row for row in self._statistics[name] if row is not None]
            if statistics:
                empty = torch.zeros_like(statistics[0])
                counted = self._statistics[name][self._first[name] :]
                rows = torch.stack([empty if row is None else row for row in counted]).cpu()
                num_outputs = draws.num_outputs[self._first[name] :]
                found[i] = from_weight_gradients(self._estimators[name], rows[:, 1:], num_outputs)
        return Measurement(
            {name: rate for name, (rate, _) in zip(self._names, found, strict=True)},
            {name: error for name, (_, error) in zip(self._names, found, strict=True)},
            dict(self._estimators),
            count,
            draws.inner_products(),
            draws,
        )

    def _draws(self) -> Draws:
        count = len(self._num_outputs)
        num_examples = torch.tensor(self._num_examples)
        probes = torch.arange(count).repeat_interleave(num_examples)
        by_example = torch.tensor([bool(self._derivatives[name]) for name in self._names])
        derivatives = torch.zeros(len(self._names), len(probes), dtype=torch.float64)
        sums = torch.zeros(len(self._names), count, dtype=torch.float64)
        if by_example.any():
            rows = [torch.cat(self._derivatives[name]) for name in self._names if self._derivatives[name]]
            derivatives[by_example] = torch.stack(rows).cpu()
            sums.index_add_(1, probes, derivatives)
        for i, name in enumerate(self._names):
            statistics = [row[0] if row is not None else None for row in self._statistics[name]]
            for probe, value in enumerate(statistics):
                if value is not None:
                    sums[i, probe] = value
        return Draws(derivatives, by_example, sums, probes, torch.tensor(self._num_outputs, dtype=torch.float64))
