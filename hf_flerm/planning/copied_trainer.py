"""A copy of a trainer with a copy of its model: it trains as the original would, and changes nothing of the original.

`copy.deepcopy` of a whole trainer is not possible (files, locks, connections) and not wanted (data sets). So the model
is copied, and then whatever refers to the model: optimizer, losses, callbacks, patched `forward` methods. All copies
share one `memo`, the table `{id of an original: its copy}` of `copy.deepcopy`, so that they refer to each other.
"""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from datasets import Dataset as HubDataset
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    DefaultFlowCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from ..config import FLeRMConfig
from ..optimizer.param_groups import raw_optimizer
from ..training.callback import FLeRMCallback
from ..training.probe_data import OnCopies

logger = logging.get_logger(__name__)
Memo = dict[int, Any]

_STEP_EVENTS = (
    "on_epoch_begin",
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
)
_SHARED = ("train_dataset", "eval_dataset", "data_collator", "processing_class")


def quiet_arguments(args: TrainingArguments, folder: str, learning_rate: float) -> TrainingArguments:
    """Return the arguments of a run with another learning rate that writes into `folder` only and reports nothing."""
    own = copy.copy(args)
    own.learning_rate = learning_rate
    for name, value in (
        ("output_dir", folder),
        ("save_strategy", "no"),
        ("eval_strategy", "no"),
        ("eval_on_start", False),
        ("logging_strategy", "no"),
        ("report_to", []),
        ("push_to_hub", False),
        ("load_best_model_at_end", False),
        ("disable_tqdm", True),
        ("resume_from_checkpoint", None),
    ):
        setattr(own, name, value)
    return own


def copied_trainer(trainer: Trainer, args: TrainingArguments, observer: TrainerCallback) -> Trainer:
    """Return a copy of a trainer that trains a copy of its model.

    Class, data, loss and optimizer are those of the trainer. Its callbacks are copied if they act on training steps;
    Transformers' own ones report, save or stop, and are left out.

    Args:
        trainer: The trainer. It is not changed.
        args: The arguments of the copy; see `quiet_arguments`. An optimizer that the trainer was given gets their
            learning rate.
        observer: Observes the copy, in place of the trainer's own `FLeRMCallback`.
    """
    original: Any = trainer
    twin: Any = object.__new__(type(trainer))
    memo: Memo = {id(getattr(original, name)): getattr(original, name) for name in _SHARED}
    model = copied_model(original.model, memo)
    memo |= {id(original): twin, id(original.model_wrapped): model}
    # `FLeRMMixin` closes the callback that it has; one that nothing calls does nothing.
    flerm = observer if isinstance(observer, FLeRMCallback) else FLeRMCallback(FLeRMConfig())
    memo |= {id(one): flerm for one in original.callback_handler.callbacks if isinstance(one, FLeRMCallback)}
    vars(twin).update({name: _of_the_copy(value, memo) for name, value in vars(original).items()})
    twin.args, twin.model_init = args, None
    twin.state, twin.control = TrainerState(), TrainerControl()
    twin.create_accelerator_and_postprocess()
    memo[id(original.accelerator)] = twin.accelerator
    _copy_optimizer(original, twin, memo)
    if not isinstance(original.train_dataset, HubDataset):  # its rows are the same objects whenever they are read
        twin.data_collator = OnCopies(original.data_collator)
    callbacks = [DefaultFlowCallback(), observer, *_copied_callbacks(original, memo)]
    twin.callback_handler = CallbackHandler(
        callbacks, model, original.processing_class, twin.optimizer, twin.lr_scheduler
    )
    return twin  # type: ignore[no-any-return]


def copied_model(model: nn.Module, memo: Memo | None = None) -> nn.Module:
    """Return a copy of a model.

    `copy.deepcopy` does not copy functions. TRL, Accelerate and PEFT replace `forward` methods, or add hooks, by
    functions that refer to the model: those of the copy must refer to the copy.
    """
    memo = {} if memo is None else memo
    replica = copy.deepcopy(model, memo)
    for module in replica.modules():
        for holder in (vars(module), *(value for value in vars(module).values() if isinstance(value, dict))):
            for name, value in list(holder.items()):
                if inspect.isfunction(value) or inspect.ismethod(value):
                    holder[name] = _rebound(value, memo)
    return replica


def nominal_learning_rate(optimizer: Optimizer) -> float | None:
    """Return the default learning rate of an optimizer if a param group has it, else the largest; None if it has none.

    It is that before any schedule.
    """
    own = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if None in own or not max(own):  # Adafactor may choose its own
        return None
    default = optimizer.defaults.get("lr")
    return float(max(own) if default is None or default not in own else default)


def set_learning_rate(optimizer: Optimizer, learning_rate: float, scheduler: Any = None) -> None:
    """Give an optimizer this learning rate; param groups with learning rates of their own keep their ratios to it.

    Args:
        optimizer: The optimizer.
        learning_rate: The new learning rate.
        scheduler: A scheduler that has noted the optimizer's learning rates.
    """
    own = nominal_learning_rate(optimizer)
    if own is None or own == learning_rate:
        return
    factor = learning_rate / own
    for group in optimizer.param_groups:
        group |= {key: group[key] * factor for key in ("lr", "initial_lr") if key in group}
    if scheduler is not None and hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]


def _copy_optimizer(original: Any, twin: Any, memo: Memo) -> None:
    """Copy the optimizer and the scheduler that the original was given; the copy creates others when it trains."""
    twin.optimizer = twin.lr_scheduler = None
    if original.optimizer is not None:
        optimizer = raw_optimizer(original.optimizer)
        twin.optimizer = copy.deepcopy(optimizer, memo)
        # `Optimizer.__getstate__` leaves out the attributes of subclasses. `step` is one if a scheduler has patched it.
        missing = vars(optimizer).keys() - vars(twin.optimizer).keys() - {"step"}
        vars(twin.optimizer).update({name: copy.deepcopy(vars(optimizer)[name], memo) for name in missing})
        if original.lr_scheduler is not None and not original._created_lr_scheduler:
            twin.lr_scheduler = copy.deepcopy(original.lr_scheduler, memo)
            if getattr(twin.lr_scheduler, "_step_count", None) == 1:
                twin.lr_scheduler._step_count = 2  # at 1, it warns that it has not patched this optimizer
        set_learning_rate(twin.optimizer, twin.args.learning_rate, twin.lr_scheduler)
    if original.optimizer_cls_and_kwargs is not None:
        kind, options = original.optimizer_cls_and_kwargs
        rate = {"lr": twin.args.learning_rate} if "lr" in options else {}
        twin.optimizer_cls_and_kwargs = kind, copy.deepcopy(options, memo) | rate


def _copied_callbacks(trainer: Any, memo: Memo) -> Iterator[TrainerCallback]:
    for callback in trainer.callback_handler.callbacks:
        kind = type(callback)
        acts = any(getattr(kind, event) is not getattr(TrainerCallback, event) for event in _STEP_EVENTS)
        if isinstance(callback, FLeRMCallback) or not acts or kind.__module__.partition(".")[0] == "transformers":
            continue
        try:
            yield copy.deepcopy(callback, memo)
        except Exception as error:
            logger.warning(f"{kind.__name__} cannot be copied ({error!r}): the copy is trained without this callback.")


def _of_the_copy(value: Any, memo: Memo) -> Any:
    """Return what takes the place of an attribute of the trainer.

    Containers and tensors are copied, because training may write into them (TRL collects metrics in dicts of lists).
    Modules are copied if they hold parameters of the model (losses do), and else shared (reference models).
    """
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Module):
        return copy.deepcopy(value, memo) if any(id(p) in memo for p in value.parameters()) else value
    if inspect.isfunction(value) or inspect.ismethod(value):
        return _rebound(value, memo)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        entries = copy.copy(value)  # which may be a defaultdict
        entries.update({key: _of_the_copy(entry, memo) for key, entry in value.items()})
        return entries
    if isinstance(value, (list, deque)):
        rows = copy.copy(value)
        for index, entry in enumerate(value):
            rows[index] = _of_the_copy(entry, memo)
        return rows
    if type(value) is tuple:
        return tuple(_of_the_copy(entry, memo) for entry in value)
    return copy.copy(value) if isinstance(value, set) else value


def _rebound(value: Any, memo: Memo) -> Any:
    """Return a function or method that refers to copies where the given one refers to their originals."""
    if id(value) in memo:
        return memo[id(value)]
    if inspect.ismethod(value):
        return MethodType(_rebound(value.__func__, memo), memo.get(id(value.__self__), value.__self__))
    if not inspect.isfunction(value) or not value.__closure__:
        return value
    memo[id(value)] = value  # a function may refer to itself
    cells = []
    for cell in value.__closure__:
        content = _content(cell)
        own = memo[id(content)] if id(content) in memo else _rebound(content, memo)
        cells.append(cell if own is content else CellType(own))
    if any(new is not old for new, old in zip(cells, value.__closure__, strict=True)):
        bound = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
        bound.__kwdefaults__ = value.__kwdefaults__
        vars(bound).update(vars(value))
        memo[id(value)] = bound
    return memo[id(value)]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None
