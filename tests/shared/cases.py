"""Models with one tensor of every kind and in every layout, their batches, and the reference for their rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_flerm import Measurement, measure_rates
from tests.shared.reference import Batch, Change, OutputFunction, finite_difference

VOCABULARY, WIDTH = 20, 8


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def updates_of(model: nn.Module, size: float = 0.5) -> dict[str, Tensor]:
    generator = seeded(99)
    return {
        name: size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
