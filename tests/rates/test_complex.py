"""Complex parameters and complex activations: rates of real outputs, by every estimator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_flerm import measure_rates
from hf_flerm.choices import Estimator, values
from hf_flerm.rates.reference import (
    kronecker_rate,
    output_change,
    per_example_derivatives,
    per_example_rate,
    rate,
)
from tests.shared.cases import WIDTH, seeded

EVERYTHING = torch.ones(())


class Spectral(nn.Module):
    """Complex weights on frequencies, held by a module whose output is real."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(WIDTH, 6, 3, dtype=torch.complex128))
        self.head = nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("bti,iot->bto", torch.fft.rfft(x, dim=1), self.spectrum)
        return self.head(torch.fft.irfft(mixed, n=4, dim=1).tanh())


class ComplexLayers(nn.Module):
    """Complex layers that hand complex activations on: narrower and wider than their inputs, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(WIDTH, 3, dtype=torch.complex128)
        self.up = nn.Linear(3, 7, dtype=torch.complex128)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x.to(torch.complex128)).tanh()).abs().tanh()


class Rotation(nn.Module):
    """A complex gain of no dimensions in a module of its own, and a complex bias over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.ParameterList([nn.Parameter(torch.tensor(0.3 - 0.8j, dtype=torch.complex128))])
        self.shift = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gain[0] * x.abs() + self.shift).tanh().real


MODELS: dict[str, Callable[[], nn.Module]] = {"spectral": Spectral, "layers": ComplexLayers, "rotation": Rotation}


def build(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name]()
    updates = {
        key: torch.randn(p.shape, generator=seeded(i), dtype=p.dtype)
        for i, (key, p) in enumerate(model.named_parameters())
    }
    return model, {"x": torch.randn(3, 4, WIDTH, generator=seeded(9), dtype=torch.float64)}, updates


@pytest.mark.parametrize("name", MODELS)
def test_exact_rates_are_those_of_finite_differences(name: str) -> None:
    model, batch, updates = build(name)
    weights = {key: parameter.detach() for key, parameter in model.named_parameters()}
    result = measure_rates(model, updates, [batch], estimator="exact")
    for key, update in updates.items():
        change = output_change(lambda: model(**batch), weights, {key: update}, step=1e-5)
        assert result.rates[key] == pytest.approx(rate(change, EVERYTHING), rel=1e-6), key


@pytest.mark.parametrize("name", MODELS)
def test_probes_are_the_literal_ones(name: str) -> None:
    model, batch, updates = build(name)
    shape = model(**batch).shape
    omega = torch.randn(shape, generator=seeded(5), dtype=torch.float64)
    literal = per_example_derivatives(lambda: model(**batch), dict(model.named_parameters()), updates, omega)
    by_gates = measure_rates(model, updates, [batch], generator=seeded(5))
    assert set(by_gates.estimators.values()) == {"per_example"}
    full = measure_rates(model, updates, [batch], estimator="full", generator=seeded(5))
    for key, expected in literal.items():
        assert by_gates.rates[key] == pytest.approx(per_example_rate({key: expected}, shape.numel()), rel=1e-9), key
        assert full.rates[key] == pytest.approx(abs(expected.sum().item()) / shape.numel() ** 0.5, rel=1e-9), key


def test_kronecker_counts_real_and_imaginary_parts_as_a_dimension() -> None:
    model, batch, updates = build("layers")
    omega = torch.randn(3, 4, 7, generator=seeded(5), dtype=torch.float64)
    found = measure_rates(model, updates, [batch], estimator="kronecker", generator=seeded(5))
    for key, update in updates.items():
        (gradient,) = torch.autograd.grad((model(**batch) * omega).sum(), model.get_parameter(key))
        z = torch.view_as_real(update) * torch.view_as_real(gradient)
        assert found.rates[key] == pytest.approx(kronecker_rate([z], 84.0), rel=1e-9), key


@pytest.mark.parametrize("estimator", values(Estimator))
def test_complex_parameters_stay_as_they_are(estimator: str) -> None:
    model, batch, updates = build("spectral")
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    measure_rates(model, updates, [batch], estimator=estimator)
    assert all(torch.equal(before[key], parameter) for key, parameter in model.named_parameters())
