"""Twelve axes that no policy or threshold was chosen on: other models, texts, sizes, ranks and optimizers.

What `FLeRMConfig(mode="match", profile=...)` and `plan` say of them was committed before any sweep of a target ran
(`examples/results/unseen/predictions`), and the sweeps were scored once. The width of the range that `plan` states was
set afterwards.
"""

from __future__ import annotations

import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import torch
import workload
from axes import Axis, Rule, Side, everywhere, grid
from datasets import Dataset
from developed import HEAD_SIZE, LAYER, in_layers
from models import pretrained_on
from optimizers import MUON_WITH_ADAMW
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

MASK = 1  # id of the mask token; also pads
SYMBOLS = 30000  # Unicode characters whose names are used
CATEGORIES = ("Lu", "Ll", "Lo", "Lm", "Mn", "Mc", "Nd", "No", "So", "Sm", "Po")


@cache
def unicode_names() -> list[tuple[str, str]]:
    """Names and categories of Unicode characters, shuffled."""
    found = []
    for code in range(sys.maxunicode):
        name = unicodedata.name(chr(code), "")
        if name and "IDEOGRAPH" not in name and "HANGUL SYLLABLE" not in name:
            found.append((name, unicodedata.category(chr(code))))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[index] for index in order[:SYMBOLS]]


@cache
def torch_docs() -> list[str]:
    """Docstrings of torch's functions."""
    names = sorted(dir(torch) + [f"nn.{name}" for name in dir(torch.nn)])
    objects = (getattr(torch.nn if name.startswith("nn.") else torch, name.removeprefix("nn.")) for name in names)
    return [text for each in objects if isinstance(text := getattr(each, "__doc__", None), str) and len(text) > 200]


@cache
def unicode_data() -> tuple[Dataset, Dataset]:
    """Names of characters as running text; the last eighth is for validation."""
    names = [name for name, _ in unicode_names()]
    cut = len(names) * 7 // 8
    train, validation = workload.blocks(["\n".join(names[:cut])]), workload.blocks(["\n".join(names[cut:])])
    return train, validation.shuffle(seed=0).select(range(workload.VALIDATION_BLOCKS))


@cache
def docs_data() -> tuple[Dataset, Dataset]:
    """Docstrings; every eighth is for validation."""
    texts = torch_docs()
    kept = [text for index, text in enumerate(texts) if index % 8]
    validation = workload.blocks(["\n".join(texts[::8])])
    return workload.blocks(["\n".join(kept)]), validation.shuffle(seed=0).select(range(workload.VALIDATION_BLOCKS))


@cache
def category_data() -> tuple[Dataset, Dataset]:
    """Which category has a character of this name?"""
    rows = [(name, CATEGORIES.index(category)) for name, category in unicode_names() if category in CATEGORIES]
    ids = [encoding.ids[:16] for encoding in workload.tokenizer().encode_batch([name for name, _ in rows])]
    padded = torch.tensor([row + [MASK] * (16 - len(row)) for row in ids])
    data = Dataset.from_dict(
        {
            "input_ids": padded.tolist(),
            "attention_mask": (padded != MASK).long().tolist(),
            "labels": [label for _, label in rows],
        }
    )
    return data.select(range(512, len(data))), data.select(range(512))


def llama_config(width: int, depth: int, tied: bool) -> LlamaConfig:
    heads = width // HEAD_SIZE
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads // (2 if heads % 3 else 3),
        vocab_size=workload.VOCABULARY,
        max_position_embeddings=2 * workload.LENGTH,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )


def tied_llama(seed: int, width: int, depth: int) -> nn.Module:
    set_seed(seed)
    return LlamaForCausalLM(llama_config(width, depth, tied=True))


def qwen3(seed: int, width: int, depth: int) -> nn.Module:
    set_seed(seed)
    config = Qwen3Config(**{**llama_config(width, depth, tied=False).to_diff_dict(), "model_type": "qwen3"})
    config.head_dim = HEAD_SIZE
    return Qwen3ForCausalLM(config)


def neox(seed: int, width: int, depth: int) -> nn.Module:
    set_seed(seed)
    config = GPTNeoXConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // HEAD_SIZE,
        vocab_size=workload.VOCABULARY,
        max_position_embeddings=2 * workload.LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def mask_tokens() -> DataCollatorForLanguageModeling:
    """A collator that masks tokens for an encoder's pretraining."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=workload.tokenizer())
    masked = tokenizer.convert_ids_to_tokens(MASK)
    tokenizer.add_special_tokens({"mask_token": masked, "pad_token": masked})
    return DataCollatorForLanguageModeling(tokenizer)


def pretrained_llama() -> Path:
    return pretrained_on("llama-docs", lambda: LlamaForCausalLM(llama_config(96, 3, tied=False)), docs_data()[0])


def pretrained_bert() -> Path:
    config = BertConfig(
        vocab_size=workload.VOCABULARY,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=workload.LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=MASK,
    )
    return pretrained_on("bert-docs", lambda: BertForMaskedLM(config), docs_data()[0], mask_tokens())


def pretrain() -> None:
    """Train the pretrained models, if they are not there."""
    pretrained_llama()
    pretrained_bert()


def adapted_llama(seed: int, rank: int, alpha: int = 32, **options: Any) -> nn.Module:
    set_seed(seed)
    model = LlamaForCausalLM.from_pretrained(pretrained_llama())
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", **options))


def whole_llama(seed: int) -> nn.Module:
    set_seed(seed)
    return LlamaForCausalLM.from_pretrained(pretrained_llama())


def adapted_bert(seed: int, rank: int, **options: Any) -> nn.Module:
    set_seed(seed)
    model = BertForSequenceClassification.from_pretrained(pretrained_bert(), num_labels=len(CATEGORIES))
    config = LoraConfig(
        r=rank, lora_alpha=16, target_modules=["query", "value", "dense"], modules_to_save=["classifier"], **options
    )
    return get_peft_model(model, config)


def muon_rule(name: str, parameter: nn.Parameter) -> float:
    if parameter.ndim != 2 or not LAYER.search(name):
        return 1.0
    rows, columns = parameter.shape
    return 0.2 * max(rows, columns) ** 0.5 / max(1.0, rows / columns) ** 0.5


def _axes() -> list[Axis]:
    scratch, adapter = grid(1.78e-3, 1.78e-2), grid(1e-3, 1e-2)
    tuned: dict[str, Any] = {"data": unicode_data, "steps": 100, "warmup": 10}
    fresh: dict[str, Any] = {"data": docs_data, "steps": 150, "warmup": 20}

    def rank(name: str, claim: str, small: dict[str, Any], large: dict[str, Any], rule: Rule | None = None) -> Axis:
        base, target = Side(adapted_llama, small, adapter), Side(adapted_llama, large, adapter)
        return Axis(f"unseen-{name}", base, target, claim, rule, **tuned)

    def grown(name: str, model: Any, claim: str, rule: Rule, small: dict[str, Any], large: dict[str, Any]) -> Axis:
        return Axis(f"unseen-{name}", Side(model, small, scratch), Side(model, large, scratch), claim, rule, **fresh)

    return [
        rank("rank-default", "muA: the same lr", {"rank": 8}, {"rank": 128}),
        rank(
            "rank-gaussian",
            "A starts at 1 / r: the best lr rises with r",
            {"rank": 8, "init_lora_weights": "gaussian"},
            {"rank": 128, "init_lora_weights": "gaussian"},
        ),
        rank(
            "alpha-x8",
            "muA: lr ~ scaling^(-1/2)",
            {"rank": 8, "alpha": 8},
            {"rank": 8, "alpha": 64},
            everywhere("lr / sqrt(8)", 8**-0.5),
        ),
        rank(
            "rank-alpha-2r",
            "muA: lr ~ rank^(-1/2) at a fixed alpha / r",
            {"rank": 4, "alpha": 8},
            {"rank": 64, "alpha": 128},
            everywhere("lr / 4", 0.25),
        ),
        grown(
            "width-tied",
            tied_llama,
            "muP: the best lr falls with width",
            in_layers("muP: matrices in blocks at lr / 3", 1 / 3, matrices_only=True),
            {"width": 48, "depth": 2},
            {"width": 144, "depth": 2},
        ),
        grown(
            "depth-tied",
            tied_llama,
            "depth-muP: lr ~ 1 / sqrt(depth)",
            in_layers("blocks at lr / sqrt(3)", 3**-0.5, matrices_only=False),
            {"width": 64, "depth": 2},
            {"width": 64, "depth": 6},
        ),
        grown(
            "width-neox",
            neox,
            "muP: the best lr falls with width",
            in_layers("muP: matrices in blocks at lr / 4", 0.25, matrices_only=True),
            {"width": 32, "depth": 3},
            {"width": 128, "depth": 3},
        ),
        grown(
            "depth-neox",
            neox,
            "depth-muP: lr ~ 1 / sqrt(depth)",
            in_layers("blocks at lr / sqrt(4)", 0.5, matrices_only=False),
            {"width": 48, "depth": 2},
            {"width": 48, "depth": 8},
        ),
        grown(
            "width-and-depth",
            qwen3,
            "muP and depth-muP together",
            Rule(
                "matrices in blocks at lr / 2 / sqrt(3), vectors in blocks at lr / sqrt(3)",
                lambda name, p: (0.5 if p.ndim >= 2 else 1.0) * 3**-0.5 if LAYER.search(name) else 1.0,
            ),
            {"width": 48, "depth": 2},
            {"width": 96, "depth": 6},
        ),
        Axis(
            "unseen-classifier-rank",
            Side(adapted_bert, {"rank": 4}, adapter),
            Side(adapted_bert, {"rank": 64}, adapter),
            "muA: the same lr",
            data=category_data,
            steps=150,
            warmup=10,
            batch_size=32,
        ),
        Axis(
            "unseen-batch-16",
            Side(adapted_llama, {"rank": 4, "use_rslora": True}, adapter),
            Side(adapted_llama, {"rank": 32, "use_rslora": True}, adapter),
            "muA, alpha / sqrt(r): best lr as r^(-1/4)",
            everywhere("lr * 8^(-1/4)", 8**-0.25),
            data=docs_data,
            steps=120,
            warmup=0,
            batch_size=16,
        ),
        Axis(
            "unseen-muon",
            Side(whole_llama, {}, grid(5.62e-4, 5.62e-3)),
            Side(whole_llama, {}, grid(5.62e-4, 1.78e-2), MUON_WITH_ADAMW),
            "Moonlight: scaled by 0.2 sqrt(max(rows, columns)), Muon takes AdamW's lr",
            Rule("0.2 sqrt(max(rows, columns)) on the matrices that Muon takes", muon_rule),
            data=unicode_data,
            steps=100,
            warmup=10,
        ),
    ]


UNSEEN: dict[str, Axis] = {axis.name: axis for axis in _axes()}
