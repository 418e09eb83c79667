"""Measurements on models: against finite differences, and without a trace left behind.

Sizes are tiny; every random estimator has a fixed number of probes and a fixed seed, and its tolerance is a multiple of
the standard error that theory gives it, computed from the reference.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from reference import Batch, Change, OutputFunction, finite_difference, kronecker_loop, weight_gradient_products
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.pytorch_utils import Conv1D

from hf_flerm import Measurement, measure_rates
from hf_flerm.estimators import ESTIMATORS
from hf_flerm.heads import LinearHead
from hf_flerm.outputs import Output, Outputs
from hf_flerm.probes import RateProbe

VOCABULARY, WIDTH = 20, 8
RANDOM = ("per_example", "full")
PROBES = {"per_example": 100, "full": 100}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Models
# ------


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def causal_mean(x: Tensor) -> Tensor:
    """Mix the positions of [N, T, d]."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype).unsqueeze(1)


class EveryKind(nn.Module):
    """One tensor of every kind in one model; the gain [] and the shift [d] belong to the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(6, WIDTH)
        self.layer_norm = nn.LayerNorm(WIDTH)
        self.conv = Conv1D(WIDTH, WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.rms_norm = RMSNorm(WIDTH)
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.token(input_ids) + self.position(torch.arange(input_ids.shape[1]).unsqueeze(0))
        h = h + self.gain * torch.tanh(self.conv(causal_mean(self.layer_norm(h))))
        h = h + self.linear(torch.tanh(h))
        return self.head(self.rms_norm(h) + self.shift)


def gpt2(layers: int = 1) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_head=2, n_layer=layers, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def llama(layers: int = 1, **settings: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=0,
        **settings,
    )
    return LlamaForCausalLM(config)


def perturb(model: nn.Module, seed: int = 0, size: float = 0.3) -> nn.Module:
    """Move every tensor off its initial value, so that no derivative vanishes because of a zero or a symmetry."""
    generator = seeded(seed)
    for parameter in model.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


def text(padding: str, seed: int = 0, examples: int = 3, length: int = 6) -> Batch:
    """Token ids, and a mask that leaves out none, 2, 3, ... positions at one side."""
    ids = torch.randint(VOCABULARY, (examples, length), generator=seeded(seed))
    kept = length - torch.arange(examples).unsqueeze(1) - (torch.arange(examples) > 0).long().unsqueeze(1)
    mask = (torch.arange(length) < kept).long()
    return {"input_ids": ids, "attention_mask": mask.flip(1) if padding == "left" else mask}


def features(*shape: int, seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(shape, generator=seeded(seed))}


# Cases
# -----


@dataclass(frozen=True)
class Case:
    """A model, the updates of its trainable parameters and the batches to measure on.

    Attributes:
        fallback: Canonical names that only their weight gradient can measure.
    """

    model: nn.Module
    batches: list[Batch]
    output: OutputFunction | None = None
    fallback: frozenset[str] = frozenset()

    @property
    def updates(self) -> dict[str, Tensor]:
        generator = seeded(99)
        return {
            name: 0.5 * torch.randn(parameter.shape, generator=generator)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def measure(self, estimator: str, seed: int = 0, probes: int = 1) -> Measurement:
        return measure_rates(
            self.model,
            self.updates,
            self.batches,
            estimator=estimator,
            probes_per_batch=probes,
            output=self.output,
            generator=seeded(seed),
        )


def canonical(name: str) -> str:
    """PEFT's name without its adapter."""
    return name.replace(".default", "")


def lora(base: Callable[[], nn.Module], targets: list[str], padding: str, **settings: Any) -> Case:
    torch.manual_seed(0)
    model = perturb(base()).requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, **settings))
    if settings.get("init_lora_weights") != "gaussian":  # which is left as it is: B = 0
        generator = seeded(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return Case(model, [text(padding)])


GPT2_TARGETS = ["c_attn", "c_fc"]
LLAMA_TARGETS = ["q_proj", "down_proj"]

NAMED: dict[str, Callable[[], Case]] = {
    "every kind": lambda: Case(perturb(EveryKind()), [text("right"), text("left", 1, examples=2)]),
    "gpt2, tied, right padding": lambda: Case(perturb(gpt2()), [text("right")]),
    "gpt2, tied, left padding": lambda: Case(perturb(gpt2(2)), [text("left")]),
    "llama, tied": lambda: Case(perturb(llama(tie_word_embeddings=True)), [text("left")]),
    "gpt2 lora": lambda: lora(lambda: gpt2(2), GPT2_TARGETS, "right", fan_in_fan_out=True),
    "gpt2 lora_bias": lambda: lora(gpt2, GPT2_TARGETS, "left", fan_in_fan_out=True, lora_bias=True),
    "gpt2 dora": lambda: lora(gpt2, GPT2_TARGETS, "right", fan_in_fan_out=True, use_dora=True),
    "gpt2 gaussian": lambda: lora(gpt2, GPT2_TARGETS, "right", fan_in_fan_out=True, init_lora_weights="gaussian"),
    "gpt2 modules_to_save": lambda: lora(
        gpt2, ["c_attn"], "right", fan_in_fan_out=True, modules_to_save=["lm_head", "ln_f"]
    ),
    "gpt2 lora on embeddings": lambda: lora(gpt2, ["wte", "wpe"], "left"),
    "gpt2 lora and biases": lambda: lora(gpt2, GPT2_TARGETS, "right", fan_in_fan_out=True, bias="all"),
    "llama lora": lambda: lora(lambda: llama(2), LLAMA_TARGETS, "right"),
    "llama lora_bias": lambda: lora(llama, LLAMA_TARGETS, "left", lora_bias=True),
    "llama dora": lambda: lora(llama, LLAMA_TARGETS, "left", use_dora=True),
    "llama gaussian": lambda: lora(llama, LLAMA_TARGETS, "left", init_lora_weights="gaussian"),
    "llama modules_to_save": lambda: lora(llama, ["q_proj"], "left", modules_to_save=["lm_head"]),
    "llama lora on embedding": lambda: lora(llama, ["embed_tokens"], "right"),
    "llama lora on head": lambda: lora(llama, ["lm_head"], "right"),
}


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.randn(4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nti,ijk,ntk->ntj", x, self.core, x.tanh())


class Wrap(nn.Module):
    """A module and how it is called."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


def mlp(*middle: nn.Module, width: int = 4, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), *middle, nn.Linear(width, outputs))


def time_major(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(x.transpose(0, 1)).cumsum(0).tanh().transpose(0, 1)


class PositionBias(nn.Module):
    """Mixes positions by learned weights that depend on their distance, as T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(11, 1)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        distances = torch.arange(6).unsqueeze(1) - torch.arange(6) + 5
        return self.out(self.bias(distances).squeeze(-1).softmax(-1) @ x)


class Attention(nn.Module):
    """Attention whose key bias shifts all scores of a query alike, so that it has no effect but round-off."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1) @ self.value(x)


def chosen(inner: nn.Module, x: Tensor) -> Tensor:
    """Send only some tokens through a module, as a mixture of experts does, and mix the positions afterwards."""
    taken = x[..., 0] > 0
    out = torch.zeros_like(x)
    out[taken] = inner(x[taken])
    return out.cumsum(1).tanh()


def routed(count: int) -> dict[str, Tensor]:
    """Two examples of 5 tokens, `count` of which will be chosen."""
    x = torch.randn(10, 4, generator=seeded(count))
    x[:, 0] = x[:, 0].abs() * torch.tensor([1.0] * count + [-1.0] * (10 - count))
    return {"x": x.reshape(2, 5, 4)}


class FusedGain(torch.autograd.Function):
    """Has a backward and nothing else, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] * weight, (grads[0] * x).flatten(0, -2).sum(0)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return FusedGain.apply(x, self.weight)


class Temperature(nn.Module):
    """Returns [1]: one number for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        return self.log_scale.exp()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.temperature = Temperature()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.temperature()


class Alias(nn.Module):
    """The root holds its embedding's weight a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.out = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.embedding(x).tanh(), self.out)


class Recomputed(nn.Module):
    """Checkpoints its middle also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(nn.Tanh(), outputs=4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


class Residual(nn.Module):
    """Adds in place to what a module returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h += self.second(x).tanh()
        return h.tanh()


def normalized_over_batch(model: nn.Module, batch: Batch) -> Tensor:
    out = model(**batch).tanh()
    return out - out.mean(0)


def batch_norm() -> Case:
    model = perturb(nn.Sequential(nn.Conv1d(4, 4, 2), nn.BatchNorm1d(4), nn.Tanh(), nn.Conv1d(4, 3, 1)))
    model[1].running_mean += 0.3
    model[1].running_var += torch.rand(4)
    return Case(Wrap(model, lambda inner, x: inner(x)), [features(3, 4, 5)])


OTHERS: dict[str, Callable[[], Case]] = {
    "custom bilinear": lambda: Case(Wrap(mlp(Bilinear()), lambda m, x: m(x)), [features(3, 5, 4)]),
    "nn.Bilinear": lambda: Case(Wrap(nn.Bilinear(4, 4, 3), lambda m, x: m(x, x.tanh())), [features(3, 5, 4)]),
    "keyword arguments": lambda: Case(Wrap(nn.Linear(4, 3), lambda m, x: m(input=x)), [features(3, 5, 4)]),
    "called twice": lambda: Case(Wrap(mlp(nn.Tanh(), outputs=4), lambda m, x: m(x + m(x))), [features(3, 5, 4)]),
    "owner never called": lambda: Case(
        Wrap(nn.Linear(4, 4), lambda m, x: F.linear(x, m.weight, m.bias).tanh()), [features(3, 5, 4)]
    ),
    "owner called and bypassed": lambda: Case(
        Wrap(nn.Linear(4, 4), lambda m, x: F.linear(m(x).tanh(), m.weight)), [features(3, 5, 4)]
    ),
    # T = 6 is a multiple of N = 3: time could be taken for the examples.
    "time-major": lambda: Case(Wrap(mlp(nn.Tanh()), time_major), [features(3, 6, 4)]),
    "time-major, odd": lambda: Case(Wrap(mlp(nn.Tanh()), time_major), [features(3, 4, 4)]),
    "flattened": lambda: Case(
        Wrap(mlp(nn.Tanh()), lambda m, x: m(x.flatten(0, 1)).reshape(*x.shape[:2], -1).cumsum(1).tanh()),
        [features(3, 5, 4)],
    ),
    "flattened, positions first": lambda: Case(
        Wrap(
            mlp(nn.Tanh()),
            lambda m, x: m(x.transpose(0, 1).flatten(0, 1)).reshape(5, 3, -1).cumsum(0).tanh().transpose(0, 1),
        ),
        [features(3, 5, 4)],
    ),
    "batch norm in eval mode": batch_norm,
    "weight norm": lambda: Case(
        Wrap(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), lambda m, x: m(x)), [features(3, 5, 4)]
    ),
    # The bias's [T, T, 1] output looks as if it had examples.
    "position bias": lambda: Case(PositionBias(), [features(3, 6, 4)]),
    "output of one number": lambda: Case(
        Wrap(mlp(nn.Tanh()), lambda m, x: m(x)), [features(3, 5, 4)], lambda m, batch: m(**batch).sum((1, 2))
    ),
    "two sizes of batch": lambda: Case(
        Wrap(mlp(nn.Tanh()), time_major), [features(3, 6, 4), features(2, 4, 4, seed=1), features(1, 5, 4, seed=2)]
    ),
    "examples mixed by the output": lambda: Case(
        Wrap(nn.Linear(4, 3), lambda m, x: m(x)),
        [features(3, 5, 4)],
        normalized_over_batch,
        frozenset({"inner.weight", "inner.bias"}),
    ),
    "examples mixed in the model": lambda: Case(
        Wrap(nn.Linear(4, 3), lambda m, x: m(x).tanh() - m(x).tanh().mean(0)), [features(3, 5, 4)]
    ),
    "in-place relu": lambda: Case(Wrap(mlp(nn.ReLU(inplace=True)), lambda m, x: m(x)), [features(3, 5, 4)]),
    "in-place residual": lambda: Case(Residual(), [features(3, 5, 4)]),
    "first batch of one example": lambda: Case(
        Wrap(nn.Linear(4, 4), time_major), [features(1, 8, 4), features(4, 8, 4, seed=1)]
    ),
    "later examples mixed": lambda: Case(
        Wrap(nn.Linear(4, 4), lambda m, x: m(x).cumsum(0).tanh()), [features(3, 5, 4)]
    ),
    "earlier examples mixed": lambda: Case(
        Wrap(nn.Linear(4, 4), lambda m, x: m(x).flip(0).cumsum(0).tanh()), [features(3, 5, 4)]
    ),
    "neighbors mixed": lambda: Case(
        Wrap(
            nn.Linear(4, 4),
            lambda m, x: m(x).unflatten(0, (2, 2)).sum(1, keepdim=True).repeat(1, 2, 1, 1).flatten(0, 1),
        ),
        [features(4, 5, 4)],
    ),
    "tokens chosen": lambda: Case(Wrap(nn.Linear(4, 4), chosen), [routed(10), routed(6), routed(7)]),
    "one number for the batch": lambda: Case(Scaled(), [features(4, 5, 4)]),
    "encoder layer": lambda: Case(
        Wrap(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), lambda m, x: m(x)), [features(3, 5, 4)]
    ),
    "alias in the root": lambda: Case(Alias(), [{"x": torch.randint(VOCABULARY, (3, 5), generator=seeded(0))}]),
    "checkpointed in eval mode": lambda: Case(Recomputed(), [features(3, 5, 4)]),
    "sparse gradient": lambda: Case(
        nn.Sequential(nn.Embedding(VOCABULARY, 4, sparse=True), nn.Linear(4, 3)),
        [{"input": torch.randint(VOCABULARY, (3, 5), generator=seeded(0))}],
    ),
}
CASES = NAMED | OTHERS


@cache
def case(name: str) -> Case:
    torch.manual_seed(0)
    return CASES[name]()


@cache
def changes(name: str) -> dict[str, Change]:
    """The reference: `{canonical name: D f}`."""
    made = case(name)
    return {
        canonical(raw): finite_difference(made.model, {raw: update}, made.batches, made.output)
        for raw, update in made.updates.items()
    }


# Numbers against the reference
# -----------------------------


@pytest.mark.parametrize("name", CASES)
def test_exact_is_the_derivative(name: str) -> None:
    expected = changes(name)
    result = case(name).measure("exact")
    assert set(result.rates) == set(expected)
    assert set(result.estimators.values()) == {"exact"}
    assert set(result.standard_errors.values()) == {0.0}
    for tensor, change in expected.items():
        assert result.rates[tensor] == pytest.approx(change.rate, rel=1e-4, abs=1e-9), tensor


@pytest.mark.parametrize("estimator", RANDOM)
@pytest.mark.parametrize("name", CASES)
def test_random_estimators_agree_with_the_derivative(name: str, estimator: str) -> None:
    made, expected = case(name), changes(name)
    result = made.measure(estimator, probes=PROBES[estimator])
    assert set(result.rates) == set(expected)
    assert result.num_probes == PROBES[estimator] * len(made.batches)
    assert result.estimators == {
        tensor: "kronecker" if tensor in made.fallback and estimator == "per_example" else estimator
        for tensor in expected
    }
    for tensor, change in expected.items():
        if result.estimators[tensor] == "kronecker":
            continue
        error = change.error(estimator, PROBES[estimator])
        assert abs(result.rates[tensor] - change.rate) <= 4 * error + 1e-9, (tensor, result.rates[tensor], change.rate)


@pytest.mark.parametrize("name", ["gpt2 gaussian", "llama gaussian"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_tensor_without_effect_has_rate_zero(name: str, estimator: str) -> None:
    result = case(name).measure(estimator, probes=2)
    for tensor, rate in result.rates.items():
        if "lora_A" in tensor:
            assert (rate, result.standard_errors[tensor]) == (0.0, 0.0), tensor
        else:
            assert rate > 0, tensor


@pytest.mark.parametrize("name", [name for name, make in OTHERS.items() if make().fallback])
def test_the_fallback_is_kronecker_on_the_same_probes(name: str) -> None:
    by_example, kronecker = (case(name).measure(estimator, probes=5) for estimator in ("per_example", "kronecker"))
    for tensor in case(name).fallback:
        assert by_example.estimators[tensor] == "kronecker"
        assert by_example.rates[tensor] == pytest.approx(kronecker.rates[tensor], rel=1e-5)
        assert by_example.standard_errors[tensor] == pytest.approx(kronecker.standard_errors[tensor], rel=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_module_without_forward_mode_falls_back(batch_first: bool) -> None:
    # Neither a bare autograd.Function nor a fused LSTM has a JVP: their own tensors fall back, the others do not.
    torch.manual_seed(0)
    middle = nn.LSTM(4, 4, batch_first=True) if batch_first else Fused()
    made = Case(Wrap(nn.ModuleList([nn.Linear(4, 4), middle, nn.Linear(4, 3)]), _chain), [features(3, 5, 4)])
    own = {f"inner.1.{name}" for name, _ in middle.named_parameters()}
    by_example, kronecker = (made.measure(estimator, probes=20) for estimator in ("per_example", "kronecker"))
    for tensor, estimator in by_example.estimators.items():
        if tensor not in own:
            assert estimator == "per_example"
        elif estimator == "kronecker":
            assert by_example.rates[tensor] == pytest.approx(kronecker.rates[tensor], rel=1e-5)
        else:
            change = finite_difference(made.model, {tensor: made.updates[tensor]}, made.batches)
            assert abs(by_example.rates[tensor] - change.rate) < 4 * change.error("per_example", 20)


def _chain(modules: nn.ModuleList, x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
        x = x[0] if isinstance(x, tuple) else x
    return x


def test_an_update_that_the_first_example_does_not_see() -> None:
    # The table is indexed by its parent, so gates at its owner never fire; only examples 1 and 2 show that.
    torch.manual_seed(0)
    model = Wrap(nn.ParameterDict({"table": torch.randn(6, 4)}), lambda m, x: F.embedding(x, m["table"]).tanh())
    batch = {"x": torch.tensor([[0, 1, 2], [3, 4, 5], [5, 2, 2]])}
    update = torch.zeros(6, 4)
    update[3:] = torch.randn(3, 4)
    change = finite_difference(model, {"inner.table": update}, [batch])
    result = measure_rates(model, {"inner.table": update}, [batch], probes_per_batch=100, generator=seeded(0))
    assert abs(result.rates["inner.table"] - change.rate) < 4 * change.error("per_example", 100)


@pytest.mark.parametrize("others", [(), ("inner.1.bias",)], ids=["alone", "with another"])
def test_an_update_that_the_first_batch_does_not_see(others: tuple[str, ...]) -> None:
    # Only the second batch shows that the table cannot be told apart by example.
    torch.manual_seed(0)
    model = Wrap(nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4)), lambda m, x: m(x))
    update = torch.zeros(6, 4)
    update[3:] = torch.randn(3, 4)
    updates = {"inner.0.weight": update} | {name: torch.randn(4) for name in others}
    batches = [{"x": torch.tensor([[0, 1, 2], [2, 1, 1]])}, {"x": torch.tensor([[3, 4, 5], [5, 2, 2]])}]
    by_example, kronecker = (
        measure_rates(
            model,
            updates,
            batches,
            estimator=estimator,
            probes_per_batch=5,
            output=normalized_over_batch,
            generator=seeded(0),
        )
        for estimator in ("per_example", "kronecker")
    )
    for name, rate in kronecker.rates.items():
        assert by_example.estimators[name] == "kronecker"
        assert by_example.rates[name] == pytest.approx(rate, rel=1e-5), name


@pytest.mark.parametrize("examples", [4, 32])
def test_layouts_are_told_apart_in_low_precision(examples: int) -> None:
    torch.manual_seed(0)
    model = Wrap(nn.Linear(4, 4), time_major).to(torch.bfloat16)
    probes, batch = 100, {"x": features(examples, examples, 4)["x"].to(torch.bfloat16)}
    updates = {name: torch.randn(p.shape, generator=seeded(1)) for name, p in model.named_parameters()}
    result = measure_rates(model, updates, [batch], probes_per_batch=probes, generator=seeded(0))
    for name, update in updates.items():
        change = finite_difference(model, {name: update.to(torch.bfloat16)}, [batch])
        # Time taken for the examples gives the bias 0.64 of its rate with 4 examples, 0.27 with 32.
        assert abs(result.rates[name] - change.rate) < 4 * change.error("per_example", probes) + 0.02 * change.rate


@pytest.mark.parametrize(
    "output",
    [
        lambda model, batch: model(**batch).flatten(0, 1)[::2],
        lambda model, batch: model(**batch).flatten(0, 1),
        lambda model, batch: model(**batch)[0::2] - model(**batch)[1::2],
        lambda model, batch: model(**batch).mean(0, keepdim=True),
    ],
    ids=["chosen positions", "all positions", "pairs of examples", "mean over examples"],
)
def test_outputs_whose_rows_are_not_the_examples(output: OutputFunction) -> None:
    torch.manual_seed(0)
    made = Case(Wrap(mlp(nn.Tanh()), lambda m, x: m(x).tanh()), [features(4, 6, 4)], output)
    by_example, kronecker = (made.measure(estimator, probes=50) for estimator in ("per_example", "kronecker"))
    for name, update in made.updates.items():
        if by_example.estimators[name] == "kronecker":
            assert by_example.rates[name] == pytest.approx(kronecker.rates[name], rel=1e-5)
        else:  # which varies no more than `full` whatever the examples are
            change = finite_difference(made.model, {name: update}, made.batches, output)
            assert abs(by_example.rates[name] - change.rate) < 4 * change.error("full", 50)


def test_an_effect_of_round_off_alone_needs_no_fallback() -> None:
    # Attention ignores a bias of its keys; a relative comparison of one round-off with another proves nothing.
    torch.manual_seed(0)
    made = Case(perturb(Attention()), [features(4, 6, 4)])
    result = made.measure("per_example")
    assert set(result.estimators.values()) == {"per_example"}
    assert result.rates["key.bias"] < 1e-6 * result.rates["key.weight"]


@pytest.mark.parametrize("probes", [1, 3])
def test_kronecker_on_a_model_is_the_literal_loop(monkeypatch: pytest.MonkeyPatch, probes: int) -> None:
    drawn: list[Tensor] = []
    original = Output.omega

    def omega(self: Output, generator: torch.Generator) -> Tensor:
        drawn.append(original(self, generator))
        return drawn[-1]

    made = case("every kind")
    monkeypatch.setattr(Output, "omega", omega)
    result = made.measure("kronecker", probes=probes)
    assert len(drawn) == probes * len(made.batches)
    batches = [batch for batch in made.batches for _ in range(probes)]
    masks = [batch["attention_mask"] for batch in batches]
    for weights, mask in zip(drawn, masks, strict=True):
        assert bool(((weights != 0) == mask.bool().unsqueeze(-1)).all()), "omega must leave padding out, and only it"
    num_outputs = sum(float(mask.sum()) for mask in masks) * VOCABULARY / len(masks)
    shapes = set()
    for name, update in made.updates.items():
        products = weight_gradient_products(made.model, name, update, batches, drawn, lambda m, b: m(**b))
        assert result.rates[name] == pytest.approx(kronecker_loop(products, num_outputs), rel=1e-4), name
        shapes.add(update.ndim)
    assert shapes == {0, 1, 2}


def test_kronecker_on_a_three_dimensional_tensor_is_the_literal_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case("custom bilinear")
    weights = torch.randn(3, 5, 3, generator=seeded(5))
    monkeypatch.setattr(Output, "omega", lambda self, generator: weights)
    result = made.measure("kronecker")
    name = "inner.1.core"
    products = weight_gradient_products(
        made.model, name, made.updates[name], made.batches, [weights], lambda m, b: m(**b)
    )
    assert result.rates[name] == pytest.approx(kronecker_loop(products, weights.numel()), rel=1e-4)


def test_kronecker_is_full_where_the_products_have_rank_one() -> None:
    # One example, one position: the gradient is g x^T, and an update u v^T leaves Z of rank one.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))
    update = torch.outer(torch.randn(5), torch.randn(4))
    batch = {"input": torch.randn(1, 4)}
    one, same = (
        measure_rates(model, {"0.weight": update}, [batch], estimator=estimator, generator=seeded(0))
        for estimator in ("kronecker", "full")
    )
    assert one.rates["0.weight"] == pytest.approx(same.rates["0.weight"], rel=1e-5)
    change = finite_difference(model, {"0.weight": update}, [batch])
    many = measure_rates(
        model, {"0.weight": update}, [batch], estimator="kronecker", probes_per_batch=400, generator=seeded(1)
    )
    assert abs(many.rates["0.weight"] - change.rate) < 4 * many.standard_errors["0.weight"]


def test_iid_is_right_for_a_diagonal_and_wrong_elsewhere() -> None:
    # With one-hot inputs that occur once each, the entries of a layer's own gradient are independent.
    model = Wrap(nn.Linear(4, 3, bias=False), lambda m, x: m(x))
    update = {"inner.weight": torch.rand(3, 4, generator=seeded(0))}
    for inputs, right in [(torch.eye(4), True), (torch.ones(4, 4), False)]:
        batch = {"x": inputs}
        change = finite_difference(model, update, [batch])
        result = measure_rates(model, update, [batch], estimator="iid", probes_per_batch=200, generator=seeded(1))
        (rate,), (error,) = result.rates.values(), result.standard_errors.values()
        assert (abs(rate - change.rate) < 4 * error) == right


def test_kronecker_output_is_unbiased_for_the_output_layer_and_varies_less() -> None:
    made, expected = case("every kind"), changes("every kind")
    seeds, probes = 30, 4
    rates: dict[str, Tensor] = {}
    for estimator in ("kronecker", "kronecker_output"):
        probe = RateProbe(made.model, estimator=estimator, probes_per_batch=probes)
        results = [probe.measure(made.updates, made.batches, seeded(seed)) for seed in range(seeds)]
        rates[estimator] = torch.tensor([list(result.rates.values()) for result in results])
    names = list(results[0].rates)
    assert results[0].estimators == {
        name: "kronecker_output" if name.startswith("head.") else "kronecker" for name in names
    }
    for i, name in enumerate(names):
        plain, output = rates["kronecker"][:, i], rates["kronecker_output"][:, i]
        if name.startswith("head."):
            squares = output.square()
            assert abs(squares.mean() - expected[name].rate ** 2) < 4 * squares.std() / seeds**0.5
            assert output.std() < 0.7 * plain.std()
        else:
            assert torch.equal(plain, output)


def test_a_tied_head_is_no_output_layer() -> None:
    result = case("gpt2, tied, right padding").measure("kronecker_output")
    assert set(result.estimators.values()) == {"kronecker"}


# Standard errors
# ---------------


@pytest.mark.parametrize(("estimator", "probes", "seeds"), [("per_example", 30, 150), ("full", 100, 100)])
def test_standard_errors_are_calibrated(estimator: str, probes: int, seeds: int) -> None:
    torch.manual_seed(0)
    made = Case(Wrap(nn.Linear(3, 4), lambda m, x: m(x)), [features(4, 2, 3)])
    expected = {name: finite_difference(made.model, {name: u}, made.batches) for name, u in made.updates.items()}
    probe = RateProbe(made.model, estimator=estimator, probes_per_batch=probes)
    z: dict[str, list[float]] = {name: [] for name in expected}
    for seed in range(seeds):
        result = probe.measure(made.updates, made.batches, seeded(seed))
        for name, change in expected.items():
            z[name].append((result.rates[name] - change.rate) / result.standard_errors[name])
    for name, values in z.items():
        spread = torch.tensor(values)
        # A standard error too large by sqrt(2) gives a variance of 0.5, too small by it 2; 100 draws know it to 0.15.
        assert 0.65 < spread.var() < 1.6, (name, spread.var())
        assert abs(spread.mean()) < 0.45, (name, spread.mean())


# Joint rates
# -----------


def joint(name: str, tensors: list[str]) -> float:
    made = case(name)
    moved = {raw: update for raw, update in made.updates.items() if canonical(raw) in tensors}
    assert len(moved) == len(tensors)
    return finite_difference(made.model, moved, made.batches, made.output).rate


def inner_products(name: str) -> Tensor:
    values = torch.stack([change.values for change in changes(name).values()])
    return values @ values.T / values.shape[1]


JOINT = ["every kind", "gpt2, tied, left padding", "llama lora_bias"]


@pytest.mark.parametrize("name", JOINT)
def test_exact_joint_rates(name: str) -> None:
    result = case(name).measure("exact")
    tensors = list(result.rates)
    assert result.total == pytest.approx(joint(name, tensors), rel=1e-4)
    for group in (tensors[:2], tensors[1::3], tensors[-1:]):
        assert result.group_rate(group) == pytest.approx(joint(name, group), rel=1e-4)
    names, inner = result.interactions()
    assert names == list(changes(name))
    expected = inner_products(name)
    assert inner.dtype == torch.float64
    assert (inner - expected).abs().max() < 1e-4 * expected.diagonal().max()


@pytest.mark.parametrize(
    ("name", "estimator"),
    [*((name, "per_example") for name in JOINT), (JOINT[0], "full"), (JOINT[0], "kronecker"), (JOINT[2], "kronecker")],
)
def test_estimated_joint_rates(name: str, estimator: str) -> None:
    # M * rate^2 of a group is unbiased: its mean over repetitions must meet the finite difference of the joint update.
    repetitions, probes = 20, 6
    made = case(name)
    probe = RateProbe(made.model, estimator=estimator, probes_per_batch=probes, outputs=Outputs(made.output))
    results = [probe.measure(made.updates, made.batches, seeded(seed)) for seed in range(repetitions)]
    tensors = list(results[0].rates)
    for group in (tensors, tensors[:2], tensors[1::3]):
        squares = torch.tensor([result.group_rate(group) ** 2 for result in results])
        error = squares.std() / repetitions**0.5
        assert abs(squares.mean() - joint(name, group) ** 2) < 4 * error
        assert error < 0.25 * squares.mean()
    assert results[0].total == results[0].group_rate(tensors)
    inner = torch.stack([result.interactions()[1] for result in results])
    errors = inner.std(0) / repetitions**0.5
    # The number of pairs reaches 600: a bound of 5 where one number has 4.
    assert ((inner.mean(0) - inner_products(name)).abs() <= 5 * errors + 1e-12).all()


@pytest.mark.parametrize("estimator", ["per_example", "full", "exact"])
def test_squared_rates_are_on_the_diagonal(estimator: str) -> None:
    result = case("every kind").measure(estimator, probes=3)
    names, inner = result.interactions()
    torch.testing.assert_close(inner.diagonal().sqrt(), torch.tensor(list(result.rates.values()), dtype=torch.float64))
    for name in names:
        assert result.group_rate([name]) == pytest.approx(result.rates[name])


def test_joint_rates_of_tensors_with_different_estimators() -> None:
    # The head's input is detached from the batch's mixing, which only the body's weight gradient can follow.
    torch.manual_seed(0)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    def output(model: nn.Module, batch: Batch) -> Tensor:
        a, b = model(**batch)
        return (a - a.mean(0)) + b

    model, batch = Half(), features(3, 5, 4)
    updates = {"a.weight": torch.randn(4, 4), "b.weight": torch.randn(4, 4)}
    joint_rate = finite_difference(model, updates, [batch], output).rate
    probe = RateProbe(model, probes_per_batch=10, outputs=Outputs(output))
    results = [probe.measure(updates, [batch], seeded(seed)) for seed in range(40)]
    assert results[0].estimators == {"a.weight": "kronecker", "b.weight": "per_example"}
    squares = torch.tensor([result.total**2 for result in results])
    assert abs(squares.mean() - joint_rate**2) < 4 * squares.std() / len(squares) ** 0.5


# How the work is split
# ---------------------


def test_exact_does_not_depend_on_how_the_batch_is_split() -> None:
    made = case("gpt2 lora")
    (batch,) = made.batches
    parts = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    whole = made.measure("exact")
    split = measure_rates(made.model, made.updates, parts, estimator="exact")
    assert split.num_probes == 3
    for name, rate in whole.rates.items():
        assert split.rates[name] == pytest.approx(rate, rel=1e-4), name


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "exact"])
def test_probes_of_one_forward_are_probes_of_several(estimator: str) -> None:
    made = case("llama lora")
    together = made.measure(estimator, probes=3)
    apart = measure_rates(made.model, made.updates, made.batches * 3, estimator=estimator, generator=seeded(0))
    assert together.num_probes == apart.num_probes == 3
    for name, rate in together.rates.items():
        assert apart.rates[name] == pytest.approx(rate, rel=1e-4), name


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "exact"])
def test_a_generator_makes_a_measurement_reproducible(estimator: str) -> None:
    made = case("llama lora")
    first, again, other = (made.measure(estimator, seed=seed) for seed in (3, 3, 4))
    assert first.rates == again.rates
    assert torch.equal(first.inner_products, again.inner_products)
    assert all(first.rates[name] != other.rates[name] for name in first.rates)


def test_a_generator_goes_on_where_it_stopped() -> None:
    made, generator = case("llama lora"), seeded(0)
    first, second = (measure_rates(made.model, made.updates, made.batches, generator=generator) for _ in range(2))
    assert all(first.rates[name] != second.rates[name] for name in first.rates)


def test_without_a_generator_the_global_stream_decides() -> None:
    made = case("llama lora")
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(measure_rates(made.model, made.updates, made.batches).rates)
    assert results[0] == results[1]
    assert all(results[0][name] != results[2][name] for name in results[0])


def test_the_order_and_choice_of_tensors_do_not_matter() -> None:
    made = case("every kind")
    whole = made.measure("per_example", probes=2).rates
    chosen = ["gain", "head.bias", "conv.weight", "head.weight"]  # the head's tensors decide if it is skipped
    some = measure_rates(
        made.model,
        {name: made.updates[name] for name in chosen},
        made.batches,
        probes_per_batch=2,
        generator=seeded(0),
    ).rates
    assert list(some) == chosen
    for name in chosen:
        assert some[name] == pytest.approx(whole[name], rel=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rates_are_linear_in_the_update(estimator: str) -> None:
    made = case("every kind")
    once = made.measure(estimator)
    tenfold = measure_rates(
        made.model,
        {name: -10 * update for name, update in made.updates.items()},
        made.batches,
        estimator=estimator,
        generator=seeded(0),
    )
    for name, rate in once.rates.items():
        assert tenfold.rates[name] == pytest.approx(10 * rate, rel=1e-4)


def test_dropout_is_off() -> None:
    made = case("gpt2, tied, right padding")
    noisy = GPT2LMHeadModel(made.model.config).train()
    noisy.load_state_dict(made.model.state_dict())
    assert noisy.transformer.drop.p == 0.1
    rates = measure_rates(noisy, made.updates, made.batches, generator=seeded(0)).rates
    assert rates == made.measure("per_example").rates


def test_labels_are_left_out_and_padding_does_not_count() -> None:
    made = case("gpt2, tied, right padding")
    (batch,) = made.batches
    # What stands at padded positions cannot matter in a causal model.
    other = torch.where(batch["attention_mask"].bool(), batch["input_ids"], (batch["input_ids"] + 1) % VOCABULARY)
    changed = batch | {"input_ids": other, "labels": torch.full((3, 6), 5)}
    assert not torch.equal(other, batch["input_ids"])
    rates = measure_rates(made.model, made.updates, [changed], estimator="exact").rates
    original = made.measure("exact").rates
    moved = {"transformer.wte.weight", "transformer.wpe.weight"}
    for name in set(rates) - moved:
        assert rates[name] == pytest.approx(original[name], rel=1e-4), name


def test_no_kind_of_label_reaches_the_model() -> None:
    made = case("every kind")  # whose forward takes none
    labels = dict.fromkeys(("labels", "label", "label_ids", "num_items_in_batch"), torch.ones(3))
    result = measure_rates(made.model, made.updates, [made.batches[0] | labels], generator=seeded(0))
    plain = measure_rates(made.model, made.updates, made.batches[:1], generator=seeded(0))
    assert result.rates == plain.rates


def test_an_output_function_decides_what_counts() -> None:
    made = case("gpt2, tied, right padding")

    def last_logit(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["input_ids"]).logits[:, -1, :2]

    expected = finite_difference(made.model, made.updates, made.batches, last_logit).rate
    result = measure_rates(made.model, made.updates, made.batches, estimator="exact", output=last_logit)
    assert result.total == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("examples", "positions"), [(1, 257), (700, 100)])
def test_outputs_are_counted_exactly_in_low_precision(examples: int, positions: int, dtype: torch.dtype) -> None:
    # 257 is no bfloat16 and 70,000 no float16. Every output is the weight, so it moves at the rate of 1.
    model = Wrap(nn.Linear(1, 1, bias=False), lambda m, x: m(x)).to(dtype)
    batch = {"x": torch.ones(examples, positions, 1, dtype=dtype)}
    result = measure_rates(model, {"inner.weight": torch.ones(1, 1)}, [batch], estimator="exact")
    assert result.rates["inner.weight"] == pytest.approx(1.0, rel=1e-6)


# Nothing left
# ------------


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


@pytest.mark.parametrize("estimator", ESTIMATORS)
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


@pytest.mark.parametrize("estimator", ESTIMATORS)
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


# Errors
# ------


def plain() -> tuple[nn.Module, dict[str, Tensor], list[dict[str, Tensor]]]:
    return mlp(nn.Tanh()), {"0.weight": torch.ones(4, 4)}, [{"input": torch.ones(2, 4)}]


@pytest.mark.parametrize("estimator", ["hutchinson", "", "Full"])
def test_unknown_estimator(estimator: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown estimator '{estimator}'.*{', '.join(ESTIMATORS)}"):
        measure_rates(*plain(), estimator=estimator)


@pytest.mark.parametrize("probes", [0, -2])
def test_too_few_probes(probes: int) -> None:
    with pytest.raises(ValueError, match=rf"probes_per_batch is {probes}; it must be at least 1"):
        measure_rates(*plain(), probes_per_batch=probes)


def test_unknown_names() -> None:
    model, updates, batches = plain()
    with pytest.raises(ValueError, match=r"Sequential has no parameters \[0\.wait, 7\.bias\]"):
        measure_rates(model, updates | {"0.wait": torch.ones(1), "7.bias": torch.ones(1)}, batches)


def test_wrong_shape() -> None:
    model, updates, batches = plain()
    with pytest.raises(ValueError, match=r"update of '2\.bias' has shape \(4,\), the parameter \(3,\)"):
        measure_rates(model, updates | {"2.bias": torch.ones(4)}, batches)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_batches(estimator: str) -> None:
    model, updates, _ = plain()
    with pytest.raises(ValueError, match="batches is empty"):
        measure_rates(model, updates, [], estimator=estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_updates(estimator: str) -> None:
    model, _, batches = plain()
    with pytest.raises(ValueError, match="updates is empty"):
        measure_rates(model, {}, batches, estimator=estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_batch_without_examples(estimator: str) -> None:
    model, updates, _ = plain()
    with pytest.raises(ValueError, match=r"holds no examples: \['input'\]"):
        measure_rates(model, updates, [{"input": torch.ones(0, 4)}], estimator=estimator)


@pytest.mark.parametrize("estimator", ["per_example", "kronecker", "exact"])
def test_a_batch_of_padding(estimator: str) -> None:
    made = case("llama lora")
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="every position of a probe batch is padding"):
        measure_rates(made.model, made.updates, [batch], estimator=estimator)


@pytest.mark.parametrize("estimator", ["per_example", "kronecker", "exact"])
def test_a_model_without_logits(estimator: str) -> None:
    class Loss(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"loss": super().forward(x).sum()}

    with pytest.raises(ValueError, match=r"Loss returned dict without logits.*output="):
        measure_rates(Loss(4, 3), {"weight": torch.ones(3, 4)}, [features(2, 4)], estimator=estimator)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda model, batch: {"a": 1}, "it returned dict"),
        (lambda model, batch: model(**batch).sum(), r"shape \(\) of torch.float32"),
        (lambda model, batch: model(**batch).argmax(-1), r"shape \(2,\) of torch.int64"),
    ],
)
def test_an_output_function_that_returns_no_outputs(output: OutputFunction, message: str) -> None:
    model, updates, batches = plain()
    with pytest.raises(ValueError, match=message):
        measure_rates(model, updates, batches, output=output)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_update_that_is_not_finite_has_no_finite_rate(estimator: str, value: float) -> None:
    model, updates, batches = plain()
    updates["0.weight"][0, 0] = value
    updates["2.weight"] = torch.ones(3, 4)
    result = measure_rates(model, updates, batches, estimator=estimator)
    assert not math.isfinite(result.rates["0.weight"])
    assert result.rates["2.weight"] > 0


class Unused(nn.Module):
    """A tensor that no module uses, one whose module is not called, and one whose result is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.wasted = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.wasted(x)
        result: Tensor = self.used(x)
        return result


@pytest.mark.parametrize("estimator", ["per_example", "kronecker", "full"])
def test_tensors_that_take_no_part_are_reported(estimator: str) -> None:
    made = Case(Unused(), [features(3, 4), features(2, 4)])
    result = made.measure(estimator)
    taken = {name for name, used in result.estimators.items() if used != "unused"}
    assert taken == {"used.weight", "used.bias"}
    assert all((rate > 0) == (name in taken) for name, rate in result.rates.items())
    assert all(result.standard_errors[name] == 0 for name in result.rates if name not in taken)
    alone = measure_rates(made.model, {"spare": torch.ones(2)}, made.batches, estimator=estimator)
    assert (alone.rates, alone.estimators) == ({"spare": 0.0}, {"spare": "unused"})


@pytest.mark.parametrize("estimator", ["per_example", "kronecker"])
def test_an_output_that_no_parameter_moves_is_refused(estimator: str) -> None:
    model = nn.Linear(4, 3)

    def detached(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            return model(**batch)  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"the output of Linear depends on no parameter.*Pass output="):
        measure_rates(
            model, {"weight": torch.ones(3, 4)}, [{"input": torch.ones(2, 4)}], estimator=estimator, output=detached
        )


class TimeMajor(nn.Module):
    """Works on [T, N, d] inside; with as many positions as examples the two cannot be told apart by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm = RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.first(x.transpose(0, 1)))).cumsum(0)
        return self.last(h).transpose(0, 1)


@pytest.mark.parametrize("positions", [2, 3, 6, 7])
def test_examples_along_the_second_dimension(positions: int) -> None:
    torch.manual_seed(0)
    made = Case(perturb(TimeMajor()), [features(3, positions, 4)])
    result = made.measure("per_example", probes=200)
    assert set(result.estimators.values()) == {"per_example"}
    probe = RateProbe(made.model)
    probe.measure(made.updates, made.batches, seeded(0))
    assert {site.module for sites in probe._sites.sites.values() for site in sites} == {"first", "norm", "last"}
    for name, update in made.updates.items():
        change = finite_difference(made.model, {name: update}, made.batches)
        assert abs(result.rates[name] - change.rate) < 4 * change.error("per_example", 200), name


def test_probes_stop_at_the_target_error() -> None:
    made = case("llama lora")
    taken = []

    def batches() -> Iterator[Batch]:
        for seed in range(50):
            taken.append(seed)
            yield text("right", seed)

    few = measure_rates(made.model, made.updates, batches(), target_error=0.2, generator=seeded(0))
    assert few.num_probes == len(taken) < 50
    assert few.relative_error <= 0.2
    before = measure_rates(made.model, made.updates, [text("right", seed) for seed in taken[:-1]], generator=seeded(0))
    assert before.relative_error > 0.2
    taken.clear()
    many = measure_rates(made.model, made.updates, batches(), target_error=1e-6, generator=seeded(0))
    assert many.num_probes == len(taken) == 50
    with pytest.raises(ValueError, match="target_error is 0"):
        measure_rates(made.model, made.updates, batches(), target_error=0)


@pytest.mark.parametrize("name", ["every kind", "gpt2, tied, left padding", "llama dora"])
def test_later_draws_of_a_forward_use_what_the_first_has_kept(name: str) -> None:
    # D phi is linear in omega: with the same omega a second backward pass reads the same numbers.
    made = case(name)
    probe = RateProbe(made.model, probes_per_batch=3, outputs=Outputs(made.output))
    original = Output.omega
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "omega", lambda self, generator: original(self, seeded(1)))
        patch.setattr(LinearHead, "pays", staticmethod(lambda *args: False))
        result = probe.measure(made.updates, made.batches[:1], seeded(0))
    assert result.draws is not None
    by_probe = result.draws.derivatives.reshape(len(result.rates), 3, -1)
    largest = by_probe.abs().max()
    torch.testing.assert_close(by_probe[:, 1], by_probe[:, 0], rtol=1e-4, atol=1e-6 * float(largest))
    torch.testing.assert_close(by_probe[:, 2], by_probe[:, 0], rtol=1e-4, atol=1e-6 * float(largest))


def test_a_model_that_reads_its_padding_index() -> None:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    made = Case(perturb(RobertaForMaskedLM(config)), [text("right")])
    assert set(made.measure("per_example").estimators.values()) == {"per_example"}
    assert made.model.roberta.embeddings.word_embeddings.padding_idx == config.pad_token_id


def test_an_encoder_decoder_that_classifies() -> None:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=16,
        num_labels=3,
        eos_token_id=2,
    )
    model = perturb(BartForSequenceClassification(config))
    ids = torch.cat([torch.randint(3, VOCABULARY, (3, 5), generator=seeded(0)), torch.full((3, 1), 2)], 1)
    result = measure_rates(model, Case(model, []).updates, [{"input_ids": ids, "labels": torch.tensor([0, 1, 2])}])
    assert result.rates["classification_head.out_proj.weight"] > 0


def test_what_gates_said_before_they_were_refuted_does_not_count() -> None:
    """One example alone refutes nothing; with several, these outputs turn out to mix them."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    updates = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}

    def output(model: nn.Module, batch: Batch) -> Tensor:
        h = torch.tanh(model(batch["x"]))
        return (h @ h.T).logsumexp(1)

    single = [features(1, 4, seed=seed) for seed in range(8)]
    together = features(4, 4, seed=9)
    mixed = measure_rates(model, updates, [*single, *[together] * 50], output=output, generator=seeded(0))
    alone = measure_rates(model, updates, [together] * 50, output=output, generator=seeded(1))
    assert mixed.estimators == alone.estimators == dict.fromkeys(updates, "kronecker")
    for name, rate in alone.rates.items():
        error = math.hypot(alone.standard_errors[name], mixed.standard_errors[name])
        assert abs(mixed.rates[name] - rate) < 4 * error, name


def test_one_batch_is_no_list_of_batches() -> None:
    with pytest.raises(ValueError, match=r"pass a list of them, \[batch\]"):
        measure_rates(nn.Linear(4, 3), {"weight": torch.ones(3, 4)}, {"input": torch.ones(2, 4)})


def test_rotary_embeddings_forget_how_long_a_probe_was() -> None:
    model = llama(max_position_embeddings=4, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    model(**text("right", length=3))
    before = {name: value.clone() for name, value in rotary._buffers.items()}, rotary.max_seq_len_cached
    measure_rates(model, Case(model, []).updates, [text("right", length=9)])
    assert rotary.max_seq_len_cached == before[1]
    assert all(torch.equal(rotary._buffers[name], value) for name, value in before[0].items())


def test_a_probe_measures_again_at_new_weights() -> None:
    torch.manual_seed(0)
    made = Case(mlp(nn.Tanh()), [{"input": torch.randn(3, 4)}])
    probe = RateProbe(made.model)
    first = probe.measure(made.updates, made.batches, seeded(0)).rates
    perturb(made.model, size=0.5)
    second = probe.measure(made.updates, made.batches, seeded(0)).rates
    assert second == made.measure("per_example").rates
    assert all(first[name] != second[name] for name in ("0.weight", "0.bias", "2.weight"))


def test_a_model_without_numbers_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'weight' is on the meta device, without numbers: load the model's weights"):
        measure_rates(model, {"weight": torch.ones(2, 2)}, [{"input": torch.ones(1, 2)}])
