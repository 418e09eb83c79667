"""Many processes: the numbers of one, the scales of all, and no trace of a recording."""

from __future__ import annotations

import importlib
import math
import runpy
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import launch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from training import (
    MEASURED,
    MODELS,
    Rows,
    arguments,
    assert_identical,
    assert_same_run,
    flerm_callback,
    gpt2,
    make_trainer,
    recorded,
    scaled,
    some_factors,
    train,
    weights_of,
)
from transformers import TrainerCallback

from hf_flerm import FLeRMConfig, Measurement, RateProfile, RateProfileError, plan, updates
from hf_flerm.distributed import Pool
from hf_flerm.estimators import ESTIMATORS
from hf_flerm.heads import LinearHead
from hf_flerm.mapping import joint_groups
from hf_flerm.names import trainable_parameters
from hf_flerm.optimizer import raw_optimizer
from hf_flerm.probe_data import ProbeData
from hf_flerm.probes import RateProbe
from hf_flerm.updates import Snapshot

BYTES_PER_TENSOR = 64
PAIR = 2
EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = ("many_processes", "raw_loop")
MEASURED_TOGETHER = [("full", e) for e in ESTIMATORS if e != "exact"] + [("lora", "per_example"), ("lora", "exact")]
UNEVEN = 22  # rows: the last global batch of 2 x 4 is short


class Stream(IterableDataset):
    """Rows that can be read in order alone."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = Rows()
        yield from (rows[index] for index in range(len(rows)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- one measurement ----------------------------------------------------------------------------------------------


def moving(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and unit updates of all that it trains."""
    model = MODELS[kind](**({"init": False} if kind == "lora" else {}))
    generator = seeded(1)
    parameters = trainable_parameters(model)
    return model, {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}


def groups_of(model: nn.Module) -> list[dict[str, float]]:
    parameters = trainable_parameters(model)
    shares = {name: 1 / (index + 1) for index, name in enumerate(parameters)}
    return [shares, *(g for groups in joint_groups(model, parameters).values() for g in groups.values())]


def batches_of(rank: int, count: int) -> list[dict[str, Tensor]]:
    """Batches of one process, no two alike in size or padding."""
    generator = seeded(100 + rank)
    batches = []
    for index in range(count):
        tokens = torch.randint(32, (2 + (rank + index) % 3, 8), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, 6 - rank % 3 :] = 0
        batches.append({"input_ids": tokens, "attention_mask": mask})
    return batches


def one_after_the_other(ranks: int, count: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """The batches of all processes, each process's with its own omega."""
    for rank in range(ranks):
        generator.set_state(seeded(rank).get_state())
        yield from batches_of(rank, count)


def probe_together(kind: str, estimator: str, count: int) -> dict[str, Any]:
    rank = dist.get_rank()
    model, moves = moving(kind)
    probe = RateProbe(model, estimator=estimator)
    pool = Pool(trainable_parameters(model), estimator, groups_of(model))
    result = pool.measurement(lambda: probe.measure(moves, batches_of(rank, count), seeded(rank)))
    return summary(model, result)


def summary(model: nn.Module, result: Measurement) -> dict[str, Any]:
    groups = dict(enumerate(groups_of(model)))
    return {
        "rates": result.rates,
        "errors": result.standard_errors,
        "estimators": result.estimators,
        "joint": result.joint_rates(groups),
        "total": result.total,
        "num_probes": result.num_probes,
    }


def measurements(cases: list[tuple[str, str]], count: int) -> dict[tuple[str, str], dict[str, Any]]:
    PartialState(cpu=True)
    return {(kind, estimator): probe_together(kind, estimator, count) for kind, estimator in cases}


@pytest.mark.parametrize("ranks", [2, 4])
def test_rates_are_those_of_one_process(tmp_path: Path, ranks: int) -> None:
    count = 3
    cases = MEASURED_TOGETHER if ranks == PAIR else MEASURED_TOGETHER[:2]
    results = launch(measurements, ranks, tmp_path, cases, count)
    assert all(result == results[0] for result in results[1:]), "the processes differ in a bit"
    for (kind, estimator), found in results[0].items():
        model, moves = moving(kind)
        generator = seeded(0)
        alone = RateProbe(model, estimator=estimator).measure(
            moves, one_after_the_other(ranks, count, generator), generator
        )
        expected = summary(model, alone)
        assert found["num_probes"] == ranks * count
        assert found["estimators"] == expected["estimators"]
        assert found["rates"] == pytest.approx(expected["rates"], rel=1e-5), (kind, estimator)
        # Errors of what is measured by weight gradient are linearized on each process: the same only on average.
        exact = estimator in ("per_example", "exact")
        assert_errors(found["errors"], expected["errors"], exact=exact)
        rates, errors = (dict(enumerate(column)) for column in zip(*found["joint"].values(), strict=True))
        of_one = [dict(enumerate(column)) for column in zip(*expected["joint"].values(), strict=True)]
        assert rates == pytest.approx(of_one[0], rel=1e-5, abs=1e-5 * found["total"]), (kind, estimator)
        assert_errors(errors, of_one[1], exact=exact)


def assert_errors(found: Mapping[Any, float], expected: Mapping[Any, float], *, exact: bool) -> None:
    if exact:
        assert found == pytest.approx(expected, rel=1e-5)
        return
    logs = [math.log(error / expected[key]) for key, error in found.items() if error or expected[key]]
    assert abs(sum(logs) / len(logs)) < 0.25


# --- whole runs ---------------------------------------------------------------------------------------------------

DROPOUT = 0.1
ACCUMULATED: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}


# Keys' biases have no gradient but round-off, which Adam would make steps of.
STABLE: dict[str, Any] = {"weight_decay": 0.1, "adam_epsilon": 1e-4}


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
        original = Pool.measurement

        def measurement(self: Pool, measure: Any) -> Measurement:
            before = len(traffic.sizes)
            result = original(self, measure)
            measured.append(traffic.sizes[before:])
            return result

        patch.setattr(Pool, "measurement", measurement)
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


def matched_run(
    folder: Path, kind: str, resume: Path | None = None, steps: Sequence[int] | None = None, **options: Any
) -> dict[str, Any]:
    model = MODELS[kind](**({"init": False} if kind == "lora" else {}))
    config = FLeRMConfig(mode="match", profile=base_of(kind), probe_batch_size=4, max_change=1e6, measure_steps=steps)
    trainer = make_trainer(folder, model, config, **STABLE, **options)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return {
        "weights": whole(trainer.model),
        "scales": flerm_callback(trainer).scales,
        "rates": {name: rates.tolist() for name, rates in trainer.rate_profile.rates.items()},
        "joint": {n: r.tolist() for g in trainer.rate_profile.joint_rates.values() for n, r in g.items()},
        "profile": trainer.rate_profile.to_bytes(),
    }


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
        config = FLeRMConfig(probes="auto", max_probes=4) if name == "auto" else FLeRMConfig()
        trainer = make_trainer(folder / name, gpt2(), config, max_steps=3, **options)
        trainer.train()
        steps[name] = (trainer.rate_profile.steps.tolist(), trainer.rate_profile.to_bytes())
    return {"saved": saved, "written": written, "steps": steps, "refused": refusal(folder)}


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
    config = FLeRMConfig(mode="match", profile=base_of("full"), probe_batch_size=4, max_change=1e6)
    trainer = make_trainer(folder, gpt2(), config, **STABLE, per_device_train_batch_size=batch)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return {
        "weights": whole(trainer.model),
        "scales": flerm_callback(trainer).scales,
        "steps": trainer.rate_profile.steps.tolist(),
    }


# --- weights in shards --------------------------------------------------------------------------------------------

TWO_EACH = {"per_device_train_batch_size": 2}
EARLY = (0, 1)  # steps that are measured, all of them before a checkpoint
WRAPPED = {"transformer_layer_cls_to_wrap": ["GPT2Block"]}
FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": WRAPPED}
SAVED_IN_SHARDS: dict[str, Any] = {"fsdp": True, "fsdp_config": {**WRAPPED, "state_dict_type": "SHARDED_STATE_DICT"}}
OFFLOADED: dict[str, Any] = {"fsdp": True, "fsdp_config": {**WRAPPED, "cpu_offload": True}}


def as_on_gpus(patch: pytest.MonkeyPatch) -> None:
    """Accelerate shards on GPUs alone, and makes DDP of it elsewhere: let it take these processes for some."""

    def prepared(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        PartialState(cpu=True)
        AcceleratorState._reset_state()
        patch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_GPU)
        original(self, *args, **kwargs)

    original = Accelerator.__init__
    patch.setattr(Accelerator, "__init__", prepared)


class Alive:
    """How many bytes of whole tensors are there at once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        original = updates.gathered

        def gathered(part: Tensor, like: Tensor) -> Tensor:
            whole = original(part, like)
            self._count(whole.nbytes)
            weakref.finalize(whole, self._count, -whole.nbytes)
            return whole

        patch.setattr(updates, "gathered", gathered)

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
        auto = FLeRMConfig(probes="auto", target_error=0.3, max_probes=16, measure_steps=(0, 2))
        streamed = {**DATA["streamed and dispatched"], **FSDP}
        trainer = make_trainer(folder, gpt2(), auto, max_steps=3, **streamed)
        trainer.train()
        found["auto"] = trainer.flerm_callback.last_measurement.num_probes
    return found


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole_tensor(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


def whole_tensor(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if not hasattr(tensor, "ds_tensor"):
        return tensor.detach().clone()
    with importlib.import_module("deepspeed").zero.GatheredParameters(tensor):
        return tensor.detach().clone()


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
            patch.setattr(LinearHead, "pays", staticmethod(lambda *args: False))  # no head is skipped in shards
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
        patch.setattr(LinearHead, "pays", staticmethod(lambda *args: False))
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
    config = FLeRMConfig(measure_steps=(0, 1), probe_batch_size=2)
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
            make_trainer(folder, gpt2(), FLeRMConfig(estimator="exact"), **FSDP).train()
    with pytest.raises(ValueError, match="plan runs in one process, this is one of 4"):
        plan(gpt2(), arguments(folder), Rows(), base_of("full"))
    return {"resumed": resumed, "own": own, "hybrid": hybrid}


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


def test_every_engine_has_a_file() -> None:
    files = {path.stem for path in (EXAMPLES / "accelerate_configs").glob("*.yaml")}
    assert files == {"ddp", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"}


def test_the_examples_run_with_every_config(tmp_path: Path) -> None:
    environments = {}
    for engine in ("ddp", "fsdp2"):
        made = prepare_multi_gpu_env(launched(engine))
        environments[engine] = {k: v for k, v in made.items() if k.startswith(("ACCELERATE_", "FSDP_"))}
    first, second = launch(examples, PAIR, tmp_path, tmp_path, environments)
    assert set(second.values()) == {""}
    for engine, weights, name in (("ddp", "Parameter", "MULTI_CPU"), ("fsdp2", "DTensor", "FSDP")):
        by_trainer, by_loop = (first[engine, script] for script in SCRIPTS)
        assert f"2 processes, {{'{weights}': 28}}" in by_trainer
        assert "base: 2 measurements, target: 2" in by_trainer
        assert f"2 processes ({name}), 2 measurements" in by_loop
        assert "scales from" in by_loop


# --- what is refused ----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "megatron": ({"distributed_type": DistributedType.MEGATRON_LM}, "Megatron-LM"),
    "xla": ({"distributed_type": DistributedType.XLA}, "XLA"),
    "fsdp1": (
        {"distributed_type": DistributedType.FSDP, "fsdp_plugin": SimpleNamespace(fsdp_version=1)},
        "FSDP1 flattens",
    ),
    "tensor parallel": ({"parallelism_config": SimpleNamespace(tp_enabled=True)}, "tp_size > 1"),
    "context parallel": ({"parallelism_config": SimpleNamespace(cp_enabled=True)}, "cp_size > 1"),
    "sequence parallel": ({"parallelism_config": SimpleNamespace(sp_enabled=True)}, "sp_size > 1"),
}
REFUSED = {engine: (state, rf"{reason}.*Train with DDP, or with FSDP2") for engine, (state, reason) in REFUSED.items()}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
ZERO_3 = {"stage": 3, "zero_hpz_partition_size": 1, "mics_shard_size": -1}
REFUSED |= {
    f"DeepSpeed: {name}": (
        {
            "distributed_type": DistributedType.DEEPSPEED,
            "deepspeed_plugins": SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 2}, **config}),
        },
        reason,
    )
    for name, config, reason in (
        ("hpZ", {"zero_optimization": ZERO_3 | {"zero_hpz_partition_size": 2}}, "hpz_partition_size'.*Take it out"),
        ("MiCS", {"zero_optimization": ZERO_3 | {"mics_shard_size": 2}}, "mics_shard_size'.*Take it out"),
        ("its optimizer", {"optimizer": {"type": "AdamW"}}, "'optimizer'.*Take the block out"),
        ("its scheduler", {"scheduler": {"type": "WarmupLR"}}, "'scheduler'.*Take the block out"),
        ("offload", {"zero_optimization": OFFLOAD}, r"'zero_optimization\.offload_optimizer'.*set its device to none"),
        ("tensor parallel", {"tensor_parallel": {"autotp_size": 2}}, "'tensor_parallel'.*Take it out"),
    )
}


@pytest.mark.parametrize("engine", REFUSED)
def test_other_engines_are_refused_before_training(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, reason = REFUSED[engine]

    class Pretend(TrainerCallback):
        """Tells of another engine once everything is prepared for this one."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            for key, value in state.items():
                for shared in (AcceleratorState._shared_state, PartialState._shared_state):
                    monkeypatch.setitem(shared, key, value)

    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig())
    trainer.callback_handler.callbacks.insert(0, Pretend())
    before = weights_of(trainer.model)
    with pytest.raises(ValueError, match=reason):
        trainer.train()
    assert_identical(weights_of(trainer.model), before)


# --- errors -------------------------------------------------------------------------------------------------------


def errors_of(count: int) -> dict[str, float]:
    return measurements([("full", "per_example")], count)["full", "per_example"]["errors"]


def test_errors_fall_as_the_root_of_the_number_of_processes(tmp_path: Path) -> None:
    count = 8
    four, *_ = launch(errors_of, 4, tmp_path, count)
    model, moves = moving("full")
    single = RateProbe(model).measure(moves, batches_of(0, count), seeded(0)).standard_errors
    ratios = [math.log(four[name] / single[name]) for name in four]
    assert sum(ratios) / len(ratios) == pytest.approx(math.log(1 / 2), abs=0.1)
