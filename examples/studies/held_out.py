"""Twelve more axes that no policy or threshold was chosen on, after `unseen.py` had shown what was wrong.

What matching and `plan` say of them was committed before any sweep of a target ran (`examples/results/held_out/
predictions`), and the sweeps were scored once. LoRA's axes on OLMo 2 share a base, as do width and depth of Mistral.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
import workload
from axes import Axis, Rule, Side, everywhere, grid
from datasets import Dataset
from developed import HEAD_SIZE, in_layers
from models import pretrained_on
from optimizers import MUON_WITH_ADAMW
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    set_seed,
)
from unseen import MASK, mask_tokens, muon_rule

FOLDERS = ("ATen/core", "ATen/cpu", "ATen/native", "c10/core", "c10/util", "torch/csrc/api", "torch/csrc/autograd")
SNIPPET = 24  # tokens of a classified snippet
SHORT = workload.LENGTH // 2
OF_BLOOM = ("h.", "transformer.h.")


@cache
def headers() -> dict[str, list[str]]:
    """C++ headers that torch installs, by folder."""
    root = Path(torch.__file__).parent / "include"
    return {
        folder: [file.read_text(encoding="utf-8", errors="replace") for file in sorted((root / folder).rglob("*.h"))]
        for folder in FOLDERS
    }


@cache
def configurations() -> list[str]:
    """Source of the configurations of Transformers' models: mostly English that explains options."""
    root = Path(transformers.__file__).parent / "models"
    return [file.read_text(encoding="utf-8") for file in sorted(root.glob("*/configuration_*.py"))]


def _split(texts: list[str]) -> tuple[Dataset, Dataset]:
    """Blocks of these texts; every eighth text is for validation."""
    kept = [text for index, text in enumerate(texts) if index % 8]
    validation = workload.blocks(["\n".join(texts[::8])])
    few = validation.shuffle(seed=0).select(range(workload.VALIDATION_BLOCKS))
    return workload.blocks(["\n".join(kept)]), few


@cache
def header_data() -> tuple[Dataset, Dataset]:
    return _split([text for texts in headers().values() for text in texts])


@cache
def configuration_data() -> tuple[Dataset, Dataset]:
    return _split(configurations())


@cache
def short_configuration_data() -> tuple[Dataset, Dataset]:
    """The same in blocks of half the length."""

    def halved(data: Dataset) -> Dataset:
        rows = torch.tensor(data["input_ids"]).view(-1, SHORT).tolist()
        return Dataset.from_dict({"input_ids": rows, "labels": rows})

    train, validation = configuration_data()
    return halved(train), halved(validation)


@cache
def folder_data() -> tuple[Dataset, Dataset]:
    """Which folder does this piece of a header come from? The pieces of every eighth file are for validation."""
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for label, texts in enumerate(headers().values()):
        for index, encoding in enumerate(workload.tokenizer().encode_batch(texts)):
            pieces = torch.tensor(encoding.ids[: len(encoding.ids) // SNIPPET * SNIPPET]).view(-1, SNIPPET)
            for piece in pieces[:40].tolist():
                row = {"input_ids": piece, "attention_mask": [1] * SNIPPET, "labels": label}
                found[0 if index % 8 else 1].append(row)
    train, validation = (Dataset.from_list(rows).shuffle(seed=0) for rows in found)
    return train, validation.select(range(512))


def mistral(seed: int, width: int, depth: int) -> nn.Module:
    set_seed(seed)
    config = MistralConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_SIZE,
        num_key_value_heads=width // HEAD_SIZE,
        head_dim=HEAD_SIZE,
        vocab_size=workload.VOCABULARY,
        max_position_embeddings=64,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=0,
    )
    return MistralForCausalLM(config)


def gemma2(seed: int, width: int, depth: int) -> nn.Module:
    """A tied head, norms before and after, logits bounded by a tanh."""
    set_seed(seed)
    config = Gemma2Config(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_SIZE,
        num_key_value_heads=width // HEAD_SIZE,
        head_dim=HEAD_SIZE,
        query_pre_attn_scalar=HEAD_SIZE,
        vocab_size=workload.VOCABULARY,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Gemma2ForCausalLM(config)


def opt(seed: int, width: int, depth: int) -> nn.Module:
    """Learned positions, ReLU, biases, a tied head."""
    set_seed(seed)
    config = OPTConfig(
        hidden_size=width,
        ffn_dim=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_SIZE,
        word_embed_proj_dim=width,
        vocab_size=workload.VOCABULARY,
        max_position_embeddings=64,
        dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=MASK,
    )
    return OPTForCausalLM(config)


def bloom(seed: int, width: int, depth: int) -> nn.Module:
    """ALiBi, norms after the embedding, biases, a tied head."""
    set_seed(seed)
    config = BloomConfig(
        hidden_size=width,
        n_layer=depth,
        n_head=width // HEAD_SIZE,
        vocab_size=workload.VOCABULARY,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return BloomForCausalLM(config)


def pretrained_olmo() -> Path:
    config = Olmo2Config(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=workload.VOCABULARY,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return pretrained_on("olmo2-headers", lambda: Olmo2ForCausalLM(config), header_data()[0])


def pretrained_distilbert() -> Path:
    config = DistilBertConfig(
        vocab_size=workload.VOCABULARY,
        dim=64,
        n_layers=3,
        n_heads=4,
        hidden_dim=256,
        max_position_embeddings=workload.LENGTH,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        pad_token_id=MASK,
    )
    make = partial(DistilBertForMaskedLM, config)
    return pretrained_on("distilbert-configurations", make, configuration_data()[0], mask_tokens())


def pretrain() -> None:
    """Train the pretrained models, if they are not there."""
    pretrained_olmo()
    pretrained_distilbert()


def adapted_olmo(seed: int, rank: int, alpha: int = 16, **options: Any) -> nn.Module:
    set_seed(seed)
    model = Olmo2ForCausalLM.from_pretrained(pretrained_olmo())
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", **options))


def whole_olmo(seed: int) -> nn.Module:
    set_seed(seed)
    return Olmo2ForCausalLM.from_pretrained(pretrained_olmo())


def adapted_distilbert(seed: int, rank: int, **options: Any) -> nn.Module:
    set_seed(seed)
    model = DistilBertForSequenceClassification.from_pretrained(pretrained_distilbert(), num_labels=len(FOLDERS))
    config = LoraConfig(
        r=rank,
        lora_alpha=16,
        target_modules=["q_lin", "v_lin", "lin1", "lin2"],
        modules_to_save=["pre_classifier", "classifier"],
        **options,
    )
    return get_peft_model(model, config)


def _both_rules(name: str, parameter: nn.Parameter) -> float:
    """Bloom's blocks, twice as wide and three times as many."""
    if not name.startswith(OF_BLOOM):
        return 1.0
    return (0.5 if parameter.ndim >= 2 else 1.0) * 3**-0.5


def _axes() -> list[Axis]:
    scratch, adapter = grid(1.78e-3, 1.78e-2), grid(1e-3, 1e-2)
    tuned: dict[str, Any] = {"data": configuration_data, "steps": 100, "warmup": 10}
    fresh: dict[str, Any] = {"data": header_data, "steps": 120, "warmup": 15}
    same, width, depth = "muA: the same lr", "muP: the best lr falls with width", "depth-muP: lr ~ 1 / sqrt(depth)"

    def adapters(name: str, claim: str, small: dict[str, Any], large: dict[str, Any], rule: Rule | None = None) -> Axis:
        base, target = Side(adapted_olmo, small, adapter), Side(adapted_olmo, large, adapter)
        return Axis(f"held-{name}", base, target, claim, rule, **tuned)

    def grown(name: str, model: Any, claim: str, rule: Rule, small: dict[str, Any], large: dict[str, Any]) -> Axis:
        return Axis(f"held-{name}", Side(model, small, scratch), Side(model, large, scratch), claim, rule, **fresh)

    small = {"width": 48, "depth": 2}
    return [
        adapters("rank-default", same, {"rank": 8}, {"rank": 128}),
        adapters(
            "rank-gaussian",
            "A starts at 1 / r: the best lr rises with r",
            {"rank": 4, "init_lora_weights": "gaussian"},
            {"rank": 64, "init_lora_weights": "gaussian"},
        ),
        adapters(
            "alpha-x4", "muA: lr ~ scaling^(-1/2)", {"rank": 8}, {"rank": 8, "alpha": 64}, everywhere("lr / 2", 0.5)
        ),
        adapters(
            "rank-alpha-2r",
            "muA: lr ~ rank^(-1/2) at a fixed alpha / r",
            {"rank": 8},
            {"rank": 64, "alpha": 128},
            everywhere("lr / sqrt(8)", 8**-0.5),
        ),
        grown(
            "width-mistral",
            mistral,
            width,
            in_layers("muP: matrices in blocks at lr / 3", 1 / 3, matrices_only=True),
            small,
            {"width": 144, "depth": 2},
        ),
        grown(
            "depth-mistral",
            mistral,
            depth,
            in_layers("blocks at lr / sqrt(3)", 3**-0.5, matrices_only=False),
            small,
            {"width": 48, "depth": 6},
        ),
        grown(
            "width-gemma",
            gemma2,
            width,
            in_layers("muP: matrices in blocks at lr / 4", 0.25, matrices_only=True),
            {"width": 32, "depth": 2},
            {"width": 128, "depth": 2},
        ),
        grown(
            "depth-opt",
            opt,
            depth,
            in_layers("blocks at lr / sqrt(4)", 0.5, matrices_only=False),
            {"width": 64, "depth": 2},
            {"width": 64, "depth": 8},
        ),
        grown(
            "width-and-depth-bloom",
            bloom,
            "muP and depth-muP together",
            Rule("matrices in blocks at lr / 2 / sqrt(3), vectors in blocks at lr / sqrt(3)", _both_rules),
            small,
            {"width": 96, "depth": 6},
        ),
        Axis(
            "held-classifier-rank",
            Side(adapted_distilbert, {"rank": 8}, adapter),
            Side(adapted_distilbert, {"rank": 64}, adapter),
            same,
            data=folder_data,
            steps=100,
            warmup=10,
            batch_size=32,
        ),
        Axis(
            "held-batch-16-short",
            Side(adapted_olmo, {"rank": 8, "use_rslora": True}, adapter),
            Side(adapted_olmo, {"rank": 64, "use_rslora": True}, adapter),
            "muA, alpha / sqrt(r): best lr as r^(-1/4)",
            everywhere("lr * 8^(-1/4)", 8**-0.25),
            data=short_configuration_data,
            steps=100,
            warmup=0,
            batch_size=16,
        ),
        Axis(
            "held-muon",
            Side(whole_olmo, {}, grid(5.62e-4, 5.62e-3)),
            Side(whole_olmo, {}, grid(1e-3, 1e-2), MUON_WITH_ADAMW),
            "Moonlight: scaled by 0.2 sqrt(max(rows, columns)), Muon takes AdamW's lr",
            Rule("0.2 sqrt(max(rows, columns)) on the matrices that Muon takes", muon_rule),
            data=configuration_data,
            steps=100,
            warmup=10,
        ),
    ]


HELD_OUT: dict[str, Axis] = {axis.name: axis for axis in _axes()}
