"""Bad input never starts a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from torch import Tensor, nn
from torch.optim import SGD
from transformers import TrainerCallback

from hf_flerm import FLeRMArguments, FLeRMCallback, FLeRMConfig, FLeRMTrainer, RateProfile, RateProfileError, Research
from hf_flerm.optimizer.param_groups import raw_optimizer
from hf_flerm.profile.rate_profile import PROFILE_NAME
from tests.shared import training
from tests.shared.trainer_runs import match, ones
from tests.shared.training import STEPS, Rows, Stream, arguments, assert_identical, gpt2, make_trainer, weights_of


class CountSteps(TrainerCallback):
    """Counts the optimizer steps."""

    def __init__(self) -> None:
        self.steps = 0

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


def frozen() -> nn.Module:
    model = gpt2()
    model.requires_grad_(False)
    return model


def one_parameter_optimizer(model: nn.Module) -> dict[str, Any]:
    kept = [
        p for name, p in model.named_parameters() if name not in ("transformer.wpe.weight", "transformer.ln_f.bias")
    ]
    return {"optimizers": (SGD(kept, lr=0.1), None)}


def other_model() -> RateProfile:
    rates = ones(gpt2())
    del rates["transformer.ln_f.bias"]
    return RateProfile([0], {**rates, "lm_head.weight": [1.0]})


class Headless(nn.Module):
    """A model that makes its loss by itself, and shows nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Embedding(training.VOCABULARY, 1)

    def score(self, batch: Mapping[str, Any]) -> Tensor:
        return self.head(batch["input_ids"]).mean(1)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": self.score({"input_ids": input_ids}).square().mean()}


BAD_INPUT: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "profile of another model": (
        lambda: {"flerm": match(other_model())},
        r"only in the profile \[lm_head.weight\]; only in the model \[transformer.ln_f.bias\].*unmatched=.*'nominal'",
    ),
    "profile of nothing in the model": (
        lambda: {"flerm": match(RateProfile([0], {"encoder.weight": [1.0]}), unmatched="nominal")},
        r"have no tensor name in common: the profile has \[encoder.weight\]",
    ),
    "profile without steps": (
        lambda: {"flerm": match(RateProfile([], {name: [] for name in ones(gpt2())}))},
        "holds no step",
    ),
    "nothing to train, record": (lambda: {"model": frozen(), "flerm": FLeRMConfig()}, "no trainable parameters"),
    "nothing to train, match": (
        lambda: {"model": frozen(), "flerm": match(RateProfile([0], ones(gpt2())))},
        "no trainable parameters",
    ),
    "empty probe dataset": (
        lambda: {"flerm": FLeRMConfig(), "probe_dataset": Rows(0)},
        "probe data set has 0 examples, and a probe batch needs 1",
    ),
    "probe dataset smaller than a batch": (
        lambda: {"flerm": FLeRMConfig(research=Research(probe_batch_size=4)), "probe_dataset": Rows(3)},
        "probe data set has 3 examples, and a probe batch needs 4",
    ),
    "training set smaller than a probe batch": (
        lambda: {"flerm": FLeRMConfig(research=Research(probe_batch_size=17))},
        "probe data set has 16 examples, and a probe batch needs 17",
    ),
    "stream": (lambda: {"flerm": FLeRMConfig(), "data": Stream()}, "stream .* pass probe_dataset"),
    "stream of the datasets library": (
        lambda: {
            "flerm": FLeRMConfig(),
            "data": datasets.Dataset.from_dict(
                {"input_ids": Rows().tokens.tolist(), "labels": Rows().tokens.tolist()}
            ).to_iterable_dataset(),
        },
        "stream .* pass probe_dataset",
    ),
    "model without logits": (
        lambda: {"model": Headless(), "flerm": FLeRMConfig()},
        "Headless returned dict without logits.*Pass output='hidden' or output=",
    ),
    "metric of classes without any": (
        lambda: {
            "model": Headless(),
            "flerm": FLeRMConfig(metric="fisher", output=lambda model, batch: model.score(batch)),
        },
        "metric 'fisher' needs the logits of at least two classes",
    ),
    "probe dataset of texts": (
        lambda: {"flerm": FLeRMConfig(), "probe_dataset": datasets.Dataset.from_dict({"text": ["a"] * 8})},
        r"no batch can be collated from the probe data set: no tensor is in \{\}.*Prepare it like the training set",
    ),
    "no labels to probe with": (
        lambda: {
            "flerm": FLeRMConfig(positions="labels"),
            "probe_dataset": [{"input_ids": tokens} for tokens in Rows().tokens],
        },
        r"positions 'labels' needs labels; a probe batch has \['input_ids'\]",
    ),
    "stream to probe with": (
        lambda: {"flerm": FLeRMConfig(), "probe_dataset": Stream()},
        "probe_dataset",
    ),
}


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_before_the_first_step(folder: Path, case: str, alone: bool) -> None:
    build, message = BAD_INPUT[case]
    refused(folder, message, alone=alone, **build())


@pytest.mark.parametrize("mode", ["record", "match"])
@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_an_optimizer_that_lacks_parameters_is_refused(folder: Path, mode: str, alone: bool) -> None:
    model = gpt2()
    config = FLeRMConfig() if mode == "record" else match(RateProfile([0], ones(model)))
    message = r"SGD does not hold the trainable parameters \[transformer.ln_f.bias, transformer.wpe.weight\]"
    refused(folder, message, model=model, flerm=config, alone=alone, extra=one_parameter_optimizer(model))


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_a_training_has_one_callback(folder: Path, alone: bool) -> None:
    model = gpt2()
    before = weights_of(model)
    second = FLeRMCallback(match(RateProfile([0], ones(model))))
    trainer = make_trainer(folder, model, second.config, alone=alone, callbacks=[second])
    with pytest.raises(
        ValueError, match="two FLeRMCallbacks or FLeRMRuns use this optimizer: scales would be applied twice"
    ):
        trainer.train()
    assert_identical(weights_of(model), before)
    trainer.remove_callback(second)
    trainer.train()
    assert trainer.state.global_step == STEPS


@pytest.mark.parametrize("given", [{"mode": "record"}, FLeRMConfig, FLeRMArguments(), None], ids=repr)
@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
def test_what_is_no_config_is_refused(folder: Path, given: Any, alone: bool) -> None:
    with pytest.raises(
        ValueError, match=r"is not an FLeRMConfig: pass FLeRMConfig\(\.\.\.\), or the config of FLeRMArguments"
    ):
        FLeRMCallback(given) if alone else FLeRMTrainer(model=gpt2(), flerm=given)


def refused(folder: Path, message: str, *, model: nn.Module | None = None, **options: Any) -> None:
    model = gpt2() if model is None else model
    before, counter = weights_of(model), CountSteps()
    trainer = make_trainer(folder, model, callbacks=[counter], **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert counter.steps == 0
    assert trainer.state.global_step == 0
    assert_identical(weights_of(model), before)
    assert not trainer.optimizer or not raw_optimizer(trainer.optimizer).state


@pytest.mark.parametrize("kind", ["trainer", "callback"])
@pytest.mark.parametrize("state", ["missing", "truncated"])
def test_a_profile_that_cannot_be_read_is_refused_at_once(tmp_path: Path, kind: str, state: str) -> None:
    if state == "truncated":
        file = RateProfile([0], ones(gpt2())).save_pretrained(tmp_path)
        file.write_bytes(file.read_bytes()[:-8])
    message = {"missing": f"no {PROFILE_NAME} in .*{tmp_path.name}", "truncated": "not a whole safetensors file"}[state]
    start = {
        "trainer": lambda: FLeRMTrainer(gpt2(), arguments(tmp_path), flerm=match(tmp_path)),
        "callback": lambda: FLeRMCallback(match(tmp_path)),
    }[kind]
    with pytest.raises(RateProfileError, match=message) as caught:
        start()
    assert str(tmp_path) in str(caught.value)
