"""What `plan` refuses before it copies anything, and what it warns of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, default_data_collator

from hf_flerm import RateProfile, plan
from hf_flerm.planning.checks import check_training, warn_if_trained
from tests.shared.plans import arguments, lora
from tests.shared.training import LENGTH, Rows, gpt2

TEXTS = ["the cat", "the dog", "the rat", "the mat"] * 4
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]
PROFILE = RateProfile([0], {"x": [1.0]})


class Whole(torch.nn.Module):
    """Cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError


RAW = {"text": {"text": TEXTS}, "label": {"text": TEXTS, "label": list(range(16))}, "chat": {"messages": CHATS}}


@pytest.mark.parametrize("columns", RAW)
@pytest.mark.parametrize("collator", [None, default_data_collator, DataCollatorForLanguageModeling])
def test_texts_are_refused_before_anything_is_copied(tmp_path: Path, columns: str, collator: Any) -> None:
    if isinstance(collator, type):
        collator = object.__new__(collator)
    rows = Dataset.from_dict(RAW[columns])
    with pytest.raises(ValueError, match=r"holds texts \((text|messages)\) and no input_ids.*Tokenize it.*SFTTrainer"):
        plan(Whole(), arguments(tmp_path), rows, PROFILE, data_collator=collator)


def test_what_can_be_collated_is_not_refused() -> None:
    tokens = Rows().tokens.tolist()
    check_training(Dataset.from_dict({"text": TEXTS}), lambda rows: {})  # may tokenize
    check_training(Dataset.from_dict({"text": TEXTS, "input_ids": tokens}), None)
    check_training(Dataset.from_dict({"file": TEXTS, "pixel_values": tokens}), None)
    check_training(Rows(), default_data_collator)


@pytest.mark.parametrize("option", ["granularity", "probe_dataset", "config"])
def test_options_of_a_base_need_its_profile(tmp_path: Path, option: str) -> None:
    with pytest.raises(TypeError, match=rf"takes {option} only with the profile of a base"):
        plan(Whole(), arguments(tmp_path), Rows(), **{option: "kind"})


def test_a_model_that_has_been_trained_is_warned_of(warnings_of: Callable[[], list[str]]) -> None:
    for fresh in (lora(), lora(init_lora_weights="gaussian"), lora(init_lora_weights=False), gpt2()):
        warn_if_trained(fresh)
    assert warnings_of() == []
    warn_if_trained(gpt2(), steps_done=7)
    assert "trained already (its trainer has made 7 steps)" in warnings_of()[-1]
    model = lora()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).view(-1)[LENGTH] = 1e-3
    warn_if_trained(model)
    assert "lora_B.default.weight is not 0" in warnings_of()[-1]
    assert len(warnings_of()) == 2
