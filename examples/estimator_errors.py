"""Error and time of every estimator against `exact`, side by side in one run (the table of README's "How it works").

    python examples/estimator_errors.py [--repeats 4]

A 4-layer GPT-2 (d = 128) with LoRA r = 8 on all linear layers, 32 tensors, after a few AdamW steps on random tokens;
8 examples of 128 tokens per probe batch. The figure is the root-mean-square log error of the rates over tensors and
repeats.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_flerm.probes import RateProbe

PROBES = (1, 5, 10, 20, 40)
ESTIMATORS = ("per_example", "kronecker", "full", "iid")


def lora_case() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """A model some steps into training, the unit update of its last step, and a probe batch."""
    set_seed(0)
    config = GPT2Config(
        n_layer=4, n_embd=128, n_head=4, vocab_size=1024, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    lora = LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = get_peft_model(GPT2LMHeadModel(config), lora)
    learning_rate = 1e-3
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate)
    for _ in range(4):
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        ids = torch.randint(1024, (8, 128))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    updates = {name: (parameter.detach() - before[name]) / learning_rate for name, parameter in trained.items()}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(before[name])
    return model, updates, {"input_ids": torch.randint(1024, (8, 128))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    model, updates, batch = lora_case()
    exact = torch.tensor(list(RateProbe(model, estimator="exact").measure(updates, [batch]).rates.values()))
    rows = []
    with tqdm(total=len(ESTIMATORS) * len(PROBES) * options.repeats, unit="measurement") as bar:
        for estimator in ESTIMATORS:
            probe = RateProbe(model, estimator=estimator)
            probe.measure(updates, [batch])
            cells, times = [], []
            for count in PROBES:
                errors = []
                for repeat in range(options.repeats):
                    generator = torch.Generator().manual_seed(1000 * count + repeat)
                    start = time.perf_counter()
                    rates = probe.measure(updates, [batch] * count, generator).rates
                    times.append((time.perf_counter() - start) / count)
                    errors.append((torch.tensor(list(rates.values())) / exact).log().square().mean())
                    bar.update()
                cells.append(f"{torch.stack(errors).mean().sqrt().item():.2f}")
            rows.append(f"| `{estimator}` | " + " | ".join(cells) + f" | {1e3 * median(times):.0f} |")
    print("| probes | " + " | ".join(map(str, PROBES)) + " | ms per probe |")
    print("|---|" + "---|" * (len(PROBES) + 1))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
