"""Runs with DDP: no trace when recording, matched as on one process, failing and saving together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_flerm import FLeRMConfig, Measurement, RateProfile, RateProfileError, Research
from hf_flerm.optimizer.step import Snapshot
from hf_flerm.rates.probe import RateProbe
from hf_flerm.rates.process_sum import ProcessSum
from tests.shared.distributed import (
    ACCUMULATED,
    DATA,
    DROPOUT,
    PAIR,
    STABLE,
    UNEVEN,
    base_of,
    drawn_by_all,
    following,
    matched_run,
    whole,
)
from tests.shared.processes import launch
from tests.shared.training import (
    MEASURED,
    MODELS,
    Rows,
    assert_same_run,
    flerm_callback,
    gpt2,
    make_trainer,
    recorded,
    scaled,
    train,
)

BYTES_PER_TENSOR = 64


class Traffic:
    """What goes over the wire while a measurement is made."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        for name in ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor"):
            original = getattr(dist, name)

            def counted(tensor: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
                sent = tensor if isinstance(tensor, Tensor) else args[0]
                self.sizes.append(sent.numel() * sent.element_size())
                return original(tensor, *args, **kwargs)

            patch.setattr(dist, name, counted)


def ddp_runs(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, model in MODELS.items():
        options = {**ACCUMULATED, "data": Rows(UNEVEN)}
        plain = train(make_trainer(folder, model(DROPOUT), **options))
        for alone in (False, True):
            assert_same_run(train(make_trainer(folder, model(DROPOUT), FLeRMConfig(), alone=alone, **options)), plain)
        found[kind] = bytes_of(folder, model())
    return found


def bytes_of(folder: Path, model: nn.Module) -> tuple[int, list[list[int]]]:
    with pytest.MonkeyPatch.context() as patch:
        measured = []
        original = ProcessSum.__call__

        def add_up(self: ProcessSum, *own: Any) -> Measurement | None:
            before = len(traffic.sizes)
            result = original(self, *own)
            measured.append(traffic.sizes[before:])
            return result

        patch.setattr(ProcessSum, "__call__", add_up)
        traffic = Traffic(patch)
        base = recorded(folder / "base", model, max_steps=3)
        config = FLeRMConfig(mode="match", profile=base)
        make_trainer(folder, model, config, max_steps=3).train()
    return len(base.names), measured


def test_recording_leaves_no_trace_and_sends_sums_alone(tmp_path: Path) -> None:
    for result in launch(ddp_runs, PAIR, tmp_path, tmp_path):
        for tensors, measured in result.values():
            assert [len(sizes) for sizes in measured] == [1] * 6, "one collective for each measurement"
            assert max(sizes[0] for sizes in measured) <= BYTES_PER_TENSOR * tensors


def matched_runs(folder: Path) -> dict[str, Any]:
    return {kind: matched_run(folder, kind, per_device_train_batch_size=2) for kind in MODELS}


def test_a_matched_run_is_that_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = launch(matched_runs, PAIR, tmp_path, tmp_path)
    for kind in MODELS:
        first, second = (result[kind] for result in together)
        assert first["scales"] == second["scales"], "bit for bit"
        assert first["profile"] == second["profile"]
        assert len({round(math.log(scale), 3) for scale in first["scales"].values()}) > 3
        with monkeypatch.context() as patch:
            drawn_by_all(patch, PAIR)
            alone = matched_run(tmp_path, kind, per_device_train_batch_size=2 * PAIR)
        assert first["scales"] == pytest.approx(alone["scales"], rel=1e-3)
        for part in ("rates", "joint"):
            assert {n: r[0] for n, r in first[part].items()} == pytest.approx(
                {n: r[0] for n, r in alone[part].items()}, rel=1e-4
            )
        for name, weight in alone["weights"].items():
            assert torch.equal(first["weights"][name], second["weights"][name])
            torch.testing.assert_close(first["weights"][name], weight, rtol=1e-3, atol=1e-4)


def failing_runs(folder: Path) -> dict[str, Any]:
    """Something fails on the second process alone, at the second measurement."""
    plain = train(make_trainer(folder, gpt2(DROPOUT)))
    found = {}
    for name, (owner, method, error) in FAILURES.items():
        calls = 0
        original = getattr(owner, method)

        def failing(*args: Any, original: Any = original, error: Exception = error, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2 and dist.get_rank() == 1:
                raise error
            return original(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, method, failing)
            trainer = make_trainer(folder, gpt2(DROPOUT), FLeRMConfig())
            assert_same_run(train(trainer), plain)
        found[name] = (trainer.rate_profile.steps.tolist(), trainer.rate_profile.to_bytes())
    return found


FAILURES: dict[str, tuple[Any, str, Exception]] = {
    "probe": (RateProbe, "measure", ValueError("no finite number")),
    "snapshot": (Snapshot, "__init__", RuntimeError("no disk")),
    "memory": (Snapshot, "__init__", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")),
}


def test_what_fails_on_one_process_fails_on_all(tmp_path: Path) -> None:
    first, second = launch(failing_runs, PAIR, tmp_path, tmp_path)
    assert first == second
    assert {name: steps for name, (steps, _) in first.items()} == {
        "probe": [0, 2, 4],
        "snapshot": [0, 2, 4],
        "memory": [0],  # and nothing after that, on either
    }


def saving_runs(folder: Path) -> dict[str, Any]:
    """Two checkpoints, of two processes; what is written by whom; data of every kind."""
    written: list[str] = []
    original = RateProfile.save_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RateProfile, "save_pretrained", lambda self, d: (written.append(str(d)), original(self, d))[1])
        saved = matched_run(folder / "two", "full", save_strategy="steps", save_steps=3, per_device_train_batch_size=2)
    steps = {}
    for name, options in DATA.items():
        config = FLeRMConfig(research=Research(probes="auto", max_probes=4)) if name == "auto" else FLeRMConfig()
        trainer = make_trainer(folder / name, gpt2(), config, max_steps=3, **options)
        trainer.train()
        steps[name] = (trainer.rate_profile.steps.tolist(), trainer.rate_profile.to_bytes())
    return {"saved": saved, "written": written, "steps": steps, "refused": refusal(folder)}


def refusal(folder: Path) -> str:
    """Each process has another base."""
    base = scaled(base_of("full"), dict.fromkeys(base_of("full").rates, 1.0 + dist.get_rank()))
    with pytest.raises(RateProfileError) as caught:
        make_trainer(folder, gpt2(), FLeRMConfig(mode="match", profile=base)).train()
    return str(caught.value)


def test_files_are_written_once_and_read_by_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = launch(saving_runs, PAIR, tmp_path, tmp_path)
    assert second["written"] == []
    assert {Path(place).name for place in first["written"]} == {"checkpoint-3", "checkpoint-6", "two"}
    assert first["steps"] == second["steps"]
    assert {name: steps for name, (steps, _) in first["steps"].items()} == {name: [0, 1, 2] for name in DATA}
    assert "the profile is not the same on all 2 processes" in first["refused"]
    assert first["refused"] == second["refused"]
    # What two processes have saved goes on in one, and the other way round.
    options = {"save_strategy": "steps", "save_steps": 3}
    with monkeypatch.context() as patch:
        drawn_by_all(patch, PAIR)
        alone = resumed_run(tmp_path / "two" / "checkpoint-3", tmp_path / "resumed", 2 * PAIR)
        matched_run(tmp_path / "one", "full", per_device_train_batch_size=2 * PAIR, **options)
    parted, _ = launch(resumed_run, PAIR, tmp_path / "b", tmp_path / "one" / "checkpoint-3", tmp_path / "resumed", 2)
    for resumed in (alone, parted):
        assert resumed["scales"] == pytest.approx(first["saved"]["scales"], rel=1e-3)
        for name, weight in first["saved"]["weights"].items():
            torch.testing.assert_close(resumed["weights"][name], weight, rtol=1e-3, atol=1e-4)
        assert resumed["steps"] == MEASURED


def resumed_run(checkpoint: Path, folder: Path, batch: int) -> dict[str, Any]:
    trainer = make_trainer(folder, gpt2(), following("full"), **STABLE, per_device_train_batch_size=batch)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return {
        "weights": whole(trainer.model),
        "scales": flerm_callback(trainer).scales,
        "steps": trainer.rate_profile.steps.tolist(),
    }
