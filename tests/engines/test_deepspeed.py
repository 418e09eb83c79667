"""DeepSpeed's ZeRO on CPU processes: the numbers of one process, and no trace of a recording.

Not in the default run: `pytest -m deepspeed` in an environment that has DeepSpeed and a C++ compiler.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_flerm import FLeRMConfig, FLeRMTrainer, Research
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.param_groups import raw_optimizer
from hf_flerm.rates.per_example.linear_head import LinearHead
from hf_flerm.rates.probe import RateProbe
from tests.shared.distributed import (
    ACCUMULATED,
    DROPOUT,
    PAIR,
    UNEVEN,
    base_of,
    drawn_by_all,
    examples,
    launched,
    matched_run,
    whole,
)
from tests.shared.processes import launch
from tests.shared.training import MEASURED, MODELS, VOCABULARY, Rows, arguments, assert_identical, gpt2, make_trainer

pytestmark = pytest.mark.deepspeed

ON_CPU = {"DS_ACCELERATOR": "cpu"}
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
# Stage, mixed precision and what else is asked of DeepSpeed.
ENGINES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "1 in bf16": {"stage": 1, "bf16": True},
    "1 in bf16, float32 gradients": {"stage": 1, "bf16": True, "data_types": {"grad_accum_dtype": "fp32"}},
    "2 in bf16": {"stage": 2, "bf16": True},
    "3": {"stage": 3, "zero": {"stage3_param_persistence_threshold": 0}},  # else all that is this small stays whole
    "3 in bf16": {"stage": 3, "bf16": True},
}
FLOAT32 = ("0", "1", "2", "3")


def engine(stage: int, *, bf16: bool = False, zero: Mapping[str, Any] | None = None, **blocks: Any) -> dict[str, Any]:
    """A Trainer's options."""
    os.environ |= {**ON_CPU, "LOCAL_SIZE": os.environ["LOCAL_WORLD_SIZE"]}
    config = {**dict.fromkeys(AUTO, "auto"), "bf16": {"enabled": "auto"}, **blocks}
    return {"deepspeed": {**config, "zero_optimization": {"stage": stage, **(zero or {})}}, "bf16": bf16}


def state_of(trainer: Trainer) -> list[Any]:
    """All that a run leaves: weights, float32 partitions, states, losses."""
    wrapper: Any = trainer.optimizer
    zero: Any = wrapper.optimizer
    groups = raw_optimizer(zero).param_groups
    partitions = getattr(zero, "fp32_partitioned_groups_flat", [p for group in groups for p in group["params"]])
    losses = [[entry["loss"], entry.get("grad_norm")] for entry in trainer.state.log_history if "loss" in entry]
    return [
        whole(trainer.model),
        [partition.detach() for partition in partitions],
        list(raw_optimizer(zero).state.values()),
        losses,
        torch.get_rng_state(),
    ]


# --- recording ----------------------------------------------------------------------------------------------------


def recordings(folder: Path, name: str) -> dict[str, Any]:
    options = {**ACCUMULATED, "data": Rows(UNEVEN), **engine(**ENGINES[name])}
    found = {}
    for kind, model in MODELS.items():

        def trained(model: Any = model, **flerm: Any) -> Trainer:
            trainer = make_trainer(folder, model(DROPOUT), **flerm, **options)
            trainer.train()
            return trainer

        plain = state_of(trained())
        for alone in (False, True):
            trainer: Any = trained(flerm=FLeRMConfig(), alone=alone)
            assert_identical(state_of(trainer), plain)
        trainer = trained(flerm=FLeRMConfig(snapshot_device="cpu", research=Research(probes="auto", max_probes=4)))
        assert_identical(state_of(trainer), plain)
        found[kind] = (trainer.rate_profile.steps.tolist(), trainer.rate_profile.to_bytes())
    return found


@pytest.mark.parametrize("name", ENGINES)
def test_recording_leaves_no_trace(tmp_path: Path, name: str) -> None:
    first, second = launch(recordings, PAIR, tmp_path, tmp_path, name)
    assert first == second
    assert {kind: steps for kind, (steps, _) in first.items()} == dict.fromkeys(MODELS, MEASURED)


def failing(folder: Path, name: str) -> tuple[list[int], bytes]:
    """The second measurement fails on the second process alone."""
    plain = make_trainer(folder, gpt2(DROPOUT), **engine(**ENGINES[name]))
    plain.train()
    calls = 0
    original = RateProbe.measure

    def measure(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and dist.get_rank() == 1:
            raise ValueError("no finite number")
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RateProbe, "measure", measure)
        trainer: Any = make_trainer(folder, gpt2(DROPOUT), FLeRMConfig(), **engine(**ENGINES[name]))
        trainer.train()
    assert_identical(state_of(trainer), state_of(plain))
    return trainer.rate_profile.steps.tolist(), trainer.rate_profile.to_bytes()


def test_what_fails_on_one_process_fails_on_all(tmp_path: Path) -> None:
    first, second = launch(failing, PAIR, tmp_path, tmp_path, "2 in bf16")
    assert first == second
    assert first[0] == [0, 2, 4]


@contextmanager
def seen_updates() -> Iterator[list[dict[str, Tensor]]]:
    """The unit updates of every measurement."""
    seen: list[dict[str, Tensor]] = []
    original = RateProbe.measure

    def measure(self: Any, updates: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.append(dict(updates))
        return original(self, updates, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RateProbe, "measure", measure)
        yield seen


def first_updates(folder: Path, name: str) -> dict[str, Tensor]:
    config = FLeRMConfig(measure_steps=(0,))
    with seen_updates() as seen:
        options = {"max_steps": 1, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "adam_epsilon": 1e-30}
        make_trainer(folder, gpt2(), config, **options, **engine(**ENGINES[name])).train()
    return seen[0]


@pytest.mark.parametrize("name", [name for name in ENGINES if name not in FLOAT32])
def test_updates_are_those_of_the_masters(tmp_path: Path, name: str) -> None:
    """Adam's first update is a sign; weights of 1 in bf16 do not even move at a learning rate of 1e-4."""
    for updates in launch(first_updates, PAIR, tmp_path, tmp_path, name):
        for tensor, update in updates.items():
            moved = update[update != 0].abs().float()
            torch.testing.assert_close(moved, torch.ones_like(moved), rtol=1e-2, atol=0.0)
            if "ln_" in tensor:
                assert len(moved) > 0.9 * update.numel(), tensor  # a gradient in bf16 may be 0 by itself


# --- matching -----------------------------------------------------------------------------------------------------


def matched_runs(folder: Path, name: str) -> dict[str, Any]:
    found = {}
    for kind in MODELS:
        options = {"per_device_train_batch_size": 2, **engine(**ENGINES[name])}
        found[kind] = matched_run(folder / kind, kind, save_strategy="steps", save_steps=3, **options)
        again = matched_run(folder / "again", kind, resume=folder / kind / "checkpoint-3", **options)
        assert_identical(again, found[kind])
    return found


@pytest.mark.parametrize(("name", "ranks"), [*((name, PAIR) for name in ENGINES), ("2", 2 * PAIR)])
def test_a_matched_run_is_that_of_one_process(
    tmp_path: Path, name: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = launch(matched_runs, ranks, tmp_path, tmp_path, name)
    for kind in MODELS:
        first, *others = (result[kind] for result in together)
        for other in others:
            assert first["scales"] == other["scales"], "bit for bit"
            assert first["profile"] == other["profile"]
            assert_identical(first["weights"], other["weights"])
        if name not in FLOAT32:
            assert len(set(first["scales"].values())) > 3
            continue
        with monkeypatch.context() as patch:
            drawn_by_all(patch, ranks)
            if ENGINES[name]["stage"] == 3:
                patch.setattr(
                    LinearHead, "saves_work", staticmethod(lambda *args: False)
                )  # no head is skipped in parts
            alone = matched_run(tmp_path, kind, per_device_train_batch_size=2 * ranks)
        assert first["scales"] == pytest.approx(alone["scales"], rel=1e-3)
        for part in ("rates", "joint"):
            assert {n: r[0] for n, r in first[part].items()} == pytest.approx(
                {n: r[0] for n, r in alone[part].items()}, rel=1e-5
            )
        for tensor, weight in alone["weights"].items():
            torch.testing.assert_close(first["weights"][tensor], weight, rtol=1e-3, atol=1e-4)


class Still(TrainerCallback):
    """Gives one tensor a scale of 0 and another one of 2 from the second step on, and writes down every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(whole(kwargs["model"]))


def scaled_steps(folder: Path, name: str) -> list[dict[str, Tensor]]:
    """A run whose scales are set by hand after its first step, which is the only one that is measured."""
    watch = Still()
    config = FLeRMConfig(mode="match", profile=base_of("full"), measure_steps=(0,))
    options = {"max_steps": 3, "weight_decay": 0.0, "lr_scheduler_type": "constant", "adam_beta1": 0.0}
    trainer: Any = make_trainer(folder, gpt2(), config, callbacks=[watch], **options, **engine(**ENGINES[name]))

    class Set(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run = trainer.flerm_callback.run
            names = list(trainable_parameters(trainer.model))
            scales = dict.fromkeys(names, 1.0)
            if state.global_step == 1:
                scales |= {name: (0.0, 2.0)[index % 2] for index, name in enumerate(names)}
            run._scaler._step_scales.scales = scales

    trainer.add_callback(Set())
    trainer.train()
    return [*watch.weights, whole(trainer.model)]


@pytest.mark.parametrize("name", FLOAT32)
def test_every_tensor_steps_at_its_own_learning_rate(tmp_path: Path, name: str) -> None:
    """Adam without momentum: |update| <= lr * sqrt(1 / (1 - beta2)), and 0 where the scale is 0."""
    for steps in launch(scaled_steps, PAIR, tmp_path, tmp_path, name):
        _, before, after, last = steps
        for index, tensor in enumerate(before):
            moved = float((after[tensor] - before[tensor]).abs().max())
            assert (moved == 0.0) == (index % 2 == 0), tensor
            assert not torch.equal(last[tensor], after[tensor])


def test_the_examples_run_with_every_config(tmp_path: Path) -> None:
    environments = {}
    for name in ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"):
        args = launched(name)
        args.deepspeed_fields_from_accelerate_config = "zero_stage,mixed_precision"
        _, made = prepare_deepspeed_cmd_env(args)
        environments[name] = {k: v for k, v in made.items() if k.startswith("ACCELERATE_")} | ON_CPU
    first, second = launch(examples, PAIR, tmp_path, tmp_path, environments, ("many_processes",))
    assert not any("measurements" in printed for printed in second.values())
    for printed in first.values():
        assert "2 processes, {'Parameter': 28}" in printed
        assert "base: 2 measurements, target: 2" in printed


# --- weights in parts ---------------------------------------------------------------------------------------------


def llama_run(folder: Path, adapter: LoraConfig | None, flerm: FLeRMConfig | None, **options: Any) -> Any:
    """The arguments come first: they tell `from_pretrained` that it must make weights in parts."""
    args = arguments(folder, max_steps=3, weight_decay=0.1, adam_epsilon=1e-4, **options)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM.from_pretrained(folder / "llama")
    if adapter is not None:
        model = get_peft_model(model, adapter)
    common: dict[str, Any] = {"model": model, "args": args, "train_dataset": Rows()}
    trainer = Trainer(**common) if flerm is None else FLeRMTrainer(**common, flerm=flerm)
    trainer.train()
    return trainer


IN_PARTS: dict[str, tuple[LoraConfig | None, dict[str, Any]]] = {
    "full": (None, {}),
    "checkpointed": (None, {"gradient_checkpointing": True}),
    "DoRA": (LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_dora=True), {}),
}
TWICE = FLeRMConfig(research=Research(probe_batch_size=4, probes_per_batch=2))


@contextmanager
def whole_at_a_time() -> Iterator[list[int]]:
    """How many numbers of weights are whole whenever DeepSpeed has gathered some for a probe."""
    coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    owner = coordinator.PartitionedParameterCoordinator
    counts: list[int] = []
    probed: list[nn.Module] = []
    measure, fetch = RateProbe.measure, owner.fetch_sub_module

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        probed.append(self.model)
        try:
            return measure(self, *args, **kwargs)
        finally:
            probed.pop()

    def counted(*args: Any, **kwargs: Any) -> None:
        fetch(*args, **kwargs)
        parameters: list[Any] = [parameter for model in probed for parameter in model.parameters()]
        counts.append(sum(p.ds_numel for p in parameters if p.ds_status.name != "NOT_AVAILABLE"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RateProbe, "measure", watched)
        patch.setattr(owner, "fetch_sub_module", counted)
        yield counts


def runs_in_parts(folder: Path) -> dict[str, Any]:
    options = {"per_device_train_batch_size": 2, **engine(3, zero={"stage3_param_persistence_threshold": 0})}
    importlib.import_module("deepspeed").init_distributed(dist_backend="gloo")
    found = {}
    for name, (adapter, own) in IN_PARTS.items():
        plain = state_of(llama_run(folder, adapter, None, **options, **own))
        with whole_at_a_time() as counts:
            trainer = llama_run(folder, adapter, TWICE, **options, **own)
        assert_identical(state_of(trainer), plain)
        layers = [module for module in trainer.model.modules() if isinstance(module, LlamaDecoderLayer)]
        assert 0 < max(counts) <= max(sum(p.ds_numel for p in layer.parameters()) for layer in layers), name
        assert set(trainer.flerm_callback.last_measurement.estimators.values()) == {"per_example"}
        found[name] = {tensor: rates.tolist() for tensor, rates in trainer.rate_profile.rates.items()}
    return found


def test_a_model_that_is_loaded_in_parts_is_measured_as_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    llama = LlamaConfig(vocab_size=VOCABULARY, **sizes, bos_token_id=0, eos_token_id=0)
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    together = launch(runs_in_parts, PAIR, tmp_path, tmp_path)
    drawn_by_all(monkeypatch, PAIR)
    monkeypatch.setattr(LinearHead, "saves_work", staticmethod(lambda *args: False))
    for name, (adapter, own) in IN_PARTS.items():
        alone = llama_run(tmp_path, adapter, TWICE, per_device_train_batch_size=2 * PAIR, **own).rate_profile.rates
        assert together[0][name] == together[1][name]
        for tensor, rates in alone.items():
            assert together[0][name][tensor] == pytest.approx(rates.tolist(), rel=1e-5, abs=1e-12), (name, tensor)


# --- what is refused ----------------------------------------------------------------------------------------------

OF_TORCH = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
BOTH = ("record", "match")
# What is asked of DeepSpeed, whether the callback is alone, in which modes, and what is said.
REFUSED: dict[str, tuple[dict[str, Any], bool, tuple[str, ...], str]] = {
    "an optimizer": ({"stage": 2, "optimizer": OF_TORCH}, False, BOTH, "'optimizer'.*Remove the block"),
    "round robin": (
        {"stage": 2, "zero": {"round_robin_gradients": True}},
        False,
        ("record",),  # a group of one tensor has no order
        "Set round_robin_gradients to false",
    ),
    "bf16 without ZeRO": ({"stage": 0, "bf16": True}, False, BOTH, "no float32 partition.*Use ZeRO-1 or ZeRO-2"),
    "groups of many": (
        {"stage": 2},
        True,
        ("match",),
        "FLeRMTrainer with a torch optimizer: it gives every tensor its own group",
    ),
}


def refusals(folder: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name, (options, alone, modes, _) in REFUSED.items():
        found[name] = {}
        for mode in modes:
            config = FLeRMConfig(mode=mode, profile=base_of("full") if mode == "match" else None)
            trainer = make_trainer(folder, gpt2(), config, alone=alone, **engine(**options))
            with pytest.raises(ValueError) as caught:  # noqa: PT011, what it says is checked below
                trainer.train()
            assert trainer.state.global_step == 0, name
            found[name][mode] = str(caught.value)
    return found


def test_what_cannot_be_followed_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for found in launch(refusals, PAIR, tmp_path, tmp_path):
        for name, (_, _, modes, reason) in REFUSED.items():
            assert all(re.search(reason, found[name][mode]) for mode in modes), name
