"""What the tests of trainings ask for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """The Trainer collects garbage whenever it starts; the imported libraries need not be searched every time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For runs that write nothing."""
    return tmp_path_factory.mktemp("runs")
