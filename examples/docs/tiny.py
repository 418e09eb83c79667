"""What the code blocks of the pages work on: a small GPT-2 with LoRA, untrained, and bytes of Python's help pages."""

import pydoc_data.topics

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

text = "\n".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
rows = [list(text[start : start + 32]) for start in range(0, 32 * 256, 32)]
data = Dataset.from_dict({"input_ids": rows, "labels": rows})


def gpt2(width: int = 32, layers: int = 2) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=128,
            n_positions=32,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def lora(rank: int) -> PeftModel:
    config = LoraConfig(
        r=rank,
        lora_alpha=16,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        init_lora_weights="gaussian",
    )
    return get_peft_model(gpt2(), config)


small, big = lora(rank=2), lora(rank=16)
args = TrainingArguments(
    "runs",
    learning_rate=1e-3,
    max_steps=6,
    per_device_train_batch_size=8,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
