"""Rates under compilation, checkpointing, mixed precision and kinds of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from hf_flerm import Measurement, measure_rates
from hf_flerm.rates.per_example.linear_head import LinearHead
from tests.shared.cases import WIDTH, features, gpt2, llama, perturb, seeded, text, updates_of


def rates(model: nn.Module, updates: dict[str, Tensor] | None = None, probes: int = 3, **settings: Any) -> Measurement:
    updates = updates_of(model) if updates is None else updates
    return measure_rates(model, updates, [text("right")], probes_per_batch=probes, generator=seeded(0), **settings)


def assert_same_rates(found: Measurement, expected: Measurement, rel: float) -> None:
    largest = max(expected.rates.values())
    assert list(found.rates) == list(expected.rates)
    for name, rate in expected.rates.items():
        assert found.rates[name] == pytest.approx(rate, rel=rel, abs=rel * 1e-3 * largest), name
    assert found.estimators == expected.estimators


def lora(model: nn.Module, **settings: Any) -> nn.Module:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", **settings))
    generator = seeded(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapted


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: perturb(gpt2(2)),
    "llama": lambda: perturb(llama(2)),
    "llama lora": lambda: lora(perturb(llama(2))),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def compile_whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compile_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compile_blocks(model: nn.Module) -> nn.Module:
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for block in blocks:
        block.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compile_whole, compile_in_place, compile_blocks])
def test_compiled_models_have_the_rates_of_plain_ones(compiled: Callable[[nn.Module], nn.Module]) -> None:
    model, plain = compiled(made("llama")), made("llama")
    model(**text("right"))
    assert_same_rates(rates(model), rates(plain), 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(**text("right")).logits, plain(**text("right")).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("estimator", ["per_example", "kronecker", "exact"])
def test_checkpointed_models_have_the_rates_of_plain_ones(name: str, reentrant: bool, estimator: str) -> None:
    model = made(name)
    expected = rates(model, estimator=estimator)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_same_rates(rates(model, estimator=estimator), expected, 1e-4)
    assert all("forward" not in vars(module) for module in model.modules() if "Layer" in type(module).__name__)


def test_a_checkpoint_keeps_nothing_of_a_tangent_by_two_backward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would miss what a recomputation, which knows by then that norms are affine, does not save again."""
    model = made("llama")
    expected = rates(model)

    def missing(*args: object) -> None:
        raise RuntimeError("there is no forward mode")

    monkeypatch.setattr(torch.func, "jvp", missing)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_same_rates(rates(model), expected, 1e-4)


def test_a_reentrant_checkpoint_in_a_forward_says_why_not() -> None:
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = checkpoint(self.inner, self.first(x), use_reentrant=True)
            return result

    model = Recomputed()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        measure_rates(model, updates_of(model), [features(3, 4)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_autocast_gives_the_rates_of_the_function_in_low_precision(name: str, dtype: torch.dtype) -> None:
    model = made(name)
    model.forward = torch.autocast("cpu", dtype)(model.forward)
    expected, found = rates(model, estimator="exact"), rates(model, probes=300)
    for tensor, rate in expected.rates.items():
        bound = 4 * found.standard_errors[tensor] + 0.05 * rate + 1e-3 * max(expected.rates.values())
        assert abs(found.rates[tensor] - rate) < bound, tensor
    assert set(found.estimators.values()) == {"per_example"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_callers_autocast_is_for_the_forward_pass_alone(dtype: torch.dtype) -> None:
    model, own = made("llama"), made("llama")
    own.forward = torch.autocast("cpu", dtype)(own.forward)
    expected = rates(own)
    with torch.autocast("cpu", dtype):
        found = rates(model)
    assert_same_rates(found, expected, 1e-6)


def accelerated(model: nn.Module) -> nn.Module:
    """What Accelerate makes of a model under mixed precision: autocast, and outputs in float32."""
    AcceleratorState._reset_state(reset_partial_state=True)
    prepared: nn.Module = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    return prepared


def test_the_vocabulary_is_skipped_under_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=WIDTH, n_head=2, n_layer=1, n_positions=8, bos_token_id=0, eos_token_id=0)
    model = perturb(GPT2LMHeadModel(config))
    updates = {name: update for name, update in updates_of(model).items() if "wte" not in name}
    expected = rates(model, updates, probes=100)
    drawn = []
    draw = LinearHead.draw
    monkeypatch.setattr(LinearHead, "draw", lambda *args: drawn.append(1) or draw(*args))
    found = rates(accelerated(model), updates, probes=100)
    assert len(drawn) == 100
    assert_same_rates(found, expected, 0.1)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e4])
def test_float16_neither_under_nor_overflows(size: float) -> None:
    # Updates far below float16's smallest number, and beyond its largest.
    model = made("llama lora")
    expected = rates(model, updates_of(model, size))
    model.forward = torch.autocast("cpu", torch.float16)(model.forward)
    found = rates(model, updates_of(model, size))
    for name, rate in expected.rates.items():
        assert found.rates[name] == pytest.approx(rate, rel=0.05), name


@pytest.mark.parametrize("size", [2.0**-20, 2.0**14])
def test_float16_gradients_are_scaled_into_range(size: float) -> None:
    """The gradient that omega sends back is far out of range; that of a loss would have been lost as well."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x)).float() * size

    torch.manual_seed(0)
    model = Scaled().half()
    updates = {"first.weight": torch.randn(8, 8)}
    x = torch.randn(4, 8, generator=seeded(0)).half()
    found = measure_rates(model, updates, [{"x": x}], probes_per_batch=20, generator=seeded(1))
    expected = measure_rates(model.float(), updates, [{"x": x.float()}], probes_per_batch=20, generator=seeded(1))
    assert found.rates["first.weight"] == pytest.approx(expected.rates["first.weight"], rel=0.02)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("estimator", ["per_example", "exact"])
def test_kinds_of_attention(attention: str, estimator: str) -> None:
    model = made("llama")
    expected = rates(model, estimator=estimator)
    model.set_attn_implementation(attention)
    assert_same_rates(rates(model, estimator=estimator), expected, 1e-3)


def test_caches_are_off_during_a_probe() -> None:
    model = made("llama")
    expected = rates(model)
    model.config.use_cache = True
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["use_cache"]), with_kwargs=True)
    assert_same_rates(rates(model), expected, 1e-6)
    assert not any(seen)
    assert model.config.use_cache


def test_a_loss_that_is_fused_with_the_head_is_not_called() -> None:
    """Fused losses replace `forward` and give logits only where there are no labels."""
    model = made("llama")
    expected = rates(model)
    own = model.forward

    def fused(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        assert labels is None, "the loss was called"
        return own(*args, **kwargs)

    model.forward = fused
    batch = {**text("right"), "labels": text("right")["input_ids"]}
    found = measure_rates(model, updates_of(model), [batch], probes_per_batch=3, generator=seeded(0))
    assert_same_rates(found, expected, 1e-6)
