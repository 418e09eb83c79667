"""Parameters in one memory: the update of one moves the others, and its rate is the derivative with all moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_flerm import Measurement, measure_rates
from hf_flerm.engines import engine_of
from hf_flerm.rates.reference import output_change, rate
from hf_flerm.rates.tensors import OverlappingMemory
from tests.shared.cases import WIDTH, llama, perturb, seeded, text
from tests.shared.wrapped_tensor import WrappedTensor

SIZES = {"dtype": torch.float64}
Made = tuple[nn.Module, dict[str, Tensor]]
EVERYTHING = torch.ones(())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), **SIZES)


class Autoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed, in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, 4, **SIZES)
        self.decoder = nn.Linear(4, WIDTH, **SIZES)
        self.decoder.weight = nn.Parameter(self.encoder.weight.data.T)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).tanh()).tanh()


class HandTied(nn.Module):
    """A head that was given the embedding's data, not its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, WIDTH, **SIZES)
        self.head = nn.Linear(WIDTH, 12, bias=False, **SIZES)
        self.head.weight.data = self.embedding.weight.data

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).tanh())


class Slices(nn.Module):
    """A projection of which one part is called by another module, in other rows and every second column."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(WIDTH, 3 * WIDTH, bias=False, **SIZES)
        self.part = nn.Linear(WIDTH // 2, WIDTH, bias=False, **SIZES)
        self.part.weight = nn.Parameter(self.whole.weight.data[WIDTH : 2 * WIDTH, ::2])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.whole(x).tanh().chunk(3, -1)
        return (q * k + self.part(v[..., ::2])).tanh()


class OneModule(nn.Module):
    """Two parameters of one module in one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.forth = nn.Parameter(randn(WIDTH, WIDTH))
        self.back = nn.Parameter(self.forth.data.T)

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.forth).tanh() @ self.back).tanh()


class ComplexAndReal(nn.Module):
    """A complex parameter, and its real and imaginary parts as another one."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.view_as_complex(randn(WIDTH, WIDTH, 2)))
        self.pairs = nn.Parameter(torch.view_as_real(self.spectrum.data))

    def forward(self, x: Tensor) -> Tensor:
        return ((x.to(torch.complex128) @ self.spectrum).abs() + x @ self.pairs[..., 1]).tanh()


class Expanded(nn.Module):
    """A gain for all positions that is one gain in memory, beside that one."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(randn(WIDTH))
        self.gains = nn.Parameter(self.gain.data.expand(5, WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gains * self.gain).tanh()


def plain(kind: Callable[[], nn.Module], *shape: int) -> Callable[[], Made]:
    return lambda: (kind(), {"input": randn(*shape, seed=3)})


def tied_adapters() -> Made:
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = get_peft_model(llama(tie_word_embeddings=True), config)
    return perturb(model), text("right")


MODELS: dict[str, Callable[[], Made]] = {
    "autoencoder": plain(Autoencoder, 3, 5, WIDTH),
    "head on the embedding's data": lambda: (HandTied(), {"input": torch.arange(12).reshape(3, 4)}),
    "slices": plain(Slices, 3, 5, WIDTH),
    "one module": plain(OneModule, 3, WIDTH),
    "complex and real": plain(ComplexAndReal, 3, WIDTH),
    "expanded": plain(Expanded, 3, 5, WIDTH),
    "adapters of tied embeddings": tied_adapters,
}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    result: Any = model(*batch.values()) if "input" in batch else model(**batch).logits
    return result


def build(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    return (
        model.eval(),
        batch,
        {k: torch.randn(p.shape, generator=seeded(i), dtype=p.dtype) for i, (k, p) in enumerate(trained)},
    )


def measured(model: nn.Module, batch: dict[str, Tensor], updates: dict[str, Tensor], estimator: str) -> Measurement:
    return measure_rates(model, updates, [batch], estimator=estimator, output=logits, generator=seeded(7))


def moved(model: nn.Module, batch: dict[str, Tensor], updates: dict[str, Tensor]) -> Tensor:
    """D f by moving the memory itself."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    double = next(iter(updates.values())).dtype in (torch.float64, torch.complex128)
    return output_change(lambda: logits(model, batch), weights, updates, step=1e-5 if double else 1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_exact_moves_whatever_lies_in_the_memory(name: str) -> None:
    model, batch, updates = build(name)
    result = measured(model, batch, updates, "exact")
    precision = 1e-6 if name != "adapters of tied embeddings" else 1e-2  # differences in float32
    for (raw, update), found in zip(updates.items(), result.rates.values(), strict=True):
        assert found == pytest.approx(rate(moved(model, batch, {raw: update}), EVERYTHING), rel=precision), raw
    assert result.total == pytest.approx(rate(moved(model, batch, updates), EVERYTHING), rel=precision)


@pytest.mark.parametrize("estimator", ["per_example", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_a_probe_sees_whatever_lies_in_the_memory(name: str, estimator: str) -> None:
    model, batch, updates = build(name)
    result = measured(model, batch, updates, estimator)
    shape = logits(model, batch).shape
    omega = torch.randn(shape, generator=seeded(7), dtype=logits(model, batch).dtype)
    assert set(result.estimators.values()) == {estimator}
    precision = {"rtol": 1e-5, "atol": 1e-7} if omega.dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    for i, (raw, update) in enumerate(updates.items()):
        expected = (omega * moved(model, batch, {raw: update})).flatten(1).sum(1).double()
        found = result.draws.derivatives[i] if estimator == "per_example" else result.draws.sums[i]
        assert torch.allclose(found, expected if estimator == "per_example" else expected.sum(), **precision), raw


@pytest.mark.parametrize("estimator", ["exact", "per_example"])
def test_a_step_that_both_names_have_seen_moves_the_memory_once(estimator: str) -> None:
    """Weights before and after a step are read by both names: both have the whole update, which is one."""
    model, batch, updates = build("autoencoder")
    one = {"encoder.weight": updates["encoder.weight"]}
    both = one | {"decoder.weight": updates["encoder.weight"].T}
    alone, together = (measured(model, batch, chosen, estimator) for chosen in (one, both))
    assert together.rates["decoder.weight"] == pytest.approx(together.rates["encoder.weight"], rel=1e-9)
    assert together.total == pytest.approx(alone.total, rel=1e-9)
    assert together.total == pytest.approx(together.rates["encoder.weight"], rel=1e-9)
    others = {"encoder.weight": updates["encoder.weight"], "decoder.weight": updates["decoder.weight"]}
    apart = measured(model, batch, others, "exact")
    assert apart.total == pytest.approx(rate(moved(model, batch, others), EVERYTHING), rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_memory_stays_shared(name: str) -> None:
    model, batch, updates = build(name)
    before = {key: (p, p.data_ptr(), p.detach().clone()) for key, p in model.named_parameters()}
    for estimator in ("per_example", "kronecker", "exact"):
        measured(model, batch, updates, estimator)
    for key, parameter in model.named_parameters():
        held, place, value = before[key]
        assert parameter is held
        assert parameter.data_ptr() == place
        assert torch.equal(parameter, value)


def test_slices_of_one_buffer_that_do_not_meet_are_tensors_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))
    batch, updates = {"input": torch.randn(3, WIDTH)}, {n: torch.randn(p.shape) for n, p in model.named_parameters()}
    apart = measure_rates(model, updates, [batch], generator=seeded(0))
    buffer = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for parameter in model.parameters():
        parameter.data = buffer[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    memory = OverlappingMemory(model, engine_of(model))
    assert all(not memory.tensor(parameter).maps for parameter in model.parameters())
    together = measure_rates(model, updates, [batch], generator=seeded(0))
    assert together.rates == apart.rates


def test_columns_of_one_matrix_do_not_meet() -> None:
    matrix = torch.zeros(4, 6)
    even, odd = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
    even.weight, odd.weight = nn.Parameter(matrix[:, ::2]), nn.Parameter(matrix[:, 1::2])
    model = nn.ModuleList([even, odd])
    memory = OverlappingMemory(model, engine_of(model))
    assert not memory.tensor(even.weight).maps


def test_weights_that_wrap_other_tensors_share_no_memory() -> None:
    """As quantized weights do: their own storage is empty."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    updates = {name: torch.randn(value.shape) for name, value in model.named_parameters() if name.startswith("2.")}
    batch = {"input": torch.randn(3, WIDTH)}
    plain = measure_rates(model, updates, [batch], generator=seeded(0)).rates
    for layer in (model[0], model[3]):
        layer.weight = nn.Parameter(WrappedTensor(layer.weight.detach()), requires_grad=False)
    assert measure_rates(model, updates, [batch], generator=seeded(0)).rates == pytest.approx(plain)


def test_one_memory_in_two_dtypes_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class TwoDtypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Parameter(torch.randn(4))
            self.narrow = nn.Parameter(self.wide.data.view(torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x * self.wide, (0, 4)) + self.narrow.nan_to_num()

    measure_rates(TwoDtypes(), {"wide": torch.ones(4)}, [{"x": torch.ones(2, 4)}])
    assert "wide (torch.float32) and narrow (torch.bfloat16) lie in the same memory" in caplog.text
