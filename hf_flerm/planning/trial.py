"""Trials: short trainings of copies, which change nothing of what they copy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..model.isolation import kept_random_state, own_generators
from ..training.callback import FLeRMCallback
from ..training.probe_data import OnCopies
from .checks import check_training
from .copied_trainer import copied_model, copied_trainer, quiet_arguments, set_learning_rate

OptimizerFactory = Callable[[nn.Module], Optimizer]


@dataclass(frozen=True)
class Trial:
    """A training to try on copies.

    Attributes:
        model: The model, as it will be trained.
        args: Its training arguments.
        train_dataset: Its training set.
        data_collator: Its collate function.
        optimizer: Creates its optimizer, if `args.optim` does not name it.
        trainer: The trainer that will train it; it brings all of the above.
        callbacks: Further callbacks for the training of a copy.
    """

    model: nn.Module
    args: TrainingArguments
    train_dataset: Dataset[Any] | None
    data_collator: Any = None
    optimizer: OptimizerFactory | None = None
    trainer: Trainer | None = None
    callbacks: Sequence[TrainerCallback] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module | Trainer,
        args: TrainingArguments | None,
        train_dataset: Dataset[Any] | None,
        **given: Any,
    ) -> Trial:
        """Return the trial of a trainer, or of a model with its arguments and training set.

        Raises:
            TypeError: If a trainer is given and something that it brings, too; or a model without args.
            ValueError: If the training set holds texts that nothing tokenizes, or several processes run.
        """
        if isinstance(model, Trainer):
            brought = {"args": args, "train_dataset": train_dataset, **given}
            if doubled := [name for name, value in brought.items() if value is not None]:
                raise TypeError(f"plan(trainer) takes {', '.join(doubled)} from the trainer: do not give them, too.")
            trained: Any = model.model
            found = cls(trained, model.args, model.train_dataset, model.data_collator, trainer=model)
        elif not isinstance(model, nn.Module) or args is None:
            raise TypeError("plan needs a trainer, or a model (torch.nn.Module) and its TrainingArguments.")
        else:
            found = cls(model, args, train_dataset, **given)
        check_training(found.train_dataset, found.data_collator)
        return found

    @property
    def own_callback(self) -> FLeRMCallback | None:
        """The trainer's own `FLeRMCallback`."""
        callbacks = self.trainer.callback_handler.callbacks if self.trainer is not None else ()
        return next((callback for callback in callbacks if isinstance(callback, FLeRMCallback)), None)

    def run(self, learning_rate: float, observer: TrainerCallback, *others: TrainerCallback) -> Trainer:
        """Train a copy. All random number generators, the disk and the originals are left as they were.

        Args:
            learning_rate: The learning rate of the copy.
            observer: Observes the training, in place of the trainer's own `FLeRMCallback`, and stops it. If it has an
                attribute `trainer`, that becomes the copied trainer.
            *others: Further observers, called after it.

        Returns:
            The copied trainer, after its training.
        """
        drawing = own_generators(self.trainer, self.train_dataset, self.data_collator, *_data_of(observer))
        with kept_random_state(self.args.device), drawing, tempfile.TemporaryDirectory() as scratch:
            quiet = quiet_arguments(self.args, scratch, learning_rate)
            if self.trainer is not None:
                copied = copied_trainer(self.trainer, quiet, observer)
            else:
                copied = self._new_trainer(quiet, observer)
            for callback in (*others, *self.callbacks):
                copied.add_callback(callback)
            if hasattr(observer, "trainer"):
                observer.trainer = copied
            set_seed(self.args.seed)
            copied.train()
        return copied

    def with_callbacks(self, callbacks: Sequence[TrainerCallback]) -> Trial:
        """Return the same trial with further callbacks."""
        return replace(self, callbacks=callbacks)

    def _new_trainer(self, args: TrainingArguments, observer: TrainerCallback) -> Trainer:
        model = copied_model(self.model)
        made = self.optimizer(model) if self.optimizer else None
        if made is not None:
            set_learning_rate(made, args.learning_rate)
        collate: Any = self.data_collator and OnCopies(self.data_collator)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=self.train_dataset,
            data_collator=collate,
            optimizers=(made, None),
            callbacks=[observer],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def _data_of(observer: TrainerCallback) -> list[object]:
    """The data set that an observer draws from by itself."""
    return [observer.probe_dataset] if isinstance(observer, FLeRMCallback) else []
