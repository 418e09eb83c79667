"""`Measurement`: the rates of some tensors and their joint rates; `Samples`: how probes become one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from ..model.names import preview
from .estimators import from_examples, from_weight_gradients, rates_from
from .totals import Combination, Draws, Totals, combination_key

UNUSED = "unused"  # in place of an estimator, for a tensor that no output depends on


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
        totals: The sums that the rates follow from.
        draws: The draws one by one; None for `exact`.
        same_moves: `{canonical name: earlier name}` of tensors that lie in the memory of an earlier one and whose
            update is that one's: the memory moves once, so a joint rate of both counts one.
        summed_joint_rates: `{combination: (rate, standard error)}` of the combinations that were asked for, if several
            processes have measured; `inner_products` and `draws` are then those of this process alone.
    """

    rates: dict[str, float]
    standard_errors: dict[str, float]
    estimators: dict[str, str]
    num_probes: int
    inner_products: Tensor = field(repr=False)
    totals: Totals = field(default_factory=Totals, repr=False)
    draws: Draws | None = field(default=None, repr=False)
    same_moves: Mapping[str, str] = field(default_factory=dict, repr=False)
    summed_joint_rates: Mapping[Combination, tuple[float, float]] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        totals: Totals,
        estimators: dict[str, str],
        inner_products: Tensor,
        draws: Draws | None = None,
        same_moves: Mapping[str, str] = MappingProxyType({}),
        summed_joint_rates: Mapping[Combination, tuple[float, float]] | None = None,
    ) -> Measurement:
        """Turn sums into rates; arguments as above. `estimators` has the tensors in their order."""
        rates, errors = totals.rates(estimators)
        probes = totals.num_probes
        return cls(rates, errors, estimators, probes, inner_products, totals, draws, same_moves, summed_joint_rates)

    def group_rate(self, names: Iterable[str]) -> float:
        """Estimate the joint rate of some tensors: how far they move the outputs when they move together.

        Args:
            names: Canonical names, each at most once.

        Returns:
            The RMS over outputs of the sum of the tensors' output changes; of one tensor, its rate. Of several, the
            estimate is unbiased (in the square) for every estimator; for `kronecker` and `iid` it comes from the sums
            of Z, as in `full`.

        Raises:
            ValueError: If a name was not measured, or several processes have measured and not this joint rate.
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
        """Estimate the joint rates of several combinations of updates at once.

        Args:
            groups: `{key: {canonical name: factor on its update}}`.

        Returns:
            `{key: (rate, standard error)}`, as `group_rate` and `group_standard_error` estimate them.

        Raises:
            ValueError: As for `group_rate`.
        """
        unknown = {name for group in groups.values() for name in group} - self.rates.keys()
        if unknown:
            raise ValueError(f"not measured: {preview(unknown)}. Measured: {preview(self.rates)}.")
        keys = {name: combination_key(shares) for name, shares in groups.items()}
        found = self._joint_rates({keys[name]: shares for name, shares in groups.items() if len(shares) != 1})
        for key in keys.values():
            if len(key) == 1:
                ((name, share),) = key
                found[key] = share * self.rates[name], share * self.standard_errors[name]
        return {name: found[key] for name, key in keys.items()}

    def _joint_rates(self, groups: Mapping[Combination, Mapping[str, float]]) -> dict[Combination, tuple[float, float]]:
        if self.summed_joint_rates is None:
            rates, errors = rates_from(*self.joint_squares(groups.values()), 1.0)
            return dict(zip(groups, zip(rates.tolist(), errors.tolist(), strict=True), strict=True))
        missing = groups.keys() - self.summed_joint_rates.keys()
        if missing:
            raise ValueError(
                f"{len(self.summed_joint_rates)} joint rates were added up over processes; not those of "
                f"{preview(name for key in missing for name, _ in key)}."
            )
        return {key: self.summed_joint_rates[key] for key in groups}

    def joint_squares(self, groups: Collection[Mapping[str, float]]) -> tuple[Tensor, Tensor]:
        """Estimate squared joint rates.

        Args:
            groups: `{canonical name: factor on its update}` of each combination.

        Returns:
            (Joint rate)^2, an unbiased estimate that may be negative, and its variances, float64 [G] each.
        """
        order = {name: i for i, name in enumerate(self.rates)}
        weights = torch.zeros(len(groups), len(order), dtype=torch.float64)
        for row, group in zip(weights, groups, strict=True):
            for name, share in group.items():
                if group.get(self.same_moves.get(name, "")) != share:
                    row[order[name]] = share
        squares = ((weights @ self.inner_products) * weights).sum(1)
        if self.draws is None:
            return squares, torch.zeros_like(squares)
        return squares, self.draws.joint_variances(weights) / self.draws.num_outputs.sum().square()

    def interactions(self) -> tuple[list[str], Tensor]:
        """Inner products of the tensors' output changes.

        Returns:
            The names, and <D_l f, D_m f> / M as float64 [L, L]. The diagonal holds squared rates; where the rate is
            `kronecker`'s or `iid`'s it holds `full`'s. Where several processes have measured, they are those of this
            process's examples.
        """
        return list(self.rates), self.inner_products.clone()

    @property
    def total(self) -> float:
        """The joint rate of all measured tensors."""
        return self.group_rate(self.rates)

    @property
    def relative_errors(self) -> dict[str, float]:
        """`{name: standard error / rate}` of the tensors with a rate above 0; nan where it is not known."""
        return {name: error / self.rates[name] for name, error in self.standard_errors.items() if self.rates[name]}

    @property
    def relative_error(self) -> float:
        """The largest standard error of a rate, relative to that rate; inf where one is not known."""
        errors = self.relative_errors.values()
        return math.inf if any(math.isnan(error) for error in errors) else max(errors, default=0.0)


class Samples:
    """Collects the samples of several probes and makes a `Measurement` of them.

    Args:
        names: The tensors, in the order of the result.
        same_moves: As for `Measurement`.
    """

    def __init__(self, names: Iterable[str], same_moves: Mapping[str, str] = MappingProxyType({})) -> None:
        self._names = list(names)
        self._same_moves = same_moves
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
        if self._derivatives[name]:  # its gates were unverified until now, or are refuted now: they do not count
            if any(bool(values.any()) for values in self._derivatives[name]):
                self._first[name] = len(self._num_outputs)
            self._derivatives[name].clear()
            self._statistics[name] = [None] * len(self._num_outputs)
        self._statistics[name].append(statistics)
        if statistics is not None:
            self._estimators[name] = estimator

    def set_to_zero(self, names: Iterable[str]) -> None:
        """Replace all samples of some tensors by 0: their numbers are nothing but round-off."""
        for name in names:
            self._derivatives[name] = [torch.zeros_like(values) for values in self._derivatives[name]]
            self._statistics[name] = [s if s is None else torch.zeros_like(s) for s in self._statistics[name]]
            if self._gram is not None:
                index = self._names.index(name)
                self._gram[index], self._gram[:, index] = 0.0, 0.0

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
        """Combine the samples.

        Raises:
            ValueError: If there are none.
        """
        count = len(self._num_outputs)
        if not count:
            raise ValueError("there was no probe batch: batches is empty.")
        num_outputs = sum(self._num_outputs)
        if self._gram is not None:
            squares = self._gram.diagonal().cpu()
            totals = Totals(count, num_outputs, squares, torch.zeros_like(squares), {})
            estimators = dict.fromkeys(self._names, "exact")
            return Measurement.of(totals, estimators, (self._gram / num_outputs).cpu(), None, self._same_moves)
        draws = self._draws()
        squares, variances = from_examples(draws.derivatives)
        totals = Totals(count, num_outputs, squares, variances, {})
        for i, name in enumerate(self._names):
            statistics = [row for row in self._statistics[name] if row is not None]
            if statistics:
                empty = torch.zeros_like(statistics[0])
                counted = self._statistics[name][self._first[name] :]
                rows = torch.stack([empty if row is None else row for row in counted]).cpu()
                share = num_outputs / sum(self._num_outputs[self._first[name] :])
                estimator = self._estimators[name]
                factors, variances[i] = from_weight_gradients(estimator, share * rows[:, 1:])
                totals.factors[name] = estimator, factors
        inner_products = draws.inner_products()
        return Measurement.of(totals, dict(self._estimators), inner_products, draws, self._same_moves)

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
