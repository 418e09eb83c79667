"""What examples probes are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from hf_flerm import FLeRMConfig, Research
from hf_flerm.rates.probe import RateProbe
from tests.shared.trainer_runs import DROPOUT
from tests.shared.training import MEASURED, Rows, Stream, assert_identical, assert_same_run, gpt2, make_trainer, train


def test_a_stream_is_recorded_with_a_probe_dataset(folder: Path) -> None:
    plain = train(make_trainer(folder, gpt2(DROPOUT), data=Stream()))
    trainer = make_trainer(folder, gpt2(DROPOUT), FLeRMConfig(), data=Stream(), probe_dataset=Rows(8, seed=3))
    assert_same_run(train(trainer), plain)
    assert trainer.rate_profile.steps.tolist() == MEASURED


def probed(folder: Path, patch: pytest.MonkeyPatch, data: Rows, config: FLeRMConfig, **options: Any) -> list[Tensor]:
    """The token batches of every probe of a run of two steps."""
    seen: list[Tensor] = []
    measure = RateProbe.measure

    def spying(probe: RateProbe, updates: Mapping[str, Tensor], batches: Iterator[Any], *rest: Any, **more: Any) -> Any:
        batches = list(batches)
        seen.extend(batch["input_ids"] for batch in batches)
        return measure(probe, updates, batches, *rest, **more)

    with patch.context() as context:
        context.setattr(RateProbe, "measure", spying)
        make_trainer(folder, gpt2(), config, probe_dataset=data, max_steps=2, **options).train()
    return seen


def test_probes_draw_from_the_probe_dataset_by_their_own_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Rows(7, seed=3)
    config = FLeRMConfig(research=Research(probes=3, probe_batch_size=5))
    batches = probed(folder, monkeypatch, data, config)
    assert [len(batch) for batch in batches] == [5] * 6
    rows = [[tuple(row) for row in batch.tolist()] for batch in batches]
    assert {row for batch in rows for row in batch} == {tuple(row) for row in data.tokens.tolist()}
    assert all(len(set(batch)) == 5 for batch in rows), "an example came twice in one batch"
    assert len({tuple(batch) for batch in rows}) == 6, "steps or probes share their batch"
    assert_identical(probed(folder, monkeypatch, data, config, seed=1), batches)
    other = probed(folder, monkeypatch, data, FLeRMConfig(seed=1, research=Research(probes=3, probe_batch_size=5)))
    assert not any(torch.equal(left, right) for left, right in zip(other, batches, strict=True))


@pytest.mark.parametrize(
    ("batch", "accumulation", "probe_batch", "probes"),
    [(1, 1, 1, 1), (4, 1, 1, 1), (4, 2, 2, 1), (2, 8, 2, 2), (3, 5, 3, 2), (12, 4, 4, 1)],
)
def test_a_measurement_draws_half_as_often_as_a_step_sees_examples(
    folder: Path, monkeypatch: pytest.MonkeyPatch, batch: int, accumulation: int, probe_batch: int, probes: int
) -> None:
    """Twice per example, rounded up to whole batches no larger than the training's, and at most 8 draws."""
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    batches = probed(folder, monkeypatch, Rows(12, seed=3), FLeRMConfig(measure_steps=(0,)), **options)
    assert [len(rows) for rows in batches] == [probe_batch] * probes


def test_columns_that_the_model_does_not_take_are_left_out_of_probes(
    folder: Path, warnings_of: Callable[[], list[str]]
) -> None:
    """The Trainer drops them from a training set; the same data set must do as a probe data set."""
    tokens = Rows().tokens.tolist()
    ragged = [list(range(index)) for index in range(len(tokens))]  # no collator could make a tensor of these
    data = datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens, "source": ragged})
    trainer = make_trainer(folder, gpt2(), FLeRMConfig(), data=data, probe_dataset=data, max_steps=2)
    trainer.train()
    assert warnings_of() == []
    assert trainer.rate_profile.steps.tolist() == [0, 1]
