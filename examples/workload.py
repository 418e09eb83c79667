"""The demo's small real task: a GPT-2 pretrained on English, fine-tuned on Python source with LoRA.

All text is on every machine that has Python: its help topics (English) and its standard library (Python).
"""

from __future__ import annotations

import multiprocessing
import os
import pydoc_data.topics
import shutil
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from hf_flerm import FLeRMConfig, FLeRMTrainer

Result = TypeVar("Result")

VOCABULARY = 1024
LENGTH = 48
PYTHON_FILES = 120
ALPHA = 32
VALIDATION_BLOCKS = 128
BYTES = 128  # ASCII
BYTE_LENGTH = 64
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
    """Turn off warnings and progress bars of the libraries."""
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
    return blocks(source[:-12]), _few(blocks(source[-12:]))


@cache
def english_bytes() -> tuple[Dataset, Dataset]:
    """Training and validation blocks of single bytes; every eighth help topic is for validation."""
    topics = list(pydoc_data.topics.topics.values())
    kept = [topic for index, topic in enumerate(topics) if index % 8]
    return _byte_blocks("\n".join(kept)), _few(_byte_blocks("\n".join(topics[::8])))


def _byte_blocks(text: str) -> Dataset:
    ids = torch.tensor(list(text.encode("ascii", "replace")))
    rows = ids[: len(ids) // BYTE_LENGTH * BYTE_LENGTH].view(-1, BYTE_LENGTH).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def _few(data: Dataset) -> Dataset:
    return data.shuffle(seed=0).select(range(VALIDATION_BLOCKS))


def arguments(folder: str, **options: object) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder, report_to="none", save_strategy="no", logging_strategy="no", use_cpu=True, **options
    )


def pretrained(progress: bool = True) -> Path:
    """Return the folder of the pretrained model; the first call trains it."""
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


def lora(seed: int, rank: int, **options: Any) -> torch.nn.Module:
    """The pretrained model with LoRA on every linear layer; one alpha and alpha / r scaling at every rank."""
    set_seed(seed)
    model = GPT2LMHeadModel.from_pretrained(pretrained())
    targets = ["c_attn", "c_proj", "c_fc"]
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=targets, fan_in_fan_out=True, **options)
    return get_peft_model(model, config)


def adapted(run: Run) -> torch.nn.Module:
    return lora(run.seed, run.rank, init_lora_weights="gaussian" if run.init == "gaussian" else True)


def trained(
    model: torch.nn.Module,
    data: tuple[Dataset, Dataset],
    flerm: FLeRMConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    optimizer: torch.optim.Optimizer | None = None,
    **options: object,
) -> tuple[float, Any]:
    """Train with these arguments, silently. Return the validation loss and the trainer."""
    train, validation = data
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(StringIO()):
        given = {
            "args": arguments(scratch, disable_tqdm=True, per_device_eval_batch_size=64, **options),
            "model": model,
            "train_dataset": train,
            "eval_dataset": validation,
            "callbacks": [*callbacks],
            "optimizers": (optimizer, None),
        }
        trainer = Trainer(**given) if flerm is None else FLeRMTrainer(**given, flerm=flerm)
        trainer.train()
        return trainer.evaluate()["eval_loss"], trainer


def fine_tune(
    run: Run, flerm: FLeRMConfig | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> tuple[float, Any]:
    """Train once. Return the validation loss and the trainer."""
    return trained(
        adapted(run),
        python_data(),
        flerm,
        callbacks,
        learning_rate=run.learning_rate,
        max_steps=run.steps,
        seed=run.seed,
        per_device_train_batch_size=run.batch_size,
    )


def processes(workers: int | None = None) -> ProcessPoolExecutor:
    """Context manager: a pool of fresh processes."""
    return ProcessPoolExecutor(workers or os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


def in_parallel(
    pool: Executor, function: Callable[..., Result], calls: Iterable[tuple[Any, ...]], title: str
) -> list[Result]:
    """Call `function` with each of these arguments in parallel. Return the results in the order of completion."""
    futures = [pool.submit(function, *call) for call in calls]
    return [future.result() for future in tqdm(as_completed(futures), title, total=len(futures), unit="run")]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, with the standard error over seeds."""
    return f"{mean(values):.{digits}f}" + (f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else "")


def standard_error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
