"""Several processes measure together: each probes its own examples, and only sums travel between them.

All estimates are sums over probes (`Totals`, and some squared joint rates), so one sum over processes turns their
measurements into one: as many times the examples as there are processes. All processes get the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from ..engines.processes import sum_over_processes
from .estimators import FALLBACK, num_factors, rates_from
from .measurement import UNUSED, Measurement
from .totals import Totals, combination_key

_HEADER = 4  # failures, those for want of memory, probes, M


class ProcessSum:
    """Adds up the measurements of all processes, in one collective call.

    Args:
        shapes: `{canonical name: shape of Z = U * G}` of what is measured.
        estimator: As for `measure_rates`.
        combinations: Those whose joint rates will be asked for: `{canonical name: factor on its update}` each.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], estimator: str, combinations: Iterable[Mapping[str, float]]
    ) -> None:
        self._estimator = FALLBACK if estimator == "per_example" else estimator
        self._widths = {name: 2 + num_factors(estimator, len(shape)) for name, shape in shapes.items()}
        self._combinations = {combination_key(shares): shares for shares in combinations if len(shares) > 1}

    def __call__(self, own: Measurement | None, failure: Exception | None = None) -> Measurement | None:
        """Add up what all processes have measured; a collective call, also for a process whose measurement failed.

        Args:
            own: The measurement of this process; None if there was nothing to measure or it failed.
            failure: Why it failed; None if it did not.

        Returns:
            The measurement of all together: rates, standard errors and these joint rates are the same bits on
            every process. None if there was nothing to measure on any of them.

        Raises:
            OutOfMemoryError: On every process, if memory did not suffice on one.
            Exception: `failure` where there is one, and a RuntimeError on the other processes.
        """
        if PartialState().num_processes == 1:
            if failure is not None:
                raise failure
            return own
        numbers = torch.zeros(_HEADER + sum(self._widths.values()) + 2 * len(self._combinations), dtype=torch.float64)
        if failure is not None:
            numbers[0], numbers[1] = 1.0, should_reduce_batch_size(failure)
        elif own is not None:
            numbers = self._numbers(own)
        summed = sum_over_processes(numbers)
        failed, out_of_memory, num_probes = (int(number) for number in summed[:3])
        if failed:
            processes = f"of {PartialState().num_processes} processes"
            if out_of_memory:
                raise torch.OutOfMemoryError(f"{out_of_memory} {processes} ran out of memory.") from failure
            raise failure or RuntimeError(f"the probe failed on {failed} {processes}.")
        return self._read(own, summed) if own is not None and num_probes else None

    def _numbers(self, own: Measurement) -> Tensor:
        totals = own.totals
        numbers = [torch.tensor([0.0, 0.0, totals.num_probes, totals.num_outputs], dtype=torch.float64)]
        for index, (name, width) in enumerate(self._widths.items()):
            row = torch.zeros(width, dtype=torch.float64)
            row[0], row[1] = totals.squares[index], totals.variances[index]
            if name in totals.factors:
                _, factors = totals.factors[name]
                row[2 : 2 + len(factors)] = factors
            numbers.append(row)
        squares, variances = own.joint_squares(self._combinations.values())
        return torch.cat([*numbers, squares * totals.num_outputs, variances * totals.num_outputs**2])

    def _read(self, own: Measurement, summed: Tensor) -> Measurement:
        header, *rows, joint, joint_variances = summed.split(
            [_HEADER, *self._widths.values(), *[len(self._combinations)] * 2]
        )
        *_, num_probes, num_outputs = header.tolist()
        squares, variances = (torch.stack([row[column] for row in rows]) for column in range(2))
        factors = {}
        for name, row in zip(self._widths, rows, strict=True):
            estimator, mine = own.totals.factors.get(name, (self._estimator, row[2:]))
            if row[2:].any():
                factors[name] = estimator, row[2 : 2 + len(mine)]
        totals = Totals(int(num_probes), num_outputs, squares, variances, factors)
        estimators = {
            name: of_own if of_own != UNUSED or not row[[0, *range(2, len(row))]].any() else self._used(name, factors)
            for (name, of_own), row in zip(own.estimators.items(), rows, strict=True)
        }
        rates, errors = rates_from(joint, joint_variances, num_outputs)
        joint_rates = dict(zip(self._combinations, zip(rates.tolist(), errors.tolist(), strict=True), strict=True))
        return Measurement.of(totals, estimators, own.inner_products, own.draws, own.same_moves, joint_rates)

    def _used(self, name: str, factors: Mapping[str, object]) -> str:
        return self._estimator if name in factors else "per_example"
