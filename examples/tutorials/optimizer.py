"""Effect of an optimizer on the function: rates over training, and how the updates of tensors interact.

    python examples/tutorials/optimizer.py

A small GPT-2 is trained on bytes of Python's help pages, once with AdamW and once with SGD, each measured densely.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from pathlib import Path

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed
from transformers.utils import logging

from hf_flerm import FLeRMConfig, FLeRMTrainer, Research
from hf_flerm.show.plotting import plot_interactions

LENGTH = 64
OPTIMIZERS = {
    "AdamW": (3e-3, lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate)),
    "SGD": (3e-1, lambda parameters, rate: torch.optim.SGD(parameters, lr=rate, momentum=0.9)),
}


def trained(folder: Path, name: str, steps: int) -> FLeRMTrainer:
    """A run that was recorded, measured at every fourth step."""
    set_seed(0)
    text = "\n".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
    rows = [
        list(text[start : start + LENGTH]) for start in range(0, len(text) - LENGTH, LENGTH)
    ]
    size = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": LENGTH, "vocab_size": 128}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    learning_rate, make = OPTIMIZERS[name]
    trainer = FLeRMTrainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            learning_rate=learning_rate,
            max_steps=steps,
            warmup_steps=steps // 10,
            per_device_train_batch_size=8,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        optimizers=(make(model.parameters(), learning_rate), None),
        flerm=FLeRMConfig(measure_steps=range(0, steps, 4), research=Research(probes=4)),
    )
    trainer.train()
    return trainer


def main(arguments_given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", type=Path, default=Path("runs/tutorials"))
    options = parser.parse_args(arguments_given)
    logging.set_verbosity_error()
    lines = [
        "| optimizer | loss | joint rate | root of the sum of squared rates | joint / root | largest correlations |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for name in OPTIMIZERS:
        trainer = trained(options.output / name, name, options.steps)
        trainer.rate_profile.plot().savefig(options.output / f"rates-{name}.png", dpi=100)
        # [interactions]
        measured = trainer.flerm_callback.last_measurement
        names, inner_products = measured.interactions()
        alone = sum(rate**2 for rate in measured.rates.values()) ** 0.5
        weights = [
            index
            for index, tensor in enumerate(names)
            if "h." in tensor and tensor.endswith("weight")
        ]
        weights = [index for index in weights if "ln_" not in names[index]]
        picture = plot_interactions(
            [names[i] for i in weights], inner_products[weights][:, weights]
        )
        picture.savefig(options.output / f"interactions-{name}.png", dpi=100)
        # [report]
        sizes = inner_products.diagonal().sqrt()
        correlations = (inner_products / sizes / sizes[:, None])[weights][
            :, weights
        ].fill_diagonal_(0.0)
        lines.append(
            f"| {name} | {trainer.state.log_history[-1]['train_loss']:.2f} | {measured.total:.3g} | {alone:.3g} "
            f"| {measured.total / alone:.2f} | {correlations.min():.2f} to {correlations.max():.2f} |"
        )
    lines += [
        "",
        f"Rates of the last measurement of {options.steps} steps, in logits per unit learning rate; one seed.",
        "",
    ]
    (options.output / "optimizer.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
