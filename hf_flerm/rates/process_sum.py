"""Combine the measurements of several processes: each probes its own examples, and only sums are communicated.

All estimates are sums over probes (`Totals`, and some squared joint rates), so one sum over processes makes one
measurement of them, on the examples of all processes. All processes get the same bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from ..engines.processes import sum_over_processes
from .estimators import FALLBACK_ESTIMATOR, num_factors, rates_from
from .measurement import UNUSED, Measurement
from .totals import Combination, Totals, combination_key

_HEADER = 4  # processes that failed, those that ran out of memory, number of probes, M


class ProcessSum:
    """Adds up the measurements of all processes, in one collective call.

    The summed vector is float64: the header (`_HEADER`); for each tensor 2 + F numbers, namely M * rate^2 if it is
    measured per example, the variance of M * rate^2, and the F factors of its weight-gradient estimator, 0 for one
    that it does not have; then M * (joint rate)^2 of every combination, and their variances.

    Args:
        shapes: `{canonical name: shape of Z = U * G}` of the measured tensors.
        estimator: One of `hf_flerm.choices.Estimator`.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], estimator: str) -> None:
        self._estimator = FALLBACK_ESTIMATOR if estimator == "per_example" else estimator
        self._widths = {name: 2 + num_factors(estimator, len(shape)) for name, shape in shapes.items()}

    def __call__(
        self,
        local: Measurement | None,
        combinations: Iterable[Mapping[str, float]],
        failure: Exception | None = None,
    ) -> Measurement | None:
        """Add up the measurements of all processes; a collective call, also for a process whose measurement failed.

        Args:
            local: The measurement of this process; None if there was nothing to measure or it failed.
            combinations: Combinations whose joint rates will be needed, each `{canonical name: factor on its update}`;
                the same on every process.
            failure: The exception of this process; None if it did not fail.

        Returns:
            The combined measurement, whose rates, standard errors and joint rates of the combinations are the same bits
            on every process. None if there was nothing to measure on any of them.

        Raises:
            OutOfMemoryError: On every process, if one ran out of memory.
            Exception: `failure` on a process that has one, a RuntimeError on the others.
        """
        if PartialState().num_processes == 1:
            if failure is not None:
                raise failure
            return local
        keyed = {combination_key(shares): shares for shares in combinations if len(shares) > 1}
        numbers = torch.zeros(_HEADER + sum(self._widths.values()) + 2 * len(keyed), dtype=torch.float64)
        if failure is not None:
            numbers[0], numbers[1] = 1.0, should_reduce_batch_size(failure)
        elif local is not None:
            numbers = self._numbers(local, keyed.values())
        summed = sum_over_processes(numbers)
        failed, out_of_memory, num_probes = (int(number) for number in summed[:3])
        if failed:
            processes = f"of {PartialState().num_processes} processes"
            if out_of_memory:
                raise torch.OutOfMemoryError(f"{out_of_memory} {processes} ran out of memory.") from failure
            raise failure or RuntimeError(f"the measurement failed on {failed} {processes}.")
        return self._read(local, summed, keyed) if local is not None and num_probes else None

    def _numbers(self, local: Measurement, combinations: Collection[Mapping[str, float]]) -> Tensor:
        """Return the vector of this process; see the class for its layout."""
        totals = local.totals
        numbers = [torch.tensor([0.0, 0.0, totals.num_probes, totals.num_outputs], dtype=torch.float64)]
        for index, (name, width) in enumerate(self._widths.items()):
            row = torch.zeros(width, dtype=torch.float64)
            row[0], row[1] = totals.squares[index], totals.variances[index]
            if name in totals.factors:
                _, factors = totals.factors[name]
                row[2 : 2 + len(factors)] = factors
            numbers.append(row)
        squares, variances = local.joint_squares(combinations)
        return torch.cat([*numbers, squares * totals.num_outputs, variances * totals.num_outputs**2])

    def _read(self, local: Measurement, summed: Tensor, keys: Collection[Combination]) -> Measurement:
        """Make a measurement of the summed vector; `inner_products` and `draws` stay those of this process."""
        header, *rows, joint, joint_variances = summed.split([_HEADER, *self._widths.values(), *[len(keys)] * 2])
        *_, num_probes, num_outputs = header.tolist()
        squares, variances = (torch.stack([row[column] for row in rows]) for column in range(2))
        factors, estimators = {}, dict(local.estimators)
        for name, row in zip(self._widths, rows, strict=True):
            if row[2:].any():
                # Without outputs that depend on the tensor this process has no factors, but others may have some.
                estimator, local_factors = local.totals.factors.get(name, (self._estimator, row[2:]))
                factors[name] = estimator, row[2 : 2 + len(local_factors)]
            if estimators[name] == UNUSED and (name in factors or row[0]):
                estimators[name] = self._estimator if name in factors else "per_example"
        totals = Totals(int(num_probes), num_outputs, squares, variances, factors)
        rates, errors = rates_from(joint, joint_variances, num_outputs)
        joint_rates = dict(zip(keys, zip(rates.tolist(), errors.tolist(), strict=True), strict=True))
        summed_up = Measurement.from_sums(
            totals, estimators, local.inner_products, local.draws, local.shared_updates, joint_rates
        )
        return replace(summed_up, learning_rates=local.learning_rates)
