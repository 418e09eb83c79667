"""Trainings as people describe them in public reports: retrieval, several adapters, parts that are unfrozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPModel, Trainer, TrainerCallback

from hf_flerm import FLeRMCallback, FLeRMConfig
from hf_flerm.model.names import trainable_parameters
from tests.shared.trainer_runs import match_known
from tests.shared.training import (
    VOCABULARY,
    Rows,
    arguments,
    assert_same_run,
    flerm_callback,
    gpt2,
    make_trainer,
    recorded,
    scaled,
    some_factors,
    train,
    weights_of,
)


class Pairs(Dataset):
    """Captions and images, or queries and two passages each."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(3, VOCABULARY, (3, 6), generator=generator)
        return {"tokens": tokens, "image": torch.randn(3, 4, 4, generator=generator)}


def clip() -> nn.Module:
    torch.manual_seed(0)
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": VOCABULARY, "max_position_embeddings": 6, "eos_token_id": 1, "bos_token_id": 0}
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config={**tower, "image_size": 4, "patch_size": 2}, projection_dim=4)
    )


def with_images(examples: list[dict[str, Tensor]]) -> dict[str, Any]:
    tokens, images = (torch.stack([each[key] for each in examples]) for key in ("tokens", "image"))
    return {"return_loss": True, "input_ids": tokens[:, 0], "pixel_values": images}


class TwoTowers(nn.Module):
    """In-batch negatives, with a mapping of inputs for each encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.projection = nn.Linear(4, 4)

    def encode(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.projection(self.embedding(inputs["input_ids"]).tanh()).mean(1)  # type: ignore[no-any-return]

    def forward(self, query: Mapping[str, Tensor], passage: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scores = self.encode(query) @ self.encode(passage).T
        return {"loss": nn.functional.cross_entropy(scores, 2 * torch.arange(len(scores))), "scores": scores}


def two_towers() -> nn.Module:
    torch.manual_seed(0)
    return TwoTowers()


def with_passages(examples: list[dict[str, Tensor]]) -> dict[str, Any]:
    tokens = torch.stack([each["tokens"] for each in examples])
    return {"query": {"input_ids": tokens[:, 0]}, "passage": {"input_ids": tokens[:, 1:].flatten(0, 1)}}


RETRIEVAL: dict[str, tuple[Any, Any, Any]] = {
    "CLIP": (clip, with_images, lambda model, batch: model(**batch).logits_per_image),
    "two towers": (two_towers, with_passages, lambda model, batch: model(**batch)["scores"]),
}


@pytest.mark.parametrize("name", RETRIEVAL)
def test_retrieval_is_recorded_without_a_trace_and_matched(folder: Path, name: str) -> None:
    make, collate, output = RETRIEVAL[name]
    options: dict[str, Any] = {"data": Pairs(), "extra": {"data_collator": collate}, "remove_unused_columns": False}
    options |= {"max_steps": 2, "weight_decay": 0.0}
    plain = train(make_trainer(folder, make(), **options))
    assert_same_run(train(make_trainer(folder, make(), FLeRMConfig(output=output), **options)), plain)

    options["max_steps"] = 1
    base, once = make(), FLeRMConfig(output=output, measure_steps=(0,))
    profile = recorded(folder, base, flerm=once, **options)
    target = make()
    before = weights_of(target)
    trainer = make_trainer(folder, target, match_known(scaled(profile, some_factors(make())), output=output), **options)
    trainer.train()
    scales = flerm_callback(trainer).scales
    acting = [name for name, factor in some_factors(make()).items() if profile.rates[name][0] > 0]
    assert len(acting) >= 3
    for tensor in acting:
        assert scales[tensor] == pytest.approx(some_factors(make())[tensor], rel=1e-3)
        step = trainable_parameters(base)[tensor].detach() - before[tensor]
        redone = trainable_parameters(target)[tensor].detach() - before[tensor]
        torch.testing.assert_close(redone, scales[tensor] * step, rtol=1e-3, atol=1e-7)


class AllParameters(Trainer):
    """Hands frozen parameters to the optimizer, too: they may be unfrozen."""

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = AdamW(self.model.parameters(), lr=1e-2)
        return self.optimizer


class Alternate(TrainerCallback):
    """Trains one block at a time."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for index, block in enumerate(kwargs["model"].transformer.h):
            block.requires_grad_(index == state.global_step % 2)


def two_adapters() -> Any:
    config = LoraConfig(r=2, target_modules=["attn.c_attn"], fan_in_fan_out=True)
    model = get_peft_model(gpt2(), config, "one")
    model.add_adapter("two", config)
    return model


class Switch(TrainerCallback):
    """Trains one adapter at a time."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].set_adapter(["one", "two"][state.global_step % 2])


def frozen_block() -> nn.Module:
    model = gpt2()
    model.transformer.h[1].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("make", "callback", "named"),
    [
        (frozen_block, Alternate, "[transformer.h.1.attn.c_attn.bias, "),
        (two_adapters, Switch, "[base_model.model.transformer.h.0.attn.c_attn.lora_A.two.weight, "),
    ],
)
def test_what_is_unfrozen_during_training_is_named_once(
    folder: Path,
    warnings_of: Callable[[], list[str]],
    make: Callable[[], nn.Module],
    callback: type[TrainerCallback],
    named: str,
) -> None:
    flerm = FLeRMCallback(FLeRMConfig())
    args = arguments(folder, max_steps=4)
    AllParameters(make(), args, train_dataset=Rows(), callbacks=[flerm, callback()]).train()
    (warning,) = [text for text in warnings_of() if "became trainable" in text]
    assert named in warning
    assert flerm.rate_profile.steps.tolist()[0] == 0


def test_what_is_frozen_and_unfrozen_again_is_followed(folder: Path, warnings_of: Callable[[], list[str]]) -> None:
    trainer = make_trainer(folder, gpt2(), FLeRMConfig(), callbacks=[Alternate()], max_steps=2)
    trainer.train()
    rates = flerm_callback(trainer).rate_profile.rates
    assert rates["transformer.h.0.attn.c_attn.weight"][0] > 0
    assert rates["transformer.h.1.attn.c_attn.weight"][1] > 0
    assert not [text for text in warnings_of() if "became trainable" in text]


def test_a_second_training_of_another_adapter_is_refused_with_the_remedy(folder: Path) -> None:
    """A Trainer keeps its optimizer: the plain one trains nothing then, without a word."""
    trainer = make_trainer(folder, two_adapters(), FLeRMConfig(), max_steps=1)
    trainer.train()
    trainer.model.set_adapter("two")
    with pytest.raises(ValueError, match="make a new Trainer after you have activated another"):
        trainer.train()
