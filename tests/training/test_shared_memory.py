"""Tensors over the same memory are rescaled once when they are matched, and have one scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hf_flerm import FLeRMConfig, RateProfile, Research
from hf_flerm.optimizer.behavior import decayed_fractions
from hf_flerm.optimizer.step_scales import StepScales
from tests.shared.training import VOCABULARY, make_trainer, weights_of


class Points(Dataset):
    """Random vectors, and the same as targets."""

    def __init__(self) -> None:
        self.points = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.points[index], "labels": self.points[index]}


class Autoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed, by `.data`; with three layers the last is the first again."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(*((6, 4) if i % 2 == 0 else (4, 6))) for i in range(layers))
        for i, layer in enumerate(self.layers):
            first: Any = self.layers[0].weight
            layer.weight.data = first.data.t() if i % 2 else first.data

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        for layer in self.layers:
            inputs = layer(inputs).tanh()
        outputs = {"logits": inputs}
        return outputs if labels is None else {"loss": (inputs[:, :4] - labels[:, :4]).square().mean(), **outputs}


class Sliced(nn.Module):
    """One layer has the first rows of another's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.long, self.short = nn.Linear(6, 6), nn.Linear(6, 4)
        self.short.weight.data = self.long.weight.data[:4]

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = {"logits": self.short(self.long(inputs).tanh())}
        return outputs if labels is None else {"loss": outputs["logits"].square().mean(), **outputs}


def tied_lora() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **sizes))
    config = LoraConfig(
        r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True, init_lora_weights=False
    )
    return get_peft_model(llama, config)


OPTIONS: dict[str, Any] = {"max_steps": 1, "optim": "sgd", "weight_decay": 0.0, "max_grad_norm": 0.0}
CASES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "autoencoder": (Autoencoder, True),
    "three layers": (lambda: Autoencoder(3), True),
    "LoRA": (tied_lora, False),
}


@pytest.mark.parametrize("case", CASES)
def test_twice_every_rate_is_twice_the_step(tmp_path: Path, case: str) -> None:
    make, points = CASES[case]
    options = {**OPTIONS, **({"data": Points()} if points else {})}

    def run(flerm: FLeRMConfig | None = None, **more: Any) -> Any:
        trainer = make_trainer(tmp_path, make(), flerm, **options, **more)
        trainer.train()
        return trainer

    profile = run(FLeRMConfig(measure_steps=[0])).rate_profile
    twice = RateProfile(
        profile.steps,
        {name: 2 * rates for name, rates in profile.rates.items()},
        profile.metadata,
        {kind: {name: 2 * rates for name, rates in of.items()} for kind, of in profile.joint_rates.items()},
    )
    config = FLeRMConfig(
        mode="match", profile=twice, measure_steps=[0], granularity="tensor", research=Research(pool="unit", beta=1.0)
    )
    actual, expected = weights_of(run(config).model), weights_of(run(learning_rate=2e-2).model)
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_tensors_over_the_same_memory_have_one_scale() -> None:
    parameters = dict(Autoencoder(3).named_parameters())
    scaling = StepScales(SGD(parameters.values(), lr=1.0), parameters)
    scaling.scales = {"layers.0.weight": 1.0, "layers.1.weight": 2.0, "layers.2.weight": 4.0, "layers.0.bias": 3.0}
    assert scaling.scales == pytest.approx(
        {**{f"layers.{i}.weight": 2.0 for i in range(3)}, "layers.0.bias": 3.0}, rel=1e-12
    )


def test_a_part_in_common_is_recorded_and_not_matched(tmp_path: Path) -> None:
    options = {**OPTIONS, "data": Points()}
    recorder: Any = make_trainer(tmp_path, Sliced(), FLeRMConfig(), **options)
    recorder.train()
    config = FLeRMConfig(mode="match", profile=recorder.rate_profile)
    matched = make_trainer(tmp_path, Sliced(), config, **options)
    with pytest.raises(ValueError, match=r"short\.weight and long\.weight share a part .* separate tensors"):
        matched.train()
    assert matched.state.global_step == 0


@pytest.mark.parametrize("count", [2, 3])
def test_tensors_over_the_same_memory_decay_once_for_each(count: int) -> None:
    """What a step without gradients leaves of the weights is what the update is measured from."""
    model = Autoencoder(count)
    parameters = dict(model.named_parameters())
    groups = [{"params": [p], "weight_decay": 0.1 * index} for index, p in enumerate(parameters.values(), 1)]
    optimizer = AdamW(groups, lr=0.5)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    before = weights_of(model)
    optimizer.step()
    fractions = decayed_fractions(optimizer, parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), before[name] * (1.0 - fractions[name]))


def test_a_tie_that_a_step_breaks_is_none_any_more() -> None:
    parameters = dict(Autoencoder(2).named_parameters())
    scaling = StepScales(SGD(parameters.values(), lr=1.0), parameters)
    scaling.scales = {"layers.0.weight": 1.0, "layers.1.weight": 4.0}
    assert scaling.scales["layers.1.weight"] == pytest.approx(2.0, rel=1e-12)
    parameters["layers.1.weight"].data = parameters["layers.1.weight"].data.clone()
    scaling.scales = {"layers.0.weight": 1.0, "layers.1.weight": 4.0}
    assert scaling.scales["layers.1.weight"] == 4.0
    assert scaling.tied == {}
