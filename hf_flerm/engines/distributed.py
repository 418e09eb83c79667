"""Several processes measure together: each probes its own examples, and only sums over these travel.

Whatever is estimated is a sum over probes (`Totals`, and the squared joint rates of some groups), so one sum over
processes makes many measurements one: P processes give P times the examples. All processes get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast, get_int_from_env, reduce
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers.utils import logging

from ..rates.estimators import FALLBACK, num_factors, rates_from
from ..rates.measurement import UNUSED, Measurement
from ..profile.file import parse_bytes
from ..profile.rate_profile import PROFILE_NAME, RateProfile, RateProfileError
from .sharding import is_sharded, whole_shape
from ..rates.totals import Group, Totals, group_key

logger = logging.get_logger(__name__)

_INSTEAD = "Train with DDP, or with FSDP2 where the model does not fit (fsdp_version: 2), or measure in one process."
_REFUSED = {
    DistributedType.MEGATRON_LM: "Megatron-LM has a model of its own",
    DistributedType.XLA: "XLA does not run hooks as they are set",
}
_HEADER = 4  # failures, those for want of memory, probes, M

Agree = Callable[[Sequence[bool]], list[bool]]


def anywhere(flags: Sequence[bool]) -> list[bool]:
    """Tell which flags are set on any process; a collective call.

    Args:
        flags: As many on every process.

    Returns:
        The same on every process.
    """
    if PartialState().num_processes == 1 or not flags:
        return list(flags)
    values: Tensor = reduce(torch.tensor(flags, dtype=torch.uint8, device=PartialState().device), "max")
    return [bool(value) for value in values.tolist()]


def agreement(model: nn.Module) -> Agree:
    """How processes decide together: for a model in shards all run it in step, so a flag is set where any has set it.

    Args:
        model: The model.

    Returns:
        What makes flags of flags; it changes nothing where each process has the whole model and goes its own way.
    """
    return anywhere if is_sharded(model) else list


def check_engine(model: nn.Module, estimator: str) -> None:
    """Refuse what updates cannot be followed in.

    Args:
        model: What is trained.
        estimator: As for `measure_rates`.

    Raises:
        ValueError: With the reason, and what to use instead.
    """
    state = AcceleratorState._shared_state
    engine, parallelism = state.get("distributed_type"), state.get("parallelism_config")
    reason = _REFUSED.get(engine) if isinstance(engine, DistributedType) else None
    if engine == DistributedType.FSDP and getattr(state.get("fsdp_plugin"), "fsdp_version", 1) != 2:
        reason = "FSDP1 flattens the weights of a layer into one"
    for kind in ("tp", "cp", "sp"):
        if getattr(parallelism, f"{kind}_enabled", False) or (kind == "tp" and (getattr(model, "tp_size", 1) or 1) > 1):
            reason = f"{kind}_size > 1: processes that share their examples are not told from those that do not"
    if reason:
        raise ValueError(f"function-space learning rates cannot be followed here: {reason}. {_INSTEAD}")
    if estimator == "exact" and is_sharded(model):
        raise ValueError("estimator 'exact' needs whole weights, and these are sharded. Use 'per_example'.")


def check_loop(model: nn.Module) -> None:
    """Refuse a step of a loop of one's own that processes do not make and measure together.

    Args:
        model: What is trained, wrapped as it is.

    Raises:
        ValueError: If DeepSpeed steps, or processes may run out of batches one before the other.
    """
    if AcceleratorState._shared_state.get("distributed_type") == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed steps in accelerator.backward(), not in optimizer.step(): use FLeRMTrainer.")
    if getattr(getattr(model, "_join_config", None), "enable", False):
        raise ValueError(
            "processes that have run out of batches take no part in measurements: train without join_uneven_inputs (or "
            "torch's Join), and let Accelerate give all as many batches (even_batches=True)."
        )


def are_several() -> bool:
    """Tell whether this process was started as one of several, also before they have found each other.

    Returns:
        Whether it was.
    """
    count: int = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    return count > 1


def common_profile(what: str, read: Callable[[], RateProfile | None]) -> RateProfile | None:
    """Read a profile that is one for all processes, though each node may have a disk of its own; a collective call.

    Args:
        what: What it is.
        read: Reads it on this process; None if there is none.

    Returns:
        The first process's, also where it could not be read; None if it has none.

    Raises:
        RateProfileError: On every process: if the first cannot read it, or another has one with other rates.
    """
    state = PartialState()
    if state.num_processes == 1:
        return read()
    own, content, failure = None, b"", None
    try:
        own = read()
        content = own.to_bytes() if own is not None else b""
    except Exception as error:  # which the others must not wait for
        failure = error
    commit = (own is not None and own.commit_hash) or ""
    content, told_commit, reason = (
        _broadcast(part) for part in (content, commit.encode(), str(failure or "").encode())
    )
    if reason:
        raise RateProfileError(f"{what} cannot be read on the first process: {reason.decode()}") from failure
    first = RateProfile(*parse_bytes(content, Path(PROFILE_NAME))) if content else None
    (differs,) = anywhere([own is not None and (first is None or _rates(own) != _rates(first))])
    if differs:
        raise RateProfileError(
            f"{what} is not the same on all {state.num_processes} processes: every node needs the same file, or the "
            "first node alone has one."
        )
    if first is not None:
        first.commit_hash = told_commit.decode() or None
        if own is None:
            because = f": {failure}" if failure else "."
            logger.warning(f"{what} is not on this node, and that of the first process is used{because}")
    return first


def _rates(profile: RateProfile) -> bytes:
    """A profile but for its metadata, in which nodes may differ: a data set's fingerprint may be random."""
    return RateProfile(profile.steps, profile.rates, None, profile.joint_rates).to_bytes()


def _broadcast(content: bytes) -> bytes:
    """What the first process has."""
    state = PartialState()
    numbers = torch.frombuffer(bytearray(content + b"."), dtype=torch.uint8).to(state.device)
    size = int(broadcast(torch.tensor([len(numbers)], device=state.device)))
    told: Tensor = broadcast(numbers if state.is_main_process else numbers.new_zeros(size))
    return told.cpu().numpy().tobytes()[:-1]


class Pool:
    """Puts the measurements of all processes together, in one sum.

    Args:
        parameters: `{canonical name: parameter}` of what is measured.
        estimator: As for `measure_rates`.
        groups: The groups of tensors whose joint rates will be asked for: `{canonical name: share of its update}`.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], estimator: str, groups: Iterable[Mapping[str, float]]
    ) -> None:
        self._estimator = FALLBACK if estimator == "per_example" else estimator
        self._widths = {
            name: 2 + num_factors(estimator, len(whole_shape(tensor))) for name, tensor in parameters.items()
        }
        self._groups: dict[Group, Mapping[str, float]] = {group_key(g): g for g in groups if len(g) > 1}

    def measurement(self, measure: Callable[[], Measurement | None]) -> Measurement | None:
        """Measure on every process; a collective call, which a process takes part in also when its probe fails.

        Args:
            measure: Measures on this one; None if there is nothing to measure.

        Returns:
            What all have measured together: rates, standard errors and the groups' joint rates are the same bits on
            every process. None if there was nothing to measure on any of them.

        Raises:
            OutOfMemoryError: On every process, if memory does not suffice on one.
            Exception: If `measure` raised something else: that, and a RuntimeError on the processes where it did not.
        """
        if PartialState().num_processes == 1:
            return measure()
        own, failure = None, None
        numbers = torch.zeros(_HEADER + sum(self._widths.values()) + 2 * len(self._groups), dtype=torch.float64)
        try:
            own = measure()
        except Exception as error:
            failure = error
            numbers[0], numbers[1] = 1.0, should_reduce_batch_size(error)
        if own is not None:
            numbers = self._numbers(own)
        summed: Tensor = reduce(numbers.to(PartialState().device), "sum").cpu()
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
            row[0], row[1] = totals.sizes[index], totals.variances[index]
            if name in totals.factors:
                _, factors = totals.factors[name]
                row[2 : 2 + len(factors)] = factors
            numbers.append(row)
        squares, variances = own.joint_squares(self._groups.values())
        return torch.cat([*numbers, squares * totals.num_outputs, variances * totals.num_outputs**2])

    def _read(self, own: Measurement, summed: Tensor) -> Measurement:
        header, *rows, squares, variances = summed.split([_HEADER, *self._widths.values(), *[len(self._groups)] * 2])
        *_, num_probes, num_outputs = header.tolist()
        sizes, of_sizes = (torch.stack([row[column] for row in rows]) for column in range(2))
        factors = {}
        for name, row in zip(self._widths, rows, strict=True):
            estimator, mine = own.totals.factors.get(name, (self._estimator, row[2:]))
            if row[2:].any():
                factors[name] = estimator, row[2 : 2 + len(mine)]
        totals = Totals(int(num_probes), num_outputs, sizes, of_sizes, factors)
        estimators = {
            name: of_own if of_own != UNUSED or not row[[0, *range(2, len(row))]].any() else self._used(name, factors)
            for (name, of_own), row in zip(own.estimators.items(), rows, strict=True)
        }
        rates, errors = rates_from(squares, variances, num_outputs)
        pooled = dict(zip(self._groups, zip(rates.tolist(), errors.tolist(), strict=True), strict=True))
        return Measurement.of(totals, estimators, own.inner_products, own.draws, pooled)

    def _used(self, name: str, factors: Mapping[str, object]) -> str:
        return self._estimator if name in factors else "per_example"
