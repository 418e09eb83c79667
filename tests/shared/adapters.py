"""Every kind of adapter, on the tiny models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from tests.shared.architectures import Architecture, ConvNet, features, gpt2, llama, mixtral, padded, perturb
from tests.shared.reference import Batch

LINEAR = ["q_proj", "down_proj"]
TEXT = [padded("right", 4, 6)]
LEFT = [padded("left", 4, 6)]


def adapted(
    config: PeftConfig, base: Callable[[], nn.Module] = llama, batches: list[Batch] = TEXT, **expected: Any
) -> Callable[[], Architecture]:
    """The tensors that an adapter trains, moved off their initial values."""

    def build() -> Architecture:
        model = perturb(base()).requires_grad_(False)
        return Architecture(perturb(get_peft_model(model, config), 1, trainable=True), batches, **expected)

    return build


def lora(targets: list[str] | str = LINEAR, rank: int = 2, **settings: Any) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=targets, **settings)


def two_adapters() -> Architecture:
    model = get_peft_model(perturb(llama()).requires_grad_(False), lora())
    model.add_adapter("other", lora())
    perturb(model, 1)
    return Architecture(model, TEXT)


def quantized(bits: int, layers: int) -> Callable[[], Architecture]:
    """LoRA on projections that hold 4 or 8 bits a weight."""

    def build() -> Architecture:
        kinds = bitsandbytes.nn
        model: Any = perturb(llama(layers, hidden_size=64, head_dim=16, num_key_value_heads=4))
        for layer in model.model.layers:
            if bits == 4:
                projection = kinds.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
            else:
                projection = kinds.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
            projection.load_state_dict(layer.self_attn.v_proj.state_dict())
            layer.self_attn.v_proj = projection.to("cpu")
        model = get_peft_model(model.requires_grad_(False), lora(["v_proj"]))
        return Architecture(perturb(model, 1, trainable=True), TEXT, precision=1e-2)

    return build


ADAPTERS: dict[str, Callable[[], Architecture]] = {
    "lora": adapted(lora(), lambda: llama(2), LEFT),
    "lora on gpt2": adapted(lora(["c_attn", "c_fc"], fan_in_fan_out=True), gpt2),
    "lora, bias": adapted(lora(bias="lora_only"), lambda: llama(attention_bias=True)),
    "lora, own bias": adapted(lora(lora_bias=True)),
    "rslora": adapted(lora(use_rslora=True)),
    "dora": adapted(lora(use_dora=True), batches=LEFT),
    "pissa": adapted(lora(init_lora_weights="pissa")),
    "lora on embeddings": adapted(lora(["embed_tokens"])),
    "lora on a tied embedding and head": adapted(
        lora(["embed_tokens", "lm_head"]), lambda: llama(tie_word_embeddings=True)
    ),
    "lora on convolutions": adapted(lora(["stem", "grouped"], rank=4), ConvNet, [features(4, 4, 8, 8)]),
    "modules to save": adapted(lora(modules_to_save=["lm_head", "embed_tokens"])),
    "trainable tokens with lora": adapted(lora(trainable_token_indices=[1, 5, 7, 9])),
    "trainable tokens": adapted(TrainableTokensConfig(token_indices=[1, 5, 7, 9], target_modules=["embed_tokens"])),
    "lora on experts": adapted(
        lora(["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]), mixtral
    ),
    "adalora": adapted(AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=LINEAR)),
    "vera": adapted(VeraConfig(r=4, target_modules=LINEAR)),
    "ia3": adapted(IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "loha": adapted(LoHaConfig(r=2, target_modules=LINEAR)),
    "lokr": adapted(LoKrConfig(r=2, target_modules=LINEAR)),
    "oft": adapted(OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR)),
    "ln tuning": adapted(LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "prompt tuning": adapted(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix tuning": adapted(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "p-tuning": adapted(
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8), batches=LEFT
    ),
    "two adapters": two_adapters,
    "lora on 4 bits": quantized(4, layers=2),
    # One layer: 8 bits round their inputs too, and such a step has no derivative behind it.
    "lora on 8 bits": quantized(8, layers=1),
}
