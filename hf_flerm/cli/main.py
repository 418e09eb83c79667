"""The `hf-flerm` command: its commands on profiles (`profiles.py`), `plan` and `sweep`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hf_flerm

from ..choices import Granularity
from .checks import check_folder, check_source, errors_as_usage, quiet_libraries
from .profiles import AsJson, Output, commands, print_result, with_adapter

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

    from ..profile.rate_profile import RateProfile

# Pickled weights count as weights: `from_pretrained` then refuses a folder without other ones, where `plan` would
# otherwise initialize a new model.
_WEIGHTS = ("*.safetensors*", "pytorch_model*.bin*")

_OF_THE_BASE = "Default: as in the base run."

# Plain text instead of boxes: errors can be read by other programs, and help loads faster.
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(commands)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf_flerm {hf_flerm.__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Function-space learning rates: find a learning rate, plan others from its profile, inspect and share profiles.

    Exit codes: 0 success; 1 `diff` found a difference; 2 wrong input.
    """


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="The target: a folder or repository. A folder without weights is initialized.")
    ],
    data: Annotated[str, typer.Argument(help="A text file, a data set saved to disk, or a data set on the Hub.")],
    profile: Annotated[
        str | None,
        typer.Argument(help="The profile of the base run: a folder, a file or a repository. Default: no base."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Folder or repository with the target's adapter_config.json; none: train the whole model."),
    ] = None,
    start: Annotated[
        float | None,
        typer.Option(help="Learning rate to begin with. Default: of the base, else of TrainingArguments."),
    ] = None,
    optim: Annotated[str | None, typer.Option(help=f"Optimizer, as in TrainingArguments. {_OF_THE_BASE}")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help=f"Training examples in a batch. {_OF_THE_BASE}")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens per example, if the data is text.")] = 512,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help=f"Steps of the planned training, for its schedule. {_OF_THE_BASE}")
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(min=0, help=f"Warm-up steps of the planned training. {_OF_THE_BASE}")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help=f"Learning-rate schedule, as in TrainingArguments. {_OF_THE_BASE}")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps of each copy. Default: 32 to measure rates, 64 to look at curvature."),
    ] = None,
    looks: Annotated[int, typer.Option(min=0, help="Most learning rates at which to look at curvature.")] = 6,
    granularity: Annotated[
        Granularity | None,
        typer.Option(help="What gets its own multiplier. Default: tensor if names match, else module."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of initialization and training.")] = 42,
    as_json: AsJson = False,
) -> None:
    """Find the learning rate for a model, with the profile of a base run or without one.

    Trains copies of the model for a few steps; nothing is saved. The first line of the output is the decision.
    """
    with errors_as_usage():
        check_folder("model", model)
        check_source("data set", data, "dataset")
        if adapter not in (None, "none"):
            check_folder("adapter", adapter)
    from huggingface_hub.utils import tqdm
    from transformers import TrainingArguments, set_seed

    set_seed(seed)  # weights may be initialized here
    with errors_as_usage(), quiet_libraries(), tempfile.TemporaryDirectory() as scratch:
        base = None if profile is None else hf_flerm.RateProfile.from_pretrained(profile)
        if base is not None:
            _check_base(base, str(profile), adapter, start)
        given = {
            "optim": optim,
            "per_device_train_batch_size": batch_size,
            "max_steps": max_steps,
            "warmup_steps": warmup_steps,
            "lr_scheduler_type": scheduler,
        }
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if base is not None:
            options = base.about.training_options | options
        if start is not None:
            options["learning_rate"] = start
        args = TrainingArguments(output_dir=scratch, seed=seed, **options)
        target = _model(model)
        if adapter not in (None, "none"):
            target = with_adapter(target, adapter)
        examples, collator = _examples(data, model, length)
        with tqdm(desc="steps on copies", unit=" steps", disable=None) as bar:
            found = hf_flerm.plan(
                target,
                args,
                examples,
                base,
                steps=steps,
                looks=looks,
                granularity=granularity,
                data_collator=collator,
                callbacks=[_progress(bar)],
            )
    print_result(found.to_dict(), [str(found)], as_json)


@app.command()
def sweep(
    model: Annotated[
        str, typer.Argument(help="The model: a folder or repository. A folder without weights is initialized.")
    ],
    data: Annotated[str, typer.Argument(help="A text file, a data set saved to disk, or a data set on the Hub.")],
    output: Output = Path("sweep"),
    evaluation: Annotated[
        str | None,
        typer.Option("--eval", help="Evaluation data, like DATA. Default: none; the training loss is minimized."),
    ] = None,
    around: Annotated[float | None, typer.Option(help="Learning rate in the middle. Default: what plan finds.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds; the model is the same.")] = 1,
    refine: Annotated[int, typer.Option(min=0, help="How often to halve the spacing of the learning rates.")] = 0,
    adapter: Annotated[
        str | None, typer.Option(help="Folder or repository with an adapter_config.json, to train an adapter.")
    ] = None,
    optim: Annotated[str | None, typer.Option(help="Optimizer, as in TrainingArguments.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Training examples in a batch.")] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens per example, if the data is text.")] = 512,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Steps of each training. Default: three epochs.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(min=0, help="Warm-up steps of each training.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Learning-rate schedule, as in TrainingArguments.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of initialization, and the first seed of training.")] = 42,
    as_json: AsJson = False,
) -> None:
    """Find the best learning rate for a model by training copies of it.

    Finished trainings and the profile of the best one are kept in the output folder; the same command goes on from
    there. The first line of the output is the learning rate to use.
    """
    from transformers import TrainingArguments, set_seed

    set_seed(seed)  # weights may be initialized here
    given = {
        "optim": optim,
        "per_device_train_batch_size": batch_size,
        "max_steps": max_steps,
        "warmup_steps": warmup_steps,
        "lr_scheduler_type": scheduler,
    }
    with errors_as_usage(), tempfile.TemporaryDirectory() as scratch:
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        silent = not sys.stderr.isatty()
        args = TrainingArguments(output_dir=scratch, seed=seed, report_to="none", disable_tqdm=silent, **options)
        trained = _model(model)
        if adapter is not None:
            trained = with_adapter(trained, adapter)
        examples, collator = _examples(data, model, length)
        found = hf_flerm.sweep(
            trained,
            args,
            examples,
            None if evaluation is None else _examples(evaluation, model, length)[0],
            folder=output,
            around=around,
            seeds=range(seed, seed + seeds),
            refine=refine,
            data_collator=collator,
        )
    print_result(found.to_dict(), [str(found), f"The profile at {found.best:g} is in {output}."], as_json)


def _check_base(base: RateProfile, profile: str, adapter: str | None, start: float | None) -> None:
    if (base.about.learning_rate is None) == (start is None):
        raise ValueError(
            f"{profile} does not contain the learning rate of its run, which plan needs. (An average contains it only "
            "if all its runs had the same.) Pass it as --start."
            if start is None
            else f"{profile} contains the learning rate to begin with, {base.about.learning_rate:g}: leave --start out."
        )
    if base.about.adapters and adapter is None:
        raise ValueError(
            f"{profile} is the profile of a run with the adapter {base.about.adapters[0].method}. Pass --adapter "
            "FOLDER, with the adapter_config.json of the target, or --adapter none to plan the training of the whole "
            "model."
        )


def _progress(bar: Any) -> TrainerCallback:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        """Advances the progress bar."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            bar.update()

    return Progress()


def _model(source: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(source)
    has_weights = any(file for kind in _WEIGHTS for file in folder.glob(kind))
    if folder.is_dir() and not has_weights:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    return AutoModelForCausalLM.from_pretrained(source, use_safetensors=True)


def _examples(source: str, model: str, length: int) -> tuple[Dataset, Any]:
    """Return training examples and their collator. A data set with `input_ids` is used unchanged."""
    from datasets import Dataset, load_dataset, load_from_disk
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling, default_data_collator

    path = Path(source)
    if path.is_file():
        examples = load_dataset("text", data_files=str(path), split="train")
    else:
        examples = load_from_disk(path) if path.is_dir() else load_dataset(source, split="train")
    if not isinstance(examples, Dataset):
        raise ValueError(f"{source} contains several data sets: {', '.join(examples)}. Pass one of them.")
    if "input_ids" in examples.column_names:
        return examples, default_data_collator
    if "text" not in examples.column_names:
        raise ValueError(f"{source} has no column 'text' or 'input_ids'; it has {examples.column_names}.")
    tokenizer = AutoTokenizer.from_pretrained(model)

    def blocks(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [token for row in tokenizer(rows["text"])["input_ids"] for token in row]
        return {"input_ids": [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]}

    tokenized = examples.map(blocks, batched=True, remove_columns=examples.column_names)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenized, DataCollatorForLanguageModeling(tokenizer, mlm=False)
