"""Metrics: how the size of an output change is measured.

A metric is a positive semidefinite matrix F per position. Probes draw omega with covariance F, and
sum |project(D f)|^2 = D f^T F D f. The Fisher metric depends on the distribution that the logits parametrize:

    categorical   F = diag(p) - p p^T,     p = softmax(f)
    bernoulli     F = diag(p (1 - p)),     p = sigmoid(f), entries independent
    normal        F = identity,            f the mean, unit variance

To add a metric, add an entry to `METRICS` and its name to `choices.Metric`. A model's last linear layer is skipped
(`per_example/linear_head.py`) for 'euclidean' only.
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
        draw: (f, N(0, 1) noise shaped like f) -> omega.
        project: (f, D f) -> a tensor whose sum of squares is the squared size of D f.
        counts_entries: Whether M counts every entry of the last dimension (True) or every position (False).
    """

    draw: Callable[[Tensor, Tensor], Tensor]
    project: Callable[[Tensor, Tensor], Tensor]
    counts_entries: bool


def _categorical_draw(values: Tensor, noise: Tensor) -> Tensor:
    probabilities = _precise(values).softmax(-1)
    omega = probabilities.sqrt() * noise
    return (omega - probabilities * omega.sum(-1, keepdim=True)).to(values.dtype)


def _categorical_project(values: Tensor, change: Tensor) -> Tensor:
    probabilities = _precise(values).softmax(-1)
    return probabilities.sqrt() * (change - (probabilities * change).sum(-1, keepdim=True))


def _bernoulli_project(values: Tensor, change: Tensor) -> Tensor:
    probabilities = _precise(values).sigmoid()
    return (probabilities * (1 - probabilities)).sqrt() * change


def _precise(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


METRICS = {
    "euclidean": Metric(lambda values, noise: noise, lambda values, change: change, counts_entries=True),
    "fisher": Metric(_categorical_draw, _categorical_project, counts_entries=False),
}

# The Fisher metric for each distribution of the logits.
FISHER = {
    "categorical": METRICS["fisher"],
    "bernoulli": Metric(
        lambda values, noise: _bernoulli_project(values, noise).to(values.dtype),
        _bernoulli_project,
        counts_entries=False,
    ),
    "normal": Metric(lambda values, noise: noise, lambda values, change: change, counts_entries=False),
}
