"""Metrics: how the size of an output change is measured.

A metric is a positive semidefinite matrix F per position. Probes draw omega with covariance F, and
sum |project(D f)|^2 = D f^T F D f. The Fisher metric depends on the distribution that the logits parametrize:

    categorical   F = diag(p) - p p^T,     p = softmax(f),                        r = sqrt(p)
    bernoulli     F = diag(p (1 - p)),     p = sigmoid(f), entries independent,   r = sqrt(p (1 - p))
    normal        F = identity,            f the mean, unit variance

The roots r [..., K] are computed once for all draws on one output: these are the largest tensors of a probe.

To add a metric, add an entry to `METRICS` and its name to `choices.Metric`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """How the size of an output change is measured.

    Attributes:
        counts_entries: Whether M counts every entry of the last dimension (True) or every position (False).
        roots: f -> r, in float32 or better. None if F is the identity, for every f.
        draw: (r, N(0, 1) noise shaped like f, which is overwritten) -> omega.
        project: (r, D f) -> a tensor whose sum of squares is the squared size of D f.
    """

    counts_entries: bool
    roots: Callable[[Tensor], Tensor] | None = None
    draw: Callable[[Tensor, Tensor], Tensor] = lambda roots, noise: noise
    project: Callable[[Tensor, Tensor], Tensor] = lambda roots, change: change


def _categorical_roots(values: Tensor) -> Tensor:
    return values.detach().softmax(-1, dtype=torch.promote_types(values.dtype, torch.float32)).sqrt_()


def _categorical_draw(roots: Tensor, noise: Tensor) -> Tensor:
    omega = noise.mul_(roots)
    return omega.addcmul_(roots, roots * omega.sum(-1, keepdim=True), value=-1)  # sqrt(p) z - p sum(sqrt(p) z)


def _categorical_project(roots: Tensor, change: Tensor) -> Tensor:
    return roots * (change - (roots.square() * change).sum(-1, keepdim=True))


def _bernoulli_roots(values: Tensor) -> Tensor:
    probabilities = values.detach().to(torch.promote_types(values.dtype, torch.float32)).sigmoid()
    return (probabilities * (1 - probabilities)).sqrt_()


_CATEGORICAL = Metric(False, _categorical_roots, _categorical_draw, _categorical_project)

METRICS = {"euclidean": Metric(counts_entries=True), "fisher": _CATEGORICAL}

# The Fisher metric for each distribution of the logits.
FISHER = {
    "categorical": _CATEGORICAL,
    "bernoulli": Metric(False, _bernoulli_roots, torch.mul, torch.mul),
    "normal": Metric(counts_entries=False),
}
