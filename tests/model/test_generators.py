"""Random generators that collators and data sets keep are put back, wherever they keep them."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from hf_flerm.model.isolation import own_generators

Draw = Callable[[], float]
SHARED = torch.Generator()


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand(1, generator=generator))
    return float(generator.random() if hasattr(generator, "random") else generator.random_sample())


def draw_from_default(generator: Any = random.Random(1)) -> float:  # noqa: B008
    return draw(generator)


class Attribute:
    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __call__(self) -> float:
        return draw(self.generator)


class Lazy:
    """Makes its generator at its first call, in the place of a class's None."""

    generator: torch.Generator | None = None

    def __call__(self) -> float:
        self.generator = self.generator or torch.Generator().manual_seed(3)
        return draw(self.generator)


class OfTheClass:
    generator = torch.Generator().manual_seed(4)

    def __call__(self) -> float:
        return draw(self.generator)


class OfTheModule:
    def __call__(self) -> float:
        return draw(SHARED)


class Inside:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self) -> float:
        return self.value()  # type: ignore[no-any-return]


class Settings:
    def __init__(self) -> None:
        self.options = {"generators": [torch.Generator().manual_seed(5)]}

    def __call__(self) -> float:
        return draw(self.options["generators"][0])

    def collate(self) -> float:
        return draw(self.options["generators"][0])


class Reseeds:
    """Replaces its generator at every call."""

    def __init__(self) -> None:
        self.generator = random.Random(0)

    def __call__(self) -> float:
        drawn = self.generator.random()
        self.generator = random.Random(drawn)
        return drawn


def in_a_closure() -> Draw:
    generator = torch.Generator().manual_seed(6)
    return lambda: draw(generator)


HOLDERS: dict[str, Callable[[], Draw]] = {
    "attribute, torch": lambda: Attribute(torch.Generator().manual_seed(1)),
    "attribute, numpy": lambda: Attribute(np.random.default_rng(1)),
    "attribute, old numpy": lambda: Attribute(np.random.RandomState(1)),
    "attribute, random": lambda: Attribute(random.Random(1)),
    "made at the first call": Lazy,
    "replaced": Reseeds,
    "of the class": OfTheClass,
    "of the module": OfTheModule,
    "in settings": Settings,
    "in a closure": in_a_closure,
    "in a partial": lambda: partial(draw, np.random.default_rng(2)),
    "keyword of a partial": lambda: partial(draw, generator=random.Random(2)),
    "default of a function": lambda: draw_from_default,
    "bound method": lambda: Settings().collate,
    "collator in a collator": lambda: Inside(Inside(in_a_closure())),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("earlier", [0, 2], ids=["new", "used before"])
def test_what_is_drawn_in_the_block_is_drawn_again_after_it(holder: str, earlier: int) -> None:
    drawing = HOLDERS[holder]()
    for _ in range(earlier):
        drawing()
    inside: list[float] = []

    def raising() -> None:
        with own_generators(drawing):
            inside.extend(drawing() for _ in range(3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        raising()
    assert [drawing() for _ in range(3)] == inside


def test_data_and_what_has_no_state_are_left_alone() -> None:
    class Rows:
        def __init__(self) -> None:
            self.rows = [random.Random(index) for index in range(100)]  # examples, not settings
            self.system = random.SystemRandom()

    rows = Rows()
    expected = random.Random(7)
    with own_generators(rows, None):
        rows.rows[7].random()
        rows.system.random()
    expected.random()
    assert rows.rows[7].random() == expected.random()
