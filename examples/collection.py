"""The collection in `profiles/`: rate profiles of tiny models, each at the best learning rate of a sweep.

    python examples/collection.py [NAME ...] [--output profiles]

The text is the names of the characters of Unicode 3.2, which every Python has and which will never change. A model
learns the names of letters (`pretrain`); all of it (`full`), the matrices of its blocks (`full` with Muon, which takes
nothing else) or LoRA on its linear layers (`lora`) then learns those of symbols. The same command, the same bytes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import hashlib
import json
import math
import platform
import random
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import Muon
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, set_seed
from workload import in_parallel, processes, quiet, trained

from hf_flerm import FLeRMConfig, RateProfile, Research
from hf_flerm.model.names import tensor_places
from hf_flerm.show.card import profile_files
from hf_flerm.show.summary import rates_by_kind

FOLDER = Path(__file__).parents[1] / "profiles"
MANIFEST = "manifest.json"
WIDTH, LAYERS, HEADS = 64, 2, 4
VOCABULARY, LENGTH = 128, 64  # ASCII bytes, and how many are an example
VALIDATION = 128  # examples
FIRST_SYMBOL = 0x2000  # code points below are those of letters, with few exceptions
ALGORITHMIC = ("CJK UNIFIED", "CJK COMPATIBILITY", "HANGUL SYLLABLE")  # named by rule
STEPS = {"pretrain": 150, "full": 100, "lora": 100}
BATCH = 8
SWEEP = 5  # learning rates, to begin with


@dataclass(frozen=True)
class Entry:
    """One profile of the collection. `first` is the first learning rate of its sweep, in quarters of a decade."""

    model: str
    method: str
    first: int
    optimizer: str = "adamw"
    rank: int = 0
    init: str = ""

    @property
    def name(self) -> str:
        lora = [f"r{self.rank}", self.init] if self.rank else []
        return "-".join([self.model, self.method, *lora, self.optimizer])

    @property
    def command(self) -> str:
        return f"python examples/collection.py {self.name}"


ENTRIES = {
    entry.name: entry
    for model in ("gpt2", "llama")
    for entry in (
        Entry(model, "pretrain", -10),
        Entry(model, "full", -11),
        Entry(model, "full", -8, "muon"),
        *(Entry(model, "lora", -8, "adamw", rank, init) for rank in (4, 16) for init in ("default", "gaussian")),
        Entry(model, "lora", -6, "muon", 4, "default"),
    )
}


@cache
def data(symbols: bool) -> tuple[Dataset, Dataset]:
    """Training and validation examples: names in an order drawn at random, one per line."""
    named = ((point, unicodedata.ucd_3_2_0.name(chr(point), "")) for point in range(0x110000))
    names = [
        name
        for point, name in named
        if name and (point >= FIRST_SYMBOL) == symbols and not name.startswith(ALGORITHMIC)
    ]
    random.Random(0).shuffle(names)
    text = "\n".join(names).encode("ascii")
    rows = [list(text[start : start + LENGTH]) for start in range(0, len(text) - LENGTH + 1, LENGTH)]
    return _examples(rows[VALIDATION:]), _examples(rows[:VALIDATION])


def _examples(rows: list[list[int]]) -> Dataset:
    """Make a data set whose fingerprint depends on its content only."""
    table = InMemoryTable.from_pydict({"input_ids": rows, "labels": rows})
    return Dataset(table, fingerprint=hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16])


def untrained(model: str) -> nn.Module:
    set_seed(0)
    if model == "llama":
        llama = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            bos_token_id=0,
            eos_token_id=0,
        )
        return LlamaForCausalLM(llama)
    config = GPT2Config(
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        activation_function="gelu_pytorch_tanh",
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


@cache
def weights(model: str, learning_rate: float) -> dict[str, torch.Tensor]:
    """Of the pretrained model."""
    return run(ENTRIES[f"{model}-pretrain-adamw"], learning_rate)[1].model.state_dict()


def build(entry: Entry, base_rate: float | None = None) -> nn.Module:
    """Make the model of an entry; it is pretrained first, at the base's learning rate, if the entry says so."""
    state = weights(entry.model, base_rate) if base_rate is not None else None
    model = untrained(entry.model)
    if state is not None:
        model.load_state_dict(state)
    if entry.rank:
        gpt2 = entry.model == "gpt2"
        config = LoraConfig(
            r=entry.rank,
            lora_alpha=16,
            target_modules=["c_attn", "c_proj", "c_fc"] if gpt2 else "all-linear",
            fan_in_fan_out=gpt2,
            init_lora_weights=True if entry.init == "default" else entry.init,
        )
        return get_peft_model(model, config)
    if entry.optimizer == "muon":
        places = tensor_places(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.ndim == 2 and "*" in places[name].kind)
    return model


def run(
    entry: Entry, learning_rate: float, base_rate: float | None = None, flerm: FLeRMConfig | None = None
) -> tuple[float, Any]:
    """Train an entry once. Return the validation loss and the trainer."""
    model = build(entry, base_rate if entry.method != "pretrain" else None)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return trained(
        model,
        data(symbols=entry.method != "pretrain"),
        flerm,
        optimizer=Muon(trainable, lr=learning_rate, weight_decay=0.0) if entry.optimizer == "muon" else None,
        learning_rate=learning_rate,
        max_steps=STEPS[entry.method],
        per_device_train_batch_size=BATCH,
        seed=0,
    )


def loss_of(name: str, learning_rate: float, base_rate: float | None) -> tuple[str, float, float]:
    quiet()
    torch.set_num_threads(1)
    return name, learning_rate, round(run(ENTRIES[name], learning_rate, base_rate)[0], 4)


def grid_rate(index: int) -> float:
    """Four learning rates per decade: 0.001, 0.00178, 0.00316, 0.00562, 0.01, ..."""
    return float(f"{10 ** (index / 4):.3g}")


def sweeps(names: list[str], base_rates: dict[str, float]) -> dict[str, dict[float, float]]:
    """Sweep until the best learning rate is not at an end. Return `{name: {learning rate: validation loss}}`."""
    ranges = {name: (ENTRIES[name].first, ENTRIES[name].first + SWEEP) for name in names}
    found: dict[str, dict[float, float]] = {name: {} for name in names}
    with processes() as pool:
        while True:
            jobs = [
                (name, rate, base_rates.get(ENTRIES[name].model))
                for name, indices in ranges.items()
                for rate in map(grid_rate, range(*indices))
                if rate not in found[name]
            ]
            if not jobs:
                return {name: dict(sorted(losses.items())) for name, losses in found.items()}
            for name, rate, loss in in_parallel(pool, loss_of, jobs, "sweeps"):
                found[name][rate] = loss
            for name, (first, last) in ranges.items():
                best = best_rate(found[name])
                ranges[name] = (first - (best == grid_rate(first)), last + (best == grid_rate(last - 1)))


def best_rate(losses: dict[float, float]) -> float:
    return min((rate for rate, loss in losses.items() if math.isfinite(loss)), key=losses.__getitem__)


def record(entry: Entry, learning_rate: float, base_rate: float | None) -> tuple[float, RateProfile]:
    """Record an entry. Its validation loss is that of the sweep, because recording changes nothing."""
    loss, trainer = run(
        entry, learning_rate, base_rate, FLeRMConfig(mode="record", metric="euclidean", research=Research(probes=8))
    )
    return round(loss, 4), trainer.rate_profile


def write(entry: Entry, losses: dict[float, float], base_rate: float | None, output: Path) -> dict[str, Any]:
    """Train, record and write an entry. Return its part of the manifest."""
    rate = best_rate(losses)
    loss, found = record(entry, rate, base_rate)
    if loss != losses[rate]:
        raise RuntimeError(f"{entry.name} came to {loss} when it was recorded and to {losses[rate]} in its sweep.")
    metadata = {
        **found.metadata,
        "sweep": [[rate, loss if math.isfinite(loss) else None] for rate, loss in losses.items()],
    }
    file = RateProfile(found.steps, found.rates, metadata, found.joint_rates).save_pretrained(output / entry.name)
    return describe(entry, RateProfile.from_pretrained(file), base_rate, output)  # in the file's order of tensors


def describe(entry: Entry, profile: RateProfile, base_rate: float | None, output: Path) -> dict[str, Any]:
    """Write profile, card and picture. Return the entry's part of the manifest."""
    folder = output / entry.name
    folder.mkdir(parents=True, exist_ok=True)
    files = profile_files(profile, f"profiles/{entry.name}")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    rate = profile.metadata["training_arguments"]["learning_rate"]
    return {
        "command": entry.command,
        "base_learning_rate": base_rate,
        "learning_rate": rate,
        "loss": profile.about.sweep[rate],
        "versions": {"python": platform.python_version(), **profile.metadata["packages"]},
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "rates": {
            kind: [float(f"{rate:.3g}") for rate in np.nan_to_num(rates.mean[[0, -1]]).tolist()]
            for kind, rates in rates_by_kind(profile).items()
        },
    }


def manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    return json.loads(file.read_text()) if file.exists() else {}


def make(names: list[str], output: Path) -> None:
    """Write these entries. An entry that starts from a pretrained model needs that model's entry in the manifest."""
    quiet()
    torch.set_num_threads(1)
    bases = {f"{ENTRIES[name].model}-pretrain-adamw" for name in names} - manifest(output).keys()
    wanted = [name for name in ENTRIES if name in {*names, *bases}]
    for pretrain in (True, False):
        part = [name for name in wanted if (ENTRIES[name].method == "pretrain") == pretrain]
        known = manifest(output)
        base_rates = (
            {}
            if pretrain
            else {
                model: known[f"{model}-pretrain-adamw"]["learning_rate"]
                for model in ("gpt2", "llama")
                if f"{model}-pretrain-adamw" in known
            }
        )
        found = sweeps(part, base_rates)
        for name in tqdm(part, "records"):
            known[name] = write(ENTRIES[name], found[name], base_rates.get(ENTRIES[name].model), output)
        output.mkdir(parents=True, exist_ok=True)
        (output / MANIFEST).write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(ENTRIES)}; all, if none is given")
    parser.add_argument("--output", type=Path, default=FOLDER)
    given = parser.parse_args()
    if unknown := sorted({*given.names} - ENTRIES.keys()):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(ENTRIES)}.")
    make(given.names or list(ENTRIES), given.output)


if __name__ == "__main__":
    main()
