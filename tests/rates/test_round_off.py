"""A tensor whose derivatives are round-off has a rate of 0; one that moves the outputs little has its small rate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

from hf_flerm import measure_rates
from hf_flerm.choices import Estimator, values
from hf_flerm.rates.outputs import MeasuredOutput
from hf_flerm.rates.probe import RateProbe
from tests.shared.cases import WIDTH, features, seeded
from tests.shared.reference import Batch, finite_differences

Made = tuple[nn.Module, Batch, str]


class ConvBeforeNorm(nn.Module):
    """A norm over positions takes the mean of every channel away, and with it the bias before it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)
        self.norm = norm
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).tanh().mean(-1))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class ScaledBeforeNorm(nn.Module):
    """A norm without an epsilon takes the size of its input away, and with it the gain before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.scale = Scale()
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale(self.layer(x))
        return self.head(h / h.norm(dim=-1, keepdim=True)).tanh()


def bert(layers: int = 2) -> BertForMaskedLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=32, max_position_embeddings=32, **sizes))


def bert_case() -> Made:
    return bert(), {"input_ids": torch.randint(32, (4, 8), generator=seeded(1))}, "key.bias"


def vit_case() -> Made:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))
    return model, {"pixel_values": torch.randn(4, 3, 8, 8, generator=seeded(1))}, "k_proj.bias"


MODELS: dict[str, Callable[[], Made]] = {
    "bert": bert_case,
    "vit": vit_case,
    "instance norm": lambda: (ConvBeforeNorm(nn.InstanceNorm1d(4)), features(4, 3, 9), "conv.bias"),
    "group norm of single channels": lambda: (ConvBeforeNorm(nn.GroupNorm(4, 4)), features(4, 3, 9), "conv.bias"),
    "gain before a norm": lambda: (ScaledBeforeNorm(), features(4, 6, WIDTH), "gain"),
}


def build(name: str) -> tuple[nn.Module, Batch, str, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, batch, blind = MODELS[name]()
    updates = {key: torch.randn(p.shape, generator=seeded(i)) for i, (key, p) in enumerate(model.named_parameters())}
    return model.eval(), batch, blind, updates


@pytest.mark.parametrize("estimator", values(Estimator))
@pytest.mark.parametrize("name", MODELS)
def test_only_tensors_without_effect_have_no_rate(name: str, estimator: str) -> None:
    model, batch, blind, updates = build(name)
    result = measure_rates(model, updates, [batch] * 2, estimator=estimator, generator=seeded(0))
    changes = finite_differences(model, updates, [batch])
    largest = max(change.rate for change in changes.values())
    for key, change in changes.items():
        assert (change.rate < 1e-7 * largest) == (blind in key or change.rate == 0), (key, change.rate / largest)
        assert (result.rates[key] == 0) == (blind in key or change.rate == 0), (key, result.rates[key])
    names, inner = result.interactions()
    assert all(not inner[names.index(key)].any() for key in updates if blind in key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_every_precision(dtype: torch.dtype) -> None:
    model, batch, blind, updates = build("bert")
    result = measure_rates(model.to(dtype), updates, [batch] * 2, generator=seeded(0))
    assert {key for key, rate in result.rates.items() if rate == 0} == {key for key in updates if blind in key}


@pytest.mark.parametrize("size", [1e-4, 1e-8, 1e-12])
@pytest.mark.parametrize("estimator", values(Estimator))
def test_small_rates_are_kept(estimator: str, size: float) -> None:
    """LoRA's A after the first step of a warm-up: it acts through a B that has just left 0."""
    torch.manual_seed(0)
    lora_a, lora_b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
    adapter = nn.Sequential(lora_a, lora_b)
    with torch.no_grad():
        lora_b.weight.mul_(size / lora_b.weight.abs().max())

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.adapter, self.head = nn.Linear(WIDTH, WIDTH), adapter, nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.base(x) + self.adapter(x)).tanh())

    model, batch = Adapted(), features(4, 6, WIDTH)
    updates = {"adapter.0.weight": torch.randn(2, WIDTH), "adapter.1.weight": torch.randn(WIDTH, 2)}
    result = measure_rates(model, updates, [batch], estimator=estimator, generator=seeded(0))
    model.adapter[1].weight.data /= size  # linear in B, and large enough for differences here
    scaled = measure_rates(model, updates, [batch], estimator=estimator, generator=seeded(0))
    assert scaled.rates["adapter.0.weight"] > 0
    if size <= 1e-8:  # B has then no part in the activations
        base = measure_rates(zeroed(model), updates, [batch], estimator=estimator, generator=seeded(0))
        assert result.rates["adapter.1.weight"] == pytest.approx(base.rates["adapter.1.weight"], rel=1e-4)
    assert 0.1 < result.rates["adapter.0.weight"] / (size * scaled.rates["adapter.0.weight"]) < 10


def zeroed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.adapter[1].weight.zero_()
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("examples", [1, 2])
def test_a_small_draw_of_few_examples_is_no_round_off(examples: int, dtype: torch.dtype) -> None:
    """The output is chosen at right angles to the omega that verification draws: D phi_n is round-off by chance."""
    omega = torch.randn(examples, 3, generator=seeded(0), dtype=dtype)
    output = torch.stack([omega[:, 1], -omega[:, 0], torch.zeros_like(omega[:, 0])], 1)
    model, updates = nn.Sequential(Scale()).to(dtype), {"0.gain": torch.ones(())}
    result = measure_rates(model, updates, [{"input": output}], generator=seeded(1))
    assert result.rates["0.gain"] > 0


def test_round_off_stays_0_after_many_measurements() -> None:
    model, batch, blind, updates = build("bert")
    probe = RateProbe(model, output=MeasuredOutput())
    for step in range(12):
        result = probe.measure(updates, [batch], seeded(step))
        assert {key for key, rate in result.rates.items() if rate == 0} == {key for key in updates if blind in key}
        assert set(result.estimators.values()) == {"per_example"}
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=seeded(100 * step + i)))
