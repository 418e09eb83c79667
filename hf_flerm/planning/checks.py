"""What `plan` and `sweep` refuse before anything is copied, and what `plan` warns of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from typing import Any

from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers.utils import logging

from ..model.isolation import kept_random_state, own_generators
from ..profile.metadata import Adapter

logger = logging.get_logger(__name__)
_MOST_REFINED = 4  # times: learning rates then differ by 7 %
_ZERO_AT_START = (True, "gaussian", "eva")  # values of `init_lora_weights` with which lora_B starts at 0


def check_training(train_dataset: Dataset[Any] | None, data_collator: Any, caller: str = "plan") -> None:
    """Raise ValueError unless there are a single process, examples, and a way to collate them.

    Args:
        train_dataset: The training set.
        data_collator: The collate function of the training.
        caller: The function that asks, for the message.
    """
    if PartialState().num_processes > 1:
        raise ValueError(
            f"{caller} must run in a single process, and there are {PartialState().num_processes}: start it without a "
            "launcher."
        )
    if train_dataset is None:
        raise ValueError(f"{caller} needs the training set, and train_dataset is None.")
    if isinstance(train_dataset, Sized) and not len(train_dataset):
        raise ValueError(f"{caller} needs examples to train on, and train_dataset is empty.")
    _check_examples(caller, train_dataset, data_collator)


def check_sweep(
    around: float | None, seeds: Sequence[int], refine: int, train_dataset: Dataset[Any] | None, data_collator: Any
) -> None:
    """Raise ValueError unless learning rate, seeds and refinement can be used and there is something to train on."""
    if around is not None and not 0 < around < math.inf:
        raise ValueError(f"around is {around}; it must be a learning rate above 0.")
    if not seeds or len(set(seeds)) < len(seeds) or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ValueError(f"seeds is {list(seeds)}; it must be one or more different whole numbers, such as [0, 1, 2].")
    if type(refine) is not int or not 0 <= refine <= _MOST_REFINED:
        raise ValueError(
            f"refine is {refine!r}; it must be a whole number from 0 to {_MOST_REFINED}: how often the spacing is "
            "halved."
        )
    check_training(train_dataset, data_collator, "sweep")


def warn_if_trained(model: nn.Module, steps_done: int = 0) -> None:
    """Warn if a model has been trained already: a profile is of a training from its first step.

    Args:
        model: The target.
        steps_done: Optimizer steps that its trainer has made.
    """
    reason = f"its trainer has made {steps_done} steps" if steps_done else None
    adapters = [Adapter(config.to_dict()) for config in getattr(model, "peft_config", {}).values()]
    if all(adapter.config.get("init_lora_weights") in _ZERO_AT_START for adapter in adapters):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_B." in name and parameter.count_nonzero():
                reason = reason or f"{name} is not 0, as it is at first"
    if reason:
        logger.warning(
            f"the model has been trained already ({reason}): plan compares the first steps from these weights with the "
            "first steps of the base run. Give the model as it was before its training."
        )


def _check_examples(caller: str, train_dataset: Any, data_collator: Any) -> None:
    """Raise ValueError if the examples are texts, and the collate function is one that does not tokenize."""
    kind = data_collator if hasattr(data_collator, "__qualname__") else type(data_collator)
    may_tokenize = data_collator is not None and not kind.__module__.startswith("transformers.data.")
    if may_tokenize or isinstance(train_dataset, IterableDataset) or not hasattr(train_dataset, "__getitem__"):
        return
    with kept_random_state(PartialState().device), own_generators(train_dataset):
        example = train_dataset[0]
    if not isinstance(example, Mapping) or "input_ids" in example:
        return
    texts = [key for key, value in example.items() if _is_text(value)]
    others = [value for key, value in example.items() if key not in texts]
    if texts and all(value is None or isinstance(value, (bool, int, float)) for value in others):
        raise ValueError(
            f"the training set holds texts ({', '.join(map(str, texts))}) and no input_ids. Tokenize it first "
            f'(train_dataset.map(lambda row: tokenizer(row["{texts[0]}"], truncation=True))), give a data_collator '
            "that tokenizes, or build the trainer that tokenizes, such as TRL's SFTTrainer, and call "
            f"{caller}(trainer, ...)."
        )


def _is_text(value: object) -> bool:
    """Whether a value is a text, or lists and dicts of texts (the messages of a chat)."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(_is_text, value)))
