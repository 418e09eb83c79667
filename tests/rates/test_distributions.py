"""The Fisher metric of each kind of head: rate^2 lr^2 / 2 is the KL divergence per position of the predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    ElectraConfig,
    ElectraForPreTraining,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from hf_flerm import measure_rates
from hf_flerm.rates.metrics import FISHER
from hf_flerm.rates.outputs import OutputValues
from tests.shared.cases import perturb, seeded, text
from tests.shared.reference import Batch, float64_copy

TOKENS = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
TEXT = text("right")
MASK = TEXT["attention_mask"].bool()
IMAGES = torch.randn(3, 3, 8, 6, generator=seeded(0))


class Pixels(nn.Module):
    """Logits for every pixel, [N, C, H, W], or [N, H, W] without a dimension of classes."""

    def __init__(self, classes: int, keep: bool = True) -> None:
        super().__init__()
        self.features, self.classes, self.keep = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, classes, 1), keep

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        logits = self.classes(self.features(pixel_values).tanh())
        return {"logits": logits if self.keep else logits.squeeze(1)}


class Frames(nn.Module):
    """Logits over time, [N, C, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.classes = nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(4, 5, 1)

    def forward(self, series: Tensor) -> dict[str, Tensor]:
        return {"logits": self.classes(self.features(series).tanh())}


def bert(kind: type[Any], **settings: Any) -> nn.Module:
    return kind(BertConfig(**TOKENS, **settings))


def segformer(classes: int) -> nn.Module:
    config = SegformerConfig(
        num_encoder_blocks=1,
        depths=[1],
        sr_ratios=[1],
        hidden_sizes=[8],
        num_attention_heads=[1],
        mlp_ratios=[1],
        patch_sizes=[3],
        strides=[2],
        decoder_hidden_size=8,
        num_labels=classes,
    )
    return SegformerForSemanticSegmentation(config)


def integers(most: int, *shape: int) -> Tensor:
    return torch.randint(most, shape, generator=seeded(9))


def categorical(old: Tensor, new: Tensor, dim: int = -1) -> Tensor:
    old, new = old.log_softmax(dim), new.log_softmax(dim)
    return (old.exp() * (old - new)).sum(dim)


def bernoulli(old: Tensor, new: Tensor) -> Tensor:
    pairs = [(F.logsigmoid(sign * old), F.logsigmoid(sign * new)) for sign in (1, -1)]
    return sum((before.exp() * (before - after) for before, after in pairs), torch.zeros(()))


def answers(old: Tensor, new: Tensor) -> Tensor:
    """Begin and end of an answer, [N, T, 2]: distributions over the tokens that are no padding."""
    padding = ~MASK.unsqueeze(-1)
    old, new = (x.masked_fill(padding, -torch.inf).log_softmax(1) for x in (old, new))
    return (old.exp() * (old - new).masked_fill(padding, 0.0)).sum(1)


Case = tuple[Callable[[], nn.Module], Batch, Callable[[Tensor, Tensor], Tensor]]
CASES: dict[str, Case] = {
    "a class for each pixel": (
        lambda: Pixels(4),
        {"pixel_values": IMAGES, "labels": integers(4, 3, 8, 6)},
        lambda old, new: categorical(old, new, 1),
    ),
    "as many classes as pixels in a row": (
        lambda: Pixels(6),
        {"pixel_values": IMAGES[:, :, :6], "labels": integers(6, 3, 6, 6)},
        lambda old, new: categorical(old, new, 1),
    ),
    "SegFormer, labels at a higher resolution": (
        lambda: segformer(5),
        {"pixel_values": IMAGES, "labels": integers(5, 3, 8, 6)},
        lambda old, new: categorical(old, new, 1),
    ),
    "SegFormer without labels": (
        lambda: segformer(5),
        {"pixel_values": IMAGES},
        lambda old, new: categorical(old, new, 1),
    ),
    "SegFormer of one class": (lambda: segformer(1), {"pixel_values": IMAGES}, bernoulli),
    "one class, [N, 1, H, W]": (
        lambda: Pixels(1),
        {"pixel_values": IMAGES, "labels": integers(2, 3, 8, 6)},
        bernoulli,
    ),
    "one class, [N, H, W]": (
        lambda: Pixels(1, keep=False),
        {"pixel_values": IMAGES, "labels": integers(2, 3, 8, 6)},
        bernoulli,
    ),
    "a class at each time, [N, C, T]": (
        Frames,
        {"series": torch.randn(3, 3, 7, generator=seeded(1)), "labels": integers(5, 3, 7)},
        lambda old, new: categorical(old, new, 1),
    ),
    "ELECTRA's discriminator": (
        lambda: ElectraForPreTraining(ElectraConfig(**TOKENS, embedding_size=8)),
        {**TEXT, "labels": integers(2, 3, 6)},
        lambda old, new: bernoulli(old, new)[MASK],
    ),
    "several labels, by the config": (
        lambda: bert(BertForSequenceClassification, num_labels=4, problem_type="multi_label_classification"),
        dict(TEXT),
        lambda old, new: bernoulli(old, new).sum(-1),
    ),
    "several labels, by the labels": (
        lambda: bert(BertForSequenceClassification, num_labels=4),
        {**TEXT, "labels": integers(2, 3, 4).float()},
        lambda old, new: bernoulli(old, new).sum(-1),
    ),
    "a regression, by the config": (
        lambda: bert(BertForSequenceClassification, num_labels=1, problem_type="regression"),
        dict(TEXT),
        lambda old, new: (old - new).square().sum(-1) / 2,
    ),
    "a regression, by the labels": (
        lambda: bert(BertForSequenceClassification, num_labels=1),
        {**TEXT, "labels": torch.rand(3)},
        lambda old, new: (old - new).square().sum(-1) / 2,
    ),
    "one label of four": (
        lambda: bert(BertForSequenceClassification, num_labels=4),
        {**TEXT, "labels": integers(4, 3)},
        categorical,
    ),
    "a class for each token": (
        lambda: bert(BertForTokenClassification, num_labels=4),
        dict(TEXT),
        lambda old, new: categorical(old, new)[MASK],
    ),
    "an answer's begin and end": (lambda: bert(BertForQuestionAnswering), dict(TEXT), answers),
}


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    result = model(**{name: value for name, value in batch.items() if name != "labels"})
    return result["logits"] if "logits" in result else torch.stack([result["start_logits"], result["end_logits"]], -1)


@pytest.mark.parametrize("name", CASES)
def test_the_fisher_rate_is_the_size_of_the_change_in_kl_divergence(name: str) -> None:
    build, batch, divergence = CASES[name]
    model = perturb(build(), size=0.2).eval()
    named = list(model.named_parameters())
    updates = {name: torch.randn(p.shape, generator=seeded(7)) for name, p in (*named[-2:], named[len(named) // 2])}
    exact = measure_rates(model, updates, [batch], estimator="exact", metric="fisher").rates
    random = measure_rates(model, updates, [batch], probes_per_batch=200, metric="fisher", generator=seeded(8))
    double = float64_copy(model)
    moved = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    floor = 1e-4 * max(exact.values())
    for tensor, update in updates.items():
        step = 1e-4 / float(update.norm())
        parameter = double.get_parameter(tensor)
        with torch.no_grad():
            old = logits_of(double, moved)
            parameter += step * update.double()
            new = logits_of(double, moved)
            parameter -= step * update.double()
        expected = math.sqrt(max(2 * divergence(old, new).mean().item(), 0.0)) / step
        assert exact[tensor] == pytest.approx(expected, rel=5e-3, abs=floor), tensor
        assert abs(random.rates[tensor] - expected) < 5 * random.standard_errors[tensor] + 1e-2 * expected + floor, (
            tensor
        )


@pytest.mark.parametrize("distribution", ["bernoulli", "normal"])
def test_fisher_draws_have_the_covariance_of_the_distribution(distribution: str) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0])
    draws = 200_000
    omega = OutputValues(logits.expand(draws, 3), torch.ones(draws, 1), FISHER[distribution]).omega(seeded(0))
    p = logits.sigmoid()
    variances = p * (1 - p) if distribution == "bernoulli" else torch.ones(3)
    error = ((variances.outer(variances) + variances.diag().square()) / draws).sqrt()
    assert ((omega.T @ omega / draws - variances.diag()).abs() < 4.5 * error).all()


class Scores(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.linear, self.shape = nn.Linear(4, math.prod(shape)), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).reshape(len(x), *self.shape)


@pytest.mark.parametrize(
    ("shape", "labels"),
    [
        ((3,), torch.rand(5, 3)),  # soft targets, several labels or a regression
        ((1,), None),
        ((), torch.rand(5)),
        ((2, 3, 4), None),
        ((2, 3), torch.rand(5, 2, 3)),
    ],
)
def test_what_nothing_tells_is_refused(shape: tuple[int, ...], labels: Tensor | None) -> None:
    batch = {"x": torch.randn(5, 4), **({} if labels is None else {"labels": labels})}
    model = Scores(*shape)
    with pytest.raises(ValueError, match=r"metric 'fisher' needs .* dimension .*shape \(5.*'euclidean', or output="):
        measure_rates(model, {"linear.bias": torch.ones(len(model.linear.bias))}, [batch], metric="fisher")


def test_an_output_callable_has_its_classes_along_the_last_dimension() -> None:
    model = Pixels(4)
    update = {"classes.bias": torch.tensor([1.0, -1.0, 0.0, 0.0])}
    batch = {"pixel_values": IMAGES, "labels": integers(4, 3, 8, 6)}
    rates = [
        measure_rates(model, update, [batch], estimator="exact", metric="fisher", output=output).rates
        for output in (None, lambda model, batch: logits_of(model, batch).movedim(1, -1))
    ]
    assert rates[0] == pytest.approx(rates[1])


def test_log_probabilities_of_pixels_are_those_of_their_classes() -> None:
    shift = {"classes.bias": torch.ones(4)}
    batch = {"pixel_values": IMAGES, "labels": integers(4, 3, 8, 6)}
    rates = measure_rates(Pixels(4), shift, [batch], estimator="exact", output="log_probs").rates
    assert rates["classes.bias"] < 1e-6


def test_log_probabilities_need_classes() -> None:
    batch = {"pixel_values": IMAGES, "labels": integers(2, 3, 8, 6)}
    with pytest.raises(ValueError, match=r"'log_probs' needs .* classes; the logits of Pixels have a bernoulli"):
        measure_rates(Pixels(1), {"classes.bias": torch.ones(1)}, [batch], output="log_probs")


def test_several_logits_are_named() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"token_logits": super().forward(x), "order_logits": super().forward(x)}

    with pytest.raises(
        ValueError, match=r"without logits; it has token_logits, order_logits. Pass .*output=\(model, batch"
    ):
        measure_rates(Two(4, 3), {"bias": torch.ones(3)}, [{"x": torch.randn(5, 4)}])
