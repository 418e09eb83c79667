"""The folder of a sweep. What it holds is whole: a sweep that was killed goes on from its finished runs.

settings.json                               what all runs share
runs/RATE-seed-SEED/rate_profile.safetensors  the profile of a complete run
runs/RATE-seed-SEED/run.json                  the run; written last, it says that the run is finished
rate_profile.safetensors                    the profile of the best run, with the sweep in its metadata
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sized
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from ...model.isolation import kept_random_state, own_generators
from ...profile.file import write_whole
from ...profile.rate_profile import RateProfile
from .run import Recipe, SweepRun

_SETTINGS, _PLAN, _RUN = "settings.json", "plan.json", "run.json"
_DIFFERS_BY_RUN = {"learning_rate", "seed", "output_dir", "run_name"}
_NO_EFFECT = ("logging_", "save_", "hub_", "dataloader_num", "dataloader_pin", "dataloader_pre", "dataloader_pers")


@dataclass(frozen=True)
class SweepFolder:
    """The runs of one sweep on disk.

    Attributes:
        path: The folder; it is created when something is written.
    """

    path: Path

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Write the settings of a sweep into the folder, or compare them with those that it holds.

        Raises:
            ValueError: If it holds a sweep with other settings.
        """
        file = self.path / _SETTINGS
        if not file.exists():
            write_whole(file, _json(settings))
            return
        before, now = dict(_flat(_read(file))), dict(_flat(settings))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            differences = "; ".join(f"{key} was {before.get(key)!r:.80}, is {now.get(key)!r:.80}" for key in changed)
            raise ValueError(
                f"{self.path} holds a sweep with other settings: {differences}. Give another folder, or go on with the "
                "settings of that sweep. (A model that is initialized at random needs set_seed before it is made.)"
            )

    def read_middle(self) -> float | None:
        """Return the learning rate in the middle of the grid, if one was planned."""
        file = self.path / _PLAN
        return float(_read(file)["middle"]) if file.exists() else None

    def write_middle(self, learning_rate: float, plan: Mapping[str, Any]) -> None:
        """Write the learning rate in the middle of the grid, and the plan that it comes from."""
        write_whole(self.path / _PLAN, _json({"middle": learning_rate, "plan": plan}))

    def read(self, learning_rate: float, seed: int) -> SweepRun | None:
        """Return the finished run at a learning rate with a seed; None if there is none."""
        file = self._run(learning_rate, seed) / _RUN
        if not file.exists():
            return None
        content = _read(file)
        try:
            loss = content.pop("loss")
            losses = tuple(content.pop("training_losses"))
            return SweepRun(**content, loss=math.inf if loss is None else loss, training_losses=losses)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a run of a sweep: {error}. Delete it to train it again.") from error

    def write(self, run: SweepRun, profile: RateProfile) -> None:
        """Write a finished run; its profile, too, if the run is complete."""
        folder = self._run(run.learning_rate, run.seed)
        if run.end == "complete":
            profile.save_pretrained(folder)
        loss = run.loss if math.isfinite(run.loss) else None
        write_whole(folder / _RUN, _json({**asdict(run), "loss": loss}))

    def profile(self, run: SweepRun) -> RateProfile:
        """Return the profile of a complete run."""
        return RateProfile.from_pretrained(self._run(run.learning_rate, run.seed))

    def _run(self, learning_rate: float, seed: int) -> Path:
        return self.path / "runs" / f"{learning_rate:g}-seed-{seed}"


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return what determines the trainings of a sweep, apart from learning rate and seed, as values for JSON.

    Weights are hashed, and so are a few examples of the data: those of another model or data set are told apart.
    """
    trainer: Any = recipe.trainer
    arguments = {
        name: value
        for name, value in recipe.arguments("", 0.0, 0).to_dict().items()
        if name not in _DIFFERS_BY_RUN and not name.startswith(_NO_EFFECT)
    }
    optimizer = trainer.optimizer
    found: dict[str, Any] = {
        "trainer": type(trainer).__name__,
        "arguments": arguments,
        "weights": _hash_of_weights(trainer.model),
        "train_dataset": _described(trainer.train_dataset, trainer.args.device),
        "eval_dataset": _described(trainer.eval_dataset, trainer.args.device),
        "optimizer": optimizer and f"{type(optimizer).__name__} {_without_rate(optimizer.defaults)}",
        "flerm": {
            entry.name: str(getattr(value, "__qualname__", value))
            for entry in fields(recipe.config)
            for value in [getattr(recipe.config, entry.name)]
        },
    }
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]


def _without_rate(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "lr"}


def _hash_of_weights(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _described(dataset: Any, device: torch.device) -> Any:
    """Describe a data set by its class, its length and a hash of its first, middle and last example."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):  # several evaluation sets
        return {name: _described(each, device) for name, each in dataset.items()}
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        return type(dataset).__name__
    with kept_random_state(device), own_generators(dataset):
        set_seed(0)  # examples may be drawn at random
        examples = [repr(dataset[index]) for index in (0, len(dataset) // 2, len(dataset) - 1)] if len(dataset) else []
    text = "\n".join(examples)
    return f"{type(dataset).__name__} of {len(dataset)} examples, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield path + key, value


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode()


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise TypeError("it is not a JSON object")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a file of a sweep: {error}. Delete it to go on without it.") from error
    return content
