"""What the tests of several rooms ask for."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests run in a temporary folder: what they write by a relative path does not land in the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        yield


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings of the package so far."""
    caplog.set_level(logging.WARNING, "hf_flerm")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("hf_flerm")]


# Trackio reads this where it is imported first, which TRL does.
_tracked = tempfile.TemporaryDirectory(prefix="trackio-")
os.environ["TRACKIO_DIR"] = _tracked.name
