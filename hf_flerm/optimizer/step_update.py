"""What one optimizer step did to the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from .step import Snapshot


@dataclass(frozen=True)
class StepUpdate:
    """The update of one optimizer step, from the weights before it and the learning rates it used.

    Attributes:
        snapshot: The weights from before the step.
        learning_rates: `{canonical name: learning rate of the step}`, scales included.
        decays: `{canonical name: fraction of the weights that decoupled weight decay took}`.
        agree: Maps flags to flags that are the same on all processes that must run the model in step.
    """

    snapshot: Snapshot
    learning_rates: Mapping[str, float]
    decays: Mapping[str, float]
    agree: Callable[[Sequence[bool]], list[bool]]

    def moved(self) -> bool:
        """Return whether the step changed any weight: a gradient scaler or an optimizer may skip it."""
        (moved,) = self.agree([self.snapshot.moved()])
        return moved

    def unit_updates(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Context manager: put the weights from before the step back; yields updates per unit learning rate."""
        return self.snapshot.put_back(self.learning_rates, self.decays)

    def rescale(self, ratios: Mapping[str, float]) -> None:
        """Redo the step with `{canonical name: new learning rate / the one it used}`; weight decay stays as it was."""
        self.snapshot.rescale(ratios, self.decays)
