"""`Measurement`: the rates of some tensors and their joint rates. `Samples`: collects probes and computes one."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from ..model.name_text import preview
from .estimators import from_examples, from_weight_gradients, rates_from
from .totals import Combination, Draws, Totals, combination_key

Key = TypeVar("Key", bound=Hashable)

UNUSED = "unused"  # stands in `estimators` for a tensor that no output depends on


@dataclass(frozen=True)
class Measurement:
    """Function-space learning rates of some tensors, in output units per unit learning rate.

    Attributes:
        rates: `{canonical name: rate}`.
        standard_errors: Standard errors of the rates over random draws of omega, for the examples that were probed; 0
            for `exact`, nan for a weight-gradient estimator with one probe.
        estimators: `{canonical name: the estimator that gave this rate}`; `unused` for a tensor that no output depends
            on (its rate is 0).
        num_probes: Number of probes (draws of omega for a batch); for `exact`, of batches.
        inner_products: <D_l f, D_m f> / M, float64 [L, L], tensors in the order of `rates`.
        totals: Sums over probes from which `rates` is computed.
        draws: Derivatives for each draw of omega; None for `exact`.
        shared_updates: `{canonical name: earlier name}` of the tensors that share memory with an earlier tensor and
            have the same update. A joint rate of both counts their change once.
        summed_joint_rates: `{combination: (rate, standard error)}` over all processes, of the combinations requested in
            advance; None with a single process. With several, `inner_products` and `draws` are those of this process.
        learning_rates: `{canonical name: learning rate}` of the step; empty if all are equal. A joint rate is per unit
            of the largest learning rate of its tensors: the joint update divided by that. (A sum of unit updates would
            say nothing: with Muon at 0.02 and AdamW at 0.0003, AdamW's part would count 67 times.)
    """

    rates: dict[str, float]
    standard_errors: dict[str, float]
    estimators: dict[str, str]
    num_probes: int
    inner_products: Tensor = field(repr=False)
    totals: Totals = field(default_factory=Totals, repr=False)
    draws: Draws | None = field(default=None, repr=False)
    shared_updates: Mapping[str, str] = field(default_factory=dict, repr=False)
    summed_joint_rates: Mapping[Combination, tuple[float, float]] | None = field(default=None, repr=False)
    learning_rates: Mapping[str, float] = field(default_factory=dict, repr=False)

    @classmethod
    def from_sums(
        cls,
        totals: Totals,
        estimators: dict[str, str],
        inner_products: Tensor,
        draws: Draws | None = None,
        shared_updates: Mapping[str, str] = MappingProxyType({}),
        summed_joint_rates: Mapping[Combination, tuple[float, float]] | None = None,
    ) -> Measurement:
        """Compute the rates from sums. The attributes above describe the arguments; `estimators` orders the tensors."""
        rates, errors = totals.rates(estimators)
        probes = totals.num_probes
        return cls(rates, errors, estimators, probes, inner_products, totals, draws, shared_updates, summed_joint_rates)

    def group_rate(self, names: Iterable[str]) -> float:
        """Estimate the joint rate of some tensors: how much the outputs change if all of them are updated.

        Args:
            names: Canonical names, each at most once.

        Returns:
            The RMS over outputs of the sum of the tensors' output changes; for one tensor, its rate. For several, the
            estimate is unbiased (in the square) with every estimator; `kronecker` and `iid` use `full` here.

        Raises:
            ValueError: If a name was not measured, or if several processes measured and this joint rate was not
                requested in advance.
        """
        return self.joint_rates({"": dict.fromkeys(names, 1.0)})[""][0]

    def group_standard_error(self, names: Iterable[str]) -> float:
        """Estimate the standard error of a joint rate.

        Args:
            names: Canonical names, each at most once.

        Returns:
            The standard error over random draws of omega, for the examples that were probed; 0 for `exact`, nan if it
            needs more than one probe.

        Raises:
            ValueError: If a name was not measured, or if several processes measured and this joint rate was not
                requested in advance.
        """
        return self.joint_rates({"": dict.fromkeys(names, 1.0)})[""][1]

    def joint_rates(self, groups: Mapping[Key, Mapping[str, float]]) -> dict[Key, tuple[float, float]]:
        """Estimate the joint rates of several combinations of updates.

        Args:
            groups: `{key: {canonical name: factor on its update}}`.

        Returns:
            `{key: (rate, standard error)}`, as `group_rate` and `group_standard_error` estimate them.

        Raises:
            ValueError: If a name was not measured, or if several processes measured and a joint rate was not requested
                in advance.
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
                f"joint rates over several processes are available for {len(self.summed_joint_rates)} combinations; "
                f"not for one of {preview(name for key in missing for name, _ in key)}."
            )
        return {key: self.summed_joint_rates[key] for key in groups}

    def joint_squares(self, groups: Collection[Mapping[str, float]]) -> tuple[Tensor, Tensor]:
        """Estimate squared joint rates, on the examples of this process.

        Args:
            groups: `{canonical name: factor on its update}` of each combination.

        Returns:
            (Joint rate)^2, unbiased estimates that may be negative, and their variances, float64 [G] each.
        """
        order = {name: i for i, name in enumerate(self.rates)}
        weights = torch.zeros(len(groups), len(order), dtype=torch.float64)
        for row, group in zip(weights, groups, strict=True):
            relative = self._relative_rates(group)
            for name, share in group.items():
                # A tensor with the same update as an earlier one of the group counts once (if their factors agree).
                if group.get(self.shared_updates.get(name, "")) != share:
                    row[order[name]] = share * relative[name]
        squares = ((weights @ self.inner_products) * weights).sum(1)
        if self.draws is None:
            return squares, torch.zeros_like(squares)
        return squares, self.draws.joint_variances(weights) / self.draws.num_outputs.sum().square()

    def _relative_rates(self, names: Iterable[str]) -> dict[str, float]:
        """Return `{name: its learning rate / the largest of these tensors}`; 1 where learning rates are not known."""
        rates = {name: self.learning_rates.get(name, 1.0) for name in names}
        largest = max(rates.values(), default=0.0) or 1.0
        return {name: rate / largest for name, rate in rates.items()}

    def interactions(self) -> tuple[list[str], Tensor]:
        """Inner products of the tensors' output changes.

        Returns:
            The names, and <D_l f, D_m f> / M as float64 [L, L]. The diagonal holds squared rates, estimated by `full`
            for tensors measured by `kronecker` or `iid`. With several processes, only this process's examples are used.
        """
        return list(self.rates), self.inner_products.clone()

    @property
    def total(self) -> float:
        """The joint rate of all measured tensors."""
        return self.group_rate(self.rates)

    @property
    def relative_errors(self) -> dict[str, float]:
        """`{name: standard error / rate}` of the tensors with a rate above 0; nan if the error is not known."""
        return {name: error / self.rates[name] for name, error in self.standard_errors.items() if self.rates[name]}

    @property
    def relative_error(self) -> float:
        """The largest of `relative_errors`; inf if one is not known."""
        errors = self.relative_errors.values()
        return math.inf if any(math.isnan(error) for error in errors) else max(errors, default=0.0)


class Samples:
    """Collects the samples of several probes and computes a `Measurement` from them.

    Args:
        names: Canonical names of the tensors, in the order of the result.
        shared_updates: See `Measurement`.
    """

    def __init__(self, names: Iterable[str], shared_updates: Mapping[str, str] = MappingProxyType({})) -> None:
        self._names = list(names)
        self._shared_updates = shared_updates
        self._num_outputs: list[float] = []
        self._num_examples: list[int] = []
        self._derivatives: dict[str, list[Tensor]] = {name: [] for name in self._names}
        self._statistics: dict[str, list[Tensor | None]] = {name: [] for name in self._names}
        self._first = dict.fromkeys(self._names, 0)  # index of the first probe that is used for a tensor
        self._estimators = dict.fromkeys(self._names, UNUSED)
        self._gram: Tensor | None = None

    def add_derivatives(self, derivatives: Mapping[str, Tensor], used: Set[str]) -> None:
        """Add D phi_n of one probe for the tensors that are measured per example.

        Args:
            derivatives: `{name: float64 [N]}`.
            used: Names of the tensors that the outputs depend on.
        """
        for name, values in derivatives.items():
            self._derivatives[name].append(values)
            if name in used:
                self._estimators[name] = "per_example"
        self._num_examples.append(max(map(len, derivatives.values()), default=0))

    def add_statistics(self, name: str, estimator: str, statistics: Tensor | None) -> None:
        """Add the statistics of one tensor's weight gradient from one probe.

        Args:
            name: The tensor.
            estimator: A key of `WEIGHT_GRADIENT_ESTIMATORS`.
            statistics: Float64 [1 + F]: the sum of Z, then the factors of the estimator; None if no output depends on
                the tensor.
        """
        # Earlier probes measured this tensor by gates that were not verified then, or have failed verification since:
        # their values are discarded. If all were 0 (it had no effect yet), they count as probes with rate 0.
        if self._derivatives[name]:
            if any(bool(values.any()) for values in self._derivatives[name]):
                self._first[name] = len(self._num_outputs)
            self._derivatives[name].clear()
            self._statistics[name] = [None] * len(self._num_outputs)
        self._statistics[name].append(statistics)
        if statistics is not None:
            self._estimators[name] = estimator

    def set_to_zero(self, names: Iterable[str]) -> None:
        """Set all samples of some tensors to 0, because they are round-off."""
        for name in names:
            self._derivatives[name] = [torch.zeros_like(values) for values in self._derivatives[name]]
            self._statistics[name] = [s if s is None else torch.zeros_like(s) for s in self._statistics[name]]
            if self._gram is not None:
                index = self._names.index(name)
                self._gram[index], self._gram[:, index] = 0.0, 0.0

    def add_tangents(self, tangents: Tensor) -> None:
        """Add the exact output changes of all tensors on one batch.

        Args:
            tangents: D f in the metric, [L, ...], tensors in the order of `names`, 0 where an output does not count.
        """
        flat = tangents.double().flatten(1)
        gram = flat @ flat.T
        self._gram = gram if self._gram is None else self._gram + gram

    def count_outputs(self, num_outputs: float) -> None:
        """End a probe.

        Args:
            num_outputs: M, the number of its outputs that count.
        """
        self._num_outputs.append(num_outputs)

    def measurement(self) -> Measurement:
        """Combine the samples.

        Raises:
            ValueError: If there was no probe.
        """
        count = len(self._num_outputs)
        if not count:
            raise ValueError("there was no probe batch: batches is empty.")
        num_outputs = sum(self._num_outputs)
        if self._gram is not None:
            squares = self._gram.diagonal().cpu()
            totals = Totals(count, num_outputs, squares, torch.zeros_like(squares), {})
            estimators = dict.fromkeys(self._names, "exact")
            inner_products = (self._gram / num_outputs).cpu()
            return Measurement.from_sums(totals, estimators, inner_products, None, self._shared_updates)
        draws = self._draws()
        squares, variances = from_examples(draws.derivatives)
        totals = Totals(count, num_outputs, squares, variances, {})
        for i, name in enumerate(self._names):
            statistics = [row for row in self._statistics[name] if row is not None]
            if statistics:
                empty = torch.zeros_like(statistics[0])
                counted = self._statistics[name][self._first[name] :]
                rows = torch.stack([empty if row is None else row for row in counted]).cpu()
                # Probes before `_first` are not used for this tensor. Its sums are scaled up to all probes, so that all
                # tensors have the same M.
                scale = num_outputs / sum(self._num_outputs[self._first[name] :])
                estimator = self._estimators[name]
                factors, variances[i] = from_weight_gradients(estimator, scale * rows[:, 1:])
                totals.factors[name] = estimator, factors
        inner_products = draws.inner_products()
        return Measurement.from_sums(totals, dict(self._estimators), inner_products, draws, self._shared_updates)

    def _draws(self) -> Draws:
        """Arrange the samples: derivatives of the tensors measured per example, and sums over each probe of all."""
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
