"""The definitions, computed slowly and literally. Read this first.

The tests compare every fast estimator with these functions (`tests/rates/test_reference.py`).

Symbols: f[n, k] is output k of example n, k running over all outputs of an example that count (positions x
vocabulary); M is the number of all (n, k). W is a parameter tensor, U its unit update (weight per unit learning rate),
D f = d f / d W . U the first-order change of f along U.

    rate = sqrt(1/M * sum_nk (D f[n, k])^2)                                                     (euclidean metric)

With omega[n, k] ~ N(0, 1) and phi_n = sum_k omega[n, k] f[n, k], D phi_n is N(0, sum_k (D f[n, k])^2): the square of
one number per example is an unbiased sample of the sum over all outputs. Source: Milsom, Anson, Aitchison,
"Function-Space Learning Rates" (arXiv 2502.17405); one phi_n per example is new in this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def output_change(f: Callable[[], Tensor], weights: Tensors, updates: Tensors, step: float = 1e-4) -> Tensor:
    """D f along all `updates` together, shaped like f(), by a central difference."""
    before = {name: weights[name].detach().clone() for name in updates}

    def at(distance: float) -> Tensor:
        for name, update in updates.items():
            weights[name].add_(distance * update)  # in place, so that tensors that share this memory change too
        values = f()
        for name, value in before.items():
            weights[name].copy_(value)
        return values

    with torch.no_grad():
        return (at(step) - at(-step)) / (2 * step)


def rate(change: Tensor, counts: Tensor) -> float:
    """Root mean square of D f over the outputs that count. `counts`: 1 or 0, broadcast over D f."""
    return ((change.square() * counts).sum() / counts.expand_as(change).sum()).sqrt().item()


def fisher_rate(change: Tensor, counts: Tensor, logits: Tensor) -> float:
    """Rate in the Fisher metric of p = softmax(f): rate^2 * step^2 / 2 is KL(before, after), in nats per position."""
    p = logits.softmax(-1)
    variance = (p * change.square()).sum(-1, keepdim=True) - (p * change).sum(-1, keepdim=True).square()
    return ((variance * counts).sum() / counts.expand_as(variance).sum()).sqrt().item()


def joint_rate(changes: Tensors, counts: Tensor) -> float:
    """Rate of several tensors that change together: D f is linear in the update, so their output changes add up."""
    return rate(torch.stack(list(changes.values())).sum(0), counts)


def per_example_derivatives(f: Callable[[], Tensor], weights: Tensors, updates: Tensors, omega: Tensor) -> Tensors:
    """One probe by its definition: `{name: D phi_n = <U, d phi_n / d W>}`, [N] each, one backward pass per example."""
    phi = (omega * f()).reshape(len(omega), -1).sum(1)
    derivatives = {name: torch.zeros_like(phi) for name in updates}
    for n in range(len(phi)):
        for name, update in updates.items():
            (gradient,) = torch.autograd.grad(phi[n], weights[name], retain_graph=True, allow_unused=True)
            if gradient is not None:
                derivatives[name][n] = (update.conj() * gradient).real.sum()  # conj: W may be complex
    return derivatives


def per_example_rate(derivatives: Tensors, num_outputs: float) -> float:
    """Joint rate of these tensors from one probe: sqrt(sum_n (sum_l D_l phi_n)^2 / M). For one tensor, its rate."""
    return (torch.stack(list(derivatives.values())).sum(0).square().sum() / num_outputs).sqrt().item()


def kronecker_rate(products: list[Tensor], num_outputs: float) -> float:
    """The paper's estimate from one Z = U * G per probe, G = d (sum_n phi_n) / d W; each factor is a mean over probes.

    M * rate^2 = prod_d E[sum (sum_d Z)^2] / E[sum Z^2]^(D - 1), d running over the D dimensions of Z.
    """
    z = torch.stack([product.double().reshape(product.shape or (1,)) for product in products])  # [probes, *shape]
    total = z.square().sum() / len(z)
    factors = [z.sum(d).square().sum() / len(z) for d in range(1, z.ndim)]
    return (torch.stack(factors).prod() / total ** (len(factors) - 1) / num_outputs).sqrt().item()
