"""One optimizer step, seen from before it: W_before, and the unit update U = (W_after - W_before) / learning rate.

A step has two parts: decoupled weight decay, which takes `decay * W_before`, and the update, which is the rest. Only
the update is measured, and only the update is scaled:

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
    """Unit updates by canonical name, in the dtype and on the device of their parameters.

    Each is fetched when it is looked up, so that no two need to be in memory.

    Args:
        updates: Unit updates by any name.
        keys: `{canonical name: name in updates}`.
        parameters: `{canonical name: parameter}`.
        engine: Tells on which device a parameter is used.
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
    """W_before of an optimizer step: a copy of all that the optimizer steps on this process.

    Weights before and after the step are exchanged, never computed from each other, so that no bit changes.

    Args:
        weights: The weights that the optimizer steps.
        device: Where the copy lies; None: with the weights.
    """

    def __init__(self, weights: MasterWeights, device: str | None = None) -> None:
        self._weights = weights
        self._kept: dict[str, Tensor] = {}
        for name in weights.parameters:
            part = weights.local(name)
            self._kept[name] = part.to(device or part.device, copy=True)

    def moved(self) -> bool:
        """Tell whether any weight that this process steps has changed since."""
        for name, kept in self._kept.items():
            part = self._weights.local(name)
            if not torch.equal(kept.to(part.device), part):
                return True
        return False

    @contextmanager
    def put_back(
        self, learning_rates: Mapping[str, float], decays: Mapping[str, float] = NO_DECAY
    ) -> Iterator[Mapping[str, Tensor]]:
        """Give the model W_before for a block, and W_after at its end.

        Args:
            learning_rates: `{canonical name: learning rate that the step used}`.
            decays: `{canonical name: fraction of the weights that decayed in it}`; 0 for a tensor that is not there.

        Yields:
            The unit updates, each computed when it is looked up; 0 at a learning rate of 0.

        Raises:
            RuntimeError: If another process could not exchange its weights.
        """
        exchanged: list[str] = []
        try:
            failure = self._exchange_all(exchanged)
            # The others must not begin to probe: they would wait for this process in their next collective call.
            (failed,) = self._weights.agree([failure is not None])
            if failed:
                raise failure or RuntimeError("another process could not put the weights from before the step back.")
            updates: Mapping[str, Tensor] = _Updates(self._weights, self._kept, learning_rates, decays)
            yield dict(updates) if self._weights.gather_is_collective else updates
        finally:
            with self._weights.writing():
                for name in exchanged:
                    self._exchange(name)

    def rescale(self, ratios: Mapping[str, float], decays: Mapping[str, float] = NO_DECAY) -> None:
        """Redo the step with other learning rates, for an optimizer that is linear in them; weights decay as before.

        Args:
            ratios: `{canonical name: new learning rate / old one}`.
            decays: `{canonical name: fraction of the weights that decayed in it}`; 0 for a tensor that is not there.
        """
        with torch.no_grad(), self._weights.writing():
            for name, ratio in ratios.items():
                if ratio != 1.0:
                    end = self._weights.local(name)
                    start = decayed(self._kept[name].to(end.device), decays.get(name, 0.0))
                    end.copy_(start + (end - start) * ratio)

    def _exchange_all(self, exchanged: list[str]) -> Exception | None:
        """Exchange all weights, noting which were; return what stopped it."""
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


class _Updates(Mapping[str, Tensor]):
    """U = (W_after - (1 - decay) * W_before) / learning rate, while the model has W_before.

    Args:
        weights: The weights that the optimizer steps, from before the step.
        after: What they were after it, on this process.
        learning_rates: As for `Snapshot.put_back`.
        decays: As for `Snapshot.put_back`.
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
    """Return the weights after decay alone, rounded as an optimizer rounds them that decays before it updates.

    Args:
        before: The weights before a step.
        decay: The fraction of them that decays in it.
    """
    return before * (1.0 - decay) if decay else before
