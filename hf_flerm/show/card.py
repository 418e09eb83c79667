"""The model card of a profile: a section in the card of a model, or a new card."""

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
from .summary import describe, rates_by_kind

logger = logging.get_logger(__name__)

PICTURE_NAME = "rate_profile.png"
LIBRARY = "hf_flerm"
TAGS = ("hf_flerm", "rate-profile", "function-space-learning-rates")
_BEGIN, _END = "<!-- hf_flerm: rate profile -->", "<!-- hf_flerm: end -->"
_SECTION = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_PAPER = "https://arxiv.org/abs/2502.17405"
_LONGEST_TEXT = 200  # in characters, of a text from a file in the card


def profile_files(profile: RateProfile, address: str, card: ModelCard | None = None) -> dict[str, bytes]:
    """Return the files of a folder or repository that shares a profile.

    Args:
        profile: The profile.
        address: Repository id with which others load the profile.
        card: The existing card. None: a new one.

    Returns:
        `{file name: content}` of the profile, the card and, if matplotlib is installed, the picture.

    Raises:
        RateProfileError: If the section of an earlier profile in `card` has no end.
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
    """Write the section of a profile into a card; the rest of the card is unchanged.

    Args:
        profile: The profile.
        address: Repository id with which others load the profile.
        card: The existing card. None: a new one.
        with_picture: Whether the folder has the picture.

    Returns:
        The card. The section replaces the section of an earlier profile, else it is added at the end. For search on the
        Hub, tags are added; library and base model, too, if the card names none.

    Raises:
        RateProfileError: If the section of an earlier profile in `card` has no end.
    """
    section = f"{_BEGIN}\n{_section(profile, address, with_picture)}\n{_END}"
    if card is None:
        card = ModelCard(f"---\n{ModelCardData(library_name=LIBRARY).to_yaml()}\n---\n\n# {_safe(address)}\n")
    if card.text.count(_BEGIN) != len(_SECTION.findall(card.text)):
        raise RateProfileError(f"the card contains {_BEGIN!r} without a matching {_END!r}. Remove that section.")
    data: Any = card.data
    data.tags = [*(tags := _texts(data.tags)), *(tag for tag in TAGS if tag not in tags)]
    if getattr(data, "base_model", None) is None and (base := _base_model(profile)):
        data.base_model = base
    if data.library_name is None:
        data.library_name = LIBRARY
    if _BEGIN in card.text:  # the first section is replaced, further ones are removed
        kept = iter([section])
        card.text = _SECTION.sub(lambda _: next(kept, ""), card.text)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    return card


def _section(profile: RateProfile, address: str, with_picture: bool) -> str:
    rate = profile.about.learning_rate
    at_rate = "" if rate is None else f" at learning rate {_safe(rate)}"
    facts = [f"| {what} | {_safe(text)} |" for what, text in describe(profile).items()]
    rows = [
        f"| `{_safe(kind)}` | {len(rates.names)} | {_first_rate(rates.mean[:1])} | {_first_rate(rates.mean[-1:])} |"
        for kind, rates in rates_by_kind(profile).items()
    ]
    return "\n".join(
        [
            "## Function-space learning rates",
            "",
            f"`{PROFILE_NAME}` holds the function-space learning rates of this model, trained{at_rate}: how much the "
            "update of each tensor changed the outputs of the model, per unit learning rate "
            f"([Milsom, Anson, Aitchison, 2025]({_PAPER})). They were measured with `hf_flerm`. To train a larger "
            "model, or this one with another rank or initialization, with the same learning rate, match them:",
            "",
            "```python",
            "from hf_flerm import FLeRMConfig, FLeRMTrainer",
            "",
            f'flerm = FLeRMConfig(mode="match", profile="{_safe(address)}")',
            "FLeRMTrainer(model=model, args=args, train_dataset=data, flerm=flerm).train()",
            "```",
            "",
            *([f"![rates over training, by kind of tensor]({PICTURE_NAME})", ""] if with_picture else []),
            "| | |",
            "|---|---|",
            *facts,
            "",
            "Rates are in output units per unit learning rate, and geometric means over the tensors of a kind:",
            "",
            "| kind of tensor | tensors | at the first measured step | at the last |",
            "|---|---|---|---|",
            *rows,
            "",
            "Limits: a profile transfers a learning rate to another model. It does not find one: the learning rate of "
            "this run must have been tuned. Rates are first-order changes, measured with this data and optimizer; "
            "match with similar data and a similar optimizer. The tables above show the metadata of the file, which "
            "are not verified: `hf-flerm validate` checks only the file format.",
        ]
    )


def _picture(profile: RateProfile) -> bytes:
    """Draw the rates and return a PNG with 256 colors, a quarter of the size of the full one."""
    from PIL import Image  # a dependency of matplotlib

    from .plotting import close, plot_profile

    figure = plot_profile(profile)
    drawn, small = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    close(figure)
    few = Image.open(drawn).convert("RGB").quantize(method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(small, format="png", optimize=True)
    return small.getvalue()


def _base_model(profile: RateProfile) -> str | None:
    """Return the repository of the base model. Local folders are left out, so that a card does not show local paths."""
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


def _safe(text: object) -> str:
    """Make a text from a file safe for a card: one line, with the syntax of Markdown, HTML and Python replaced."""
    line = "".join(character if character.isprintable() else " " for character in str(text)[:_LONGEST_TEXT])
    return re.sub(r"[|`<>\[\]\"\\]", "_", line)


def _first_rate(values: object) -> str:
    """Format a row of at most one rate; "0" for an empty row and for nan (all tensors have rate 0)."""
    row = [value for value in values.tolist() if value == value]  # type: ignore[attr-defined]
    return f"{row[0]:.3g}" if row else "0"
