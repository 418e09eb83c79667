"""The models that are timed, their training steps, and measurements of memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, set_seed
from transformers.utils import logging

from hf_flerm.engines.engine import MasterWeights
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.step import Snapshot

LEARNING_RATE = 1e-3
logging.set_verbosity_error()


def gpt2(width: int, layers: int, vocabulary: int) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=width,
            n_layer=layers,
            n_head=max(width // 64, 2),
            vocab_size=vocabulary,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama(width: int, layers: int, vocabulary: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 8 * 8,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=max(width // 128, 1),
            vocab_size=vocabulary,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def lora(model: nn.Module, rank: int) -> nn.Module:
    targets = ["c_attn", "c_proj", "c_fc"] if isinstance(model, GPT2LMHeadModel) else "all-linear"
    return get_peft_model(model, LoraConfig(r=rank, target_modules=targets))


@dataclass
class Training:
    """A model in training: steps of AdamW on one batch, under bf16 autocast on a GPU; another batch to probe with."""

    model: nn.Module
    train_ids: Tensor
    probe_ids: Tensor

    def __post_init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        if self.device.type == "cuda":
            self.model.forward = torch.autocast("cuda", torch.bfloat16)(self.model.forward)
        self.parameters = trainable_parameters(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LEARNING_RATE, fused=True)
        self.train_batch = {"input_ids": self.train_ids.to(self.device)}
        self.probe_batch = {"input_ids": self.probe_ids.to(self.device)}

    def update(self) -> None:
        """Forward, backward, clipping and the optimizer's step. Gradients are kept, as in a step of the Trainer."""
        self.model.train()
        self.model(**self.train_batch, labels=self.train_batch["input_ids"]).loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()

    def step(self) -> None:
        self.update()
        self.optimizer.zero_grad()

    def measured(self, measure: Callable[[Any], Any]) -> None:
        """Make a training step and measure its update."""
        before = Snapshot(MasterWeights(self.parameters))
        self.update()
        with before.put_back(dict.fromkeys(self.parameters, LEARNING_RATE)) as updates:
            measure(updates)
        self.optimizer.zero_grad()

    @property
    def held(self) -> int:
        """Bytes of weights and optimizer state."""
        states = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(tensor.nbytes for tensor in [*self.model.parameters(), *states])

    @property
    def trained(self) -> int:
        """Bytes of the trainable weights."""
        return sum(parameter.nbytes for parameter in self.parameters.values())


def on_random_tokens(model: nn.Module, examples: int, length: int) -> Training:
    set_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    return Training(model, *torch.randint(vocabulary, (2, examples, length)))


def seconds(function: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def peak_memory(function: Callable[[], Any]) -> int:
    """Return the peak of the allocated bytes while `function` runs, minus the bytes allocated before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
