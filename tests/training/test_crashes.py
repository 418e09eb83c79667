"""A training that is killed at any moment leaves whole files, and goes on to where it would have ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_flerm import RateProfile
from hf_flerm.profile.rate_profile import PROFILE_NAME
from tests.shared import ROOT
from tests.shared.killed_run import STEPS, train, whole_checkpoint
from tests.shared.training import MODELS, assert_identical, recorded, scaled, some_factors

MOMENTS = 50
FILE_OPERATIONS = 70  # about as many as a run makes
FINAL = f"checkpoint-{STEPS}"
WEIGHTS = {"record": "model.safetensors", "match": "adapter_model.safetensors"}


class Processes:
    """Fresh processes, forked from one that has imported everything and run nothing."""

    def __init__(self, base: Path) -> None:
        self.bases = {"record": None, "match": base}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([train.__module__])

    def run(self, mode: str, folder: Path, *, kill_after: float | None = None, **options: Any) -> int | None:
        process = self._context.Process(target=train, args=(folder, self.bases[mode]), kwargs=options)
        process.start()
        process.join(kill_after)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Processes:
    folder = tmp_path_factory.mktemp("base")
    model = MODELS["lora"]()
    scaled(recorded(folder / "run", model), some_factors(model)).save_pretrained(folder)
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    found = Processes(folder)
    found.run("record", folder / "first")  # starts the server of processes, which keeps the environment
    patch.undo()
    return found


@pytest.fixture(scope="module")
def undisturbed(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("undisturbed")
    for mode in WEIGHTS:
        assert processes.run(mode, folder / mode) == 0
    return {mode: folder / mode for mode in WEIGHTS}


def assert_same_end(mode: str, folder: Path, expected: Path) -> None:
    for own, other in ((folder, expected), (folder / FINAL, expected / FINAL)):
        assert (own / PROFILE_NAME).read_bytes() == (other / PROFILE_NAME).read_bytes()
    own, other = folder / FINAL, expected / FINAL
    assert_identical(load_file(own / WEIGHTS[mode]), load_file(other / WEIGHTS[mode]), "weights")
    for name in ("optimizer.pt", "scheduler.pt"):
        assert_identical(torch.load(own / name), torch.load(other / name), name)
    losses = [
        [entry["loss"] for entry in json.loads((end / "trainer_state.json").read_text())["log_history"]]
        for end in (own, other)
    ]
    assert losses[0] == losses[1]


def killed(processes: Processes, mode: str, folder: Path, numbers: random.Random) -> None:
    """Kill one run, at a time or at an operation on its files; earlier, if it was through by then."""
    at_a_file = numbers.random() < 0.5
    moment = numbers.uniform(1, FILE_OPERATIONS) if at_a_file else numbers.uniform(0.05, 1.5)
    for _ in range(20):
        options = {"operations": int(moment)} if at_a_file else {"kill_after": moment}
        if processes.run(mode, folder, **options) == -signal.SIGKILL:
            return
        shutil.rmtree(folder)
        moment /= 2
    raise AssertionError(f"run could not be killed in {folder}")


def test_killed_at_any_moment(processes: Processes, undisturbed: dict[str, Path], tmp_path: Path) -> None:
    def survive(index: int) -> str | None:
        numbers = random.Random(index)
        mode, folder = numbers.choice(list(WEIGHTS)), tmp_path / str(index)
        killed(processes, mode, folder, numbers)
        for file in folder.glob(f"**/{PROFILE_NAME}"):
            assert len(RateProfile.from_pretrained(file).steps)
        checkpoint = whole_checkpoint(folder)
        if checkpoint is not None:
            assert Path(checkpoint, PROFILE_NAME).is_file()
        assert processes.run(mode, folder, resume=checkpoint) == 0
        assert_same_end(mode, folder, undisturbed[mode])
        return checkpoint and Path(checkpoint).name

    with ThreadPoolExecutor(2) as pool:
        resumed = list(pool.map(survive, range(MOMENTS)))
    assert len(resumed) == MOMENTS
    assert len(set(resumed)) >= STEPS  # they were killed early and late
