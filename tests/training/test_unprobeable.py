"""A model or data that cannot be probed: refused before a match, told before and after a recording."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer

from hf_flerm import FLeRMConfig, FLeRMMixin, RateProfile, Research, measure_rates
from hf_flerm.training.probe_data import ProbeData
from tests.shared.training import Rows, arguments, assert_same_run, flerm_callback, gpt2, make_trainer, train


class Net(nn.Module):
    """A class for every token; subclasses differ in how they are called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)

    def result(self, input_ids: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        logits = self.head(self.embedding(input_ids).tanh())
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class OneDict(Net):
    """Is called with the batch itself."""

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return self.result(batch["input_ids"], batch["labels"])


class InTrainingAlone(Net):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if not self.training:
            raise NotImplementedError("evaluation is to come")
        return self.result(input_ids, labels)


class Detached(Net):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        result = self.result(input_ids, labels)
        return {**result, "logits": result["logits"].detach()}


class GivesTheBatch(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(inputs)["loss"]


class FLeRMGivesTheBatch(FLeRMMixin, GivesTheBatch):
    pass


def match(model: nn.Module) -> FLeRMConfig:
    rates = {name: [1.0] for name, _ in model.named_parameters()}
    return FLeRMConfig(mode="match", profile=RateProfile([0], rates))


def trainer_of(folder: Path, model: nn.Module, flerm: FLeRMConfig) -> Trainer:
    if isinstance(model, OneDict):
        options = arguments(folder, remove_unused_columns=False)
        return FLeRMGivesTheBatch(model=model, args=options, train_dataset=Rows(), flerm=flerm)
    return make_trainer(folder, model, flerm)


@pytest.mark.parametrize("kind", [OneDict, InTrainingAlone])
def test_a_model_that_cannot_be_run_is_refused_before_it_is_matched(tmp_path: Path, kind: type[Net]) -> None:
    model = kind()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(tmp_path, model, match(model))
    with pytest.raises(ValueError, match=f"{kind.__name__} cannot be run on a probe batch: .*output=.*probe_dataset"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [OneDict, InTrainingAlone])
def test_a_model_that_cannot_be_run_is_trained_and_told_of_where_it_is_recorded(
    tmp_path: Path, kind: type[Net], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path, kind(), FLeRMConfig())
    trainer.train()
    assert trainer.state.global_step == 6
    assert not len(flerm_callback(trainer).rate_profile.steps)
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    (refusal,) = (message for message in told if "cannot be run on a probe batch" in message)
    assert "output=" in refusal
    assert any("profile is empty" in message for message in told)


def test_what_the_message_says_helps(tmp_path: Path) -> None:
    config = FLeRMConfig(output=lambda model, batch: model(batch)["logits"], measure_steps=[0])
    trainer = trainer_of(tmp_path, OneDict(), config)
    trainer.train()
    assert (flerm_callback(trainer).rate_profile.rates["head.bias"] > 0).all()


@pytest.mark.parametrize("mode", ["record", "match"])
def test_logits_that_are_cut_off_from_the_weights_are_refused(tmp_path: Path, mode: str) -> None:
    model = Detached()
    trainer = make_trainer(tmp_path, model, FLeRMConfig() if mode == "record" else match(model))
    with pytest.raises(ValueError, match="depends on no parameter through autograd: nothing can be measured"):
        trainer.train()
    assert trainer.state.global_step == 0


# Examples that cannot be mixed
# -----------------------------


class Ragged(Dataset):
    """Rows of two lengths, in pairs of one length."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = Rows().tokens[index, : 8 if index % 4 < 2 else 5]
        return {"input_ids": tokens, "labels": tokens}


class InPairs(Trainer):
    """Batches of neighbors: the sampler keeps lengths together."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(range(16))


class FLeRMInPairs(FLeRMMixin, InPairs):
    pass


class OneByOne(Net):
    """Takes one example at a time in a probe, where they are of any kind."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if not self.training and len(input_ids) > 1:
            raise RuntimeError("images of one size alone")
        return self.result(input_ids, labels)


def test_examples_that_cannot_be_stacked_are_probed_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    given = {"train_dataset": Ragged(), "args": arguments(tmp_path, **options)}
    config = FLeRMConfig(research=Research(probe_batch_size=2))
    plain = train(InPairs(model=gpt2(), **given))
    trainer = FLeRMInPairs(model=gpt2(), **given, flerm=config)
    assert_same_run(train(trainer), plain)
    assert flerm_callback(trainer).rate_profile.steps.tolist() == [0, 1, 2]
    told = [record.message for record in caplog.records if "one at a time" in record.message]
    assert len(told) == 1
    assert "stack" in told[0]


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_in_step_draw_as_many_batches_as_each_other(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(num_processes=processes, process_index=0, device=torch.device("cpu"))
    monkeypatch.setattr("hf_flerm.training.probe_data.PartialState", lambda: state)
    loader = torch.utils.data.DataLoader(Ragged(), batch_size=2 * processes)
    config = FLeRMConfig(research=Research(probe_batch_size=2, probes=8))
    batches, _ = ProbeData(config, loader, batch_size=2).drawn(0, torch.device("cpu"))
    sizes = [len(batch["input_ids"]) for batch in batches]
    assert {1, 2} == set(sizes)
    assert len(sizes) == 8 if processes > 1 else sum(sizes) == 16


def test_examples_that_cannot_be_run_together_are_probed_one_by_one(tmp_path: Path) -> None:
    config = FLeRMConfig(measure_steps=[0], research=Research(probe_batch_size=4, probes=64))
    trainer = make_trainer(tmp_path, OneByOne(), config, optim="sgd", max_grad_norm=0.0)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.args.max_steps = 1
    trainer.train()
    profile = flerm_callback(trainer).rate_profile
    assert profile.metadata["flerm"]["probe_batch_size"] == 1
    assert profile.metadata["flerm"]["probes"] == 256
    model = Plain()
    model.load_state_dict(before)
    updates = {name: (p.detach() - before[name]) / 1e-2 for name, p in trainer.model.named_parameters()}
    whole = {"input_ids": Rows().tokens}
    expected = measure_rates(model, updates, [whole], estimator="exact").rates
    for name, rate in expected.items():
        assert profile.rates[name][0] == pytest.approx(rate, rel=0.2), name  # 512 draws, their examples at random


class Plain(Net):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return self.result(input_ids, labels)


# What only the loss needs
# ------------------------


class Weighted(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**Rows()[index], "weight": torch.tensor(0.5 + index % 2), "source": "web"}


class WeighsLosses(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        weights, labels = inputs.pop("weight"), inputs.pop("labels")
        inputs.pop("source", None)
        logits = model(**inputs)["logits"]
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return (losses.reshape(len(weights), -1).mean(1) * weights).mean()


class FLeRMWeighsLosses(FLeRMMixin, WeighsLosses):
    pass


def collated(rows: list[Any]) -> dict[str, Any]:
    tensors = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels", "weight")}
    return {**tensors, "source": [row["source"] for row in rows]}


@pytest.mark.parametrize("build", [gpt2, Plain])
def test_columns_that_a_compute_loss_takes_out_are_no_inputs(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    given = {
        "args": arguments(tmp_path, remove_unused_columns=False),
        "train_dataset": Weighted(),
        "data_collator": collated,
    }
    plain = train(WeighsLosses(model=build(), **given))
    trainer = FLeRMWeighsLosses(model=build(), **given, flerm=FLeRMConfig())
    assert_same_run(train(trainer), plain)
    profile = flerm_callback(trainer).rate_profile
    assert profile.steps.tolist() == [0, 1, 2, 4]
    assert any(rates.any() for rates in profile.rates.values())
