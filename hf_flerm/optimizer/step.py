"""A copy of the weights before an optimizer step, and the unit update of the step.

A step has two parts: decoupled weight decay, which removes `decay * W_before`, and the update, which is the rest. Only
the update is measured and scaled; U is the unit update:

    W_after = (1 - decay) * W_before + learning rate * U
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..engines.engine import Engine, MasterWeights

NO_DECAY: Mapping[str, float] = MappingProxyType({})


class UnitUpdates(Mapping[str, Tensor]):
    """Mapping from canonical name to unit update, in the dtype and on the device of the parameter.

    A lookup fetches one update, so that they need not all be in memory at once.

    Args:
        updates: Unit updates by any name.
        keys: `{canonical name: name in updates}`.
        parameters: `{canonical name: parameter}`.
        engine: The engine of the model, which knows the devices of the parameters.
    """

    def __init__(
        self,
        updates: Mapping[str, Tensor],
        keys: Mapping[str, str],
        parameters: Mapping[str, nn.Parameter],
        engine: Engine,
    ) -> None:
        self._updates = updates
        self._keys = keys
        self._parameters = parameters
        self._engine = engine

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        return self._updates[self._keys[name]].detach().to(self._engine.device(parameter), parameter.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Snapshot:
    """W_before of an optimizer step: a copy, made before the step, of the weights that this process steps.

    The weights before and after the step are exchanged and never computed from each other, so that no bit changes.

    Args:
        weights: The weights that the optimizer steps.
        device: Device of the copy; None: the device of the weights.
    """

    def __init__(self, weights: MasterWeights, device: str | None = None) -> None:
        self._weights = weights
        self._kept: dict[str, Tensor] = {}
        for name in weights.parameters:
            part = weights.local(name)
            self._kept[name] = part.to(device or part.device, copy=True)

    def moved(self) -> bool:
        """Return whether any weight that this process steps has changed since."""
        for name, kept in self._kept.items():
            part = self._weights.local(name)
            if not torch.equal(kept.to(part.device), part):
                return True
        return False

    @contextmanager
    def put_back(
        self, learning_rates: Mapping[str, float], decays: Mapping[str, float] = NO_DECAY
    ) -> Iterator[Mapping[str, Tensor]]:
        """Context manager: the model has W_before inside the block, and W_after again when the block ends.

        Args:
            learning_rates: `{canonical name: learning rate that the step used}`.
            decays: `{canonical name: fraction of the weights that decayed in the step}`; 0 for a missing name.

        Yields:
            `{canonical name: unit update}`, each computed when it is looked up; 0 if the learning rate is 0.

        Raises:
            RuntimeError: If another process could not exchange its weights.
        """
        exchanged: list[str] = []
        try:
            failure = self._exchange_all(exchanged)
            # If one process failed, no other may start to probe: it would wait for this one in a collective call.
            (failed,) = self._weights.agree([failure is not None])
            if failed:
                raise failure or RuntimeError("another process could not put the weights from before the step back.")
            updates: Mapping[str, Tensor] = _LazyUnitUpdates(self._weights, self._kept, learning_rates, decays)
            yield dict(updates) if self._weights.gather_is_collective else updates
        finally:
            with self._weights.writing():
                for name in exchanged:
                    self._exchange(name)

    def rescale(self, ratios: Mapping[str, float], decays: Mapping[str, float] = NO_DECAY) -> None:
        """Redo the step with other learning rates; weight decay is not scaled.

        The update of the optimizer must be linear in the learning rate.

        Args:
            ratios: `{canonical name: new learning rate / old learning rate}`.
            decays: `{canonical name: fraction of the weights that decayed in the step}`; 0 for a missing name.
        """
        with torch.no_grad(), self._weights.writing():
            for name, ratio in ratios.items():
                if ratio != 1.0:
                    end = self._weights.local(name)
                    start = decayed(self._kept[name].to(end.device), decays.get(name, 0.0))
                    end.copy_(start + (end - start) * ratio)

    def _exchange_all(self, exchanged: list[str]) -> Exception | None:
        """Exchange all weights, adding the names to `exchanged`; return the exception if it failed."""
        with self._weights.writing():
            try:
                for name in self._kept:
                    self._exchange(name)
                    exchanged.append(name)
            except Exception as error:  # out of memory: an exchange by copy needs room for a tensor
                return error
        return None

    def _exchange(self, name: str) -> None:
        self._kept[name] = self._weights.exchange(name, self._kept[name])


class _LazyUnitUpdates(Mapping[str, Tensor]):
    """U = (W_after - (1 - decay) * W_before) / learning rate, while the model has W_before.

    Args:
        weights: The weights that the optimizer steps; now W_before.
        after: `{canonical name: W_after}`, the part on this process.
        learning_rates: `{canonical name: learning rate}`.
        decays: `{canonical name: decayed fraction}`; 0 for a missing name.
    """

    def __init__(
        self,
        weights: MasterWeights,
        after: Mapping[str, Tensor],
        learning_rates: Mapping[str, float],
        decays: Mapping[str, float],
    ) -> None:
        self._weights = weights
        self._after = after
        self._learning_rates = learning_rates
        self._decays = decays

    def __getitem__(self, name: str) -> Tensor:
        before, rate = self._weights.local(name), self._learning_rates[name]
        if not rate:
            return before.new_zeros(self._weights.shape(name))
        start = decayed(before, self._decays.get(name, 0.0))
        part = torch.sub(self._after[name].to(before.device), start).div_(rate)
        return self._weights.gather(name, part)

    def __iter__(self) -> Iterator[str]:
        return iter(self._after)

    def __len__(self) -> int:
        return len(self._after)


def decayed(before: Tensor, decay: float) -> Tensor:
    """Return the weights after decay only, rounded as by an optimizer that applies decay before the update.

    Args:
        before: The weights before a step.
        decay: The fraction of them that decays in the step.
    """
    return before * (1.0 - decay) if decay else before
