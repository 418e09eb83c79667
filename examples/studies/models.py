"""Models that grow along an axis: a decoder of every norm placement, a residual MLP, GPT-2, and the adapted GPT-2.

Each maker takes a seed and sizes. Linear layers and embeddings of the two models written here start as torch starts
them; `init_scale` multiplies the weights of the linear layers.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import workload
from datasets import Dataset
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Trainer, set_seed
from transformers.modeling_outputs import CausalLMOutput

HEAD_SIZE = 16
CONTEXT = 8  # bytes that the residual MLP sees
STRIDE = 5  # between its examples

Map = Callable[[Tensor], Tensor]
RESIDUALS: dict[str, Callable[[Tensor, Map, Map, int], Tensor]] = {
    "pre": lambda x, f, norm, depth: x + f(norm(x)),
    "post": lambda x, f, norm, depth: norm(x + f(x)),
    "pre_post_mod": lambda x, f, norm, depth: x + norm(f(x)) * depth**-0.5,
}


class Attention(nn.Module):
    """Causal self-attention with a linear layer each for queries, keys, values and output."""

    def __init__(self, width: int, qk_norm: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (nn.LayerNorm(HEAD_SIZE) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, HEAD_SIZE)) for layer in (self.q, self.k, self.v))  # [N, T, H, E]
        q, k, v = (heads.transpose(1, 2) for heads in (self.q_norm(q), self.k_norm(k), v))
        return self.o(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x)))


class Block(nn.Module):
    """Attention and MLP, each with its norm where `norm` puts it."""

    def __init__(self, width: int, depth: int, norm: str, qk_norm: bool) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width, qk_norm), MLP(width)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.depth, self.residual = depth, RESIDUALS[norm]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.residual(x, lambda h: self.attention(h, mask), self.attention_norm, self.depth)
        return self.residual(x, self.mlp, self.mlp_norm, self.depth)


class Decoder(nn.Module):
    """A decoder transformer with learned positions and an untied head.

    Args:
        width: Of the residual stream; heads are of `HEAD_SIZE`.
        depth: Number of blocks.
        norm: `pre`: x + f(norm(x)); `post`: norm(x + f(x)); `pre_post_mod`: x + norm(f(x)) / sqrt(depth).
        qk_norm: Normalize queries and keys, head by head.
        init_scale: Factor on the initial weights of all linear layers.

    Raises:
        ValueError: If `norm` is none of these, or the width is no multiple of `HEAD_SIZE`.
    """

    def __init__(
        self, width: int, depth: int, norm: str = "pre", qk_norm: bool = False, init_scale: float = 1.0
    ) -> None:
        if norm not in RESIDUALS:
            raise ValueError(f"norm is {norm!r}; it must be one of {', '.join(RESIDUALS)}.")
        if width % HEAD_SIZE:
            raise ValueError(f"width is {width}; it must be a multiple of {HEAD_SIZE}.")
        super().__init__()
        self.tokens = nn.Embedding(workload.BYTES, width)
        self.positions = nn.Embedding(workload.BYTE_LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, depth, norm, qk_norm) for _ in range(depth))
        self.final_norm = nn.Identity() if norm == "post" else nn.LayerNorm(width)
        self.head = nn.Linear(width, workload.BYTES, bias=False)
        scale_linear_layers(self, init_scale)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> CausalLMOutput:
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None].bool()
        x = self.tokens(input_ids) + self.positions.weight[:length]
        for block in self.blocks:
            x = block(x, mask)
        logits = self.head(self.final_norm(x))  # [N, T, V]
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class ResidualLayer(nn.Module):
    """x + mlp(norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class ResMLP(nn.Module):
    """A residual MLP that guesses the next token from the `CONTEXT` tokens before it.

    Args:
        width: Of the residual stream.
        depth: Number of blocks.
        init_scale: Factor on the initial weights of all linear layers.
    """

    def __init__(self, width: int, depth: int, init_scale: float = 1.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(workload.BYTES, HEAD_SIZE)
        self.input = nn.Linear(CONTEXT * HEAD_SIZE, width)
        self.blocks = nn.ModuleList(ResidualLayer(width) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, workload.BYTES, bias=False)
        scale_linear_layers(self, init_scale)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        x = self.input(self.tokens(input_ids).flatten(1))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.final_norm(x))  # [N, V]
        return CausalLMOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def scale_linear_layers(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(factor)


def decoder(seed: int, **options: Any) -> nn.Module:
    set_seed(seed)
    return Decoder(**options)


def resmlp(seed: int, **options: Any) -> nn.Module:
    set_seed(seed)
    return ResMLP(**options)


def gpt2(seed: int, width: int, depth: int) -> nn.Module:
    set_seed(seed)
    config = GPT2Config(
        n_layer=depth,
        n_embd=width,
        n_head=width // HEAD_SIZE,
        vocab_size=workload.BYTES,
        n_positions=workload.BYTE_LENGTH,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def full(seed: int) -> nn.Module:
    """Return the pretrained model under the adapters, with all parameters trainable."""
    set_seed(seed)
    return GPT2LMHeadModel.from_pretrained(workload.pretrained())


def pretrained_on(name: str, make: Callable[[], PreTrainedModel], data: Dataset, collator: Any = None) -> Path:
    """Return the folder of a model that was pretrained on these blocks; the first call trains it.

    Args:
        name: Of the model and its text.
        make: Makes the model.
        data: Training blocks.
        collator: Collate function; None: the trainer's.
    """
    folder = workload.CACHE / f"{name}-{workload.VOCABULARY}-{workload.LENGTH}"
    if not (folder / "model.safetensors").exists():
        set_seed(0)
        with tempfile.TemporaryDirectory() as scratch:
            options = workload.arguments(
                scratch,
                learning_rate=3e-3,
                lr_scheduler_type="cosine",
                warmup_steps=30,
                max_steps=400,
                per_device_train_batch_size=16,
                disable_tqdm=True,
            )
            trainer = Trainer(make(), options, train_dataset=data, data_collator=collator)
            trainer.train()
            trainer.save_model(scratch + "/model")
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(scratch + "/model", folder)
    return folder


def context_data() -> tuple[Dataset, Dataset]:
    """English for `ResMLP`: every row has `CONTEXT` tokens, its label is the next one."""
    return _contexts(workload.english_bytes()[0]), _contexts(workload.english_bytes()[1])


def _contexts(blocks: Dataset) -> Dataset:
    rows = torch.tensor(blocks["input_ids"][:]).unfold(1, CONTEXT + 1, STRIDE).flatten(0, 1)
    return Dataset.from_dict({"input_ids": rows[:, :-1].tolist(), "labels": rows[:, -1].tolist()})
