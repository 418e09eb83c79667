"""The profiles of `profiles/`: each recorded at the best learning rate of its own sweep.

    python examples/collection.py                          # all, into profiles/
    python examples/collection.py gpt2-lora-r4 --output x  # one, elsewhere

Two tiny models learn the text of this repository's LICENSE, byte by byte: it is the same everywhere. With LoRA they
have learned it before and learn it in capitals.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, set_seed
from workload import arguments, quiet

from hf_flerm import FLeRMConfig, FLeRMTrainer, RateProfile
from hf_flerm.card import LIBRARY, profile_files

ROOT = Path(__file__).parent.parent
LENGTH, STRIDE = 64, 16  # bytes of an example, and from one to the next
VALIDATION = 0.2  # of the text, its end
STEPS, PRETRAINING_STEPS = 100, 200
RATES = tuple(10 ** (exponent / 4) for exponent in range(-16, 1))  # a quarter of a decade apart


@dataclass(frozen=True)
class Recipe:
    """How a profile was recorded."""

    family: str
    rank: int | None = None
    init: str = "default"
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        adapter = "full" if self.rank is None else f"lora-r{self.rank}"
        return "-".join([self.family, adapter, *(part for part in (self.init, self.optimizer) if part not in USUAL)])

    @property
    def about(self) -> str:
        what = "all weights" if self.rank is None else f"LoRA of rank {self.rank}, {self.init} initialization"
        return f"{FAMILIES[self.family][0]}: {what}, {OPTIMIZERS[self.optimizer][0]}"


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_embd=64,
            n_head=2,
            vocab_size=128,
            n_positions=LENGTH,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2,
            hidden_size=64,
            intermediate_size=176,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=128,
            max_position_embeddings=LENGTH,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


USUAL = ("default", "adamw")
FAMILIES: dict[str, tuple[str, Callable[[], nn.Module], list[str]]] = {
    "gpt2": ("GPT-2 of 2 layers, width 64", gpt2, ["c_attn", "c_proj", "c_fc"]),
    "llama": ("Llama of 2 layers, width 64", llama, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
}
OPTIMIZERS: dict[str, tuple[str, Callable[..., torch.optim.Optimizer]]] = {
    "adamw": ("AdamW", torch.optim.AdamW),
    "muon": ("Muon", torch.optim.Muon),  # of matrices: adapters have nothing else
}
RECIPES = {
    recipe.name: recipe
    for family in FAMILIES
    for recipe in (
        Recipe(family),
        *(Recipe(family, rank, init) for rank in (4, 16) for init in ("default", "gaussian")),
        Recipe(family, 4, optimizer="muon"),
    )
}


@cache
def text(capitals: str) -> tuple[Dataset, Dataset]:
    """Training and validation examples; their labels are the inputs."""
    written = (ROOT / "LICENSE").read_text(encoding="ascii")
    ids = torch.tensor(list((written.upper() if capitals == "capitals" else written).encode()))
    kept = int(len(ids) * (1 - VALIDATION))
    rows = [part.unfold(0, LENGTH, STRIDE).tolist() for part in (ids[:kept], ids[kept:])]
    train, validation = (Dataset.from_dict({"input_ids": part, "labels": part}) for part in rows)
    return train, validation


def model_of(recipe: Recipe) -> nn.Module:
    """What is trained: a new model, or LoRA on one that has learned the text."""
    set_seed(0)
    _, make, targets = FAMILIES[recipe.family]
    model = make()
    if recipe.rank is None:
        return model
    model.load_state_dict(pretrained(recipe.family))
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=16,
        target_modules=targets,
        fan_in_fan_out=recipe.family == "gpt2",
        init_lora_weights="gaussian" if recipe.init == "gaussian" else True,
    )
    return get_peft_model(model, config)


@cache
def pretrained(family: str) -> dict[str, torch.Tensor]:
    set_seed(0)
    model = FAMILIES[family][1]()
    trained(model, "as it is", "adamw", 10**-2.5, steps=PRETRAINING_STEPS)
    return model.state_dict()


def trained(
    model: nn.Module, capitals: str, optimizer: str, rate: float, flerm: FLeRMConfig | None = None, steps: int = STEPS
) -> tuple[float, Trainer]:
    """Validation loss, in nats per byte, and trainer of a run."""
    train, validation = text(capitals)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(StringIO()):
        options = {
            "model": model,
            "args": arguments(
                scratch,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 10,
                max_steps=steps,
                per_device_train_batch_size=8,
                per_device_eval_batch_size=64,
                disable_tqdm=True,
                seed=0,
            ),
            "train_dataset": train,
            "eval_dataset": validation,
            "optimizers": (OPTIMIZERS[optimizer][1](weights, lr=rate, weight_decay=0.0), None),
        }
        trainer = Trainer(**options) if flerm is None else FLeRMTrainer(**options, flerm=flerm)
        trainer.train()
        return trainer.evaluate()["eval_loss"], trainer


def run(recipe: Recipe, rate: float, flerm: FLeRMConfig | None = None) -> tuple[float, Trainer]:
    """Train a recipe at a learning rate."""
    capitals = "as it is" if recipe.rank is None else "capitals"
    return trained(model_of(recipe), capitals, recipe.optimizer, rate, flerm)


def recorded(recipe: Recipe, rate: float) -> RateProfile:
    """The profile of a recipe at a learning rate."""
    _, trainer = run(recipe, rate, FLeRMConfig(mode="record"))
    assert isinstance(trainer, FLeRMTrainer)
    return trainer.rate_profile


def sweep(recipe: Recipe) -> dict[float, float]:
    """Validation losses around the best, up to two quarters of a decade on either side."""
    losses: dict[float, float] = {}
    near = RATES.index(min(RATES, key=lambda rate: abs(math.log(rate / 10**-2.5))))
    wanted = {near}
    while wanted - {RATES.index(rate) for rate in losses}:
        for index in sorted(wanted):
            rate = RATES[index]
            if rate not in losses:
                loss = run(recipe, rate)[0]
                losses[rate] = loss if math.isfinite(loss) else math.inf
        best = RATES.index(min(losses, key=losses.__getitem__))
        wanted = {index for index in range(best - 2, best + 3) if 0 <= index < len(RATES)}
    return dict(sorted(losses.items()))


def write(recipe: Recipe, folder: Path) -> dict[str, object]:
    """Sweep, record, write file, card and picture; what the manifest says of it."""
    losses = sweep(recipe)
    rate = min(losses, key=losses.__getitem__)
    profile = recorded(recipe, rate)
    rows = [f"| {tried:.3g} | {loss:.3f} |" for tried, loss in losses.items()]
    intro = [
        f"# {recipe.name}",
        "",
        f"{recipe.about}; {STEPS} steps on the bytes of an Apache license. Made again by",
        "",
        f"    python examples/collection.py {recipe.name}",
        "",
        f"| learning rate | validation loss, nats per byte (best: {rate:.3g}) |",
        "|---|---|",
        *rows,
    ]
    data = ModelCardData(library_name=LIBRARY).to_yaml()
    card = ModelCard(f"---\n{data}\n---\n\n" + "\n".join(intro) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    files = profile_files(profile, f"profiles/{recipe.name}", card)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {
        "about": recipe.about,
        "command": f"python examples/collection.py {recipe.name}",
        "learning_rate": rate,
        "sweep": {f"{tried:.3g}": round(loss, 4) if math.isfinite(loss) else None for tried, loss in losses.items()},
        "tensors": len(profile.names),
        "steps": profile.steps.tolist(),
        "packages": {name: version(name) for name in ("hf_flerm", "torch", "transformers", "peft")},
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--output", type=Path, default=ROOT / "profiles")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in RECIPES]
    if unknown:
        parser.error(f"no such profile: {', '.join(unknown)}; there are {', '.join(RECIPES)}.")
    quiet()
    torch.set_num_threads(1)  # sums in the same order on every machine
    manifest = options.output / "manifest.json"
    found = json.loads(manifest.read_text()) if manifest.exists() else {}
    for name in tqdm(options.names or RECIPES, unit="profile"):
        found[name] = write(RECIPES[name], options.output / name)
        manifest.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
