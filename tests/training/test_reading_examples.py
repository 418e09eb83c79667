"""Reading examples for probes changes nothing, whatever collators and data sets do with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BatchEncoding

from hf_flerm import FLeRMConfig, Research, plan
from hf_flerm.training.probe_data import copied
from tests.shared.plans import arguments, recorded
from tests.shared.training import MEASURED, Rows, assert_same_run, flerm_callback, gpt2, make_trainer, train

TOKENS = Rows(24).tokens


class Kept(Dataset):
    """Hands out the very objects that it holds."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


class Cached(Dataset):
    """Makes an example when it is first read, and hands out the same one from then on."""

    def __init__(self) -> None:
        self.cache: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index not in self.cache:
            self.cache[index] = {"input_ids": TOKENS[index].clone(), "labels": TOKENS[index].clone()}
        return self.cache[index]


@dataclass
class Example:
    tokens: Tensor
    tags: list[int]


class Plain:
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens


def batch_of(rows: list[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}


def pops(examples: list[Any]) -> dict[str, Tensor]:
    return batch_of([torch.as_tensor(example.pop("labels")) for example in examples])


def writes(examples: list[Any]) -> dict[str, Tensor]:
    """Masks a token for good, as a collator does that forgets to clone; a third reading has other tokens."""
    for example in examples:
        example["input_ids"][:] = (example["input_ids"] + 1) % 32
    return batch_of([torch.as_tensor(example["input_ids"]) for example in examples])


def appends(examples: list[Any]) -> dict[str, Tensor]:
    for example in examples:
        example["input_ids"].append(len(example["input_ids"]) % 32)
    return batch_of([torch.tensor(example["input_ids"][-8:]) for example in examples])


def writes_attributes(examples: list[Any]) -> dict[str, Tensor]:
    for example in examples:
        example.tokens += 1
        example.tokens %= 32
    return batch_of([example.tokens.clone() for example in examples])


Case = tuple[Callable[[], Any], Callable[[list[Any]], dict[str, Tensor]]]
CASES: dict[str, Case] = {
    "pops, rows of lists": (lambda: [{"labels": row} for row in TOKENS.tolist()], pops),
    "pops, encodings": (lambda: Kept([BatchEncoding({"labels": row}) for row in TOKENS.tolist()]), pops),
    "writes into tensors": (lambda: Kept([{"input_ids": row.clone()} for row in TOKENS]), writes),
    "writes into arrays": (lambda: Kept([{"input_ids": row.clone().numpy()} for row in TOKENS]), writes),
    "writes into a cache": (Cached, writes),
    "appends to lists": (lambda: Kept([{"input_ids": row} for row in TOKENS.tolist()]), appends),
    "writes into a dataclass": (lambda: Kept([Example(row.clone(), []) for row in TOKENS]), writes_attributes),
    "writes into an object": (lambda: Kept([Plain(row.clone()) for row in TOKENS]), writes_attributes),
}


@pytest.mark.parametrize("name", CASES)
def test_recording_trains_on_what_plain_training_reads(tmp_path: Path, name: str) -> None:
    data, collator = CASES[name]
    # Popped labels are gone in a second epoch, with and without probes.
    options = {"remove_unused_columns": False, "max_steps": 6 if name.startswith("pops") else 9}
    extra = {"data_collator": collator}
    plain = train(make_trainer(tmp_path, gpt2(), data=data(), extra=extra, **options))
    trainer = make_trainer(tmp_path, gpt2(), FLeRMConfig(), data=data(), extra=extra, **options)
    assert_same_run(train(trainer), plain)
    # Training itself has popped the labels of some rows after a step: probes that draw one of these fail.
    expected = MEASURED[:1] if name.startswith("pops") else MEASURED
    assert set(expected) <= set(flerm_callback(trainer).rate_profile.steps.tolist())


@pytest.mark.parametrize("name", ["pops, rows of lists", "writes into tensors", "writes into an object"])
def test_planning_leaves_the_examples_as_they_are(tmp_path: Path, name: str) -> None:
    data, collator = CASES[name]
    base = recorded(tmp_path / "base", gpt2())
    rows = data()
    before = copy.deepcopy(rows)
    options = arguments(tmp_path, remove_unused_columns=False)
    settings = {"steps": 3, "config": FLeRMConfig(research=Research(probes=2))}
    plan(gpt2(), options, rows, base, data_collator=collator, **settings)
    for index in range(len(rows)):
        kept, found = (x if isinstance(x, (dict, BatchEncoding)) else vars(x) for x in (before[index], rows[index]))
        assert kept.keys() == found.keys()
        assert all(torch.equal(torch.as_tensor(kept[key]), torch.as_tensor(found[key])) for key in kept)


class Pair(NamedTuple):
    first: list[int]
    second: Tensor


def test_a_copy_shares_nothing_that_can_be_written_into() -> None:
    base = torch.ones(3, requires_grad=True)
    example = {
        "pair": Pair([1, 2], torch.zeros(2)),
        "nested": ({"array": np.zeros(2)}, {1, 2}, bytearray(b"ab")),
        "computed": base * 2,  # in a graph
        "text": "abc",
    }
    found = copied(example)
    assert type(found["pair"]) is Pair
    found["pair"].first.append(3)
    found["pair"].second.add_(1)
    found["nested"][0]["array"][:] = 1
    found["nested"][1].clear()
    found["nested"][2].clear()
    with torch.no_grad():
        found["computed"].add_(1)
    assert example["pair"].first == [1, 2]
    assert not example["pair"].second.any()
    assert not example["nested"][0]["array"].any()
    assert example["nested"][1] == {1, 2}
    assert example["nested"][2] == b"ab"
    assert (example["computed"] == 2).all()


def test_what_only_refers_to_data_is_not_copied(tmp_path: Path) -> None:
    file = (tmp_path / "text").open("w")
    row = {"file": file, "owner": Kept([1]), "make": lambda: 1}
    found = copied(row)
    assert found is not row
    assert all(found[name] is row[name] for name in row)
    file.close()
