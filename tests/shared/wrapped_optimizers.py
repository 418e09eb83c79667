"""Optimizers that hand their step on to others, or do not read their param groups, as users write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

Groups = list[dict[str, Any]]


class Pair(Optimizer):
    """Optimizers behind one face that shares their groups."""

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([p for each in self.optimizers for group in each.param_groups for p in group["params"]], {})
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in self.optimizers:
            each.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for each, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            each.load_state_dict(state)
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]


class SingleDeviceMuonWithAuxAdam(Optimizer):
    """One class for both, as Keller Jordan's: Muon in groups with `use_muon`, AdamW in the others, no defaults."""

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if group["use_muon"]:
                    momentum = state.setdefault("momentum_buffer", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 0.05)
                    left, _, right = torch.linalg.svd(momentum.double(), full_matrices=False)
                    p.sub_(group["lr"] * (left @ right).to(p.dtype))
                else:
                    mean = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                    square = state.setdefault("exp_avg_sq", torch.zeros_like(p)).lerp_(p.grad**2, 0.05)
                    p.sub_(group["lr"] * mean / (square.sqrt() + 1e-10))


class PairByProperty(Optimizer):
    """The same in a dict, with groups that are put together whenever they are read, and without hooks of its own."""

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.by_kind = {str(index): each for index, each in enumerate(optimizers)}
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> Groups:  # type: ignore[override]
        return [group for each in self.by_kind.values() for group in each.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in self.by_kind.values():
            each.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for each in self.by_kind.values():
            each.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {kind: each.state_dict() for kind, each in self.by_kind.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for kind, each in self.by_kind.items():
            each.load_state_dict(state_dict[kind])


class Sam(Optimizer):
    """Takes the gradient at weights that are a little off, and steps from the weights that they were."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base = base
        self.param_groups = base.param_groups

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        tensors = [p for group in self.param_groups for p in group["params"]]
        offsets = [1e-2 * torch.sign(p.grad) for p in tensors]
        with torch.no_grad():
            torch._foreach_add_(tensors, offsets)
        closure()
        with torch.no_grad():
            torch._foreach_sub_(tensors, offsets)
        self.base.step()


class Larc(Optimizer):
    """Multiplies gradients by a trust ratio, and keeps weight decay from the optimizer that it wraps."""

    def __init__(self, wrapped: Optimizer) -> None:
        super().__init__(wrapped.param_groups, {})
        self.optim = wrapped
        self.param_groups = wrapped.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        decays = [group["weight_decay"] for group in self.optim.param_groups]
        for group in self.optim.param_groups:
            for p in group["params"]:
                p.grad.mul_(p.norm() / (p.grad.norm() + 1e-6))
            group["weight_decay"] = 0.0
        self.optim.step()
        for group, decay in zip(self.optim.param_groups, decays, strict=True):
            group["weight_decay"] = decay


class Hybrid(Optimizer):
    """Steps matrices by their sign itself, and hands the rest on to AdamW; its groups hold everything."""

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, {"lr": 0.0})
        vectors = [group for group in self.param_groups if group["params"][0].ndim < 2]
        self.adamw = AdamW(vectors, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1:
                    p.sub_(group["lr"] * p.grad.sign())
        self.adamw.step()


class Hidden(Optimizer):
    """Has the optimizer that it hands its step on to in a function, where nobody finds it."""

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, {"lr": 0.0})
        inner = SGD(self.param_groups, lr=0.0, momentum=0.9)
        self.run = lambda: inner.step()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.run()


class Flat(Optimizer):
    """Walks over a list of tensors and groups that it made in the beginning."""

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.flat = [(p, group) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p, group in self.flat:
            p.sub_(group["lr"] * p.grad)


class Afterwards(SGD):
    """Moves the weights once more after the step of its base class."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(0.5 * group["lr"] * p.grad.sign())


class Lookahead(Optimizer):
    """Every second step goes half of the way back to where the weights were two steps before."""

    def __init__(self, fast: Optimizer) -> None:
        super().__init__(fast.param_groups, {})
        self.fast = fast
        self.param_groups = fast.param_groups
        self.steps = 0
        self.slow: list[Tensor] = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.fast.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for slow, p in zip(self.slow, (p for g in self.param_groups for p in g["params"]), strict=True):
                slow.add_(0.5 * (p - slow))
                p.copy_(slow)


def by_dimension(groups: Groups) -> tuple[Groups, Groups]:
    """Groups of matrices and groups of everything else."""
    matrices = [group for group in groups if group["params"][0].ndim > 1]
    return matrices, [group for group in groups if group["params"][0].ndim < 2]


def muon_and_adamw(face: Callable[[Iterable[Optimizer]], Optimizer], groups: Groups) -> Optimizer:
    matrices, vectors = by_dimension(groups)
    return face([torch.optim.Muon(matrices, weight_decay=0.0), AdamW(vectors, weight_decay=0.0)])


# Of groups that hold either matrices or vectors, with a learning rate each.
READ: dict[str, Callable[[Groups], Optimizer]] = {
    "Muon and AdamW": lambda groups: muon_and_adamw(Pair, groups),
    "Muon and AdamW by property": lambda groups: muon_and_adamw(PairByProperty, groups),
    "pair of pairs": lambda groups: Pair([muon_and_adamw(Pair, groups)]),
    "SAM": lambda groups: Sam(SGD(groups, momentum=0.9)),
    "LARC": lambda groups: Larc(SGD(groups, momentum=0.9)),
    "hybrid": Hybrid,
    "base class first": lambda groups: Afterwards(groups, momentum=0.9),
}
NOT_READ: dict[str, Callable[[Groups], Optimizer]] = {"hidden": Hidden, "flat": Flat}
