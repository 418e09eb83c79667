"""Share a profile: record a run, look at the files, push them.

    python examples/tutorials/share.py                        # writes what would be pushed
    python examples/tutorials/share.py --push org/tuned-small # pushes it

The token is that of `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from pathlib import Path

from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed
from transformers.utils import logging

from hf_flerm import FLeRMConfig, FLeRMTrainer, RateProfile
from hf_flerm.show.card import profile_files

LENGTH = 64


def recorded(folder: Path, seed: int) -> RateProfile:
    """The profile of a short run."""
    set_seed(seed)
    text = "\n".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
    rows = [list(text[start : start + LENGTH]) for start in range(0, 200 * LENGTH, LENGTH)]
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "vocab_size": 128}
    trainer = FLeRMTrainer(
        model=GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)),
        args=TrainingArguments(
            str(folder),
            learning_rate=3e-3,
            max_steps=10,
            per_device_train_batch_size=8,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        flerm=FLeRMConfig(seed=seed),
    )
    trainer.train()
    return trainer.rate_profile


def main(arguments_given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--push", metavar="REPOSITORY", help="Push to this repository of the Hub."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/tutorials/share"))
    options = parser.parse_args(arguments_given)
    logging.set_verbosity_error()
    profile = RateProfile.average([recorded(options.output / "run", seed) for seed in (0, 1)])
    profile.save_pretrained(options.output)
    if options.push:
        commit = profile.push_to_hub(options.push)
        again = RateProfile.from_pretrained(options.push)
        assert again == profile
        print(f"pushed: {commit.commit_url}; load it with profile={options.push!r}")
        return
    for name, content in profile_files(profile, "org/tuned-small").items():
        (options.output / name).write_bytes(content)
        print(options.output / name)


if __name__ == "__main__":
    main()
