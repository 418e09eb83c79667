"""How to make probe batches for TRL's trainers, and which positions of the outputs count.

A trainer is recognized by the name of the class of its arguments: TRL is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, TrainingArguments, default_data_collator

from ..engines import engine_of
from ..rates.model_call import Batch
from .probe_data import Collate, Staged

_IGNORED = -100


@dataclass(frozen=True)
class Task:
    """The probe settings of a trainer.

    Attributes:
        positions: Which positions of the output count, unless `FLeRMConfig.positions` is set.
        collate_fn: Makes model inputs from a list of training examples.
    """

    positions: str
    collate_fn: Collate


def trl_task(args: TrainingArguments, model: nn.Module, dataloader: Any, processing_class: Any) -> Task:
    """Return the probe settings of a trainer; other trainers than TRL's use the collate function of their data loader.

    Args:
        args: The trainer's arguments.
        model: The trained model.
        dataloader: The training data loader.
        processing_class: The trainer's tokenizer.

    Raises:
        ValueError: If it is an unsupported trainer of TRL.
    """
    names = [kind.__name__ for kind in type(args).__mro__ if kind.__module__.partition(".")[0] == "trl"]
    if not names:
        return Task("attention_mask", getattr(dataloader, "collate_fn", None) or default_data_collator)
    known = next((name for name in names if name in _TASKS), None)
    if known is None:
        raise ValueError(
            f"TRL's {names[0]} is not supported; supported are {', '.join(_TASKS)}. Use FLeRMRun in a custom loop, "
            "with collate_fn and FLeRMConfig(output=...)."
        )
    return _TASKS[known](args, model, dataloader, processing_class)


def _sft(args: Any, model: nn.Module, dataloader: Any, processing_class: Any) -> Task:
    """Logits of labeled positions. Packed and padding-free rows are split into their documents."""
    collate: Any = dataloader.collate_fn
    if not getattr(collate, "padding_free", False):
        return Task("labels", collate)
    padded = replace(collate, padding_free=False)
    return Task("labels", lambda rows: padded([document for row in rows for document in _documents(row)]))


def _documents(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Split a packed row into its documents."""
    lengths = row.get("seq_lengths")
    if lengths is None:
        yield row
        return
    columns = {name: values for name, values in row.items() if name != "seq_lengths"}
    for length, end in zip(lengths, accumulate(lengths), strict=True):
        if length > 1:  # a single token has no next token to predict
            yield {name: values[end - length : end] for name, values in columns.items()}


def _dpo(args: Any, model: nn.Module, dataloader: Any, processing_class: Any) -> Task:
    """Logits of the tokens of chosen and rejected completions; each completion is an example."""

    def collate(rows: Sequence[Any]) -> Batch:
        batch = dict(dataloader.collate_fn(rows))
        mask = batch.pop("completion_mask")
        kept = {name: value for name, value in batch.items() if not name.startswith("ref_")}
        return {**kept, "labels": batch["input_ids"].masked_fill(mask == 0, _IGNORED)}

    return Task("labels", collate)


def _reward(args: Any, model: nn.Module, dataloader: Any, processing_class: Any) -> Task:
    """Rewards of chosen and rejected texts; each text is an example."""

    def collate(rows: Sequence[Any]) -> Batch:
        return {name: value for name, value in dataloader.collate_fn(rows).items() if name != "margin"}

    return Task("attention_mask", collate)


def _grpo(args: Any, model: Any, dataloader: Any, processing_class: Any) -> Task:
    """Logits of completion tokens; the policy samples completions for each probe with the weights before the update."""

    def prompts(rows: Sequence[Any]) -> Batch:
        if "input_ids" in rows[0]:
            return _given_completions(rows, processing_class)
        if engine_of(model).sharded:
            raise ValueError(
                "cannot sample completions from a sharded model: pass a probe_dataset with the columns input_ids and "
                "labels."
            )
        texts = [row["prompt"] for row in rows]
        if isinstance(texts[0], str):
            ids = processing_class(text=texts)["input_ids"]
        else:
            ids = processing_class.apply_chat_template(
                texts,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **(args.chat_template_kwargs or {}),
            )["input_ids"]
        return _padded(ids, processing_class.pad_token_id, "left")

    def completed(batch: Batch) -> Batch:
        return batch if "labels" in batch else _sampled_completions(model, batch, settings)

    settings = GenerationConfig(
        **{
            "max_new_tokens": args.max_completion_length,
            "do_sample": True,
            "pad_token_id": getattr(processing_class, "pad_token_id", None),
            "bos_token_id": getattr(processing_class, "bos_token_id", None),
            "eos_token_id": getattr(processing_class, "eos_token_id", None),
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "min_p": args.min_p,
            "repetition_penalty": args.repetition_penalty,
            **(args.generation_kwargs or {}),
        },
        disable_compile=True,
    )
    return Task("labels", Staged(prompts, completed))


def _given_completions(rows: Sequence[Any], tokenizer: Any) -> Batch:
    """Make a batch from given completions: rows with `input_ids` and `labels`."""
    batch = _padded([row["input_ids"] for row in rows], tokenizer.pad_token_id, "right")
    labels = [torch.as_tensor(row["labels"]) for row in rows]
    return {**batch, "labels": pad_sequence(labels, batch_first=True, padding_value=_IGNORED)}


def _sampled_completions(model: Any, prompts: Mapping[str, Tensor], settings: GenerationConfig) -> Batch:
    """Sample completions of prompts. Labels are the sampled tokens up to the first end-of-text token."""
    device = next(model.parameters()).device
    prompts = {name: value.to(device) for name, value in prompts.items()}
    with torch.no_grad():
        ids = model.generate(**prompts, generation_config=settings, use_cache=True)
    start = prompts["input_ids"].shape[1]
    ends = torch.isin(ids[:, start:], torch.as_tensor(settings.eos_token_id, device=device))
    mask = torch.cat([prompts["attention_mask"], (ends.cumsum(1) - ends.long() == 0).long()], 1)
    labels = ids.masked_fill(mask == 0, _IGNORED)
    labels[:, :start] = _IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _padded(ids: Sequence[Any], pad_token_id: int, side: str) -> dict[str, Tensor]:
    rows = [torch.as_tensor(row) for row in ids]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id, padding_side=side),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side),
    }


_TASKS: Mapping[str, Callable[[Any, nn.Module, Any, Any], Task]] = {
    "SFTConfig": _sft,
    "DPOConfig": _dpo,
    "RewardConfig": _reward,
    "GRPOConfig": _grpo,
}
