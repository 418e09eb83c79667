"""Signal and curvature along the update: whether a learning rate is too high or too low, from the training itself.

Along the update U of one step (learning rate included), the loss on fresh examples is, to second order in s,

    L(W + s U) - L(W)  =  -s m + s^2 h / 2        m = -g(W) . U,   h = (g(W + U) - g(W)) . U

with g the gradient on these examples: m is the signal of the step, h its curvature. Both are sums over tensors, so one
pair of gradients gives them for every tensor, too. The best s is m / h: at h / m = 1 a step of the same direction could
not be longer. Training wants a little more than the greedy step (the learning rate decays later): at the best learning
rates of 65 base and target runs of `examples/studies`, h / m was about `AT_BEST` (median 1.17, standard deviation 0.34
in log; one seed each), across models, adapters and optimizers. From scratch it is so above the best one, too; see
`fixed_point`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..model.isolation import kept_random_state
from ..model.names import tensor_kinds, trainable_parameters
from ..optimizer.param_groups import raw_optimizer

# h / m of the joint update at the best learning rate: median over the base and target runs of examples/studies.
AT_BEST = 1.2
# Before this step the sensitivity of a network changes too fast for the ratio to say something about later steps.
_FIRST_STEP = 16
_EVERY = 4  # steps between two measurements
_BATCHES = 4  # fresh batches in a measurement
# log(h / m / AT_BEST) at which a learning rate is clearly too low or too high, however much is measured.
CLEARLY_LOW, CLEARLY_HIGH = -math.log(30.0), math.log(6.0)
_FEW = 5  # measurements after which that ends a look


@dataclass(frozen=True)
class Look:
    """What a short training at one learning rate showed.

    Attributes:
        learning_rate: The peak learning rate of this training.
        steps: Training steps.
        signal: m of every measured step and fresh batch, float64 [T, B, K] for K kinds of tensors.
        curvature: h, float64 [T, B, K].
        kinds: Names of the kinds, K.
        losses: Losses on the same batches before the first step and before every measured one.
        warmup: Mean share of the warm-up that the measured steps had behind them; 1 without a warm-up.
    """

    learning_rate: float
    steps: int
    signal: Tensor
    curvature: Tensor
    kinds: tuple[str, ...]
    losses: tuple[float, ...]
    warmup: float = 1.0

    @property
    def has_diverged(self) -> bool:
        """Whether a loss is not finite, or the last four exceed the first one by more than a tenth of it."""
        if not all(map(math.isfinite, self.losses)):
            return True
        return mean(self.losses[-4:]) > self.losses[0] + abs(self.losses[0]) / 10

    @property
    def ratio(self) -> float:
        """H / m of the joint update over all measurements; inf if the loss does not fall along the update."""
        signal, curvature = self.signal.sum().item(), self.curvature.sum().item()
        return curvature / signal if signal > 0 else math.inf

    @property
    def excess(self) -> float:
        """log(h / m / AT_BEST), as it would be after the warm-up: above 0, the learning rate is too high.

        h / m of a step is proportional to its length. It is inf if the loss clearly rises along the updates or in the
        training, and -inf if no curvature is seen, or noise hides both: longer steps would show more.
        """
        signal = self.signal.sum(2).flatten()
        rises = len(signal) > 1 and signal.mean() < -2 * signal.std() / len(signal) ** 0.5
        if self.has_diverged or rises:
            return math.inf
        return math.log(self.ratio / AT_BEST / self.warmup) if 0 < self.ratio < math.inf else -math.inf

    @property
    def is_too_high(self) -> bool:
        """Whether nothing can be read from this look but that its learning rate is too high."""
        return self.excess == math.inf

    @property
    def error(self) -> float:
        """Standard error of log(h / m), by the scatter between batches; inf if it is not determined."""
        signal, curvature = (values.sum(2).flatten() for values in (self.signal, self.curvature))
        if len(signal) < 2 or signal.sum() <= 0 or curvature.sum() <= 0:
            return math.inf
        scatter = curvature / curvature.mean() - signal / signal.mean()
        return (scatter.square().sum() / (len(signal) * (len(signal) - 1))).sqrt().item()

    @property
    def by_kind(self) -> dict[str, float]:
        """`{kind: factor}`: how much longer or shorter than all others its steps should be.

        The slope of the loss along one kind's part of the update falls from m_k at W to m_k - h_k at W + U. It is 0 at
        s = m_k / h_k, for all tensors together at m / h. Kinds that have no such s are left out.
        """
        if not 0 < self.ratio < math.inf:
            return {}
        signal, curvature = self.signal.sum((0, 1)), self.curvature.sum((0, 1))
        usable = zip(self.kinds, signal.tolist(), curvature.tolist(), strict=True)
        return {kind: m / h * self.ratio for kind, m, h in usable if m > 0 and h > 0}


class CurvatureProbe(TrainerCallback):
    """Measures signal and curvature of a trainer's steps, and stops its training.

    Attributes:
        trainer: The trainer, of a copy of the model. It is set after the trainer was made.

    Args:
        steps: Steps after which training stops, if it is not shorter.
    """

    def __init__(self, steps: int) -> None:
        self.trainer: Any = None
        self._steps = steps  # fewer, once it is known that the training is shorter
        self._first = 0
        self._before: list[Tensor] | None = None
        self._batches: Iterator[Any] = iter(())
        self._reference: list[Any] = []  # batches on which the loss is followed
        self._epoch = 0
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._warmups: list[float] = []
        self._losses: list[float] = []

    def look(self, learning_rate: float, steps: int) -> Look:
        """Return what was seen in a training of so many steps."""
        kinds = tuple(dict.fromkeys(self._kinds))
        empty = torch.empty(0, _BATCHES, len(kinds), dtype=torch.float64)
        signal, curvature = (torch.stack([row[i] for row in self._rows]) if self._rows else empty for i in (0, 1))
        warmup = mean(self._warmups) if self._warmups else 1.0
        return Look(learning_rate, steps, signal, curvature, kinds, tuple(self._losses), warmup)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the trained tensors.

        Raises:
            ValueError: If the optimizer chooses its learning rate itself.
        """
        optimizer = raw_optimizer(self.trainer.optimizer)
        if optimizer.defaults.get("lr", 0.0) is None:
            raise ValueError(
                f"{type(optimizer).__name__} chooses its learning rate itself (lr is "
                "None), so there is none to find. Give it a learning rate (Adafactor: relative_step=False and lr=1e-3)."
            )
        self._steps = min(self._steps, state.max_steps)
        self._first = min(_FIRST_STEP, self._steps // 4)
        model = self.trainer.model
        parameters, kinds = trainable_parameters(model), tensor_kinds(model)
        self._parameters = list(parameters.values())
        self._kinds = [kinds[name] for name in parameters]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the weights before a step that is measured."""
        step = state.global_step
        if step == 0 or (step >= self._first and (step - self._first) % _EVERY == 0):
            self._before = [parameter.detach().clone() for parameter in self._parameters]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the step."""
        if self._before is None:
            return
        with kept_random_state(args.device):
            self._reference = self._reference or [self._next() for _ in range(_BATCHES)]
            loss, signal, curvature = self._measured(self._before)
        self._before = None
        self._losses.append(loss)
        share = self._warmup_share(args, state)
        if share > 0 and (state.global_step > 0 or self._first == 0):
            self._rows.append((signal, curvature))
            self._warmups.append(share)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the training after `steps`, or when its learning rate is clearly far off or its loss not finite."""
        clear = len(self._rows) >= _FEW and not CLEARLY_LOW < self.look(0.0, 0).excess < CLEARLY_HIGH
        if state.global_step >= self._steps or clear or not all(map(math.isfinite, self._losses)):
            control.should_training_stop = True

    def _warmup_share(self, args: TrainingArguments, state: TrainerState) -> float:
        """The share of the peak learning rate that the last step had because of a warm-up; 1 after it.

        It is read from the optimizer, because some schedules ("constant") have no warm-up whatever `warmup_steps` is.
        """
        group = self.trainer.optimizer.param_groups[0]
        peak = group.get("initial_lr")
        if not peak or state.global_step >= args.get_warmup_steps(state.max_steps):
            return 1.0
        return min(1.0, float(group["lr"] / peak))

    def _measured(self, before: Sequence[Tensor]) -> tuple[float, Tensor, Tensor]:
        """Return the loss before the last step, and the step's signal and curvature, float64 [B, K] each."""
        updates = [now.detach() - then for now, then in zip(self._parameters, before, strict=True)]
        after = [parameter.detach().clone() for parameter in self._parameters]
        batches = [self._next() for _ in range(_BATCHES)]
        model = self.trainer.model
        was_training = model.training
        model.eval()  # dropout would differ between the two weights
        try:
            ends = self._slopes(batches, updates)
            self._set(before)
            starts = self._slopes(batches, updates)
            with torch.no_grad():
                loss = mean(self._loss(batch).item() for batch in self._reference)
        finally:
            self._set(after)
            model.train(was_training)
        return loss, -starts, ends - starts

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def _loss(self, batch: Any) -> Tensor:
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.trainer.model, self.trainer._prepare_inputs(dict(batch)))
        return loss  # type: ignore[no-any-return]

    def _slopes(self, batches: Sequence[Any], updates: Sequence[Tensor]) -> Tensor:
        """Return g . U by batch and kind at the present weights, float64 [B, K]."""
        kinds = list(dict.fromkeys(self._kinds))
        columns = torch.tensor([kinds.index(kind) for kind in self._kinds])
        slopes = torch.zeros(len(batches), len(kinds), dtype=torch.float64)
        for row, batch in zip(slopes, batches, strict=True):
            with torch.enable_grad():
                gradients = torch.autograd.grad(self._loss(batch), self._parameters, allow_unused=True)
            products = [
                update.new_zeros((), dtype=torch.float32)
                if gradient is None
                else torch.sum(gradient.float() * update.float())
                for gradient, update in zip(gradients, updates, strict=True)
            ]
            row.index_add_(0, columns, torch.stack(products).double().cpu())  # one transfer for all tensors
        return slopes

    def _next(self) -> Any:
        """Return a batch of the training set, in another order than that of training."""
        batch = next(self._batches, None)
        if batch is None:
            loader = self.trainer.get_train_dataloader()
            self._epoch += 1
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(self._epoch)
            self._batches = iter(loader)
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError(
                    "the training set yields nothing when it is read a second time. Give a data set that can be read "
                    "again, such as datasets.IterableDataset.from_generator."
                )
        return batch
