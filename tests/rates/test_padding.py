"""Padding never counts: the rates of a padded batch are those of its examples alone, without padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForPreTraining,
    HubertConfig,
    HubertForCTC,
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetForCTC,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    WavLMConfig,
    WavLMForAudioFrameClassification,
)
from transformers.utils import logging

from hf_flerm import measure_rates
from hf_flerm.rates.outputs import MeasuredOutput
from tests.shared.cases import perturb, seeded
from tests.shared.reference import Batch, float64_copy


@dataclass(frozen=True)
class Padded:
    """A model, a batch with padding, its examples without, and the outputs of such an example."""

    model: nn.Module
    batch: Batch
    alone: list[Batch]
    read: Callable[[Any], Tensor] = lambda result: result.logits


SOUND = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 16,
    "conv_dim": [8, 8],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "pad_token_id": 0,
}


def sounds(kind: type[Any], config: type[Any], **settings: Any) -> Padded:
    """300 and 180 samples of sound, which become 14 and 8 frames."""
    rows = [torch.randn(length, generator=seeded(length)) for length in (300, 180)]
    batch = {
        "input_values": torch.stack([F.pad(row, (0, 300 - len(row))) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (300 - len(row)) for row in rows]),
    }
    model = perturb(kind(config(**SOUND, **settings)), size=0.1)
    return Padded(
        model, batch, [{"input_values": row[None], "attention_mask": torch.ones(1, len(row))} for row in rows]
    )


def spectrograms(model: nn.Module, width: int, mask: Callable[[int], Tensor]) -> Padded:
    """40 and 24 frames of a spectrogram."""
    rows = [torch.randn(length, width, generator=seeded(length)) for length in (40, 24)]
    batch = {
        "input_features": torch.stack([F.pad(row, (0, 0, 0, 40 - len(row))) for row in rows]),
        "attention_mask": torch.stack([F.pad(mask(len(row)), (0, 40 - len(row))) for row in rows]),
    }
    alone = [{"input_features": row[None], "attention_mask": mask(len(row))[None]} for row in rows]
    return Padded(perturb(model, size=0.1), batch, alone)


def parakeet() -> Padded:
    encoder = ParakeetEncoderConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        subsampling_conv_channels=8,
        num_mel_bins=16,
        conv_kernel_size=3,
        dropout=0.0,
        layerdrop=0.0,
        scale_input=False,
    )
    model = ParakeetForCTC(ParakeetCTCConfig(vocab_size=12, encoder_config=encoder, pad_token_id=0))
    return spectrograms(model, 16, lambda length: torch.ones(length, dtype=torch.long))


def wav2vec2_bert() -> Padded:
    config = Wav2Vec2BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=12,
        feature_projection_input_dim=8,
        add_adapter=True,
        num_adapter_layers=1,
        adapter_stride=2,
        output_hidden_size=16,
        conv_depthwise_kernel_size=3,
        position_embeddings_type="relative_key",
    )
    return spectrograms(Wav2Vec2BertForCTC(config), 8, lambda length: torch.ones(length, dtype=torch.long))


TOKENS = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
LENGTHS = (6, 4, 3)


def texts(model: nn.Module, mask: str = "attention_mask", **settings: Any) -> Padded:
    rows = [torch.randint(1, 20, (length,), generator=seeded(length)) for length in LENGTHS]
    batch = {
        "input_ids": torch.stack([F.pad(row, (0, 6 - len(row))) for row in rows]),
        mask: torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in rows]),
    }
    return Padded(perturb(model), batch, [{"input_ids": row[None]} for row in rows], **settings)


class Torch(nn.Module):
    """Torch's own encoder layer, whose mask is True at padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 5)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, input_ids: Tensor, src_key_padding_mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.layer(self.embedding(input_ids), src_key_padding_mask=src_key_padding_mask)
        return {"logits": self.head(hidden)}


class Tagger(nn.Module):
    """A head on every token alone, in one of several layouts."""

    def __init__(self, layout: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 5)
        self.layout = layout

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.layout(self.head(self.embedding(input_ids).tanh()))


class Segmenter(nn.Module):
    """Logits of 3 classes at half the resolution, [N, 3, H / 2, W / 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.classes = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 3, 1)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.classes(self.features(pixel_values).tanh())}


def images() -> Padded:
    rows = [torch.randn(3, *size, generator=seeded(size[0])) for size in ((8, 6), (4, 6), (6, 2))]
    padding = [(0, 6 - row.shape[2], 0, 8 - row.shape[1]) for row in rows]
    batch = {
        "pixel_values": torch.stack([F.pad(row, pad) for row, pad in zip(rows, padding, strict=True)]),
        "pixel_mask": torch.stack([F.pad(row[0] * 0 + 1, pad) for row, pad in zip(rows, padding, strict=True)]),
    }
    alone = [{"pixel_values": row[None]} for row in rows]
    return Padded(perturb(Segmenter()), batch, alone, lambda result: result["logits"])


def torch_encoder() -> Padded:
    made = texts(Torch(), "src_key_padding_mask", read=lambda result: result["logits"])
    mask = made.batch["src_key_padding_mask"] == 0
    return Padded(made.model, {**made.batch, "src_key_padding_mask": mask}, made.alone, made.read)


def prepared_decoder() -> Padded:
    """T5 with decoder inputs in the batch, as `DataCollatorForSeq2Seq(model=...)` makes them, and sources of a length.

    The encoder's mask has the shape of the decoder's inputs, and says nothing of them.
    """
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = perturb(T5ForConditionalGeneration(config))
    sources = torch.randint(1, 20, (3, 6), generator=seeded(7))
    targets = [torch.randint(1, 20, (length,), generator=seeded(length)) for length in LENGTHS]
    labels = torch.stack([F.pad(target, (0, 6 - len(target)), value=-100) for target in targets])
    batch = {
        "input_ids": sources,
        "attention_mask": torch.ones(3, 6),
        "labels": labels,
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels),
    }
    alone = [{"input_ids": sources[i : i + 1], "labels": target[None]} for i, target in enumerate(targets)]
    return Padded(model, batch, alone)


def electra() -> nn.Module:
    return ElectraForPreTraining(ElectraConfig(**TOKENS, embedding_size=8, max_position_embeddings=8))


CASES = {
    "HuBERT, CTC": lambda: sounds(HubertForCTC, HubertConfig),
    "WavLM, a class for each frame": lambda: sounds(WavLMForAudioFrameClassification, WavLMConfig),
    "Parakeet, CTC": parakeet,
    "Wav2Vec2-BERT with an adapter, CTC": wav2vec2_bert,
    "ELECTRA's discriminator, [N, T]": lambda: texts(electra()),
    "question answering, [N, T] twice": lambda: texts(
        BertForQuestionAnswering(BertConfig(**TOKENS, max_position_embeddings=8)),
        read=lambda result: torch.stack([result.start_logits, result.end_logits]),
    ),
    "key_padding_mask, True at padding": torch_encoder,
    "classes along dimension 1, [N, C, T]": lambda: texts(
        Tagger(lambda x: x.transpose(1, 2)), "mask", read=lambda result: result
    ),
    "all tokens in one dimension, [N T, C]": lambda: texts(
        Tagger(lambda x: x.flatten(0, 1)), "mask", read=lambda result: result
    ),
    "pixels at half the resolution": images,
    "decoder inputs in the batch": prepared_decoder,
}


def rate_alone(case: Padded, name: str, update: Tensor, step: float = 1e-5) -> float:
    """The root mean square of the derivative of all outputs of the unpadded examples, in float64."""
    model = float64_copy(case.model)
    examples = [
        {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        for batch in case.alone
    ]

    def outputs(distance: float) -> Tensor:
        parameter = model.get_parameter(name)
        before = parameter.data.clone()
        with torch.no_grad():
            parameter += distance * update.double()
            values = torch.cat([case.read(model(**batch)).flatten() for batch in examples])
        parameter.data.copy_(before)
        return values

    return float(((outputs(step) - outputs(-step)) / (2 * step)).square().mean().sqrt())


@pytest.mark.parametrize("name", CASES)
def test_padding_does_not_count(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = CASES[name]()
    generator = seeded(3)
    named = list(case.model.named_parameters())
    updates = {name: torch.randn(p.shape, generator=generator) for name, p in (*named[-4:], named[len(named) // 2])}
    measured = measure_rates(case.model, updates, [case.batch], estimator="exact")
    random = measure_rates(case.model, updates, [case.batch], probes_per_batch=200, generator=seeded(4))
    expected = {name: rate_alone(case, name, update) for name, update in updates.items()}
    floor = 1e-5 * max(expected.values())  # attention is blind to a bias of its keys
    for name, rate in expected.items():
        assert measured.rates[name] == pytest.approx(rate, rel=2e-3, abs=floor), name
        assert abs(random.rates[name] - rate) < 5 * random.standard_errors[name] + 1e-3 * rate + floor, name
    assert not caplog.records


def classifier(classes: int) -> nn.Module:
    return BertForSequenceClassification(BertConfig(**TOKENS, max_position_embeddings=8, num_labels=classes))


@pytest.mark.parametrize("labels", [{}, {"labels": torch.tensor([0, 1, 2])}, {"labels": torch.rand(3, 6)}])
def test_as_many_classes_as_tokens_are_no_tokens(labels: Batch) -> None:
    case = texts(classifier(6))
    assert MeasuredOutput()(case.model.eval(), {**case.batch, **labels}).count() == 18


class Downsampled(nn.Module):
    """Every second token has an output, and nothing tells so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tagger(lambda x: x[:, ::2])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(input_ids)


def test_a_mask_that_fits_no_output_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(logging.get_logger("hf_flerm.rates.positions"), "warning", lambda message: told.append(message))
    case = texts(Downsampled())
    update = {"inner.head.bias": torch.ones(5)}
    for _ in range(2):
        rates = measure_rates(case.model, update, [case.batch], estimator="exact").rates
    assert rates["inner.head.bias"] == pytest.approx(1.0)
    assert len(told) == 1
    for word in ("attention_mask (3, 6)", "(3, 3, 5)", "padding included", "positions=", "output="):
        assert word in told[0]
    whole = {**case.batch, "attention_mask": torch.ones(3, 6)}
    measure_rates(Downsampled(), update, [whole], estimator="exact")
    assert len(told) == 1


def test_labels_of_a_transcript_are_no_labels_of_frames() -> None:
    case = sounds(HubertForCTC, HubertConfig)
    batch = {**case.batch, "labels": torch.tensor([[1, 2], [3, -100]])}
    with pytest.raises(ValueError, match=r"labels for every position of the output: the batch has \(2, 2\)"):
        measure_rates(case.model, {"lm_head.bias": torch.ones(16)}, [batch], positions="labels")


def test_labels_of_pixels_leave_out_those_that_the_loss_ignores() -> None:
    case = images()
    labels = torch.randint(3, (3, 4, 3), generator=seeded(0))
    labels[0, :2] = -100
    out = MeasuredOutput(positions="labels")(case.model, {**case.batch, "labels": labels})
    assert out.count() == 3 * (36 - 6)
    assert torch.equal(out.weight[:, 0].bool(), labels != -100)
