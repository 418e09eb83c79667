"""The model card: its picture, its texts, and what of a profile it tells."""

from __future__ import annotations

from io import BytesIO

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from hf_flerm import RateProfile, RateProfileError
from hf_flerm.show.card import profile_files, updated_card
from hf_flerm.show.figures import COLORS


def test_a_cards_picture_is_small_and_keeps_the_colors_of_the_lines() -> None:
    found = RateProfile([0, 1], {f"{name}.w": [1.0, index + 2.0] for index, name in enumerate("abcdefg")})
    content = profile_files(found, "org/repo")["rate_profile.png"]
    assert len(content) < 50_000
    pixels = torch.frombuffer(bytearray(Image.open(BytesIO(content)).convert("RGB").tobytes()), dtype=torch.uint8)
    colors = pixels.view(-1, 3).unique(dim=0).int()
    for color in COLORS:
        wanted = torch.tensor([int(color[start : start + 2], 16) for start in (1, 3, 5)])
        assert (colors - wanted).abs().amax(1).min() <= 3, color


def test_a_card_is_the_same_twice_and_its_texts_are_only_text() -> None:
    hostile = "</div><script>alert(1)</script>|`x`\n# heading [a](b)"
    metadata = {"model": hostile, "training_arguments": {"learning_rate": 0.1, "lr_scheduler_type": hostile}}
    found = RateProfile([0], {"w|`<b>`": [1.0]}, metadata)
    first = profile_files(found, "org/repo")
    assert first == profile_files(found, "org/repo", ModelCard(first["README.md"].decode()))
    text = first["README.md"].decode()
    assert "<script" not in text
    assert "\n# heading" not in text
    assert "<b>" not in text
    card = ModelCard(text)
    assert card.data.library_name == "hf_flerm"
    assert 'profile="org/repo"' in card.text


def test_a_card_tells_the_sweep_and_ignores_one_of_another_form() -> None:
    def row(sweep: object) -> str:
        card = updated_card(RateProfile([0], {"w": [1.0]}, {"sweep": sweep}), "org/repo")
        return next((line for line in card.text.splitlines() if line.startswith("| sweep")), "")

    assert row([[0.01, 2.5], [0.1, None]]) == "| sweep | 0.01: loss 2.5, 0.1: loss nan |"
    assert all(row(other) == "" for other in ("text", [1], [[1, 2, 3]], {"0.1": 2}, [["0.1", "2"]], [[[], {}]]))


def test_a_card_names_the_base_model_and_refuses_a_broken_section() -> None:
    found = RateProfile([0], {"w": [1.0]}, {"adapters": {"default": {"base_model_name_or_path": "org/base"}}})
    assert updated_card(found, "org/repo").data.base_model == "org/base"
    with pytest.raises(RateProfileError, match="Remove that section"):
        updated_card(found, "org/repo", ModelCard("---\ntags: []\n---\n<!-- hf_flerm: rate profile -->\nmine\n"))
