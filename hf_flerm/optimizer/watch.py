"""`StepWatch`: sees an optimizer step from just before to just after it, and says what it did to the weights."""

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
from .param_groups import learning_rates, raw_optimizer
from .step import Snapshot
from .step_hooks import FollowedSteps, runs_step_hooks


@dataclass(frozen=True)
class StepUpdate:
    """The update that one optimizer step made.

    Attributes:
        attempt: The measurement of this update, as far as this process gets with it.
        snapshot: The weights from before the step; None if `attempt` failed to keep them.
        nominal_rate: The largest learning rate in the param groups.
        learning_rates: `{canonical name: learning rate of the step}`, scales included.
        decays: `{canonical name: fraction of the weights that decoupled weight decay took}`.
    """

    attempt: Attempt
    snapshot: Snapshot | None
    nominal_rate: float
    learning_rates: Mapping[str, float]
    decays: Mapping[str, float]

    def moved(self) -> bool:
        """Return whether the step changed any weight: a gradient scaler or an optimizer may skip it."""
        if self.snapshot is None:
            return False
        return self.attempt.any_process(bool(self.attempt.run(self.snapshot.moved)))

    def unit_updates(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Context manager: put the weights from before the step back; yields updates per unit learning rate."""
        return self._kept.put_back(self.learning_rates, self.decays)

    def rescale(self, ratios: Mapping[str, float]) -> None:
        """Redo the step with `{canonical name: new learning rate / the one it used}`; weight decay stays as it was."""
        self._kept.rescale(ratios, self.decays)

    @property
    def _kept(self) -> Snapshot:
        if self.snapshot is None:
            raise RuntimeError("the weights from before the step were not kept") from self.attempt.failure
        return self.snapshot


class StepWatch:
    """Keeps the weights from before the steps that are to be measured, and calls back when the optimizer has stepped.

    An update is what happens between the step hooks of the optimizer, so that what others do to the weights before and
    after `optimizer.step` (merged adapters, pruning, averages) is not taken for it. Where hooks do not tell (DeepSpeed,
    optimizers that do not run them), it is what happens between `begin` and `end`.

    Attributes:
        optimizer: The optimizer, not wrapped.
        in_optimizer: `{canonical name: tensor in its param groups}` of all that is trained.

    Args:
        engine: The engine of the model.
        optimizer: The optimizer, bare or wrapped by Accelerate.
        parameters: `{canonical name: parameter}` of all that is trained.
        device: Where the weights from before a step are kept; None: beside the weights.

    Raises:
        ValueError: If the optimizer cannot be followed, or is followed by another watch.
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
        self._device = device
        self._wants_update = False
        self._pending: tuple[Attempt, Snapshot | None] | None = None
        self._on_update: Callable[[], None] = lambda: None
        self._followed: FollowedSteps | None = None

    def check_own_learning_rates(self) -> None:
        """Raise ValueError unless every tensor can be stepped at a learning rate of its own."""
        self._weights.check_own_learning_rates()

    def start(self, on_update: Callable[[], None]) -> None:
        """Watch from the next step on.

        To be called after hooks that change learning rates for the time of a step are in place: hooks run in order.

        Args:
            on_update: Called when the optimizer has made an update that `begin` asked for.
        """
        self._on_update = on_update
        if self._weights.is_seen_by_hooks and runs_step_hooks(self.optimizer):
            self._followed = FollowedSteps(self.optimizer, lambda _: self._keep_weights(), lambda _: self._call_back())

    def begin(self, wants_update: bool) -> None:
        """Announce an optimizer step.

        Args:
            wants_update: Whether its update is wanted.
        """
        self._pending = None  # a step that was cut short may have left one
        self._wants_update = wants_update
        if self._followed is None:
            self._keep_weights()

    def end(self) -> None:
        """Announce that the optimizer has stepped, or has skipped its step."""
        if self._followed is None:
            self._call_back()
        self._wants_update = False

    def update(self, scales: Mapping[str, float]) -> StepUpdate:
        """Return the update that was just made; to be called once, from `on_update`.

        Args:
            scales: `{canonical name: factor on the nominal learning rate}` that the step was made with.
        """
        if self._pending is None:
            raise RuntimeError("there is no update: call this from on_update")
        (attempt, snapshot), self._pending = self._pending, None
        with self._weights.in_param_groups():
            nominal = learning_rates(self.optimizer, self.in_optimizer)
            decays = decayed_fractions(self.optimizer, self._weights.stepped())
        used = {name: nominal[name] * scale for name, scale in scales.items()}
        return StepUpdate(attempt, snapshot, max(nominal.values()), used, decays)

    def close(self) -> None:
        """Release the optimizer and the weights that are kept."""
        self._pending = None
        self._wants_update = False
        if self._followed is not None:
            self._followed.remove()

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
    """Raise ValueError if another watch follows this optimizer: scales would be applied twice."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    followed = (getattr(hook, "__self__", None) for hook in hooks)
    if any(isinstance(each, FollowedSteps) for each in followed):
        raise ValueError(
            "this training has two FLeRMCallbacks: scales would be applied twice. Leave one: FLeRMTrainer and "
            "FLeRMMixin bring their own, made of flerm=FLeRMConfig(...). In a loop of your own, close() the FLeRMRun "
            "that has ended."
        )
