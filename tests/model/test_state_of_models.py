"""Measuring leaves alone whatever state a model keeps: of the last batch, of its adapters, of what it has counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_flerm import FLeRMConfig, measure_rates
from hf_flerm.model.isolation import undisturbed
from tests.shared.reference import finite_difference
from tests.shared.training import VOCABULARY, assert_same_run, gpt2, make_trainer, train


class Recurrent(nn.Module):
    """Goes on from the state that it had after the last batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.cell = nn.Linear(8, 4)
        self.head = nn.Linear(4, VOCABULARY)
        self.begin()

    def begin(self) -> None:
        self.state: Tensor | None = None

    def read(self) -> Tensor | None:
        return self.state

    def write(self, state: Tensor) -> None:
        self.state = state

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        state = self.read()
        if state is None:
            state = torch.zeros(4)
        states = []
        for x in self.embedding(input_ids).unbind(1):
            state = self.cell(torch.cat([x, state.expand(len(x), 4)], 1)).tanh()
            states.append(state)
        self.write(state.detach().mean(0))
        logits = self.head(torch.stack(states, 1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class InPlace(Recurrent):
    """Writes its state into a tensor that is no buffer."""

    def begin(self) -> None:
        self.state = torch.zeros(4)

    def write(self, state: Tensor) -> None:
        assert self.state is not None
        self.state.copy_(state)


class InList(Recurrent):
    """Keeps every state."""

    def begin(self) -> None:
        self.states: list[Tensor] = []

    def read(self) -> Tensor | None:
        return torch.stack(self.states).mean(0) if self.states else None

    def write(self, state: Tensor) -> None:
        self.states.append(state)


class InDict(Recurrent):
    """Keeps its state by name."""

    def begin(self) -> None:
        self.states: dict[str, Tensor] = {}

    def read(self) -> Tensor | None:
        return self.states.get("last")

    def write(self, state: Tensor) -> None:
        self.states["last"] = state


@pytest.mark.parametrize("kind", [Recurrent, InPlace, InList, InDict])
def test_recording_changes_nothing_of_a_model_with_a_state(tmp_path: Path, kind: type[Recurrent]) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return kind()

    options = {"max_steps": 3}
    plain = train(make_trainer(tmp_path, make(), **options))
    assert_same_run(train(make_trainer(tmp_path, make(), FLeRMConfig(), **options)), plain)


def test_a_forward_pass_that_switches_adapters_is_measured_and_leaves_those_that_were_active() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["attn.c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(gpt2(), config, "one")
    model.add_adapter("two", config)

    def state() -> list[Any]:
        flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
        layers = [vars(module)["_active_adapter"] for module in model.modules() if "_active_adapter" in vars(module)]
        return [flags, layers, model.active_adapter]

    def output(model: Any, batch: Any) -> Tensor:
        logits: list[Tensor] = []
        for adapter in ("one", "two"):
            model.set_adapter(adapter)
            logits.append(model(**batch).logits)
        return logits[0] * logits[1]

    before = state()
    ((name, parameter), *_) = [each for each in model.named_parameters() if "lora_B.one" in each[0]]
    update, batch = 0.1 * torch.randn_like(parameter), {"input_ids": torch.randint(VOCABULARY, (3, 5))}
    change = finite_difference(model, {name: update}, [batch], output)
    for estimator in ("per_example", "full"):
        generator = torch.Generator().manual_seed(0)
        measured = measure_rates(
            model,
            {name: update},
            [batch],
            output=output,
            estimator=estimator,
            probes_per_batch=200,
            generator=generator,
        )
        assert state() == before
        assert set(measured.estimators.values()) == {estimator}
        (rate,) = measured.rates.values()
        assert rate == pytest.approx(change.rate, abs=5 * change.error(estimator, 200))


def test_a_parameter_that_the_model_wraps_anew_is_put_back_without_a_warning(
    warnings_of: Callable[[], list[str]],
) -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    with undisturbed(model, torch.device("cpu")):
        model.weight = nn.Parameter(weight.data)
    assert model.weight is weight
    assert warnings_of() == []
