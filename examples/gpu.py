"""Correctness, cost and transfer on one GPU, in less than eight minutes.

    python examples/gpu.py [--output runs/gpu]
    python examples/gpu.py --tiny      # on any machine, in less than a minute: whether everything runs

Needs a CUDA device, no network and no weights: models are made from configs, texts are Python's help topics and its
standard library. Writes `gpu.json` and `gpu.md`. The exit code is 1 if a check of correctness fails.

    rates      `per_example` rates against exact derivatives (JVPs), in float32 and in bf16, for each attention
    training   a recorded run ends with the weights of a plain one: AdamW, fused, compiled, DDP on one process
    cost       time and peak memory of a measured step beside a plain one
    transfer   the learning rate that is best at a small LoRA rank, at a large one, on Python source
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import is_flash_attn_2_available

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from cases import peak_memory, seconds
from workload import ALPHA, LENGTH, VOCABULARY, blocks, english, python_data, quiet

from hf_flerm import FLeRMConfig, FLeRMRun, FLeRMTrainer, measure_rates

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GIB = 2**30
RATE = 1e-3
NEGLIGIBLE = 1e-2  # share of the largest rate; the smaller rates of an untrained model are cancellations
LARGEST_ERRORS = {"float32": 0.1, "bf16": 0.15}  # root-mean-square log error; draws alone make 0.04
ROOM = 12 * GIB  # for activations and logits, beside weights, gradients and optimizer state
# Copies of the weights in a measured step: weights, gradients, AdamW, snapshot, and autocast's in bf16.
COPIES = {"LoRA r = 16": 1.1, "full": 5.5}


@dataclass(frozen=True)
class Shape:
    """The shape of a Qwen2 model."""

    name: str
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True

    def model(self, attention: str = "sdpa") -> nn.Module:
        config = Qwen2Config(
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)

    @property
    def nbytes(self) -> int:
        with torch.device("meta"):
            return sum(parameter.nbytes for parameter in self.model().parameters())


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    checked: Shape  # the model of the checks
    examples: int
    probes: int
    compiler: str  # backend of torch.compile
    timed: tuple[Shape, ...]  # models of which the cost is measured
    larger: tuple[Shape, ...]  # and of these the largest that fits, smallest first
    length: int  # tokens per example
    repeats: int
    width: int  # of the model that is fine-tuned
    layers: int
    pretraining_steps: int
    steps: int  # of each fine-tuning
    ranks: tuple[int, int]
    base_rates: tuple[float, ...]
    target_rates: tuple[float, ...]


GPU = Scale(
    checked=Shape("d = 256", 256, 704, 4, 4, 2, 4096),
    examples=8,
    probes=32,
    compiler="inductor",
    timed=(
        Shape("0.1B", 768, 2048, 12, 12, 12, 32000),
        Shape("0.5B (Qwen2.5)", 896, 4864, 24, 14, 2, 151936),
    ),
    larger=(
        Shape("1.5B (Qwen2.5)", 1536, 8960, 28, 12, 2, 151936),
        Shape("3B (Qwen2.5)", 2048, 11008, 36, 16, 2, 151936),
        Shape("7B (Qwen2.5)", 3584, 18944, 28, 28, 4, 152064, tied=False),
        Shape("14B (Qwen2.5)", 5120, 13824, 48, 40, 8, 152064, tied=False),
    ),
    length=512,
    repeats=7,
    width=384,
    layers=6,
    pretraining_steps=600,
    steps=150,
    ranks=(8, 128),
    base_rates=(1e-3, 1.8e-3, 3.2e-3, 5.6e-3),
    target_rates=(1e-3, 1.8e-3, 3.2e-3, 5.6e-3, 1e-2),
)
TINY = Scale(
    checked=Shape("d = 32", 32, 64, 2, 2, 1, 128),
    examples=8,
    probes=32,
    compiler="eager",
    timed=(Shape("tiny", 32, 64, 2, 2, 1, 128),),
    larger=(),
    length=16,
    repeats=2,
    width=32,
    layers=1,
    pretraining_steps=4,
    steps=4,
    ranks=(2, 8),
    base_rates=(1e-3,),
    target_rates=(1e-3,),
)


# --- correctness --------------------------------------------------------------------------------------------------


def check_rates(scale: Scale) -> list[dict[str, Any]]:
    """`per_example` rates of the first update of a sign-based optimizer, against exact ones in float32."""
    set_seed(0)
    model = scale.checked.model("eager").to(DEVICE)
    batch = {"input_ids": random_tokens(scale.checked, scale.examples, scale.length).to(DEVICE)}
    model(**batch, labels=batch["input_ids"]).loss.backward()
    updates = {name: -parameter.grad.sign() for name, parameter in model.named_parameters()}
    model.zero_grad()
    exact = measure_rates(model, updates, [batch], estimator="exact").rates
    counted = [name for name, rate in exact.items() if rate > NEGLIGIBLE * max(exact.values())]
    attentions = ["eager", "sdpa"]
    settings = [(precision, attention) for precision in LARGEST_ERRORS for attention in attentions]
    if DEVICE.type == "cuda" and is_flash_attn_2_available():  # which knows no float32
        settings.append(("bf16", "flash_attention_2"))
    found, reference = [], None
    for precision, attention in settings:
        model.set_attn_implementation(attention)
        generator = torch.Generator(DEVICE).manual_seed(0)
        with autocast() if precision == "bf16" else nullcontext():
            measured = measure_rates(
                model, updates, [batch] * (scale.probes // 2), probes_per_batch=2, generator=generator
            )
        rates = [measured.rates[name] for name in counted]
        reference = reference or rates
        error, of_setting = log_error(rates, [exact[name] for name in counted]), log_error(rates, reference)
        found.append(
            {
                "precision": precision,
                "attention": attention,
                "tensors": len(counted),
                "fallen_back": sum(way != "per_example" for way in measured.estimators.values()),
                "log_error": error,
                "of_which_not_from_draws": of_setting,
                "passed": error < LARGEST_ERRORS[precision],
            }
        )
    return found


def check_training(scale: Scale) -> list[dict[str, Any]]:
    """Weights of a recorded run against those of a plain one, and its rates against those of the first setting."""
    settings: dict[str, tuple[Callable[[nn.Module], Any], bool]] = {
        "AdamW": (lambda model: model, False),
        "fused AdamW": (lambda model: model, True),
        f"torch.compile ({scale.compiler})": (lambda model: torch.compile(model, backend=scale.compiler), True),
        f"DDP ({'NCCL' if DEVICE.type == 'cuda' else 'Gloo'}), one process": (DistributedDataParallel, True),
    }
    found, first_rates = [], None
    with deterministic(), one_process():
        for name, (wrap, fused) in settings.items():
            plain, _ = train(scale, wrap, fused, record=False)
            again, _ = train(scale, wrap, fused, record=False)
            recorded, rates = train(scale, wrap, fused, record=True)
            first_rates = first_rates or rates
            noise, difference = largest_difference(plain, again), largest_difference(plain, recorded)
            error = log_error(rates, first_rates)
            found.append(
                {
                    "setting": name,
                    "difference_of_two_plain_runs": noise,
                    "difference_of_a_recorded_run": difference,
                    "log_error_of_rates": error,
                    "passed": difference <= 3 * noise and error < LARGEST_ERRORS["bf16"],
                }
            )
    return found


def train(
    scale: Scale, wrap: Callable[[nn.Module], Any], fused: bool, *, record: bool
) -> tuple[list[Tensor], list[float]]:
    """Train for a few steps in a loop, under bf16 autocast. Return weights and the rates of the first step."""
    set_seed(0)
    model = scale.checked.model().to(DEVICE)
    loop = Loop(wrap(model), model, scale, fused)
    if record:
        loop.record()
    for _ in range(4):
        loop.step()
    rates = loop.close()
    return [parameter.detach().clone() for parameter in model.parameters()], rates


class Loop:
    """A loop of one's own, on random tokens, under bf16 autocast.

    Args:
        wrapped: The model that is called.
        model: The model itself.
        scale: Examples and tokens of a batch.
        fused: Which kind of AdamW.
    """

    def __init__(self, wrapped: nn.Module, model: nn.Module, scale: Scale, fused: bool = True) -> None:
        self.wrapped = wrapped
        self.run: FLeRMRun | None = None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, fused=fused)
        vocabulary = model.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (8 * scale.examples, scale.length), generator=torch.Generator().manual_seed(1))
        self.loader: DataLoader[Any] = DataLoader(
            [{"input_ids": row, "labels": row} for row in ids], batch_size=scale.examples
        )
        self.batches = cycle([{key: value.to(DEVICE) for key, value in batch.items()} for batch in self.loader])

    def record(self) -> None:
        """Measure every step from now on."""
        self.run = FLeRMRun(self.wrapped, self.optimizer, FLeRMConfig(measure_every=1), self.loader)

    def step(self) -> None:
        with autocast():
            loss = self.wrapped(**next(self.batches)).loss
        loss.backward()
        with self.run.step() if self.run else nullcontext(), autocast():
            self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> list[float]:
        """Stop recording. Return the rates of the first measured step; an empty list if there is none."""
        if self.run is None:
            return []
        rates = [float(row[0]) for row in self.run.profile.rates.values()]
        self.run.close()
        return rates


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if DEVICE.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


# --- cost ---------------------------------------------------------------------------------------------------------


def measure_costs(scale: Scale) -> list[dict[str, Any]]:
    found = []
    for method in COPIES:
        found += [cost(shape, method, scale) for shape in scale.timed]
        if DEVICE.type == "cuda":
            free, _ = torch.cuda.mem_get_info()
            fitting = (shape for shape in reversed(scale.larger) if COPIES[method] * shape.nbytes + ROOM < free)
            found += islice(filter(None, (cost_if_it_fits(shape, method, scale) for shape in fitting)), 1)
    return found


def cost_if_it_fits(shape: Shape, method: str, scale: Scale) -> dict[str, Any] | None:
    try:
        return cost(shape, method, scale)
    except torch.OutOfMemoryError:
        return None


def cost(shape: Shape, method: str, scale: Scale) -> dict[str, Any]:
    """Time and peak memory of plain steps, then of measured ones, on one model with the defaults of a run."""
    gc.collect()  # the models before
    torch.cuda.empty_cache()
    set_seed(0)
    with DEVICE:
        model = shape.model()
    if method != "full":
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    loop = Loop(model, model, scale)
    loop.step()
    plain = [seconds(loop.step) for _ in range(scale.repeats)]
    plain_peak = allocated() + peak_memory(loop.step)
    loop.record()
    first, second = seconds(loop.step), seconds(loop.step)
    measured = [seconds(loop.step) for _ in range(scale.repeats)]
    measured_peak = allocated() + peak_memory(loop.step)
    loop.close()
    step = median(plain)
    return {
        "model": shape.name,
        "method": method,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "examples": scale.examples,
        "tokens_per_example": scale.length,
        "step_ms": 1e3 * step,
        "measured_step_per_step": median(measured) / step,
        "measurement_per_step": median(measured) / step - 1,
        "first_measured_step_per_step": first / step,
        "second_measured_step_per_step": second / step,
        "peak_gib": plain_peak / GIB,
        "measured_peak_per_peak": measured_peak / plain_peak,
    }


def allocated() -> int:
    """Return the allocated bytes of the GPU; 0 on the CPU, where peaks are those of a step alone."""
    gc.collect()
    return torch.cuda.memory_allocated()


# --- transfer -----------------------------------------------------------------------------------------------------


def measure_transfer(scale: Scale) -> list[dict[str, Any]]:
    """Validation losses after fine-tuning on Python source with LoRA, pretrained on English."""
    base_rank, target_rank = scale.ranks
    found = []
    with tempfile.TemporaryDirectory() as folder:
        set_seed(0)
        config = GPT2Config(
            n_embd=scale.width,
            n_layer=scale.layers,
            n_head=max(scale.width // 64, 1),
            n_positions=LENGTH,
            vocab_size=VOCABULARY,
            bos_token_id=0,
            eos_token_id=0,
        )
        pretrained = Trainer(
            GPT2LMHeadModel(config),
            arguments(folder, RATE, scale.pretraining_steps, warmup_steps=scale.pretraining_steps // 10),
            train_dataset=blocks([english()]),
        )
        with redirect_stdout(StringIO()):
            pretrained.train()
        pretrained.save_model(folder + "/model")
        for init in ("gaussian", "default"):
            base = {rate: fine_tune(folder, scale, init, base_rank, rate, FLeRMConfig()) for rate in scale.base_rates}
            sweep = {rate: fine_tune(folder, scale, init, target_rank, rate)[0] for rate in scale.target_rates}
            rate = min(base, key=lambda rate: base[rate][0])
            profile = base[rate][1].rate_profile
            loss, trainer = fine_tune(
                folder, scale, init, target_rank, rate, FLeRMConfig(mode="match", profile=profile)
            )
            whole = next(entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry)
            plain_loss = sweep[rate] if rate in sweep else fine_tune(folder, scale, init, target_rank, rate)[0]
            found.append(
                {
                    "init": init,
                    "ranks": [base_rank, target_rank],
                    "base_losses": {f"{rate:g}": result[0] for rate, result in base.items()},
                    "target_losses": {f"{rate:g}": loss for rate, loss in sweep.items()},
                    "learning_rate": rate,
                    "plain_loss": plain_loss,
                    "matched_loss": loss,
                    "best_loss": min(sweep.values()),
                    "best_learning_rate": min(sweep, key=sweep.__getitem__),
                    "matched_run_per_plain_run": whole / (whole - trainer.flerm_callback.seconds),
                }
            )
    return found


def fine_tune(
    folder: str, scale: Scale, init: str, rank: int, rate: float, flerm: FLeRMConfig | None = None
) -> tuple[float, Any]:
    """Train once. Return the validation loss and the trainer."""
    set_seed(0)
    model = GPT2LMHeadModel.from_pretrained(folder + "/model")
    lora = LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        init_lora_weights="gaussian" if init == "gaussian" else True,
    )
    train_data, validation = python_data()
    given = {
        "model": get_peft_model(model, lora),
        "args": arguments(folder, rate, scale.steps),
        "train_dataset": train_data,
        "eval_dataset": validation,
    }
    trainer = Trainer(**given) if flerm is None else FLeRMTrainer(**given, flerm=flerm)
    with redirect_stdout(StringIO()):  # the logs
        trainer.train()
        return trainer.evaluate()["eval_loss"], trainer


def arguments(folder: str, rate: float, steps: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        learning_rate=rate,
        max_steps=steps,
        per_device_train_batch_size=32,
        bf16=DEVICE.type == "cuda",
        use_cpu=DEVICE.type == "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )


# --- helpers ------------------------------------------------------------------------------------------------------


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16)


def random_tokens(shape: Shape, examples: int, length: int) -> Tensor:
    return torch.randint(shape.vocabulary, (examples, length))


def log_error(values: Sequence[float], truth: Sequence[float]) -> float:
    """Root mean square of the logarithm of their ratio; of the pairs of which neither is 0."""
    pairs = [(value, true) for value, true in zip(values, truth, strict=True) if value > 0 and true > 0]
    ratios = torch.tensor(pairs, dtype=torch.float64).log().diff(dim=1)
    return float(ratios.square().mean().sqrt()) if pairs else 0.0


def largest_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


# --- the report ---------------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[Callable[[Scale], list[dict[str, Any]]], str]] = {
    "rates": (check_rates, "Rates against exact derivatives (JVPs in float32, eager attention)"),
    "training": (check_training, "Recorded runs against plain ones (bf16 autocast)"),
    "cost": (measure_costs, "Cost (bf16 autocast, AdamW, every step measured with the defaults)"),
    "transfer": (measure_transfer, "Transfer between LoRA ranks (a GPT-2 pretrained on English, on Python source)"),
}


def markdown(report: dict[str, Any]) -> str:
    """A table for each section; numbers have three digits, columns are the keys of the JSON."""
    lines = [f"{report['device']}, torch {report['torch']}, {report['seconds']:.0f} s."]
    for section, (_, title) in SECTIONS.items():
        rows = report["sections"][section]
        columns = [key for key, value in rows[0].items() if not isinstance(value, dict)]
        lines += ["", f"{title}:", "", row(key.replace("_", " ") for key in columns), "|" + "---|" * len(columns)]
        lines += [row(text(found[key]) for key in columns) for found in rows]
    return "\n".join([*lines, ""])


def row(cells: Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |"


def text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, list):
        return " to ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the GPU or, without one, on the CPU")
    options = parser.parse_args(words)
    if DEVICE.type == "cpu" and not options.tiny:
        parser.error("there is no CUDA device. To see whether everything runs, pass --tiny.")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic matrix products
    quiet()
    scale = TINY if options.tiny else GPU
    start = time.perf_counter()
    sections = {}
    for name, (function, _) in SECTIONS.items():
        begun = time.perf_counter()
        sections[name] = function(scale)
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    report = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "seconds": time.perf_counter() - start,
        "sections": sections,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.output / "gpu.md").write_text(markdown(report))
    print(markdown(report))
    failed = [found for rows in sections.values() for found in rows if not found.get("passed", True)]
    if failed:
        sys.exit("These checks failed:\n" + "\n".join(map(str, failed)))


if __name__ == "__main__":
    main()
