"""The demo's small real task: a GPT-2 pretrained on English, fine-tuned on Python source with LoRA.

All text is on every machine that has Python: its help topics (English) and its standard library (Python).
"""

from __future__ import annotations

import os
import pydoc_data.topics
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from hf_flerm import FLeRMConfig, FLeRMTrainer

VOCABULARY = 1024
LENGTH = 48
PYTHON_FILES = 120
ALPHA = 32
CACHE = Path(os.environ.get("HF_FLERM_CACHE", Path.home() / ".cache" / "hf_flerm"))


@dataclass(frozen=True)
class Run:
    """One fine-tuning run."""

    rank: int
    learning_rate: float
    seed: int = 0
    init: str = "default"
    steps: int = 100
    batch_size: int = 8


def quiet() -> None:
    """No warnings or progress bars from the libraries below; the demo has its own."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def english() -> str:
    return "\n".join(pydoc_data.topics.topics.values())


def python_source() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:PYTHON_FILES]
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


@cache
def tokenizer() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([english(), *python_source()[:20]], trainer)
    return bpe


def blocks(texts: list[str]) -> Dataset:
    """Token blocks of one length; labels are the inputs."""
    ids = [token for encoding in tokenizer().encode_batch(texts) for token in encoding.ids]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})


@cache
def python_data() -> tuple[Dataset, Dataset]:
    """Training and validation blocks; the validation files are other files."""
    source = python_source()
    return blocks(source[:-12]), blocks(source[-12:]).shuffle(seed=0).select(range(128))


def arguments(folder: str, **options: object) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder, report_to="none", save_strategy="no", logging_strategy="no", use_cpu=True, **options
    )


def pretrained(progress: bool = True) -> Path:
    """The folder of the pretrained model, trained the first time."""
    folder = CACHE / f"gpt2-english-{VOCABULARY}-{LENGTH}"
    if (folder / "model.safetensors").exists():
        return folder
    set_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    config = GPT2Config(
        n_layer=4,
        n_embd=96,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(action="ignore"):
        trainer = Trainer(
            GPT2LMHeadModel(config),
            arguments(
                scratch,
                learning_rate=3e-3,
                lr_scheduler_type="cosine",
                warmup_steps=30,
                max_steps=400,
                per_device_train_batch_size=16,
                disable_tqdm=not progress,
            ),
            train_dataset=blocks([english()]),
        )
        trainer.train()
        trainer.save_model(scratch + "/model")
        CACHE.mkdir(parents=True, exist_ok=True)
        shutil.move(scratch + "/model", folder)
    return folder


def adapted(run: Run) -> torch.nn.Module:
    """The pretrained model with LoRA on every linear layer; one alpha and alpha / r scaling at every rank."""
    set_seed(run.seed)
    model = GPT2LMHeadModel.from_pretrained(pretrained())
    lora = LoraConfig(
        r=run.rank,
        lora_alpha=ALPHA,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        init_lora_weights="gaussian" if run.init == "gaussian" else True,
    )
    return get_peft_model(model, lora)


def fine_tune(
    run: Run, flerm: FLeRMConfig | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[float, Trainer]:
    """Train one run; its validation loss and its trainer."""
    train, validation = python_data()
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(StringIO()):
        options = {
            "args": arguments(
                scratch,
                learning_rate=run.learning_rate,
                max_steps=run.steps,
                seed=run.seed,
                disable_tqdm=True,
                per_device_train_batch_size=run.batch_size,
                per_device_eval_batch_size=64,
            ),
            "model": adapted(run),
            "train_dataset": train,
            "eval_dataset": validation,
            "callbacks": [*callbacks],
        }
        trainer = Trainer(**options) if flerm is None else FLeRMTrainer(**options, flerm=flerm)
        trainer.train()
        return trainer.evaluate()["eval_loss"], trainer
