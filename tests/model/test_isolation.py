"""A measurement that destroys a parameter of the model leaves the model as it was, and says so."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_flerm import measure_rates
from hf_flerm.model.isolation import undisturbed


class Model(nn.Module):
    """Two layers, of which one is held at two paths, and a buffer that every forward pass replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = nn.ModuleList([self.first])
        self.last = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.last(self.again[0](self.first(x)).tanh())  # type: ignore[no-any-return]


def swap(model: Model) -> None:
    """What `functional_call` leaves of a slot that it swaps twice."""
    model.first._parameters["weight"] = model.first.weight.detach().clone()  # type: ignore[assignment]


def replace(model: Model) -> None:
    model.first.weight = nn.Parameter(model.first.weight.detach().clone())


def hide(model: Model) -> None:
    """A plain attribute in the place of the parameter."""
    weight = model.first.weight.detach().clone()
    del model.first.weight
    vars(model.first)["weight"] = weight


def drop(model: Model) -> None:
    model.first._parameters["weight"] = None


DESTROY: dict[str, Callable[[Model], None]] = {"swap": swap, "replace": replace, "hide": hide, "drop": drop}


def parts(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(value)) for name, value in [*model.named_parameters(), *model.named_buffers()]]


@pytest.mark.parametrize("how", DESTROY)
@pytest.mark.parametrize("raises", [False, True])
def test_a_destroyed_parameter_is_put_back_and_reported(
    how: str, raises: bool, warnings_of: Callable[[], list[str]]
) -> None:
    torch.manual_seed(0)
    model = type(f"Model_{how}_{raises}", (Model,), {})()  # the warning comes once for each text
    inputs = {"x": torch.randn(4, 3)}
    before, numbers = parts(model), [value.clone() for value in model.state_dict().values()]
    parameters = dict(model.named_parameters())

    def output(model: Any, batch: Any) -> Tensor:
        values: Tensor = model(batch["x"])
        DESTROY[how](model)
        if raises:
            raise ZeroDivisionError
        return values

    updates = {"last.weight": torch.ones(2, 3)}
    for _ in range(2):
        with suppress(ZeroDivisionError, TypeError):  # a layer without its weight cannot run again
            measure_rates(model, updates, [inputs], output=output, estimator="full")
        assert parts(model) == before
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), numbers, strict=True))
    assert all(parameter.requires_grad for parameter in parameters.values())
    assert "weight" not in vars(model.first)
    (warning,) = warnings_of()
    assert (
        f"replaced the parameters [first.weight] of {type(model).__name__} with other objects. They were restored"
        in warning
    )
    model(inputs["x"]).sum().backward()
    assert model.first.weight.grad is not None


def test_what_models_replace_themselves_is_put_back_without_a_warning(warnings_of: Callable[[], list[str]]) -> None:
    model = Model()
    before = parts(model)
    measure_rates(model, {"last.weight": torch.ones(2, 3)}, [{"x": torch.randn(4, 3)}], output=lambda m, b: m(b["x"]))
    assert parts(model) == before
    assert model.seen.tolist() == [0.0] * 3
    assert warnings_of() == []


def test_parameters_that_a_forward_pass_adds_stay() -> None:
    """A lazy layer makes its parameters at the first call, here in a probe; the others keep their order."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first = model[0].weight
    with undisturbed(model, torch.device("cpu")):
        model[0].register_parameter("late", nn.Parameter(torch.zeros(1)))
        model[0]._parameters["weight"] = None
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "0.late", "1.weight", "1.bias"]
    assert model[0].weight is first
