"""Slow, literal references, in float64, that share no code with the package."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

Batch = dict[str, Tensor]
OutputFunction = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Change:
    """First-order change of every output that counts.

    Attributes:
        values: D f, float64 [M].
        examples: Which example, counted over all batches, each output belongs to, [M].
        batches: Which batch, [M].
    """

    values: Tensor
    examples: Tensor
    batches: Tensor

    @property
    def rate(self) -> float:
        return self.values.square().mean().sqrt().item()

    def error(self, estimator: str, probes: int) -> float:
        """The standard error that `probes` probes on every batch must have.

        D phi_n is Gaussian with variance e_n = sum_k (D f[n, k])^2, so its square has variance 2 e_n^2. `per_example`
        adds these squares up; `full` squares the sum over the whole batch.
        """
        groups = {"per_example": self.examples, "full": self.batches}[estimator]
        energy = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add(0, groups, self.values.square())
        error_of_square = (2 * energy.square().sum() / probes).sqrt() / len(self.values)
        return (error_of_square / (2 * self.rate)).item() if self.rate else 0.0


def outputs(model: nn.Module, batch: Batch, output: OutputFunction | None) -> list[Tensor]:
    """The outputs of each example that count, one flat vector per example."""
    with torch.no_grad():
        if output is not None:
            return [row.flatten() for row in output(model, batch)]
        result = model(**batch)
    logits = getattr(result, "logits", result["logits"] if isinstance(result, dict) else result)
    mask = batch.get("attention_mask", torch.ones(logits.shape[:-1]))
    return [row[kept.bool()].flatten() for row, kept in zip(logits, mask, strict=True)]


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that computes in float64 throughout and has the derivatives of the original."""
    model = copy.deepcopy(model).eval().double()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):  # computes in float32 whatever its dtype
            module.forward = partial(_rms_norm, module)
        if isinstance(module, DoraLinearLayer):  # differentiates as if the weight's norm were a constant
            module.get_weight_norm = _Constant(module.get_weight_norm)
    return model


def finite_difference(
    model: nn.Module,
    updates: Mapping[str, Tensor],
    batches: Sequence[Batch],
    output: OutputFunction | None = None,
    step: float = 1e-4,
) -> Change:
    """Change of the outputs along all `updates` at once: a central difference of the model's own outputs."""
    model = float64_copy(model)
    parameters = dict(model.named_parameters())
    start = {name: parameters[name].detach().clone() for name in updates}
    batches = [{key: _double(value) for key, value in batch.items()} for batch in batches]

    def at(distance: float) -> list[list[Tensor]]:
        for name, update in updates.items():
            parameters[name].data.copy_(start[name] + distance * update.double())
        return [outputs(model, batch, output) for batch in batches]

    at(0.0)
    ahead, behind = at(step), at(-step)
    values, examples, indices, count = [], [], [], 0
    for index, (plus, minus) in enumerate(zip(ahead, behind, strict=True)):
        for f_plus, f_minus in zip(plus, minus, strict=True):
            values.append((f_plus - f_minus) / (2 * step))
            examples.append(torch.full((len(f_plus),), count))
            indices.append(torch.full((len(f_plus),), index))
            count += 1
    return Change(torch.cat(values), torch.cat(examples), torch.cat(indices))


def kronecker_loop(products: Sequence[Tensor], num_outputs: float) -> float:
    """The paper's rate from one Z per probe: plain loops, every factor averaged over the probes before they meet."""
    shape = products[0].shape or (1,)
    total = 0.0
    factors = [0.0] * len(shape)
    for z in products:
        entries = z.double().reshape(shape)
        for index in _indices(shape):
            total += float(entries[index]) ** 2 / len(products)
        for d in range(len(shape)):
            for rest in _indices(tuple(size for e, size in enumerate(shape) if e != d)):
                inner = sum(float(entries[(*rest[:d], i, *rest[d:])]) for i in range(shape[d]))
                factors[d] += inner**2 / len(products)
    squared = 1.0
    for factor in factors:
        squared *= factor
    return (squared / total ** (len(shape) - 1) / num_outputs) ** 0.5


def weight_gradient_products(
    model: nn.Module,
    name: str,
    update: Tensor,
    batches: Sequence[Batch],
    omegas: Sequence[Tensor],
    output: OutputFunction,
) -> list[Tensor]:
    """Z = U * d(sum omega f)/dW for one omega per batch."""
    products = []
    model = copy.deepcopy(model).eval()
    parameter = dict(model.named_parameters())[name].requires_grad_(True)
    for batch, omega in zip(batches, omegas, strict=True):
        (gradient,) = torch.autograd.grad((output(model, batch) * omega).sum(), parameter)
        products.append(update * gradient)
    return products


def _indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for size in shape:
        found = [(*index, i) for index in found for i in range(size)]
    return found


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _rms_norm(module: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * hidden * scale


class _Constant:
    """A function's first value, for ever."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._value: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._value is None:
            self._value = self._function(*args, **kwargs).detach()
        return self._value
