"""A probe calls the model as training does: same decoder inputs, the columns that forward takes, labels if needed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PLBartConfig,
    PLBartForConditionalGeneration,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_flerm import measure_rates
from hf_flerm.rates.outputs import MeasuredOutput
from tests.shared.cases import perturb, seeded
from tests.shared.reference import finite_difference

SOURCES = torch.randint(3, 20, (3, 7), generator=seeded(0))
LABELS = torch.tensor([[5, 6, 7, 2, 19], [8, 9, 2, 19, -100], [-100, 4, 19, -100, -100]])
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SIZES = {"d_model": 16, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 32, "vocab_size": 20}
T5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}


def translator(kind: type[Any], config: type[Any], **settings: Any) -> nn.Module:
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return kind(config(**{**LAYERS, **SIZES, **special, **settings}))


def prophetnet() -> nn.Module:
    """Its positions are an embedding that counts from its padding index."""
    sizes = {"vocab_size": 20, "hidden_size": 16, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "ngram": 2}
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1}
    heads = {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
    config = ProphetNetConfig(**sizes, **layers, **heads, max_position_embeddings=32, decoder_start_token_id=1)
    return ProphetNetForConditionalGeneration(config)


def two_berts() -> nn.Module:
    bert = BertConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)
    config.decoder_start_token_id, config.pad_token_id = 3, 0
    return EncoderDecoderModel(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MBart": lambda: translator(MBartForConditionalGeneration, MBartConfig),
    "PLBart": lambda: translator(PLBartForConditionalGeneration, PLBartConfig),
    "Bart": lambda: translator(BartForConditionalGeneration, BartConfig, decoder_start_token_id=2),
    "Pegasus": lambda: translator(PegasusForConditionalGeneration, PegasusConfig, decoder_start_token_id=1),
    "Blenderbot": lambda: translator(BlenderbotForConditionalGeneration, BlenderbotConfig, decoder_start_token_id=0),
    "M2M100": lambda: translator(M2M100ForConditionalGeneration, M2M100Config, decoder_start_token_id=2),
    "ProphetNet": prophetnet,
    "T5": lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0, pad_token_id=0)),
    "two BERTs": two_berts,
    "LoRA on MBart": lambda: get_peft_model(MODELS["MBart"](), LoraConfig(target_modules=["q_proj"])),
}


def decoder_inputs(model: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """What the decoder is given in a run."""
    seen = []
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.decoder if isinstance(base, EncoderDecoderModel) else base.get_decoder()

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0])

    with decoder.register_forward_pre_hook(note, with_kwargs=True):
        run()
    return seen


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces a better way:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_the_decoder_is_given_what_training_makes_of_the_labels(name: str) -> None:
    model = MODELS[name]()
    model.eval()
    batch = {"input_ids": SOURCES, "attention_mask": torch.ones_like(SOURCES), "labels": LABELS}
    results: list[Any] = []
    (expected,) = decoder_inputs(model, lambda: results.append(model(**batch)))
    outputs = MeasuredOutput()
    outputs.prepare(model, batch)
    probed = decoder_inputs(model, lambda: results.append(outputs(model, batch)))
    assert all(torch.equal(found, expected) for found in probed)
    assert len(probed) == 1
    torch.testing.assert_close(results[1].values, results[0].logits)
    assert torch.equal(results[1].weight[..., 0] != 0, LABELS != -100)


def test_whisper_hears_and_writes() -> None:
    layers = {**LAYERS, "d_model": 16, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "num_mel_bins": 4}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 3}
    sizes = {"vocab_size": 20, "max_source_positions": 8, "max_target_positions": 8}
    model = WhisperForConditionalGeneration(WhisperConfig(**layers, **special, **sizes)).eval()
    batch = {
        "input_features": torch.randn(3, 4, 16, generator=seeded(0)),
        "attention_mask": torch.ones(3, 16),
        "labels": LABELS,
    }
    out = MeasuredOutput()(model, batch)
    torch.testing.assert_close(out.values, model(**batch).logits)
    assert torch.equal(out.weight[..., 0] != 0, LABELS != -100)


def fsmt() -> Any:
    """Its positions are an embedding that counts from its padding index, and its rule writes into the labels."""
    config = FSMTConfig(langs=["en", "de"], src_vocab_size=20, tgt_vocab_size=20, **LAYERS, **SIZES, pad_token_id=1)
    return FSMTForConditionalGeneration(config)


def test_labels_that_a_rule_writes_into_stay_as_they_are() -> None:
    batch = {"input_ids": SOURCES, "labels": LABELS.clone()}
    out = MeasuredOutput()(fsmt().eval(), batch)
    assert torch.equal(batch["labels"], LABELS)
    assert torch.equal(out.weight[..., 0] != 0, LABELS != -100)


def test_embeddings_that_count_from_their_padding_index_can_be_probed() -> None:
    batch = {"input_ids": SOURCES, "attention_mask": torch.ones_like(SOURCES), "labels": LABELS}
    MeasuredOutput().check(prophetnet(), batch, torch.device("cpu"))
    model = perturb(fsmt()).eval()
    name = "model.decoder.layers.0.fc1.weight"
    update = torch.randn(model.get_parameter(name).shape, generator=seeded(1))
    given = {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(LABELS.clone())}
    del given["labels"]
    weight = (LABELS != -100).unsqueeze(-1)

    def counted(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch, use_cache=False).logits * weight  # with a cache FSMT has no causal mask

    expected = finite_difference(model, {name: update}, [given], counted, step=1e-5).rate
    rates = measure_rates(model, {name: update}, [batch], estimator="exact").rates
    assert rates[name] == pytest.approx(expected / float(weight.float().mean()) ** 0.5, rel=2e-3)


@pytest.mark.parametrize(
    ("build", "missing"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(**T5, pad_token_id=0)), "decoder_start_token_id"),
        (lambda: translator(BartForConditionalGeneration, BartConfig), "decoder_start_token_id"),
        (lambda: translator(M2M100ForConditionalGeneration, M2M100Config), "decoder_start_token_id"),
        (lambda: EncoderDecoderModel(two_berts().config), "pad_token_id"),
    ],
    ids=["T5", "Bart", "M2M100", "two BERTs"],
)
def test_a_start_token_of_none_is_refused(build: Callable[[], Any], missing: str) -> None:
    model = build()
    setattr(model.config, missing, None)
    batch = {"input_ids": SOURCES, "labels": LABELS}
    with pytest.raises(ValueError, match=f"is None. Set model.config.{missing}"):
        MeasuredOutput().check(model, batch, torch.device("cpu"))


def test_the_labels_of_an_encoder_decoder_that_classifies_are_no_decoder_inputs() -> None:
    model = translator(BartForSequenceClassification, BartConfig, num_labels=4, decoder_start_token_id=2).eval()
    sources = torch.cat([SOURCES, torch.full((3, 1), 2)], 1)
    batch = {"input_ids": sources, "labels": torch.rand(3, 4)}
    out = MeasuredOutput()(model, batch)
    torch.testing.assert_close(out.values, model(input_ids=sources).logits)
    assert out.count() == 12


# Labels and columns
# ------------------


class Tagger(nn.Module):
    """A class for every token; subclasses differ in how they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 5)

    def scores(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embedding(input_ids).tanh())

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp(max=4), ignore_index=-100)


class Required(Tagger):
    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.scores(input_ids)
        return self.loss(logits, labels), logits


class Raising(Tagger):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if labels is None:
            raise ValueError("labels are needed")
        logits = self.scores(input_ids)
        return {"loss": self.loss(logits, labels), "logits": logits}


class ByName(Tagger):
    def forward(self, **batch: Tensor) -> Any:
        logits = self.scores(batch["input_ids"])
        return SimpleNamespace(loss=self.loss(logits, batch["labels"]), logits=logits)


class OnlyLossWithoutLogits(Tagger):
    """Without labels it is a backbone."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if labels is None:
            return {"hidden": self.embedding(input_ids)}
        return {"logits": self.scores(input_ids)}


class Wrapped(nn.Module):
    """A model in a wrapper that hands on labels, and keeps its config."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.config: Any = inner.config

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return self.inner(input_ids=input_ids, labels=labels)


CALLED_WITH_LABELS: dict[str, Callable[[], nn.Module]] = {
    "required": Required,
    "raises without": Raising,
    "a KeyError without": ByName,
    "no logits without": OnlyLossWithoutLogits,
    "a wrapper around MBart": lambda: Wrapped(MODELS["MBart"]()),
    "a wrapper around T5": lambda: Wrapped(MODELS["T5"]()),
}


@pytest.mark.parametrize("name", CALLED_WITH_LABELS)
def test_a_model_that_needs_labels_gets_them(name: str) -> None:
    model = perturb(CALLED_WITH_LABELS[name](), size=0.2).eval()
    batch = {"input_ids": SOURCES[:, :5], "labels": LABELS}
    some = dict(list(model.named_parameters())[-2:])
    updates = {key: torch.randn(p.shape, generator=seeded(1)) for key, p in some.items()}

    def counted(model: nn.Module, batch: Any) -> Tensor:
        result = model(**batch)
        logits = (
            result[1] if isinstance(result, tuple) else result["logits"] if isinstance(result, dict) else result.logits
        )
        return logits * (LABELS != -100).unsqueeze(-1) if hasattr(model, "config") else logits

    share = float((LABELS != -100).float().mean()) if hasattr(model, "config") else 1.0
    measured = measure_rates(model, updates, [batch], estimator="exact").rates
    gated = measure_rates(model, updates, [batch], probes_per_batch=200, generator=seeded(2))
    for key, update in updates.items():
        expected = finite_difference(model, {key: update}, [batch], counted, step=1e-5).rate / share**0.5
        assert measured[key] == pytest.approx(expected, rel=2e-3), key
        assert abs(gated.rates[key] - expected) < 5 * gated.standard_errors[key] + 1e-3 * expected, key


class Fixed(Tagger):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.scores(input_ids)


class HandsOn(Tagger):
    """Takes any keyword, and hands it to something that does not."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        return self.scores(input_ids, **kwargs)


class UsesAny(Tagger):
    """Uses a keyword that it does not name."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return self.scores(input_ids) * kwargs["factor"]


@pytest.mark.parametrize("kind", [Fixed, HandsOn])
def test_columns_that_only_the_loss_needs_are_left_out(kind: type[Tagger]) -> None:
    model = kind()
    extra = {"weights": torch.rand(3), "source": ["a", "b", "c"]}
    batch = {"input_ids": SOURCES, "labels": SOURCES}
    updates = {"head.bias": torch.ones(5)}
    rates = [measure_rates(model, updates, [given], generator=seeded(0)).rates for given in (batch, {**batch, **extra})]
    assert rates[0] == rates[1]


def test_columns_that_forward_takes_without_naming_them_stay() -> None:
    batch = {"input_ids": SOURCES, "factor": torch.full((3, 1, 1), 3.0)}
    rates = measure_rates(UsesAny(), {"head.bias": torch.ones(5)}, [batch], estimator="exact").rates
    assert rates["head.bias"] == pytest.approx(3.0)


def test_a_model_without_any_of_the_columns_says_so() -> None:
    with pytest.raises(
        ValueError, match=r"Fixed cannot be run on a probe batch: TypeError.*\['x'\].*'input_ids'.*output="
    ):
        MeasuredOutput().check(Fixed(), {"x": SOURCES}, torch.device("cpu"))
