"""The optimizers of the studies, by name. None of them decays weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import workload
from torch import Tensor
from torch.optim import SGD, AdamW, Muon, Optimizer

Groups = Iterable[dict[str, Any]]


class Lion(Optimizer):
    """The sign of a momentum (Chen et al., 2023, arXiv:2302.06675).

    Args:
        params: Tensors or groups of tensors.
        lr: Learning rate: what every number of the weights moves by.
        betas: Share of the momentum in an update, and what a step keeps of the momentum.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            mixed, kept = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.add_(torch.lerp(parameter.grad, momentum, mixed).sign_(), alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - kept)
        return loss


class MuonWithAdamW(Optimizer):
    """Muon for the matrices between hidden layers, AdamW for embeddings, the head and vectors.

    Args:
        params: Groups of tensors.
        lr: Learning rate of both.
        vocabulary: Size of the vocabulary: a matrix with a dimension of this size is an embedding or the head.
    """

    def __init__(self, params: Groups, lr: float, vocabulary: int) -> None:
        groups = [dict(group) for group in params]
        super().__init__(groups, {"lr": lr})
        parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        for group in groups:
            for tensor in group["params"]:
                is_hidden = tensor.ndim == 2 and vocabulary not in tensor.shape
                parts[0 if is_hidden else 1].append({**group, "params": [tensor]})
        self.parts = [Muon(parts[0], lr=lr, weight_decay=0.0), AdamW(parts[1], lr=lr, weight_decay=0.0)]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        for part in self.parts:
            part.step()


MUON_WITH_ADAMW = "muon with adamw"

# Muon takes matrices only: adapters have nothing else.
OPTIMIZERS: dict[str, Callable[[Groups, float], Optimizer]] = {
    "adamw": lambda groups, lr: AdamW(groups, lr=lr, weight_decay=0.0),
    "sgd": lambda groups, lr: SGD(groups, lr=lr, momentum=0.9),
    "lion": lambda groups, lr: Lion(groups, lr=lr),
    "muon": lambda groups, lr: Muon(groups, lr=lr, weight_decay=0.0),
    MUON_WITH_ADAMW: lambda groups, lr: MuonWithAdamW(groups, lr, workload.VOCABULARY),
}
