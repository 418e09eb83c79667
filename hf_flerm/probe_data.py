"""The examples that are probed: from the training set or one of the user's own, drawn by the probes' random numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset as HubDataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .config import FLeRMConfig
from .modes import kept_random_state
from .outputs import Batch, num_examples


class ProbeData:
    """Draws probe batches, collated as training batches are.

    Attributes:
        num_batches: Probe batches per measurement, at most.
        batch_size: Examples in each.
        target_error: What relative error a process may stop at: that of P together is smaller by sqrt(P). None: it
            takes all batches.
        fingerprint: Of the data set, if it has one.
        training_batch: Examples in a training batch of one process.
        accumulation_steps: Batches per optimizer step.

    Args:
        config: How many batches of what size.
        dataloader: The training set's.
        dataset: Examples to probe with; None: the training set's.
        collate_fn: Makes model inputs of examples; None: the data loader's own.
        batch_size: Examples in a training batch of one process; None: the data loader's.
        accumulation_steps: Batches per optimizer step.

    Raises:
        ValueError: If the data set is a stream or too small, its examples make no model inputs, or nothing tells the
            size of a batch.
    """

    def __init__(
        self,
        config: FLeRMConfig,
        dataloader: Any,
        dataset: Dataset[Any] | None = None,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        batch_size: int | None = None,
        accumulation_steps: int = 1,
    ) -> None:
        training: Any = getattr(dataloader, "dataset", None)
        examples: Any = training if dataset is None else dataset
        if isinstance(examples, HubDataset) and isinstance(training, HubDataset):
            common = [column for column in training.column_names if column in examples.column_names]
            examples = examples.select_columns(common) if common else examples
        if examples is None and not hasattr(dataloader, "dataset"):
            raise ValueError(
                f"{type(dataloader).__name__} is no loader with a data set to probe with: pass a torch "
                "DataLoader, or probe_dataset, collate_fn and batch_size."
            )
        if examples is None or isinstance(examples, IterableDataset) or not hasattr(examples, "__getitem__"):
            raise ValueError(
                "the training set is a stream that cannot be read twice: pass probe_dataset, a data set with a length "
                "(a few hundred examples will do)."
            )
        self.training_batch = training_batch = batch_size or _batch_size(dataloader)
        self.accumulation_steps = accumulation_steps
        draws = min(8, math.ceil(training_batch * accumulation_steps / 2))
        wanted = math.ceil(draws / config.probes_per_batch)
        least = config.probe_batch_size or training_batch
        if len(examples) < least:
            raise ValueError(
                f"the probe data set has {len(examples)} examples, a batch needs {least}. "
                "Pass a larger probe_dataset, or set probe_batch_size."
            )
        self.batch_size = config.probe_batch_size or min(wanted, training_batch)
        probes = config.max_probes if config.probes == "auto" else config.probes
        self.num_batches = int(probes or math.ceil(wanted / self.batch_size))
        self.target_error = (
            config.target_error * math.sqrt(PartialState().num_processes) if config.probes == "auto" else None
        )
        self.fingerprint = getattr(examples, "_fingerprint", None)
        self._seed = config.seed
        self._examples = examples
        self._collate = collate_fn or dataloader.collate_fn
        if collate_fn is None:
            self._check_inputs()
        if dataset is not None:
            self._check_own(config)

    def halve(self) -> bool:
        """Take half as many examples at a time, and twice as many batches.

        Returns:
            Whether there was anything to halve.
        """
        if self.batch_size == 1:
            return False
        self.batch_size //= 2
        self.num_batches *= 2
        return True

    def drawn(self, step: int, device: torch.device) -> tuple[Iterator[Batch], torch.Generator]:
        """Draw for the measurement of a step; every process of a training draws its own.

        Args:
            step: Optimizer step.
            device: Where omega is drawn.

        Returns:
            Model inputs, and what omega is drawn by.
        """
        process = PartialState().process_index
        stream = f"{self._seed} {step}" + (f" {process}" if process else "")
        random_numbers = random.Random(stream)
        generator = torch.Generator(device).manual_seed(random_numbers.getrandbits(63))
        return self._batches(random_numbers), generator

    def _check_inputs(self) -> None:
        with kept_random_state(torch.device("cpu")):
            batch = self._collate([self._examples[index] for index in range(self.batch_size)])
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"the data loader makes {type(batch).__name__} of examples, model inputs are a dict: pass collate_fn, "
                "which makes one of a list of examples, and FLeRMConfig(output=(model, batch) -> tensor) if the model "
                "does not take it as keywords."
            )

    def _check_own(self, config: FLeRMConfig) -> None:
        """Refuse examples of the user's own that no probe could take; of the training set's, training will tell."""
        columns = getattr(self._examples, "column_names", None)
        prepared = (
            f"The probe data set{f' has the columns {columns} and' if columns else ''} must be prepared (tokenized) as "
            "the training set is when training begins; without a probe_dataset, probes take that set's examples."
        )
        try:
            with kept_random_state(PartialState().device):
                batch = self._collate([self._examples[index] for index in range(self.batch_size)])
            num_examples(batch)
        except Exception as error:
            raise ValueError(f"no probe batch can be made: {error!r}. {prepared}") from error
        if config.positions == "labels" and not isinstance(batch.get("labels"), Tensor):
            raise ValueError(f"positions 'labels' needs labels; a probe batch has {sorted(batch)}. {prepared}")

    def _batches(self, random_numbers: random.Random) -> Iterator[Batch]:
        for _ in range(self.num_batches):
            chosen = random_numbers.sample(range(len(self._examples)), self.batch_size)
            yield self._collate([self._examples[index] for index in chosen])


def _batch_size(dataloader: Any) -> int:
    """Examples in a training batch of one process."""
    sampler = getattr(dataloader, "batch_sampler", None)
    size = getattr(sampler, "batch_size", None) or getattr(dataloader, "batch_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{type(dataloader).__name__} does not tell the size of its batches: pass batch_size.")
    return size // PartialState().num_processes if getattr(sampler, "split_batches", False) else size
