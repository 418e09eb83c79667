"""Six axes beside the first 31 on which the strategy of matching was developed: Llama, GPT-2 and Qwen3, other text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import workload
from axes import Axis, Rule, Side, deeper, grid, wider
from models import pretrained_on
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

HEAD_SIZE = 16
LAYER = re.compile(r"layers\.\d+\.")


def llama(seed: int, width: int, depth: int) -> nn.Module:
    set_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_SIZE,
        num_key_value_heads=width // HEAD_SIZE,
        vocab_size=workload.VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def gpt2bpe(seed: int, width: int, depth: int) -> nn.Module:
    """A GPT-2 with a tied head, on tokens of several bytes."""
    set_seed(seed)
    config = GPT2Config(
        n_layer=depth,
        n_embd=width,
        n_head=width // HEAD_SIZE,
        vocab_size=workload.VOCABULARY,
        n_positions=workload.LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def pretrained_qwen() -> Path:
    """Return the folder of a Qwen3 that was pretrained on English; the first call trains it."""
    config = Qwen3Config(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        vocab_size=workload.VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return pretrained_on("qwen3-english", lambda: Qwen3ForCausalLM(config), workload.blocks([workload.english()]))


def qwen(seed: int, rank: int, **options: Any) -> nn.Module:
    set_seed(seed)
    model = Qwen3ForCausalLM.from_pretrained(pretrained_qwen())
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", **options))


def in_layers(text: str, factor: float, matrices_only: bool) -> Rule:
    def of(name: str, parameter: nn.Parameter) -> float:
        return factor if LAYER.search(name) and (parameter.ndim >= 2 or not matrices_only) else 1.0

    return Rule(text, of)


def _axes() -> list[Axis]:
    scratch: dict[str, Any] = {"data": workload.python_data, "steps": 150, "warmup": 20}
    tuned: dict[str, Any] = {"data": workload.python_data, "steps": 100, "warmup": 0}
    rates, adapter = grid(1.78e-3, 1.78e-2), grid(1.78e-3, 1.78e-2)
    width, depth = "muP: the best lr falls with width", "depth-muP: lr ~ 1 / sqrt(depth)"
    return [
        Axis(
            "llama-width",
            Side(llama, {"width": 32, "depth": 2}, grid(3.16e-3, 3.16e-2)),
            Side(llama, {"width": 128, "depth": 2}, grid(1e-3, 1e-2)),
            width,
            in_layers("muP: matrices in blocks at lr / 4", 0.25, matrices_only=True),
            **scratch,
        ),
        Axis(
            "llama-depth",
            Side(llama, {"width": 48, "depth": 2}, grid(3.16e-3, 3.16e-2)),
            Side(llama, {"width": 48, "depth": 8}, rates),
            depth,
            in_layers("blocks at lr / sqrt(4)", 0.5, matrices_only=False),
            **scratch,
        ),
        Axis(
            "gpt2bpe-width",
            Side(gpt2bpe, {"width": 48, "depth": 2}, rates),
            Side(gpt2bpe, {"width": 144, "depth": 2}, rates),
            width,
            wider(3),
            **scratch,
        ),
        Axis(
            "gpt2bpe-depth",
            Side(gpt2bpe, {"width": 48, "depth": 2}, rates),
            Side(gpt2bpe, {"width": 48, "depth": 6}, rates),
            depth,
            deeper(3),
            **scratch,
        ),
        *(
            Axis(
                f"qwen-{init}",
                Side(qwen, {"rank": 8, **options}, adapter),
                Side(qwen, {"rank": 128, **options}, adapter),
                claim,
                **tuned,
            )
            for init, options, claim in (
                ("gaussian", {"init_lora_weights": "gaussian"}, "A starts at 1 / r: the best lr rises with r"),
                ("default", {}, "muA: the same lr"),
            )
        ),
    ]


DEVELOPED: dict[str, Axis] = {axis.name: axis for axis in _axes()}
