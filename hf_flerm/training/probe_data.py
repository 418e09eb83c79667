"""Draws the examples for probes, from the training set or from a data set of the user."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import find_device, honor_type
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset as HubDataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers.utils import logging

from ..config import FLeRMConfig
from ..model.isolation import kept_random_state, own_generators
from ..rates.model_call import Batch, ModelCallError
from ..rates.outputs import num_examples

logger = logging.get_logger(__name__)
Collate = Callable[[list[Any]], Batch]


@dataclass(frozen=True)
class Staged:
    """A collate function in two stages.

    Attributes:
        first: Makes a batch from a list of examples. It is fast, so it is tested before training.
        rest: Makes model inputs from that batch.
    """

    first: Collate
    rest: Callable[[Batch], Batch]

    def __call__(self, examples: list[Any]) -> Batch:
        """Make model inputs from examples."""
        return self.rest(self.first(examples))


@dataclass(frozen=True)
class OnCopies:
    """A collate function that gets copies of examples: it may change them or remove entries.

    Attributes:
        collate: The collate function.
    """

    collate: Collate

    def __call__(self, examples: list[Any]) -> Batch:
        """Make model inputs from copies of examples."""
        return self.collate([copied(example) for example in examples])


class ProbeData:
    """Draws probe batches, collated like training batches.

    Training is not affected: examples are copied before they are collated, and random numbers come from the probe's own
    generators. Examples that cannot be collated together are probed one at a time.

    Attributes:
        num_batches: Largest number of probe batches in a measurement.
        batch_size: Examples in a probe batch.
        target_error: Relative standard error at which this process stops. It is sqrt(P) times the option, because the
            error of P processes together is smaller by sqrt(P). None: use all batches.
        fingerprint: Fingerprint of the data set, if it has one.
        test_batch: A batch to test the model on; None if it needs the second stage of a `Staged` function.
        training_batch_size: Examples in a training batch of one process.
        accumulation_steps: Batches per optimizer step.

    Args:
        config: The options of the run.
        dataloader: The training data loader.
        dataset: Examples to probe with; None: examples of the training set.
        collate_fn: Makes model inputs from examples; None: the collate function of the data loader.
        batch_size: Examples in a training batch of one process; None: the data loader's.
        accumulation_steps: Batches per optimizer step.

    Raises:
        ValueError: If the data set is a stream or too small, no batch can be collated from it, or the batch size is not
            known.
    """

    def __init__(
        self,
        config: FLeRMConfig,
        dataloader: Any,
        dataset: Dataset[Any] | None = None,
        collate_fn: Collate | None = None,
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
                f"{type(dataloader).__name__} has no data set to probe with: pass a torch DataLoader, or "
                "probe_dataset, collate_fn and batch_size."
            )
        if examples is None or isinstance(examples, IterableDataset) or not hasattr(examples, "__getitem__"):
            raise ValueError(
                "the training set is a stream and cannot be read twice: pass probe_dataset, a map-style data set (a "
                "few hundred examples suffice)."
            )
        research = config.research
        self.training_batch_size = training_batch_size = batch_size or _batch_size(dataloader)
        self.accumulation_steps = accumulation_steps
        draws = min(8, math.ceil(training_batch_size * accumulation_steps / 2))
        wanted = math.ceil(draws / research.probes_per_batch)
        self.batch_size = research.probe_batch_size or min(wanted, training_batch_size)
        if len(examples) < self.batch_size:
            raise ValueError(
                f"the probe data set has {len(examples)} examples, and a probe batch needs {self.batch_size}. "
                "Pass a larger probe_dataset, or set probe_batch_size."
            )
        probes = research.max_probes if research.probes == "auto" else research.probes
        self.num_batches = int(probes or math.ceil(wanted / self.batch_size))
        self.target_error = (
            research.target_error * math.sqrt(PartialState().num_processes) if research.probes == "auto" else None
        )
        self.fingerprint = getattr(examples, "_fingerprint", None)
        self._seed = config.seed
        self._warned = False
        self._examples = examples
        self._collate = collate_fn or dataloader.collate_fn
        self._drawing = (examples, self._collate, getattr(dataloader, "collate_fn", None))
        batch = self._first_batch(getattr(training, "column_names", None))
        staged = isinstance(collate_fn, Staged)
        self.test_batch = None if staged else batch
        own_labels = dataset is None or staged or isinstance(batch.get("labels"), Tensor)
        if config.positions == "labels" and not own_labels:
            raise ValueError(f"positions 'labels' needs labels; a probe batch has {sorted(batch)}.")

    def check(self, run: Callable[[Batch], None]) -> None:
        """Test the model on a batch; if only single examples work, use batches of one from now on.

        Args:
            run: Runs the model on a batch.

        Raises:
            ModelCallError: If the model cannot be run on a single example either.
        """
        if self.test_batch is None:
            return
        try:
            run(self.test_batch)
        except ModelCallError as error:
            if num_examples(self.test_batch) == 1:
                raise
            single = self.single()
            try:
                run(single)
            except ModelCallError:
                raise error from error.__cause__
            self._warn_of_single_examples(error.__cause__ or error)
            self.num_batches *= self.batch_size
            self.batch_size, self.test_batch = 1, single

    def single(self) -> Batch:
        """Return a batch of the first example alone."""
        with kept_random_state(PartialState().device), own_generators(*self._drawing):
            (batch,) = self._collated(self._collate, [0])
        return batch

    def drawn(self, step: int, device: torch.device) -> tuple[Iterator[Batch], torch.Generator]:
        """Draw the batches for the measurement of a step; each process draws different ones.

        Args:
            step: Optimizer step.
            device: Device of the generator for omega.

        Returns:
            An iterator over the batches, and the generator for omega.
        """
        process = PartialState().process_index
        stream = f"{self._seed} {step}" + (f" {process}" if process else "")
        random_numbers = random.Random(stream)
        generator = torch.Generator(device).manual_seed(random_numbers.getrandbits(63))
        return self._batches(random_numbers), generator

    def halve(self) -> bool:
        """From now on, draw twice as many batches of half the size.

        Returns:
            False if batches are single examples already, so that nothing changes.
        """
        if self.batch_size == 1:
            return False
        self.batch_size //= 2
        self.num_batches *= 2
        return True

    def _first_batch(self, columns: list[str] | None) -> Batch:
        """Collate the first examples (by the first stage of a `Staged` function), and check the batch."""
        collate = self._collate.first if isinstance(self._collate, Staged) else self._collate
        try:
            with kept_random_state(PartialState().device), own_generators(*self._drawing):
                batch = self._collated(collate, range(self.batch_size))[0]
        except Exception as error:
            raise ValueError(self._no_batch(columns, repr(error))) from error
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"the data loader returns {type(batch).__name__}, but model inputs must be a dict: pass a collate_fn "
                "that makes one from a list of examples, and FLeRMConfig(output=(model, batch) -> tensor) if the model "
                "does not take keyword arguments."
            )
        if find_device(batch) is None:
            raise ValueError(self._no_batch(columns, f"no tensor is in {dict(batch)!r:.100}"))
        return batch

    def _no_batch(self, columns: list[str] | None, reason: str) -> str:
        """The message for a data set from which no batch can be collated."""
        known = ""
        if columns and isinstance(self._examples, HubDataset):
            known = f" It has the columns {self._examples.column_names}, the training set has {columns}."
        return (
            f"no batch can be collated from the probe data set: {reason}.{known} Prepare it like the training set. "
            "(TRL's trainers prepare their eval_dataset in the same way: pass probe_dataset=trainer.eval_dataset.) If "
            "the training set itself cannot be collated, pass a probe_dataset that can, or a collate_fn to FLeRMRun."
        )

    def _batches(self, random_numbers: random.Random) -> Iterator[Batch]:
        """Draw examples without replacement for each batch; training's random generators do not advance."""
        for _ in range(self.num_batches):
            chosen = random_numbers.sample(range(len(self._examples)), self.batch_size)
            with own_generators(*self._drawing):
                batches = self._collated(self._collate, chosen)
            # Processes that run the model together need the same number of batches.
            yield from batches if PartialState().num_processes == 1 else batches[:1]

    def _collated(self, collate: Collate, indices: Sequence[int]) -> list[Batch]:
        """Collate examples into one batch, or into batches of one if they cannot be collated together."""
        try:
            return [collate(self._read(indices))]
        except Exception as error:
            if len(indices) == 1 or should_reduce_batch_size(error):
                raise
            try:
                batches = [collate(self._read([index])) for index in indices]
            except Exception:  # the error of the whole batch says more
                raise error from None
            self._warn_of_single_examples(error)
            return batches

    def _warn_of_single_examples(self, error: BaseException) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                f"the examples of a probe batch cannot be batched together and are probed one at a time: {error!r}"
            )

    def _read(self, indices: Iterable[int]) -> list[Any]:
        # Each is copied as soon as it is read: a data set may return the same object every time.
        return [copied(self._examples[index]) for index in indices]


def copied(value: Any) -> Any:
    """Copy the containers, arrays and tensors of an example, and plain objects that hold some.

    Everything else is returned unchanged: files, images, and objects that they belong to, such as the data set.
    """
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, MutableMapping):
        entries = copy.copy(value)
        for key in value:
            entries[key] = copied(value[key])
        return entries
    if isinstance(value, (list, tuple)):
        return honor_type(value, (copied(entry) for entry in value))
    if isinstance(value, (set, bytearray)):
        return copy.copy(value)
    if (is_dataclass(value) and not isinstance(value, type)) or _is_plain_object(value):
        plain = copy.copy(value)
        vars(plain).update({name: copied(entry) for name, entry in vars(plain).items()})
        return plain
    return value


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an object with attributes, but without its own methods to be copied, called or indexed."""
    kind = type(value)
    special = {name for base in kind.__mro__ if base is not object for name in vars(base)}
    others = {"__reduce__", "__reduce_ex__", "__getstate__", "__copy__", "__call__", "__getitem__", "__iter__"}
    return hasattr(value, "__dict__") and not callable(value) and not special & others


def _batch_size(dataloader: Any) -> int:
    """Examples in a training batch of one process."""
    sampler = getattr(dataloader, "batch_sampler", None)
    size = getattr(sampler, "batch_size", None) or getattr(dataloader, "batch_size", None)
    if not isinstance(size, int):
        raise ValueError(f"{type(dataloader).__name__} has no batch size: pass batch_size.")
    return size // PartialState().num_processes if getattr(sampler, "split_batches", False) else size
