"""What training does around a model does not change its rates: compiling, checkpoints, precision, attention, caches."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from test_probes import WIDTH, features, gpt2, llama, perturb, seeded, text
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

from hf_flerm import Measurement, measure_rates
from hf_flerm.heads import LinearHead
from hf_flerm.names import trainable_parameters
from hf_flerm.probes import RateProbe
from hf_flerm.updates import Snapshot


def updates_of(model: nn.Module, size: float = 0.5) -> dict[str, Tensor]:
    generator = seeded(99)
    return {
        name: size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


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


# Compilation
# -----------


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


# Activation checkpoints
# ----------------------


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


# Precision
# ---------


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


# Attention and caches
# --------------------


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


# Memory
# ------


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
        before = Snapshot(self.parameters, self.snapshot_device)
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


# The weights from before
# -----------------------


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_snapshot_gives_back_every_bit(device: str | None) -> None:
    parameters = {"w": nn.Parameter(torch.tensor([0.1, -0.0, 1e-40, 3.0])), "frozen": nn.Parameter(torch.ones(2))}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    snapshot = Snapshot(parameters, device)
    assert not snapshot.moved()
    with torch.no_grad():
        parameters["w"].sub_(torch.tensor([0.3, 0.0, 1e-40, 7.0]))
    after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert snapshot.moved()
    with snapshot.put_back({"w": 0.5, "frozen": 0.0}) as updates:
        assert all(bits(parameters[name]) == bits(before[name]) for name in parameters)
        torch.testing.assert_close(updates["w"], (after["w"] - before["w"]) / 0.5, rtol=0, atol=0)
        assert updates["frozen"].tolist() == [0.0, 0.0]
    assert all(bits(parameters[name]) == bits(after[name]) for name in parameters)
    with pytest.raises(ZeroDivisionError), snapshot.put_back({"w": 0.5, "frozen": 0.0}):
        raise ZeroDivisionError
    assert all(bits(parameters[name]) == bits(after[name]) for name in parameters)
    assert places == {name: parameter.data_ptr() for name, parameter in parameters.items()}
    snapshot.rescale({"w": 2.0, "frozen": 1.0})
    torch.testing.assert_close(parameters["w"].detach(), before["w"] + 2 * (after["w"] - before["w"]))


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().view(torch.int32).tolist()  # type: ignore[no-any-return]
