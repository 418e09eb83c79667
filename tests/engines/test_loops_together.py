"""Loops of one's own on several processes, DDP and FSDP2: the numbers of one process, and no trace when it records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin, extract_model_from_parallel
from torch.distributed.algorithms.join import Join
from torch.distributed.tensor import DTensor

from hf_flerm import FLeRMConfig, FLeRMRun, RateProfile, Research
from hf_flerm.optimizer.param_groups import raw_optimizer
from hf_flerm.rates.per_example.linear_head import LinearHead
from tests.shared.distributed import as_on_gpus, drawn_by_all, whole
from tests.shared.loops import Loop
from tests.shared.processes import launch
from tests.shared.training import BATCH, MEASURED, MODELS, assert_identical, scaled, some_factors

PAIR = 2
ENGINES = ("ddp", "fsdp2")
DROPOUT = 0.1


def loop(engine: str, kind: str, **options: Any) -> Loop:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    shards = plugin if engine == "fsdp2" else None
    return Loop(MODELS[kind](**options), accelerated=True, batch=BATCH // PAIR, shards=shards)


def lies_here(followed: Loop) -> list[Any]:
    """Weights and optimizer state, as far as this process holds them."""
    states = raw_optimizer(followed.optimizer).state.values()
    return [
        [getattr(parameter, "_local_tensor", parameter).detach().clone() for parameter in followed.model.parameters()],
        [{key: getattr(value, "_local_tensor", value) for key, value in state.items()} for state in states],
    ]


def matching(base: RateProfile) -> FLeRMConfig:
    research = Research(policy="follow", beta=0.0, probe_batch_size=BATCH)
    return FLeRMConfig(mode="match", profile=base, max_change=1e6, research=research)


def starting(kind: str) -> dict[str, Any]:
    return {"init": False} if kind == "lora" else {}


def base_of(kind: str) -> RateProfile:
    """What a run must be scaled to match, other than by 1."""
    alone = Loop(MODELS[kind](**starting(kind)))
    run = alone.follow()
    alone.train(run)
    return scaled(run.profile, some_factors(alone.model))


def outcome(followed: Loop, run: FLeRMRun) -> dict[str, Any]:
    return {
        "weights": whole(extract_model_from_parallel(followed.model)),
        "scales": run.scales,
        "rates": {name: rates.tolist() for name, rates in run.profile.rates.items()},
        "profile": run.profile.to_bytes(),
    }


def loops(engine: str, bases: dict[str, RateProfile], folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        if engine == "fsdp2":
            as_on_gpus(patch)
        return {kind: loops_of(engine, kind, base, folder / kind) for kind, base in bases.items()}


def loops_of(engine: str, kind: str, base: RateProfile, folder: Path) -> dict[str, Any]:
    plain = loop(engine, kind, dropout=DROPOUT)
    losses = plain.train()
    recorded = loop(engine, kind, dropout=DROPOUT)
    run = recorded.follow()
    assert all(isinstance(p, DTensor) for p in recorded.model.parameters()) == (engine == "fsdp2")
    assert recorded.train(run) == losses
    assert run.profile.steps.tolist() == MEASURED
    assert_identical(lies_here(recorded), lies_here(plain))

    def registered() -> tuple[Loop, FLeRMRun]:
        made = loop(engine, kind, **starting(kind))
        run = made.follow(matching(base))
        made.accelerator.register_for_checkpointing(made.schedule, run)
        return made, run

    matched, run = registered()
    matched.train(run, stop=3)
    matched.accelerator.save_state(str(folder))
    matched.train(run, start=3)
    found = outcome(matched, run)
    resumed, run = registered()
    resumed.accelerator.load_state(str(folder))
    assert run.steps == 3
    resumed.train(run, start=3)
    assert_identical(outcome(resumed, run), found)
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loop_is_that_of_one_process(tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bases = {kind: base_of(kind) for kind in MODELS}
    together = launch(loops, PAIR, tmp_path, engine, bases, tmp_path)
    for kind, base in bases.items():
        first, second = (result[kind] for result in together)
        for part in ("scales", "profile"):
            assert first[part] == second[part], "bit for bit"
        alone = Loop(MODELS[kind](**starting(kind)))
        run = alone.follow(matching(base))
        with monkeypatch.context() as patch:
            drawn_by_all(patch, PAIR)
            if engine == "fsdp2":
                patch.setattr(
                    LinearHead, "saves_work", staticmethod(lambda *args: False)
                )  # no head is skipped in shards
            alone.train(run)
        expected = outcome(alone, run)
        assert len(set(first["scales"].values())) > 3
        assert first["scales"] == pytest.approx(expected["scales"], rel=1e-3)
        assert {name: rates[0] for name, rates in first["rates"].items()} == pytest.approx(
            {name: rates[0] for name, rates in expected["rates"].items()}, rel=1e-5
        )
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(first["weights"][name], weight, rtol=1e-3, atol=1e-4)


def uneven() -> str:
    """Processes that may have no batches left."""
    made = loop("ddp", "full")
    run = made.follow()
    with Join([made.model]), pytest.raises(ValueError, match="no part in measurements") as caught:
        made.train(run)
    return str(caught.value)


def test_processes_that_run_out_of_batches_apart_are_refused(tmp_path: Path) -> None:
    first, second = launch(uneven, PAIR, tmp_path)
    assert first == second
    assert "train without join_uneven_inputs" in first
