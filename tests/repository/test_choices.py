"""The Literals of `hf_flerm.choices` are the values that the code dispatches on, that it takes, and that it names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_flerm import FLeRMConfig, RateProfile, Research, choices, map_profile, measure_rates
from hf_flerm.cli import app
from hf_flerm.rates.estimators import WEIGHT_GRADIENT_ESTIMATORS
from hf_flerm.rates.metrics import METRICS
from hf_flerm.rates.outputs import OUTPUTS
from hf_flerm.show.plotting import PICTURES
from tests.shared.training import gpt2

TABLES: dict[str, tuple[object, Collection[str]]] = {
    "output": (choices.Output, OUTPUTS),
    "metric": (choices.Metric, METRICS),
    "estimator": (choices.Estimator, {"per_example", "exact", *WEIGHT_GRADIENT_ESTIMATORS}),
    "picture": (choices.Picture, PICTURES),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_have_the_values_of_their_literals(name: str) -> None:
    choice, table = TABLES[name]
    assert set(choices.values(choice)) == set(table)


def measured(**options: Any) -> object:
    model = torch.nn.Linear(2, 2)
    return measure_rates(model, {"weight": torch.ones(2, 2)}, [{"input": torch.ones(1, 2)}], **options)


def mapped(**options: Any) -> object:
    return map_profile(RateProfile([0], {"x": [1.0]}), gpt2(), **options)


TAKEN: list[tuple[str, object, Callable[..., object]]] = [
    ("mode", choices.Mode, FLeRMConfig),
    ("granularity", choices.Granularity, FLeRMConfig),
    ("unmatched", choices.Unmatched, FLeRMConfig),
    ("metric", choices.Metric, FLeRMConfig),
    ("positions", choices.Positions, FLeRMConfig),
    ("output", choices.Output, FLeRMConfig),
    ("log_by", choices.LogBy, FLeRMConfig),
    ("estimator", choices.Estimator, Research),
    ("depth", choices.Depth, Research),
    ("pool", choices.Pool, Research),
    ("estimator", choices.Estimator, measured),
    ("metric", choices.Metric, measured),
    ("positions", choices.Positions, measured),
    ("output", choices.Output, measured),
    ("granularity", choices.Granularity, mapped),
    ("depth", choices.Depth, mapped),
    ("unmatched", choices.Unmatched, mapped),
]


@pytest.mark.parametrize(("name", "choice", "taker"), TAKEN, ids=lambda value: getattr(value, "__name__", str(value)))
def test_messages_name_every_value(name: str, choice: object, taker: Callable[..., object]) -> None:
    allowed = ", ".join(choices.values(choice))
    with pytest.raises(ValueError, match=rf"^{name} is 'wrong'; it must be one of {allowed}"):
        taker(**{name: "wrong"})


@pytest.mark.parametrize(
    ("command", "option", "choice"),
    [
        ("map", "--granularity", choices.Granularity),
        ("map", "--depth", choices.Depth),
        ("map", "--unmatched", choices.Unmatched),
        ("plan", "--granularity", choices.Granularity),
        ("plot", "--what", choices.Picture),
    ],
)
def test_the_command_line_takes_every_value(command: str, option: str, choice: object) -> None:
    result = CliRunner().invoke(app, [command, "a", "b", "c", option, "wrong"], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert all(f"'{value}'" in result.output for value in choices.values(choice))
