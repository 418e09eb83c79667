"""`StepWatch`: copies the weights before an optimizer step, and returns the update that the step made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..engines.attempt import Attempt
from ..engines.engine import Engine
from .behavior import decayed_fractions
from .param_groups import Group, described_groups, learning_rates, raw_optimizer
from .step import Snapshot
from .step_hooks import StepHooks, runs_step_hooks


@dataclass(frozen=True)
class StepUpdate:
    """The update that one optimizer step made.

    Attributes:
        attempt: The measurement of this update on this process.
        snapshot: The copy of the weights before the step; None if copying failed.
        nominal_rates: `{canonical name: learning rate in its param group}`.
        learning_rates: `{canonical name: learning rate of the step}`, scales included.
        decays: `{canonical name: fraction of the weights that decoupled weight decay removed}`.
    """

    attempt: Attempt
    snapshot: Snapshot | None
    nominal_rates: Mapping[str, float]
    learning_rates: Mapping[str, float]
    decays: Mapping[str, float]

    @property
    def nominal_rate(self) -> float:
        """The largest learning rate in the param groups."""
        return max(self.nominal_rates.values())

    def moved(self) -> bool:
        """Return whether the step changed any weight: a gradient scaler or an optimizer may skip it."""
        if self.snapshot is None:
            return False
        return self.attempt.any_process(bool(self.attempt.run(self.snapshot.moved)))

    def unit_updates(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Context manager: yield the unit updates; in the block the model has the weights from before the step."""
        return self._kept.put_back(self.learning_rates, self.decays)

    def rescale(self, ratios: Mapping[str, float]) -> None:
        """Redo the step with `{canonical name: new learning rate / old learning rate}`; weight decay is not scaled."""
        self._kept.rescale(ratios, self.decays)

    @property
    def _kept(self) -> Snapshot:
        if self.snapshot is None:
            raise RuntimeError("the weights from before the step were not kept") from self.attempt.failure
        return self.snapshot


class StepWatch:
    """Copies the weights before each step that will be measured, and calls a function after the step.

    An update is the change of the weights between the pre- and post-step hooks of the optimizer. Changes made around
    the step (merged adapters, pruning, averages) do not count. For DeepSpeed, and for optimizers that do not run step
    hooks, it is the change between `begin` and `end`.

    Attributes:
        optimizer: The optimizer, unwrapped.
        in_optimizer: `{canonical name: tensor in its param groups}` of all trained parameters.
        groups: What steps which tensors; see `described_groups`.

    Args:
        engine: The engine of the model.
        optimizer: The optimizer, bare or wrapped by Accelerate, or a list of several.
        parameters: `{canonical name: parameter}` of all trained parameters.
        device: Device of the copy; None: the device of the weights.

    Raises:
        ValueError: If the optimizer does not hold the parameters or has no learning rate for some, or another
            `StepWatch` uses it.
    """

    def __init__(
        self, engine: Engine, optimizer: Any, parameters: Mapping[str, nn.Parameter], device: str | None = None
    ) -> None:
        self.optimizer: Optimizer = raw_optimizer(optimizer)
        _check_unwatched(self.optimizer)
        self._weights = engine.master_weights(optimizer, parameters)
        self.in_optimizer = self._weights.in_optimizer
        with self._weights.in_param_groups():
            learning_rates(self.optimizer, self.in_optimizer)  # raises where a tensor has none
            self.groups: list[Group] = described_groups(self.optimizer, self.in_optimizer)
        self._device = device
        self._wants_update = False
        self._pending: tuple[Attempt, Snapshot | None] | None = None
        self._on_update: Callable[[], None] = lambda: None
        self._hooks: StepHooks | None = None

    def check_own_learning_rates(self) -> None:
        """Raise ValueError unless every tensor can have its own learning rate."""
        self._weights.check_own_learning_rates()

    def start(self, on_update: Callable[[], None]) -> None:
        """Watch from the next step on.

        Register hooks that change learning rates during a step before this call: hooks run in order of registration.

        Args:
            on_update: Called after a step for which `begin` was called with `wants_update`.
        """
        self._on_update = on_update
        if self._weights.hooks_enclose_update and runs_step_hooks(self.optimizer):
            self._hooks = StepHooks(self.optimizer, lambda _: self._keep_weights(), lambda _: self._call_back())

    def begin(self, wants_update: bool) -> None:
        """Announce an optimizer step.

        Args:
            wants_update: Whether to copy the weights, and to call `on_update` after the step.
        """
        self._pending = None  # an interrupted step may have left one
        self._wants_update = wants_update
        if self._hooks is None:
            self._keep_weights()

    def end(self) -> None:
        """Announce that the optimizer has stepped, or has skipped its step."""
        if self._hooks is None:
            self._call_back()
        self._wants_update = False

    def take_update(self, scales: Mapping[str, float]) -> StepUpdate:
        """Return the latest update; call it once, from `on_update`.

        Args:
            scales: `{canonical name: factor on the nominal learning rate}` that the step was made with.
        """
        if self._pending is None:
            raise RuntimeError("there is no update to return; call this only once, from on_update")
        (attempt, snapshot), self._pending = self._pending, None
        with self._weights.in_param_groups():
            nominal = learning_rates(self.optimizer, self.in_optimizer)
            decays = decayed_fractions(self.optimizer, self._weights.stepped())
        used = {name: nominal[name] * scale for name, scale in scales.items()}
        return StepUpdate(attempt, snapshot, nominal, used, decays)

    def close(self) -> None:
        """Remove the hooks and free the copied weights."""
        self._pending = None
        self._wants_update = False
        if self._hooks is not None:
            self._hooks.remove()

    def _keep_weights(self) -> None:
        if self._wants_update and self._pending is None:
            attempt = Attempt(self._weights.agree)
            self._pending = attempt, attempt.run(partial(Snapshot, self._weights, self._device))

    def _call_back(self) -> None:
        if self._pending is not None:
            self._wants_update = False
            self._on_update()
            self._pending = None


def _check_unwatched(optimizer: Optimizer) -> None:
    """Raise ValueError if FLeRM already has hooks in this optimizer: scales would be applied twice."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    if any(isinstance(getattr(hook, "__self__", None), StepHooks) for hook in hooks):
        raise ValueError(
            "two FLeRMCallbacks or FLeRMRuns use this optimizer: scales would be applied twice. Keep one: FLeRMTrainer "
            "and FLeRMMixin create their own from flerm=FLeRMConfig(...). In a custom loop, close() the FLeRMRun that "
            "has ended."
        )
