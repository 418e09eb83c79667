"""Runs on several processes, and what one process must do to have their numbers."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_flerm import FLeRMConfig, RateProfile, Research
from hf_flerm.model.names import trainable_parameters
from hf_flerm.training.probe_data import ProbeData
from tests.shared import ROOT
from tests.shared.training import MODELS, Rows, Stream, flerm_callback, make_trainer, some_factors

PAIR = 2
EXAMPLES = ROOT / "examples"
SCRIPTS = ("many_processes", "raw_loop")
UNEVEN = 22  # rows: the last global batch of 2 x 4 is short


DROPOUT = 0.1
ACCUMULATED: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}


# Keys' biases have no gradient but round-off, which Adam would make steps of.
STABLE: dict[str, Any] = {"weight_decay": 0.1, "adam_epsilon": 1e-4}


def drawn_by_all(patch: pytest.MonkeyPatch, ranks: int) -> None:
    """Let one process draw, one after the other, what each of several would."""
    original = ProbeData.drawn

    def drawn(self: ProbeData, step: int, device: torch.device) -> Any:
        parts = []
        for rank in range(ranks):
            patch.setitem(PartialState._shared_state, "process_index", rank)
            parts.append(original(self, step, device))
        patch.setitem(PartialState._shared_state, "process_index", 0)
        generator = torch.Generator(device)

        def batches() -> Iterator[Any]:
            for own, source in parts:
                generator.set_state(source.get_state())
                yield from own

        return batches(), generator

    patch.setattr(ProbeData, "drawn", drawn)


def base_of(kind: str) -> RateProfile:
    """What a run must be scaled to match, other than by 1."""
    model = MODELS[kind](**({"init": False} if kind == "lora" else {}))
    names = list(trainable_parameters(model))
    factors = some_factors(model)
    return RateProfile([0], {name: [3.0 * factors[name]] for name in names})


def following(kind: str, steps: Sequence[int] | None = None) -> FLeRMConfig:
    """Match that base, each kind of tensor by its own rates."""
    research = Research(policy="follow", probe_batch_size=4)
    return FLeRMConfig(mode="match", profile=base_of(kind), max_change=1e6, measure_steps=steps, research=research)


def matched_run(
    folder: Path, kind: str, resume: Path | None = None, steps: Sequence[int] | None = None, **options: Any
) -> dict[str, Any]:
    model = MODELS[kind](**({"init": False} if kind == "lora" else {}))
    trainer = make_trainer(folder, model, following(kind, steps), **STABLE, **options)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return outcome(trainer)


def outcome(trainer: Any) -> dict[str, Any]:
    """What a training on several processes is compared by."""
    return {
        "weights": whole(trainer.model),
        "scales": flerm_callback(trainer).scales,
        "rates": {name: rates.tolist() for name, rates in trainer.rate_profile.rates.items()},
        "joint": {n: r.tolist() for g in trainer.rate_profile.joint_rates.values() for n, r in g.items()},
        "profile": trainer.rate_profile.to_bytes(),
    }


DATA: dict[str, dict[str, Any]] = {
    "dispatched": {"accelerator_config": {"dispatch_batches": True}},
    "streamed": {"data": Stream(), "probe_dataset": Rows(8)},
    "streamed and dispatched": {
        "data": Stream(),
        "probe_dataset": Rows(8),
        "accelerator_config": {"dispatch_batches": True},
    },
    "auto": {},
}


def as_on_gpus(patch: pytest.MonkeyPatch) -> None:
    """Accelerate shards on GPUs alone, and makes DDP of it elsewhere: let it take these processes for some."""

    def prepared(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        PartialState(cpu=True)
        AcceleratorState._reset_state()
        patch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_GPU)
        original(self, *args, **kwargs)

    original = Accelerator.__init__
    patch.setattr(Accelerator, "__init__", prepared)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole_tensor(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


def whole_tensor(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if not hasattr(tensor, "ds_tensor"):
        return tensor.detach().clone()
    with importlib.import_module("deepspeed").zero.GatheredParameters(tensor):
        return tensor.detach().clone()


def examples(
    folder: Path, environments: dict[str, dict[str, str]], scripts: tuple[str, ...] = SCRIPTS
) -> dict[tuple[str, str], str]:
    """What the examples print in the environment of each engine."""
    printed = {}
    for engine, environment in environments.items():
        with pytest.MonkeyPatch.context() as patch:
            if "ACCELERATE_USE_FSDP" in environment:
                as_on_gpus(patch)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.syspath_prepend(str(EXAMPLES))
            for script in scripts:
                place = folder / engine / script
                patch.setattr(sys, "argv", [script, "--output", str(place), "--steps", "2"])
                with redirect_stdout(StringIO()) as out:
                    runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
                printed[engine, script] = out.getvalue()
    return printed


def launched(engine: str) -> Any:
    """The arguments that `accelerate launch` makes of an engine's file."""
    config = EXAMPLES / "accelerate_configs" / f"{engine}.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(config), "many_processes.py"])
    return _validate_launch_command(args)[0]
