"""What the tests of several folders ask for."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers
from huggingface_hub import constants

from tests.shared.hub_server import WRITE, Hub, running_hub


def pytest_collection_finish() -> None:
    """Take what was imported, which stays until the end, out of the collections of garbage.

    Every training ends with a full collection. Among the objects of all the libraries it takes longer than a tiny
    training. What the tests make themselves is collected as ever.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests run in a temporary folder: what they write by a relative path does not land in the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        yield


@pytest.fixture(autouse=True)
def _warned_of_nothing() -> None:
    """Transformers gives some warnings once in a process; here every test gets its own, whatever ran before it."""
    transformers.utils.logging.warning_once.cache_clear()


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings of the package so far."""
    caplog.set_level(logging.WARNING, "hf_flerm")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("hf_flerm")]


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub and an empty cache; the client's settings are what its environment variables would set."""
    server.forget()
    settings: dict[str, Any] = {
        "ENDPOINT": server.endpoint,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    if hasattr(transformers.utils.hub, "hf_api"):  # older versions have none of their own
        monkeypatch.setattr(transformers.utils.hub.hf_api(), "endpoint", server.endpoint)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
    monkeypatch.setenv("HF_TOKEN", WRITE)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()


# Trackio reads this where it is imported first, which TRL does.
_tracked = tempfile.TemporaryDirectory(prefix="trackio-")
os.environ["TRACKIO_DIR"] = _tracked.name
