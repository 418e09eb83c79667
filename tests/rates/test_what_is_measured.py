"""What counts as an output of the model, and which tensors take part in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForSequenceClassification, GPT2LMHeadModel

from hf_flerm import measure_rates
from tests.shared.cases import VOCABULARY, Case, case, features, perturb, seeded
from tests.shared.reference import Batch, finite_difference


def test_dropout_is_off() -> None:
    made = case("gpt2, tied, right padding")
    noisy = GPT2LMHeadModel(made.model.config).train()
    noisy.load_state_dict(made.model.state_dict())
    assert noisy.transformer.drop.p == 0.1
    rates = measure_rates(noisy, made.updates, made.batches, generator=seeded(0)).rates
    assert rates == made.measure("per_example").rates


def test_labels_are_left_out_and_padding_does_not_count() -> None:
    made = case("gpt2, tied, right padding")
    (batch,) = made.batches
    # What stands at padded positions cannot matter in a causal model.
    other = torch.where(batch["attention_mask"].bool(), batch["input_ids"], (batch["input_ids"] + 1) % VOCABULARY)
    changed = batch | {"input_ids": other, "labels": torch.full((3, 6), 5)}
    assert not torch.equal(other, batch["input_ids"])
    rates = measure_rates(made.model, made.updates, [changed], estimator="exact").rates
    original = made.measure("exact").rates
    moved = {"transformer.wte.weight", "transformer.wpe.weight"}
    for name in set(rates) - moved:
        assert rates[name] == pytest.approx(original[name], rel=1e-4), name


def test_no_kind_of_label_reaches_the_model() -> None:
    made = case("every kind")  # whose forward takes none
    labels = dict.fromkeys(("labels", "label", "label_ids", "num_items_in_batch"), torch.ones(3))
    result = measure_rates(made.model, made.updates, [made.batches[0] | labels], generator=seeded(0))
    plain = measure_rates(made.model, made.updates, made.batches[:1], generator=seeded(0))
    assert result.rates == plain.rates


def test_an_output_function_decides_what_counts() -> None:
    made = case("gpt2, tied, right padding")

    def last_logit(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["input_ids"]).logits[:, -1, :2]

    expected = finite_difference(made.model, made.updates, made.batches, last_logit).rate
    result = measure_rates(made.model, made.updates, made.batches, estimator="exact", output=last_logit)
    assert result.total == pytest.approx(expected, rel=1e-4)


class Unused(nn.Module):
    """A tensor that no module uses, one whose module is not called, and one whose result is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.wasted = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.wasted(x)
        result: Tensor = self.used(x)
        return result


@pytest.mark.parametrize("estimator", ["per_example", "kronecker", "full"])
def test_tensors_that_take_no_part_are_reported(estimator: str) -> None:
    made = Case(Unused(), [features(3, 4), features(2, 4)])
    result = made.measure(estimator)
    taken = {name for name, used in result.estimators.items() if used != "unused"}
    assert taken == {"used.weight", "used.bias"}
    assert all((rate > 0) == (name in taken) for name, rate in result.rates.items())
    assert all(result.standard_errors[name] == 0 for name in result.rates if name not in taken)
    alone = measure_rates(made.model, {"spare": torch.ones(2)}, made.batches, estimator=estimator)
    assert (alone.rates, alone.estimators) == ({"spare": 0.0}, {"spare": "unused"})


def test_an_encoder_decoder_that_classifies() -> None:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=16,
        num_labels=3,
        eos_token_id=2,
    )
    model = perturb(BartForSequenceClassification(config))
    ids = torch.cat([torch.randint(3, VOCABULARY, (3, 5), generator=seeded(0)), torch.full((3, 1), 2)], 1)
    result = measure_rates(model, Case(model, []).updates, [{"input_ids": ids, "labels": torch.tensor([0, 1, 2])}])
    assert result.rates["classification_head.out_proj.weight"] > 0
