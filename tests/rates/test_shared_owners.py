"""A tensor whose owner is reached by two paths is measured with all its uses, and is the same parameter afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, VBLoRAConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from hf_flerm import measure_rates
from hf_flerm.engines import engine_of
from hf_flerm.rates.per_example.tangents import jvp, replaced_parameters
from tests.shared.cases import WIDTH, llama, perturb, seeded, text
from tests.shared.reference import Batch, finite_differences

Made = tuple[nn.Module, Batch]


def inputs(*shape: int) -> Batch:
    return {"input": torch.randn(*shape, generator=seeded(3))}


class Bank(nn.Module):
    """A layer whose weight is a mixture of vectors in a bank that all layers hold."""

    def __init__(self, bank: nn.ParameterDict) -> None:
        super().__init__()
        self.bank = bank
        self.mixture = nn.Parameter(torch.randn(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.mixture @ self.bank["vectors"]).T)


class Again(nn.Module):
    """A part that calls the layer it shares with others, with another scale."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.shared(x)


def banks() -> Made:
    bank = nn.ParameterDict({"vectors": nn.Parameter(torch.randn(4, WIDTH))})
    return nn.Sequential(Bank(bank), Bank(bank), nn.Linear(WIDTH, 3)), inputs(3, WIDTH)


def one_layer_twice() -> Made:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
            self.layers = nn.ModuleList([layer, nn.Linear(WIDTH, WIDTH), layer])

        def forward(self, input: Tensor) -> Tensor:
            for layer in self.layers:
                input = input + layer(input)
            return input

    return Twice(), inputs(3, 5, WIDTH)


def one_layer_in_two_parts() -> Made:
    shared = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(Again(shared), nn.Tanh(), Again(shared)), inputs(3, WIDTH)


def trainable_tokens() -> Made:
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6, 7])
    return get_peft_model(llama(tie_word_embeddings=True), config), text("right")


def vector_bank() -> Made:
    config = VBLoRAConfig(target_modules=["q_proj", "v_proj"], r=2, num_vectors=6, vector_length=4, topk=2)
    return get_peft_model(llama(layers=2), config), text("right")


MODELS: dict[str, Callable[[], Made]] = {
    "shared ParameterDict": banks,
    "one layer twice in a ModuleList": one_layer_twice,
    "one layer in two parts": one_layer_in_two_parts,
    "trainable tokens on tied embeddings": trainable_tokens,
    "VB-LoRA": vector_bank,
}


@pytest.mark.parametrize("estimator", ["per_example", "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_measured_with_all_uses_and_left_in_place(name: str, estimator: str) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    perturb(model)
    slots = [(m, key, held) for m in model.modules() for key, held in m._parameters.items()]
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    trained = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
    updates = {key: torch.randn(p.shape, generator=seeded(i)) for i, (key, p) in enumerate(trained)}
    probes = 1 if estimator == "exact" else 60
    result = measure_rates(model, updates, [batch], estimator=estimator, probes_per_batch=probes, generator=seeded(0))
    assert all(module._parameters[key] is held for module, key, held in slots)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(type(after[key]) is nn.Parameter for key in updates)
    for (raw, change), tensor in zip(finite_differences(model, updates, [batch]).items(), result.rates, strict=True):
        tolerance = 1e-3 * change.rate if estimator == "exact" else 4 * change.error("per_example", probes)
        assert abs(result.rates[tensor] - change.rate) <= tolerance + 1e-5, raw


def test_without_forward_mode_every_use_is_swapped_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object) -> None:
        raise RuntimeError("no forward-mode derivative")

    model, batch = one_layer_twice()
    parameter = model.layers[0][0].weight
    update = torch.randn(parameter.shape, generator=seeded(0))

    def f(weight: Tensor) -> tuple[Tensor, ...]:
        with replaced_parameters(model, {parameter: weight}):
            return (model(**batch),)

    (expected,) = jvp(f, [parameter], [update], model, engine_of(model))
    monkeypatch.setattr(torch.func, "jvp", missing)
    (found,) = jvp(f, [parameter], [update], model, engine_of(model))
    assert torch.allclose(found, expected, atol=1e-6)
    assert model.layers[2][0].weight is parameter


def test_a_swap_is_undone_when_the_block_raises_under_forward_mode() -> None:
    model, batch = one_layer_twice()
    parameter = model.layers[0][0].weight

    def run() -> None:
        dual = make_dual(parameter.detach(), torch.ones_like(parameter))
        with replaced_parameters(model, {parameter: dual}):
            assert unpack_dual(model(**batch)).tangent is not None
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"), dual_level():
        run()
    assert model.layers[0][0].weight is model.layers[2][0].weight is parameter
