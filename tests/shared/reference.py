"""The package's slow reference (`hf_flerm.rates.reference`) in float64, and the standard errors it implies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_flerm.rates.reference import output_change

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


def joint_error(by_example: Change, by_gradient: Change, probes: int) -> float:
    """The standard error of the joint rate of two groups of tensors, `probes` probes on every batch.

    With d[n] and z[n] the two groups' D phi_n, its square is estimated by sum d[n]^2 + 2 (sum d) (sum z) + (sum z)^2,
    a quadratic form v'Av in Gaussians of covariance C, whose variance is 2 tr(ACAC).
    """
    both = torch.stack([by_example.values, by_gradient.values])
    variance = 0.0
    for batch in by_example.batches.unique():
        chosen = by_example.batches == batch
        index = by_example.examples[chosen].unique(return_inverse=True)[1]
        count = int(index.max()) + 1
        energies = torch.zeros(2, 2, count, dtype=torch.float64)
        energies.index_add_(2, index, both[:, None, chosen] * both[None, :, chosen])
        covariance = torch.diag_embed(energies).transpose(1, 2).reshape(2 * count, 2 * count)
        form = torch.ones(2 * count, 2 * count, dtype=torch.float64)
        form[:count, :count] = torch.eye(count)
        product = form @ covariance
        variance += 2 * (product @ product).trace().item() / probes
    rate = both.sum(0).square().mean().sqrt().item()
    return variance**0.5 / both.shape[1] / (2 * rate)


def outputs(model: nn.Module, batch: Batch, output: OutputFunction | None) -> list[Tensor]:
    """The outputs of each example that count, one flat vector per example."""
    with torch.no_grad():
        if output is not None:
            return [row.flatten() for row in output(model, batch)]
        result = model(**batch)
    logits = getattr(result, "logits", result["logits"] if isinstance(result, dict) else result)
    kept = counted(batch, logits)
    return [row[mask].flatten() for row, mask in zip(logits, kept, strict=True)]


def counted(batch: Batch, logits: Tensor) -> Tensor:
    """Which positions of the logits count: none that is padding, and all that prompt tuning puts in front."""
    if "labels" in batch:
        return batch["labels"] != -100
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    if mask is None or logits.ndim != 3:
        return torch.ones(logits.shape[:-1], dtype=torch.bool)
    virtual = torch.ones(len(mask), logits.shape[1] - mask.shape[1], dtype=torch.bool)
    return torch.cat([virtual, mask.bool()], 1)


def float64_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that computes in float64 throughout and has the derivatives of the original."""
    model = copy.deepcopy(model).eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__module__.startswith("bitsandbytes"):
                setattr(module, name, _dequantized(child))
    model = model.double()
    for parameter in model.parameters():
        parameter.data = _double(parameter.data)  # `double` leaves complex numbers as they are
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None):
            module.config._experts_implementation = "eager"  # a grouped product has no float64
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
    return _finite_differences(model, [updates], batches, output, step)[0]


def finite_differences(
    model: nn.Module,
    updates: Mapping[str, Tensor],
    batches: Sequence[Batch],
    output: OutputFunction | None = None,
    step: float = 1e-4,
) -> dict[str, Change]:
    """Change of the outputs along each of `updates` alone."""
    alone = [{name: update} for name, update in updates.items()]
    return dict(zip(updates, _finite_differences(model, alone, batches, output, step), strict=True))


def _finite_differences(
    model: nn.Module,
    directions: Sequence[Mapping[str, Tensor]],
    batches: Sequence[Batch],
    output: OutputFunction | None,
    step: float,
) -> list[Change]:
    model = float64_copy(model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    batches = [{key: _double(value) for key, value in batch.items()} for batch in batches]

    def at_once() -> list[list[Tensor]]:
        return [outputs(model, batch, output) for batch in batches]

    with _Float64():
        rows = at_once()
        sizes = [len(row) for of_batch in rows for row in of_batch]
        examples = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        indices = torch.tensor([index for index, of_batch in enumerate(rows) for row in of_batch for _ in row])

        def flat() -> Tensor:
            return torch.cat([row for of_batch in at_once() for row in of_batch])

        wide = [{name: _double(update) for name, update in updates.items()} for updates in directions]
        return [Change(output_change(flat, weights, updates, step), examples, indices) for updates in wide]


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


def _double(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float64)) if _is_numeric(value) else value


def _is_numeric(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _dequantized(layer: Any) -> nn.Linear:
    """A linear layer with the weight that a quantized one shows to the columns of the identity."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
    with torch.no_grad():
        plain.weight.copy_(layer(torch.eye(layer.in_features)).T)
    return plain


class _Float64(TorchFunctionMode):
    """Float64 wherever code asks for float32 whatever its model's dtype, as norms, routers and softmaxes do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


class _Constant:
    """A function's first value, for ever."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._value: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._value is None:
            self._value = self._function(*args, **kwargs).detach()
        return self._value
