"""Batches of which not every entry has the examples along its first dimension."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hf_flerm import measure_rates
from hf_flerm.rates.outputs import num_examples
from tests.shared.reference import Change, finite_difference

IDS = torch.tensor([[9, 9, 9, 9, 3, 4, 0, 0, 0, 0], [9, 9, 9, 9, 9, 9, 9, 9, 5, 6]])  # 9: a place for a patch
PIXELS = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))  # one image, and two
TEXT = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
PROBES = 300


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ({"pixel_values": PIXELS, **TEXT}, 2),
        ({"return_loss": True, **TEXT}, 2),
        ({"step": torch.tensor(7), "names": ["a", "b"], **TEXT}, 2),
        ({"query": TEXT, "passage": {"input_ids": torch.zeros(6, 5), "attention_mask": torch.ones(6, 5)}}, 2),
        ({"x": torch.zeros(4, 2), "y": torch.zeros(3, 2)}, 4),
        ({"pixel_values": torch.zeros(0, 3, 4, 4), **TEXT}, 2),
    ],
)
def test_examples_are_counted_by_what_most_tensors_have(batch: dict[str, Any], count: int) -> None:
    assert num_examples(batch) == count


@pytest.mark.parametrize("batch", [{}, {"text": ["a", "b"]}, {"x": torch.zeros(0, 2)}, {"x": torch.tensor(1.0)}])
def test_a_batch_without_examples_is_refused(batch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="holds no examples"):
        num_examples(batch)


def agrees(rate: float, change: Change) -> bool:
    """Within five standard errors of per-example probes."""
    return abs(rate - change.rate) < 5 * change.error("per_example", PROBES)


# Transformers collects the hidden states of the vision tower by hooks, which see calls of its layers by themselves.
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("pixels_first", [True, False])
def test_a_vision_language_model_with_several_images(layer: int, pixels_first: bool) -> None:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2
    )
    text = LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=9, vision_feature_layer=layer)
    )
    batch = {"pixel_values": PIXELS, **TEXT} if pixels_first else {**TEXT, "pixel_values": PIXELS}
    names = [
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.embeddings.patch_embedding.weight",
        "model.multi_modal_projector.linear_1.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
    ]
    updates = {name: 0.1 * torch.randn_like(model.get_parameter(name)) for name in names}
    generator = torch.Generator().manual_seed(0)
    measured = measure_rates(model, updates, [batch], probes_per_batch=PROBES, generator=generator)
    for name, update in updates.items():
        assert measured.estimators[name] == "per_example"
        assert agrees(measured.rates[name], finite_difference(model, {name: update}, [batch])), name


class TwoTowers(nn.Module):
    """Compares every query with the passages of all: what a query is trained on depends on the other examples."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = BertModel(
            BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
            add_pooling_layer=False,
        )

    def encode(self, inputs: Any) -> Tensor:
        return nn.functional.normalize(self.encoder(**inputs).last_hidden_state[:, 0], dim=-1)

    def forward(self, query: Any, passage: Any) -> dict[str, Tensor]:
        return {"scores": self.encode(query) @ self.encode(passage).T / 0.1}


def test_two_towers_with_negatives_of_the_batch() -> None:
    """The derivative of attention's queries is small, and nothing is read of it at some sites on the way up."""
    torch.manual_seed(0)
    model = TwoTowers()
    ids = torch.randint(3, 32, (3, 6)), torch.randint(3, 32, (6, 8))
    query, passage = ({"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids)
    names = [f"encoder.encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key", "value")]
    updates = {name: 0.1 * torch.randn_like(parameter) for name, parameter in model.named_parameters()}

    def output(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch)["scores"]  # type: ignore[no-any-return]

    batch: Any = {"query": query, "passage": passage}
    generator = torch.Generator().manual_seed(0)
    measured = measure_rates(model, updates, [batch], output=output, probes_per_batch=PROBES, generator=generator)

    def of_flat(model: nn.Module, flat: Any) -> Tensor:  # the reference takes no mappings in mappings
        query = {"input_ids": flat["query"], "attention_mask": torch.ones_like(flat["query"])}
        return output(model, {"query": query, "passage": passage})

    for name in names:
        assert measured.estimators[name] == "per_example"
        change = finite_difference(model, {name: updates[name]}, [{"query": query["input_ids"]}], of_flat)
        assert agrees(measured.rates[name], change), name
