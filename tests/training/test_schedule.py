"""When a run measures: densely at first, then now and then, and what was missed at the next step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hf_flerm.training.schedule import Schedule

EARLY = {0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64}


def measured(schedule: Schedule, steps: int, succeeds: Callable[[int], bool] = lambda step: True) -> list[int]:
    """The steps that a run measures."""
    found: list[int] = []
    for step in range(steps):
        if schedule.is_due(step, found[-1] if found else None) and succeeds(step):
            found.append(step)
    return found


@pytest.mark.parametrize("every", [1, 50, 100])
def test_measures_densely_at_first_and_then_every_so_often(every: int) -> None:
    assert measured(Schedule(every), 401) == sorted(EARLY | set(range(0, 401, every)))


def test_explicit_steps_take_the_place_of_the_schedule() -> None:
    assert measured(Schedule(1, (2, 7)), 401) == [2, 7]


def test_a_measurement_that_failed_is_made_at_the_next_step() -> None:
    assert measured(Schedule(100, (0, 5, 9)), 20, lambda step: step not in (0, 1, 5, 9, 10)) == [2, 6, 11]


def test_two_measurements_that_failed_are_made_up_for_by_one() -> None:
    assert measured(Schedule(100, (0, 5, 9)), 20, lambda step: not 5 <= step < 12) == [0, 12]


def test_a_resumed_run_measures_nothing_twice() -> None:
    schedule = Schedule(100, (0, 5))
    assert [schedule.is_due(step, 5) for step in (5, 6, 100)] == [False] * 3
