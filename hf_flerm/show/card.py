"""The model card of a profile: a section of a model's card, or a card of its own."""

from __future__ import annotations

import os
import re
from io import BytesIO
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..profile.file import PROFILE_NAME, RateProfileError
from ..profile.rate_profile import RateProfile
from .summary import described, rates_by_kind

logger = logging.get_logger(__name__)

PICTURE_NAME = "rate_profile.png"
LIBRARY = "hf_flerm"
TAGS = ("hf_flerm", "rate-profile", "function-space-learning-rates")
_BEGIN, _END = "<!-- hf_flerm: rate profile -->", "<!-- hf_flerm: end -->"
_SECTION = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_PAPER = "https://arxiv.org/abs/2502.17405"
_MOST_CHARACTERS = 200  # of a text from a file


def profile_files(profile: RateProfile, address: str, card: ModelCard | None = None) -> dict[str, bytes]:
    """Make what lies in a folder or repository that shares a profile.

    Args:
        profile: The profile.
        address: What others write to load it: the id of its repository.
        card: The card that is there already.

    Returns:
        `{file name: content}`: the profile, the card and, where matplotlib is installed, the picture.

    Raises:
        RateProfileError: If the card that is there has a section that does not end.
    """
    files = {PROFILE_NAME: profile.to_bytes()}
    try:
        files[PICTURE_NAME] = _picture(profile)
    except ImportError as error:
        logger.warning(f"the card has no picture: {error}")
    updated = updated_card(profile, address, card, with_picture=PICTURE_NAME in files)
    files[REPOCARD_NAME] = str(updated).encode()
    return files


def updated_card(
    profile: RateProfile, address: str, card: ModelCard | None = None, *, with_picture: bool = False
) -> ModelCard:
    """Write the section of a profile into a card; all else in the card stays as it is.

    Args:
        profile: The profile.
        address: What others write to load it: the id of its repository.
        card: The card that is there already. None: a new one.
        with_picture: Whether the picture lies beside the card.

    Returns:
        The card, with the section in place of an earlier one or at its end, and with what search needs: tags, and the
        library and base model if it names none.

    Raises:
        RateProfileError: If the card that is there has a section that does not end.
    """
    section = f"{_BEGIN}\n{_section(profile, address, with_picture)}\n{_END}"
    if card is None:
        card = ModelCard(f"---\n{ModelCardData(library_name=LIBRARY).to_yaml()}\n---\n\n# {_plain(address)}\n")
    if card.text.count(_BEGIN) != len(_SECTION.findall(card.text)):
        raise RateProfileError(f"the card has a line {_BEGIN!r} with no {_END!r} after it. Take that section out.")
    data: Any = card.data
    data.tags = [*(tags := _texts(data.tags)), *(tag for tag in TAGS if tag not in tags)]
    if getattr(data, "base_model", None) is None and (base := _base_model(profile)):
        data.base_model = base
    if data.library_name is None:
        data.library_name = LIBRARY
    if _BEGIN in card.text:
        kept = iter([section])
        card.text = _SECTION.sub(lambda _: next(kept, ""), card.text)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    return card


def _section(profile: RateProfile, address: str, with_picture: bool) -> str:
    rate = profile.about.learning_rate
    at_rate = "" if rate is None else f" at learning rate {_plain(rate)}"
    facts = [f"| {what} | {_plain(text)} |" for what, text in described(profile).items()]
    rows = [
        f"| `{_plain(kind)}` | {len(rates.names)} | {_number(rates.mean[:1])} | {_number(rates.mean[-1:])} |"
        for kind, rates in rates_by_kind(profile).items()
    ]
    return "\n".join(
        [
            "## Function-space learning rates",
            "",
            f"`{PROFILE_NAME}` says how far the updates of each tensor moved the outputs of this model while it was "
            f"trained{at_rate} ([Milsom, Anson, Aitchison, 2025]({_PAPER})), measured with `hf_flerm`. A bigger model, "
            "another rank or another initialization can be trained at the same learning rate so that its outputs move "
            "as far:",
            "",
            "```python",
            "from hf_flerm import FLeRMConfig, FLeRMTrainer",
            "",
            f'flerm = FLeRMConfig(mode="match", profile="{_plain(address)}")',
            "FLeRMTrainer(model=model, args=args, train_dataset=data, flerm=flerm).train()",
            "```",
            "",
            *([f"![rates over training, by kind of tensor]({PICTURE_NAME})", ""] if with_picture else []),
            "| | |",
            "|---|---|",
            *facts,
            "",
            "Rates in output units per unit learning rate, geometric means over the tensors of a kind:",
            "",
            "| kind of tensor | tensors | at the first measured step | at the last |",
            "|---|---|---|---|",
            *rows,
            "",
            "Limits: the learning rate must have been tuned on this run; a profile carries it over and does not find "
            "it. Rates are of first order, and of this data and optimizer: match with data and an optimizer of the "
            "same kind. What is tabled above was written by the run; `hf-flerm validate` checks its form only.",
        ]
    )


def _picture(profile: RateProfile) -> bytes:
    """The picture of rates as a PNG of 256 colors, which is a quarter as large."""
    from PIL import Image  # matplotlib has it

    from .plotting import close, plot_profile

    figure = plot_profile(profile)
    drawn, small = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    close(figure)
    few = Image.open(drawn).convert("RGB").quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(small, format="png", optimize=True)
    return small.getvalue()


def _base_model(profile: RateProfile) -> str | None:
    """The base model's repository, if it is one; a folder of the machine that trained is nobody's business."""
    for name in profile.about.base_models:
        if not os.path.exists(name):
            try:
                validate_repo_id(name)
            except HFValidationError:
                continue
            return name
    return None


def _texts(tags: object) -> list[str]:
    return [tags] if isinstance(tags, str) else [str(tag) for tag in tags] if isinstance(tags, list) else []


def _plain(text: object) -> str:
    """A text from a file as one line that Markdown, HTML and Python take for nothing but text."""
    shown = "".join(character if character.isprintable() else " " for character in str(text)[:_MOST_CHARACTERS])
    return re.sub(r"[|`<>\[\]\"\\]", "_", shown)


def _number(values: object) -> str:
    row = [value for value in values.tolist() if value == value]  # type: ignore[attr-defined]
    return f"{row[0]:.3g}" if row else "0"
