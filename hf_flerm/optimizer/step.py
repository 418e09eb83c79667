"""One optimizer step, seen from before it: the old weights, and the update per unit learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..engines.processes import agreement
from ..engines.sharding import gathered, in_parts, runs_on, shard, whole_shape

NO_DECAY: Mapping[str, float] = MappingProxyType({})


class UnitUpdates(Mapping[str, Tensor]):
    """Unit updates by canonical name, in the dtype and on the device of their parameters, fetched one at a time.

    Args:
        updates: Unit updates by any name.
        keys: `{canonical name: name in updates}`.
        parameters: `{canonical name: parameter}`.
    """

    def __init__(
        self, updates: Mapping[str, Tensor], keys: Mapping[str, str], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._updates = updates
        self._keys = keys
        self._parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        return self._updates[self._keys[name]].detach().to(runs_on(parameter), parameter.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Snapshot:
    """The weights from before an optimizer step, in one buffer that is swapped with those from after it.

    A step has two parts: decoupled weight decay, which takes `decay * before`, and the update, which is the rest. Only
    the update is measured, and only the update is scaled.

    Args:
        parameters: `{canonical name: parameter}`.
        device: Where the buffer lies; None: with the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], device: str | None = None) -> None:
        self._parameters = parameters
        self._device = device
        self._buffer = {
            name: self._part(parameter).to(device or parameter.device, copy=True)
            for name, parameter in parameters.items()
        }

    def moved(self) -> bool:
        """Tell whether any weight has changed since, of those that lie here."""
        return any(
            not torch.equal(self._buffer[name].to(parameter.device), self._part(parameter))
            for name, parameter in self._parameters.items()
        )

    @contextmanager
    def put_back(
        self, learning_rates: Mapping[str, float], decays: Mapping[str, float] = NO_DECAY
    ) -> Iterator[Mapping[str, Tensor]]:
        """Give the model its weights from before the step for a block, bit for bit, and then those from after it.

        Args:
            learning_rates: `{canonical name: learning rate that the step used}`.
            decays: `{canonical name: fraction of the weights that decayed in it}`; 0 for a tensor that is not there.

        Yields:
            The unit updates, each computed when it is looked up; 0 at a learning rate of 0.
        """
        try:
            self._swap()
            yield _Step(self._parameters, self._buffer, learning_rates, decays)
        finally:
            self._swap()

    def rescale(self, ratios: Mapping[str, float], decays: Mapping[str, float] = NO_DECAY) -> None:
        """Redo the step with other learning rates, for an optimizer that is linear in them; weights decay as before.

        Args:
            ratios: `{canonical name: new learning rate / old one}`.
            decays: `{canonical name: fraction of the weights that decayed in it}`; 0 for a tensor that is not there.
        """
        with torch.no_grad():
            for name, ratio in ratios.items():
                parameter = self._parameters[name]
                if ratio != 1.0:
                    start, end = (
                        decayed(self._buffer[name].to(parameter.device), decays.get(name, 0.0)),
                        self._part(parameter),
                    )
                    end.copy_(start + (end - start) * ratio)

    def _part(self, parameter: nn.Parameter) -> Tensor:
        """What lies here of what the optimizer steps for a tensor; writing into it changes that."""
        return shard(parameter)

    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            other = self._buffer[name]
            if self._device is None and not in_parts(parameter):
                parameter.data, self._buffer[name] = other, parameter.data
            else:
                own = shard(parameter)
                self._buffer[name] = own.to(self._device or own.device, copy=True)
                own.copy_(other)


class Stepping:
    """How the weights of a model are stepped: by an optimizer over the model's own tensors.

    Attributes:
        is_seen_by_hooks: Whether the update is all that happens between the pre- and post-hooks of `optimizer.step`.
        held: `{canonical name: what the optimizer holds of this tensor}`.
        agree: How processes decide together that take updates together.

    Args:
        model: What is trained.
        parameters: `{canonical name: parameter}` of all that is trained.
    """

    is_seen_by_hooks = True

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.held: Mapping[str, Tensor] = parameters
        self.agree = agreement(model)
        self._parameters = parameters

    def snapshot(self, device: str | None) -> Snapshot:
        """Keep the weights from before a step.

        Args:
            device: As for `Snapshot`.

        Returns:
            The snapshot.
        """
        return Snapshot(self._parameters, device)

    def stepped(self) -> dict[str, Tensor]:
        """Tell, after a step, what was stepped of what is held: not what had no gradient.

        Returns:
            `{canonical name: what the optimizer holds of this tensor}`.
        """
        return {name: tensor for name, tensor in self.held.items() if tensor.grad is not None}

    def in_groups(self) -> AbstractContextManager[None]:
        """Have what is held in the optimizer's param groups for a block.

        Returns:
            That block's context.
        """
        return nullcontext()

    def check_apart(self) -> None:
        """Refuse tensors that cannot have learning rates of their own.

        Raises:
            ValueError: If there are some, with what to use instead.
        """


class _Step(Mapping[str, Tensor]):
    """(after - before + decay * before) / learning rate."""

    def __init__(
        self,
        before: Mapping[str, nn.Parameter],
        after: Mapping[str, Tensor],
        learning_rates: Mapping[str, float],
        decays: Mapping[str, float],
    ) -> None:
        self._before = before
        self._after = after
        self._learning_rates = learning_rates
        self._decays = decays

    def __getitem__(self, name: str) -> Tensor:
        parameter, rate = self._before[name], self._learning_rates[name]
        before = shard(parameter)
        if not rate:
            return before.new_zeros(whole_shape(parameter))
        start = decayed(before, self._decays.get(name, 0.0))
        return gathered(torch.sub(self._after[name].to(before.device), start).div_(rate), parameter)

    def __iter__(self) -> Iterator[str]:
        return iter(self._before)

    def __len__(self) -> int:
        return len(self._before)


def decayed(before: Tensor, decay: float) -> Tensor:
    """The weights after decay alone, rounded as an optimizer rounds them that decays before it updates.

    Args:
        before: The weights before a step.
        decay: The fraction of them that decays in it.

    Returns:
        The rest.
    """
    return before * (1.0 - decay) if decay else before
