"""The memory that a measured step holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

from hf_flerm.engines.engine import MasterWeights
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.step import Snapshot
from hf_flerm.rates.per_example.gates import Gates
from hf_flerm.rates.probe import RateProbe
from tests.shared.cases import seeded, updates_of


def peak_memory(function: Callable[[], Any]) -> int:
    """Bytes that tensors hold at the same time, those that were there before left out."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def language_model() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=500, n_embd=64, n_head=2, n_layer=3, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


class Steps:
    """Training steps on a batch of 8, and the same with a measurement on half as many examples, as by default."""

    def __init__(self, model: nn.Module, snapshot_device: str | None = None) -> None:
        self.model = model
        self.parameters = trainable_parameters(model)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-3)
        self.probe = RateProbe(model)
        self.snapshot_device = snapshot_device
        ids = torch.randint(500, (8, 64), generator=seeded(0))
        self.batch, self.half = {"input_ids": ids, "labels": ids}, {"input_ids": ids[:4]}
        self.train()  # the optimizer's state

    def train(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measured(self) -> None:
        before = Snapshot(MasterWeights(self.parameters), self.snapshot_device)
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        with before.put_back(dict.fromkeys(self.parameters, 1e-3)) as updates:
            self.probe.measure(updates, [self.half], seeded(1))
        self.optimizer.zero_grad()


def test_memory_of_a_measured_lora_step() -> None:
    steps = Steps(get_peft_model(language_model(), LoraConfig(r=4, target_modules=["c_attn", "c_fc", "c_proj"])))
    plain = peak_memory(steps.train)
    first, later = peak_memory(steps.measured), peak_memory(steps.measured)
    assert first <= 1.05 * plain
    assert later <= 1.05 * plain


def test_memory_of_a_measured_step_of_full_fine_tuning() -> None:
    steps = Steps(language_model())
    copy = sum(parameter.nbytes for parameter in steps.parameters.values())
    plain = peak_memory(steps.train)
    first, later = peak_memory(steps.measured), peak_memory(steps.measured)
    assert first <= plain + copy
    assert later <= plain + copy


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_memory_of_a_measured_step_with_checkpoints(lora_rank: int) -> None:
    """Transformers checkpoints in training mode only; a probe that did not would be the largest thing there is."""
    model = language_model()
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora_rank:
        model = get_peft_model(model, LoraConfig(r=lora_rank, target_modules=["c_attn", "c_fc", "c_proj"]))
    steps = Steps(model.train())
    copy = sum(parameter.nbytes for parameter in steps.parameters.values())
    plain = peak_memory(steps.train)
    first, later = peak_memory(steps.measured), peak_memory(steps.measured)
    # Verifying has the logits of its probe batch and the step's gradients at the same time, as training never has.
    assert first <= max(1.05 * plain, plain + 2 * copy)
    assert later <= max(1.05 * plain, plain + copy)


def probe_memory(estimator: str, layers: int) -> float:
    """Peak memory of a probe on layers with wide weights and few activations, in weights."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(layers)))
    updates = updates_of(model)
    probe = RateProbe(model, estimator=estimator)
    batch = {"input": torch.randn(4, 512)}
    probe.measure(updates, [batch], seeded(0))
    return peak_memory(lambda: probe.measure(updates, [batch], seeded(0))) / (512 * 512 * 4)


def test_a_probe_holds_no_weight_gradient() -> None:
    assert probe_memory("per_example", 4) < 0.2


@pytest.mark.parametrize("estimator", ["kronecker", "full", "iid"])
def test_weight_gradients_are_held_one_at_a_time(estimator: str) -> None:
    assert probe_memory(estimator, 4) < probe_memory(estimator, 1) + 0.2


def held_memory() -> int:
    """Bytes of all tensors that Python knows of."""
    gc.collect()
    return sum(each.nbytes for each in gc.get_objects() if issubclass(type(each), torch.Tensor))


@pytest.mark.parametrize("fails", [False, True])
def test_between_measurements_a_probe_holds_nothing_of_an_update(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """The draw of a trained head has (2d)^2 numbers."""
    steps = Steps(language_model())
    before = held_memory()
    steps.measured()
    if fails:
        monkeypatch.setattr(Gates, "differentiate", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            steps.measured()
        steps.optimizer.zero_grad()
    assert held_memory() < before + 4 * (2 * 64) ** 2
