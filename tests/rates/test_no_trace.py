"""A measurement leaves no trace, whether it ends or raises."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_flerm import measure_rates
from hf_flerm.choices import Estimator, values
from tests.shared.cases import GPT2_TARGETS, VOCABULARY, Case, case, gpt2, llama, lora, perturb, text
from tests.shared.reference import Batch


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a measurement must leave as it was."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
    )
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()},
        "objects": {name: id(value) for name, value in model.named_parameters(remove_duplicate=False)},
        "versions": {name: value._version for name, value in model.named_parameters()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "grad objects": {name: id(p.grad) for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "tensor hooks": {name: len(p._backward_hooks or ()) for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [list(getattr(module, kind)) for kind in hooks] for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }


def same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return isinstance(after, Tensor) and before.dtype == after.dtype and torch.equal(before, after)
    if isinstance(before, Mapping):
        return before.keys() == after.keys() and all(same(value, after[key]) for key, value in before.items())
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(same, before, after))
    return bool(np.array_equal(before, after)) if isinstance(before, np.ndarray) else before == after


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = state(model)
    changed = [key for key, value in before.items() if not same(value, after[key])]
    assert not changed


class Noisy(nn.Module):
    """Draws from every random stream, whatever the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * (torch.rand(()) + random.random() + np.random.rand())


class Stateful(nn.Module):
    """Dropout, batch norm, noise, a frozen part, a part in eval mode, a gradient and a head worth skipping."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.frozen = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(6)
        self.noise = Noisy()
        self.dropout = nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 64, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.frozen(self.embedding(input_ids))
        h = self.gain * self.dropout(self.noise(self.norm(h)))
        return self.head(torch.tanh(self.middle(h)))


def stateful(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = perturb(Stateful()).to(dtype)
    model.frozen.requires_grad_(False)
    model.train()
    model.frozen.eval()
    model.head.register_forward_pre_hook(lambda module, args: None)
    model(torch.zeros(2, 6, dtype=torch.long)).sum().backward()
    model.middle.weight.grad = None
    return model


@pytest.mark.parametrize("estimator", values(Estimator))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_measurement_leaves_no_trace(dtype: torch.dtype, estimator: str) -> None:
    model = stateful(dtype)
    updates = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    kept = {name: update.clone() for name, update in updates.items()}
    batches = [{"input_ids": text("right", seed)["input_ids"]} for seed in range(2)]
    before = state(model)
    result = measure_rates(model, updates, batches, estimator=estimator, probes_per_batch=2)
    assert_unchanged(before, model)
    assert set(result.rates) == set(updates)
    assert all(rate > 0 for rate in result.rates.values())
    assert same(kept, updates)


@pytest.mark.parametrize("estimator", values(Estimator))
def test_a_measurement_leaves_no_trace_on_adapters(estimator: str) -> None:
    made = lora(gpt2, GPT2_TARGETS, "right", fan_in_fan_out=True, use_dora=True, lora_dropout=0.5)
    made.model.train()
    made.model(**made.batches[0], labels=made.batches[0]["input_ids"]).loss.backward()
    before = state(made.model)
    made.measure(estimator)
    assert_unchanged(before, made.model)


class OutOfOrderError(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("estimator", ["per_example", "full", "exact"])
@pytest.mark.parametrize("progress", [0.0, 0.35, 0.7, 1.0])
def test_an_error_in_the_middle_of_a_forward_leaves_no_trace(
    estimator: str, progress: float, dtype: torch.dtype
) -> None:
    # The error comes in one of the model's forwards, which serve to find a head, to verify, to probe, to differentiate.
    model = stateful(dtype)
    calls, last = [0], [10**9]

    def explode(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls[0] += 1
        if calls[0] >= last[0]:
            raise OutOfOrderError

    model.middle.register_forward_pre_hook(explode)
    updates = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    batch = {"input_ids": text("right")["input_ids"]}
    measure_rates(model, updates, [batch, batch], estimator=estimator)
    last[0] = 1 + round(progress * (calls[0] - 1))
    calls[0] = 0
    before = state(model)
    with pytest.raises(OutOfOrderError):
        measure_rates(model, updates, [batch, batch], estimator=estimator)
    assert_unchanged(before, model)


@pytest.mark.parametrize("estimator", ["per_example", "full", "exact"])
@pytest.mark.parametrize("calls", range(2))
def test_an_error_in_the_output_function_leaves_no_trace(estimator: str, calls: int) -> None:
    model = stateful(torch.float32)
    remaining = [calls]

    def output(model: nn.Module, batch: Batch) -> Tensor:
        result = model(**batch)
        remaining[0] -= 1
        if remaining[0] < 0:
            raise KeyError("no such output")
        return result

    before = state(model)
    with pytest.raises(KeyError, match="no such output"):
        measure_rates(
            model,
            {"middle.weight": torch.ones(4, 4)},
            [{"input_ids": text("right")["input_ids"]}] * 3,
            estimator=estimator,
            output=output,
        )
    assert remaining == [-1]
    assert_unchanged(before, model)


def test_an_error_in_the_batches_leaves_no_trace() -> None:
    model = stateful(torch.float32)

    def batches() -> Iterator[Batch]:
        torch.rand(3), np.random.rand(), random.random()
        yield {"input_ids": text("right")["input_ids"]}
        raise OSError("no more")

    before = state(model)
    with pytest.raises(OSError, match="no more"):
        measure_rates(model, {"middle.weight": torch.ones(4, 4)}, batches())
    assert_unchanged(before, model)


def test_a_measurement_works_without_gradients_enabled() -> None:
    made = case("llama lora")
    expected = made.measure("per_example").rates
    with torch.no_grad():
        assert made.measure("per_example").rates == expected
        assert not torch.is_grad_enabled()


def test_rotary_embeddings_forget_how_long_a_probe_was() -> None:
    model = llama(max_position_embeddings=4, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    model(**text("right", length=3))
    before = {name: value.clone() for name, value in rotary._buffers.items()}, rotary.max_seq_len_cached
    measure_rates(model, Case(model, []).updates, [text("right", length=9)])
    assert rotary.max_seq_len_cached == before[1]
    assert all(torch.equal(rotary._buffers[name], value) for name, value in before[0].items())
