"""A measurement on several processes has the rates of one process, and errors that fall with their number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from hf_flerm import Measurement
from hf_flerm.choices import Estimator, values
from hf_flerm.model.names import trainable_parameters
from hf_flerm.rates.probe import RateProbe
from hf_flerm.rates.process_sum import ProcessSum
from hf_flerm.transfer.mapping import joint_groups
from tests.shared.distributed import PAIR
from tests.shared.processes import launch
from tests.shared.training import MODELS

MEASURED_TOGETHER = [("full", e) for e in values(Estimator) if e != "exact"] + [
    ("lora", "per_example"),
    ("lora", "exact"),
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moving(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and unit updates of all that it trains."""
    model = MODELS[kind](**({"init": False} if kind == "lora" else {}))
    generator = seeded(1)
    parameters = trainable_parameters(model)
    return model, {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}


def groups_of(model: nn.Module) -> list[dict[str, float]]:
    parameters = trainable_parameters(model)
    shares = {name: 1 / (index + 1) for index, name in enumerate(parameters)}
    return [shares, *(g for groups in joint_groups(model, parameters).values() for g in groups.values())]


def batches_of(rank: int, count: int) -> list[dict[str, Tensor]]:
    """Batches of one process, no two alike in size or padding."""
    generator = seeded(100 + rank)
    batches = []
    for index in range(count):
        tokens = torch.randint(32, (2 + (rank + index) % 3, 8), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, 6 - rank % 3 :] = 0
        batches.append({"input_ids": tokens, "attention_mask": mask})
    return batches


def one_after_the_other(ranks: int, count: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """The batches of all processes, each process's with its own omega."""
    for rank in range(ranks):
        generator.set_state(seeded(rank).get_state())
        yield from batches_of(rank, count)


def probe_together(kind: str, estimator: str, count: int) -> dict[str, Any]:
    rank = dist.get_rank()
    model, moves = moving(kind)
    probe = RateProbe(model, estimator=estimator)
    shapes = {name: parameter.shape for name, parameter in trainable_parameters(model).items()}
    measured = probe.measure(moves, batches_of(rank, count), seeded(rank))
    result = ProcessSum(shapes, estimator)(measured, groups_of(model))
    return summary(model, result)


def summary(model: nn.Module, result: Measurement) -> dict[str, Any]:
    groups = dict(enumerate(groups_of(model)))
    return {
        "rates": result.rates,
        "errors": result.standard_errors,
        "estimators": result.estimators,
        "joint": result.joint_rates(groups),
        "total": result.total,
        "num_probes": result.num_probes,
    }


def measurements(cases: list[tuple[str, str]], count: int) -> dict[tuple[str, str], dict[str, Any]]:
    PartialState(cpu=True)
    return {(kind, estimator): probe_together(kind, estimator, count) for kind, estimator in cases}


@pytest.mark.parametrize("ranks", [2, 4])
def test_rates_are_those_of_one_process(tmp_path: Path, ranks: int) -> None:
    count = 3
    cases = MEASURED_TOGETHER if ranks == PAIR else MEASURED_TOGETHER[:2]
    results = launch(measurements, ranks, tmp_path, cases, count)
    assert all(result == results[0] for result in results[1:]), "the processes differ in a bit"
    for (kind, estimator), found in results[0].items():
        model, moves = moving(kind)
        generator = seeded(0)
        alone = RateProbe(model, estimator=estimator).measure(
            moves, one_after_the_other(ranks, count, generator), generator
        )
        expected = summary(model, alone)
        assert found["num_probes"] == ranks * count
        assert found["estimators"] == expected["estimators"]
        assert found["rates"] == pytest.approx(expected["rates"], rel=1e-5), (kind, estimator)
        # Errors of what is measured by weight gradient are linearized on each process: the same only on average.
        exact = estimator in ("per_example", "exact")
        assert_errors(found["errors"], expected["errors"], exact=exact)
        rates, errors = (dict(enumerate(column)) for column in zip(*found["joint"].values(), strict=True))
        of_one = [dict(enumerate(column)) for column in zip(*expected["joint"].values(), strict=True)]
        assert rates == pytest.approx(of_one[0], rel=1e-5, abs=1e-5 * found["total"]), (kind, estimator)
        assert_errors(errors, of_one[1], exact=exact)


def assert_errors(found: Mapping[Any, float], expected: Mapping[Any, float], *, exact: bool) -> None:
    if exact:
        assert found == pytest.approx(expected, rel=1e-5)
        return
    logs = [math.log(error / expected[key]) for key, error in found.items() if error or expected[key]]
    assert abs(sum(logs) / len(logs)) < 0.25


def errors_of(count: int) -> dict[str, float]:
    return measurements([("full", "per_example")], count)["full", "per_example"]["errors"]


def test_errors_fall_as_the_root_of_the_number_of_processes(tmp_path: Path) -> None:
    count = 8
    four, *_ = launch(errors_of, 4, tmp_path, count)
    model, moves = moving("full")
    single = RateProbe(model).measure(moves, batches_of(0, count), seeded(0)).standard_errors
    ratios = [math.log(four[name] / single[name]) for name in four]
    assert sum(ratios) / len(ratios) == pytest.approx(math.log(1 / 2), abs=0.1)
