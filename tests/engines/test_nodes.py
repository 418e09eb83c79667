"""Several nodes, each with a disk of its own: the first process's profile counts, on all or on none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_flerm import FLeRMConfig, RateProfile, RateProfileError, Research
from hf_flerm.profile.rate_profile import PROFILE_NAME
from tests.shared.processes import launch
from tests.shared.training import flerm_callback, gpt2, make_trainer, scaled, some_factors, weights_of

NODES = 2
SAVING: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}


def base() -> RateProfile:
    rates = {name: [3.0 * factor] for name, factor in some_factors(gpt2()).items()}
    return RateProfile([0], rates)


def disk(folder: Path) -> Path:
    """Of this process's node."""
    return folder / f"node {dist.get_rank()}"


def matched(place: Path, profile: Any, resume: Path | None = None, **options: Any) -> dict[str, Any]:
    research = Research(policy="follow")
    config = FLeRMConfig(mode="match", profile=profile, measure_steps=(0, 2), max_change=1e6, research=research)
    trainer = make_trainer(place, gpt2(), config, **{**SAVING, **options})
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return {
        "weights": {name: weight.tolist() for name, weight in weights_of(trainer.model).items()},
        "scales": flerm_callback(trainer).scales,
        "profile": trainer.rate_profile.to_bytes(),
    }


def whole_checkpoint(folder: Path, run: Path) -> Path:
    """A checkpoint with weights: Transformers writes these on the first node alone."""
    checkpoint = run / "checkpoint-2"
    weights = folder / "node 0" / run.name / "checkpoint-2" / SAFE_WEIGHTS_NAME
    if not (checkpoint / SAFE_WEIGHTS_NAME).exists():
        shutil.copy(weights, checkpoint)
    return checkpoint


def profiles_in(place: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(place)) for path in place.rglob(PROFILE_NAME))


def runs_on_disks_of_their_own(folder: Path) -> dict[str, Any]:
    """The base lies on the first node's disk alone."""
    own = disk(folder)
    if dist.get_rank() == 0:
        base().save_pretrained(own / "base")
    found: dict[str, Any] = {"written": {}}
    for name, each in (("first", False), ("each", True)):
        found[name] = matched(own / name, own / "base", save_on_each_node=each)
        found["written"][name] = profiles_in(own / name)
    checkpoint = whole_checkpoint(folder, own / "each")
    found["resumed"] = matched(own / "resumed", own / "base", checkpoint, save_on_each_node=True)
    if dist.get_rank() == 1:
        (checkpoint / PROFILE_NAME).unlink()
    found["resumed without"] = matched(own / "resumed", own / "base", checkpoint, save_on_each_node=True)
    return found


def runs_in_one_folder(folder: Path) -> dict[str, Any]:
    written: list[str] = []
    original = RateProfile.save_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RateProfile, "save_pretrained", lambda self, d: (written.append(str(d)), original(self, d))[1])
        whole = matched(folder / "shared", base())
        resumed = matched(folder / "resumed", base(), folder / "shared" / "checkpoint-2")
    return {"written": [Path(place).name for place in written], "whole": whole, "resumed": resumed}


def test_the_first_of_all_processes_writes_what_nodes_share(tmp_path: Path) -> None:
    first, second = launch(runs_in_one_folder, NODES, tmp_path, tmp_path, nodes=NODES)
    assert first.pop("written") == ["checkpoint-2", "checkpoint-3", "shared", "checkpoint-3", "resumed"]
    assert second.pop("written") == []
    assert first == second
    assert first["whole"] == first["resumed"]


def test_each_node_may_have_a_disk_of_its_own(tmp_path: Path) -> None:
    first, second = launch(runs_on_disks_of_their_own, NODES, tmp_path, tmp_path, nodes=NODES)
    places = [".", "checkpoint-2", "checkpoint-3"]
    assert first.pop("written") == {"first": places, "each": places}
    assert second.pop("written") == {"first": [], "each": places}
    assert first == second, "bit for bit"
    assert len(set(first["first"]["scales"].values())) > 3
    assert first["first"] == first["each"] == first["resumed"] == first["resumed without"]


def refusals(folder: Path) -> dict[str, str]:
    own, rank = disk(folder), dist.get_rank()
    found = {}

    def refused(name: str, profile: Any, resume: Path | None = None) -> None:
        with pytest.raises(RateProfileError) as caught:
            matched(own / name, profile, resume)
        found[name] = str(caught.value)

    refused("nowhere", own / "nowhere")
    if rank == 1:
        base().save_pretrained(own / "second")
    refused("second", own / "second")
    damaged = own / "damaged"
    base().save_pretrained(damaged)
    if rank == 0:
        (damaged / PROFILE_NAME).write_bytes(b"{")
    refused("damaged", damaged)
    refused("other", scaled(base(), dict.fromkeys(base().rates, 1.0 + rank)))
    matched(own / "run", base(), save_on_each_node=True)
    checkpoint = whole_checkpoint(folder, own / "run")
    if rank == 0:
        (checkpoint / PROFILE_NAME).unlink()
    refused("checkpoint", base(), checkpoint)
    return found


def test_what_one_node_cannot_use_is_refused_on_all(tmp_path: Path) -> None:
    first, second = launch(refusals, NODES, tmp_path, tmp_path, nodes=NODES)
    assert first == second
    unread = "the profile cannot be read on the first process:"
    assert first["nowhere"].startswith(unread)
    assert first["second"].startswith(unread)
    assert first["damaged"].startswith(f"{unread} {tmp_path / 'node 0' / 'damaged'}")
    differs = "is not the same on all 2 processes. Give the same file to every node, or to the first node alone."
    assert first["other"] == f"the profile {differs}"
    assert first["checkpoint"] == f"the checkpoint's profile {differs}"
