"""Runs with FSDP2: weights in shards are measured and matched as whole ones, saved, and resumed by any number."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from hf_flerm import FLeRMConfig, Research, plan
from hf_flerm.engines.fsdp2 import Shards
from hf_flerm.optimizer.param_groups import raw_optimizer
from hf_flerm.rates.per_example.linear_head import LinearHead
from hf_flerm.training.probe_data import ProbeData
from tests.shared.distributed import (
    ACCUMULATED,
    DATA,
    DROPOUT,
    PAIR,
    UNEVEN,
    as_on_gpus,
    base_of,
    drawn_by_all,
    matched_run,
    whole,
)
from tests.shared.processes import launch
from tests.shared.training import MEASURED, MODELS, Rows, arguments, assert_identical, gpt2, make_trainer

TWO_EACH = {"per_device_train_batch_size": 2}
EARLY = (0, 1)  # steps that are measured, all of them before a checkpoint
WRAPPED = {"transformer_layer_cls_to_wrap": ["GPT2Block"]}
FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": WRAPPED}
SAVED_IN_SHARDS: dict[str, Any] = {"fsdp": True, "fsdp_config": {**WRAPPED, "state_dict_type": "SHARDED_STATE_DICT"}}
OFFLOADED: dict[str, Any] = {"fsdp": True, "fsdp_config": {**WRAPPED, "cpu_offload": True}}


class Alive:
    """How many bytes of whole tensors are there at once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        original = Shards.gather

        def gather(weights: Shards, name: str, part: Tensor) -> Tensor:
            whole = original(weights, name, part)
            self._count(whole.nbytes)
            weakref.finalize(whole, self._count, -whole.nbytes)
            return whole

        patch.setattr(Shards, "gather", gather)

    def _count(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def sharded_runs(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        as_on_gpus(patch)
        alive = Alive(patch)
        for kind, model in MODELS.items():
            options = {**ACCUMULATED, **FSDP, "data": Rows(UNEVEN)}
            plain = make_trainer(folder, model(DROPOUT), **options)
            plain.train()
            assert all(isinstance(parameter, DTensor) for parameter in plain.model.parameters())
            trainer = make_trainer(folder, model(DROPOUT), FLeRMConfig(), **options)
            trainer.train()
            assert trainer.rate_profile.steps.tolist() == MEASURED
            assert_identical(whole(trainer.model), whole(plain.model))
            assert_identical(local_state(trainer), local_state(plain))
            sharded: dict[str, Any] = {**TWO_EACH, **FSDP}
            found[kind] = matched_run(folder / kind, kind, save_strategy="steps", save_steps=3, **sharded)
            again = matched_run(folder / "again", kind, resume=folder / kind / "checkpoint-3", **sharded)
            assert_identical(again, found[kind])
            assert 0 < alive.most <= max(parameter.nbytes for parameter in model().parameters())
            assert set(trainer.flerm_callback.last_measurement.estimators.values()) == {"per_example"}
        found["early"] = matched_run(
            folder / "early", "full", steps=EARLY, save_strategy="steps", save_steps=3, **TWO_EACH, **SAVED_IN_SHARDS
        )
        auto = FLeRMConfig(measure_steps=(0, 2), research=Research(probes="auto", target_error=0.3, max_probes=16))
        streamed = {**DATA["streamed and dispatched"], **FSDP}
        trainer = make_trainer(folder, gpt2(), auto, max_steps=3, **streamed)
        trainer.train()
        found["auto"] = trainer.flerm_callback.last_measurement.num_probes
    return found


def local_state(trainer: Any) -> list[dict[str, Tensor]]:
    states = raw_optimizer(trainer.optimizer).state.values()
    return [{key: getattr(value, "_local_tensor", value) for key, value in state.items()} for state in states]


def test_sharded_weights_are_measured_and_matched_as_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = launch(sharded_runs, PAIR, tmp_path, tmp_path)
    assert together[0]["auto"] == together[1]["auto"] < 2 * 2 * 16
    for kind in MODELS:
        first, second = (result[kind] for result in together)
        assert first["scales"] == second["scales"], "bit for bit"
        assert first["profile"] == second["profile"]
        with monkeypatch.context() as patch:
            drawn_by_all(patch, PAIR)
            patch.setattr(LinearHead, "saves_work", staticmethod(lambda *args: False))  # no head is skipped in shards
            alone = matched_run(tmp_path, kind, per_device_train_batch_size=2 * PAIR)
        assert first["scales"] == pytest.approx(alone["scales"], rel=1e-3)
        for part in ("rates", "joint"):
            assert {n: r[0] for n, r in first[part].items()} == pytest.approx(
                {n: r[0] for n, r in alone[part].items()}, rel=1e-5
            )
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(first["weights"][name], weight, rtol=1e-3, atol=1e-4)

    # Four processes take up what two have saved, and measure by themselves what one does.
    four = launch(four_shards, 2 * PAIR, tmp_path / "b", tmp_path)
    assert all(result["resumed"]["scales"] == together[0]["early"]["scales"] for result in four)
    for name, weight in together[0]["early"]["weights"].items():
        torch.testing.assert_close(four[0]["resumed"]["weights"][name], weight, rtol=1e-4, atol=1e-5)
    with monkeypatch.context() as patch:
        drawn_by_all(patch, 2 * PAIR)
        patch.setattr(LinearHead, "saves_work", staticmethod(lambda *args: False))
        alone = matched_run(tmp_path, "full", steps=EARLY, per_device_train_batch_size=2 * PAIR)
    for mesh in ("own", "hybrid"):
        for result in four:
            assert result[mesh]["scales"] == four[0][mesh]["scales"], "bit for bit"
            for name, rates in alone["rates"].items():
                assert result[mesh]["rates"][name][0] == pytest.approx(rates[0], rel=1e-5), name
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(four[0][mesh]["weights"][name], weight, rtol=1e-3, atol=1e-4)

    # And two take up what four have saved.
    two = launch(two_shards, PAIR, tmp_path / "c", tmp_path)
    assert all(result["scales"] == four[0]["own"]["scales"] for result in two)
    for name, weight in four[0]["own"]["weights"].items():
        torch.testing.assert_close(two[0]["weights"][name], weight, rtol=1e-4, atol=1e-5)


def cast_and_offloaded(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        as_on_gpus(patch)
        rates, weights = {}, {}
        for name, config, bf16 in (
            ("plain", None, True),
            ("half", FLeRMConfig(), True),
            ("single", FLeRMConfig(), False),
        ):
            trainer = make_trainer(folder, gpt2(DROPOUT), config, max_steps=2, bf16=bf16, **FSDP)
            trainer.train()
            weights[name] = whole(trainer.model)
            policy = AcceleratorState().fsdp_plugin.mixed_precision_policy
            assert getattr(policy, "param_dtype", None) == (torch.bfloat16 if bf16 else None)
            if config is not None:
                rates[name] = {name: float(values[0]) for name, values in trainer.rate_profile.rates.items()}
        assert_identical(weights["half"], weights["plain"])
        assert rates["half"] == pytest.approx(rates["single"], rel=0.2)

        options: dict[str, Any] = {"steps": (0,), "max_steps": 2, **TWO_EACH}
        here = matched_run(folder, "full", **options, **FSDP)
        # No accelerator is there whose memory could be pinned.
        patch.setattr(CPUOffloadPolicy.__init__, "__defaults__", (False,))
        assert_identical(matched_run(folder, "full", **options, **OFFLOADED), here)
        assert isinstance(AcceleratorState().fsdp_plugin.cpu_offload, CPUOffloadPolicy)


def test_shards_in_half_precision_or_offloaded_are_measured(tmp_path: Path) -> None:
    """In bf16 recording leaves no trace either, and rates are those of float32 as far as bf16 goes."""
    launch(cast_and_offloaded, PAIR, tmp_path, tmp_path)


def failing_shards(folder: Path) -> dict[str, Any]:
    """The second process alone cannot make the batch of the second measurement."""
    config = FLeRMConfig(measure_steps=(0, 1), research=Research(probe_batch_size=2))
    found = {}
    original = ProbeData._batches
    for name, error in (("examples", ValueError("no text")), ("memory", torch.OutOfMemoryError("CUDA out of memory."))):
        calls = 0

        def failing(self: ProbeData, *args: Any, error: Exception = error) -> Iterator[Any]:
            nonlocal calls
            calls += 1
            if calls == 2 and dist.get_rank() == 1:
                raise error
            yield from original(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            as_on_gpus(patch)
            patch.setattr(ProbeData, "_batches", failing)
            trainer = make_trainer(folder, gpt2(), config, max_steps=3, **FSDP)
            trainer.train()
        found[name] = (trainer.rate_profile.steps.tolist(), trainer.rate_profile.to_bytes(), calls)
    return found


def test_a_batch_that_one_process_cannot_make_is_missing_on_all(tmp_path: Path) -> None:
    """Shards are gathered by all or by none: the others would wait for ever."""
    first, second = launch(failing_shards, PAIR, tmp_path, tmp_path)
    assert first == second
    steps = {name: (steps, calls) for name, (steps, _, calls) in first.items()}
    assert steps == {"examples": ([0, 2], 3), "memory": ([0, 1], 3)}, "tried again at the next step, or by half"


def two_shards(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        as_on_gpus(patch)
        resume = folder / "own" / "checkpoint-3"
        return matched_run(folder / "two", "full", steps=EARLY, resume=resume, **TWO_EACH, **FSDP)


def four_shards(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        as_on_gpus(patch)
        options: dict[str, Any] = {"steps": EARLY, "per_device_train_batch_size": 1}
        resume = folder / "early" / "checkpoint-3"
        resumed = matched_run(folder / "four", "full", resume=resume, **options, **SAVED_IN_SHARDS)
        own = matched_run(folder / "own", "full", save_strategy="steps", save_steps=3, **options, **FSDP)
        mesh = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
        hybrid = matched_run(folder / "hybrid", "full", parallelism_config=mesh, **options, **FSDP)
        assert AcceleratorState().device_mesh.mesh_dim_names == ("dp_replicate", "dp_shard")
        with pytest.raises(ValueError, match=r"'exact' needs whole weights.*Use 'per_example'"):
            make_trainer(folder, gpt2(), FLeRMConfig(research=Research(estimator="exact")), **FSDP).train()
    with pytest.raises(ValueError, match="plan must run in a single process, and there are 4"):
        plan(gpt2(), arguments(folder), Rows(), base_of("full"))
    return {"resumed": resumed, "own": own, "hybrid": hybrid}
