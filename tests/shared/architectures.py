"""Tiny models of every kind that people train, and batches to measure them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tests.shared.plain_modules import (
    WIDTH,
    Attention,
    Contrastive,
    ConvNet,
    Functional,
    Parametrized,
    Recurrent,
    ResidualMLP,
    TimeMajor,
    Unused,
)
from tests.shared.reference import Batch, OutputFunction

VOCABULARY, PADDING = 20, 0


@dataclass(frozen=True)
class Architecture:
    """A model, the batches to measure it on, and what is expected of `per_example`.

    Attributes:
        output: What "the function" is; None for the logits.
        estimators: `{pattern: estimator}` of the tensors whose canonical names contain the pattern; `per_example`
            for all others.
        without_effect: Patterns of the tensors whose true rate is 0; all others must have one.
        precision: Relative error that the model's own arithmetic brings.
    """

    model: nn.Module
    batches: list[Batch]
    output: OutputFunction | None = None
    estimators: Mapping[str, str] = field(default_factory=dict)
    without_effect: tuple[str, ...] = ()
    precision: float = 1e-3

    @property
    def updates(self) -> dict[str, Tensor]:
        generator = seeded(99)
        return {
            name: 0.5 * torch.randn(parameter.shape, generator=generator)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def perturb(model: nn.Module, seed: int = 0, size: float = 0.3, trainable: bool = False) -> nn.Module:
    """Move every tensor off its initial value, so that no derivative vanishes because of a zero or a symmetry."""
    generator = seeded(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.requires_grad or not trainable):
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


def padded(side: str, *shape: int, seed: int = 0) -> Batch:
    """Token ids [*shape], of which 0, 2, 3, ... positions at one side are padding."""
    ids = torch.randint(1, VOCABULARY, shape, generator=seeded(seed))
    left_out = _left_out(shape[:-1])
    mask = (torch.arange(shape[-1]) < shape[-1] - left_out.unsqueeze(-1)).long()
    mask = mask.flip(-1) if side == "left" else mask
    return {"input_ids": ids * mask + PADDING * (1 - mask), "attention_mask": mask}


def _left_out(shape: tuple[int, ...]) -> Tensor:
    rows = torch.arange(int(torch.tensor(shape).prod())) % 4
    return (rows + (rows > 0)).reshape(shape)


def features(*shape: int, seed: int = 0) -> Batch:
    return {"x": torch.randn(shape, generator=seeded(seed))}


# Language models
# ---------------


def gpt2(layers: int = 1) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_head=2, n_layer=layers, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def decoder(kind: type[Any], config: type[Any], layers: int = 1, **settings: Any) -> nn.Module:
    """A model of the Llama family with fewer key heads than query heads."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 12,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": PADDING,
    }
    return kind(config(**shape | settings))


def llama(layers: int = 1, **settings: Any) -> nn.Module:
    return decoder(LlamaForCausalLM, LlamaConfig, layers, **settings)


def mixtral(**settings: Any) -> nn.Module:
    return decoder(MixtralForCausalLM, MixtralConfig, num_local_experts=4, num_experts_per_tok=2, **settings)


def gemma2() -> nn.Module:
    return decoder(
        Gemma2ForCausalLM,
        Gemma2Config,
        query_pre_attn_scalar=2,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=2.0,
        sliding_window=3,
        attn_implementation="eager",
    )


def mamba() -> nn.Module:
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, state_size=4, num_hidden_layers=1, time_step_rank=2, pad_token_id=0
    )
    return MambaForCausalLM(config)


def bert(kind: type[Any]) -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        num_labels=3,
        pad_token_id=PADDING,
    )
    return kind(config)


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=4,
        relative_attention_max_distance=5,
        feed_forward_proj="gated-gelu",
        pad_token_id=PADDING,
        decoder_start_token_id=PADDING,
    )
    return T5ForConditionalGeneration(config)


def labels() -> Tensor:
    """[3, 5] of which the last 0, 2 and 3 positions do not count."""
    target = padded("right", 3, 5, seed=1)
    return target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)


def vit() -> nn.Module:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        num_labels=3,
    )
    return ViTForImageClassification(config)


# The registry
# ------------


def full(build: Callable[[], nn.Module], *batches: Batch, **expected: Any) -> Callable[[], Architecture]:
    """All of a model's tensors."""
    return lambda: Architecture(perturb(build()), list(batches), **expected)


def pooled(model: nn.Module, batch: Batch) -> Tensor:
    """One vector per example, of the hidden states."""
    return model(**batch, output_hidden_states=True).hidden_states[-1].tanh().sum(1)


def compared(model: nn.Module, batch: Batch) -> Tensor:
    """The contrastive loss's logits, where it does not call the model: a text moves the outputs of all images."""
    return model.image(batch["x"]).tanh() @ model.text(batch["y"]).tanh().T * model.log_scale.exp()


PAIRS = features(4, WIDTH) | {"y": torch.randn(4, WIDTH, generator=seeded(1))}
TEXT = padded("right", 4, 6), padded("left", 3, 5, seed=1)
ROWS = features(4, 5, WIDTH)

ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "gpt2": full(lambda: gpt2(2), *TEXT),
    "gpt2, hidden states": full(gpt2, padded("right", 4, 6), output=pooled),
    "llama": full(lambda: llama(2), *TEXT),
    "llama, tied": full(lambda: llama(tie_word_embeddings=True), padded("left", 4, 6)),
    "llama, padding token in the text": full(llama, {"input_ids": padded("right", 4, 6)["input_ids"]}),
    "qwen3": full(lambda: decoder(Qwen3ForCausalLM, Qwen3Config), padded("left", 4, 6)),
    "gemma2": full(gemma2, padded("left", 4, 6)),
    "mixtral": full(mixtral, padded("right", 4, 6)),
    "mixtral, a loop over experts": full(lambda: mixtral(experts_implementation="eager"), padded("right", 4, 6)),
    "mamba": full(mamba, padded("right", 4, 6)),
    "bert, sequence classification": full(
        lambda: bert(BertForSequenceClassification), padded("right", 4, 6), without_effect=("key.bias",)
    ),
    "bert, token classification": full(
        lambda: bert(BertForTokenClassification), padded("right", 4, 6), without_effect=("key.bias",)
    ),
    "bert, multiple choice": full(
        lambda: bert(BertForMultipleChoice), padded("right", 4, 2, 6), without_effect=("key.bias",)
    ),
    "t5, labels": full(t5, padded("right", 3, 6) | {"labels": labels()}),
    "t5, decoder inputs": full(
        t5,
        padded("right", 3, 6) | {"decoder_" + key: value for key, value in padded("right", 3, 4, seed=1).items()},
    ),
    "vit": full(vit, {"pixel_values": torch.randn(4, 3, 8, 8, generator=seeded(0))}, without_effect=("k_proj.bias",)),
    "conv net": full(ConvNet, features(4, 4, 8, 8)),
    "residual mlp": full(ResidualMLP, features(4, WIDTH), features(3, WIDTH, seed=1)),
    "nn.MultiheadAttention": full(lambda: Attention(batch_first=True), ROWS),
    "nn.MultiheadAttention, time-major": full(lambda: Attention(batch_first=False), ROWS),
    "called several times": full(Recurrent, ROWS),
    "functional_call": full(Functional, ROWS),
    "parametrizations": full(Parametrized, ROWS),
    "time-major gru": full(TimeMajor, features(3, 6, WIDTH)),
    "contrastive": full(Contrastive, PAIRS),
    "contrastive, compared by the loss": full(
        Contrastive, PAIRS, output=compared, estimators={"text": "kronecker", "log_scale": "kronecker"}
    ),
    "unused": full(Unused, ROWS, without_effect=("idle", "gain"), estimators={"idle": "unused", "gain": "unused"}),
}
