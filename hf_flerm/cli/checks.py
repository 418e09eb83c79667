"""What the command line checks before it loads a model, and how it reports what is wrong."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import typer

WRONG_INPUT = 2  # exit code, as for wrong options
_SECONDS = 5.0  # how long the Hub may take to answer


@contextmanager
def errors_as_usage() -> Iterator[None]:
    """Context manager: report ValueError, ImportError and OSError in one line, and exit with code 2."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        typer.echo(f"error: {printable(' '.join(str(error).split()))}", err=True)
        raise typer.Exit(WRONG_INPUT) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Context manager: hide warnings of other libraries, and their progress bars unless standard error is a terminal.

    Warnings of hf_flerm stay.
    """
    import datasets
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    bars_of_datasets = datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if not bars_of_datasets:
            datasets.enable_progress_bars()


def check_source(what: str, source: str, repo_type: Literal["model", "dataset"] = "model") -> None:
    """Raise ValueError unless a source exists on disk, or may be a repository on the Hub.

    The Hub is asked, once, only for a name without an owner, such as `gpt2`: without this, libraries ask for each of
    their files with pauses, and report the last failure.

    Args:
        what: What the source is, for the message.
        source: A folder, a file, or the id of a repository.
        repo_type: Kind of repository.
    """
    if Path(source).exists():
        return
    owner, slash, name = source.partition("/")
    if slash and (owner in ("", ".", "..", "~") or not name or "/" in name):
        raise ValueError(f"the {what} {source!r} does not exist: there is no such file or folder.")
    if slash or _is_known_to_the_hub(source, repo_type):
        return
    raise ValueError(
        f"the {what} {source!r} does not exist: there is no file or folder, and no repository was found on the Hub, "
        "where names have the form owner/name."
    )


def check_folder(what: str, source: str) -> None:
    """Raise ValueError unless a source is a folder, or may be a repository on the Hub; see `check_source`."""
    check_source(what, source)
    if Path(source).is_file():
        raise ValueError(f"the {what} {source!r} is a file; it must be a folder or a repository.")


def check_suffix(output: Path, allowed: Sequence[str]) -> None:
    """Raise ValueError unless the name of a file to write has one of the allowed endings."""
    if output.suffix.lower() not in allowed:
        raise ValueError(f"--output is '{output}'; it must end in {' or '.join(allowed)}.")


def check_output_folder(output: Path) -> None:
    """Raise ValueError if a folder to write into is a file, or has the name of one."""
    if output.is_file() or output.suffix == ".safetensors":
        raise ValueError(f"--output is '{output}'; it must be a folder. The file in it has a fixed name.")


def printable(value: object) -> str:
    """Replace unprintable characters, which could control the terminal."""
    return "".join(character if character.isprintable() else " " for character in str(value))


def _is_known_to_the_hub(name: str, repo_type: Literal["model", "dataset"]) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import GatedRepoError
    from huggingface_hub.file_download import repo_folder_name

    try:
        if Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=repo_type)).is_dir():
            return True
        HfApi().repo_info(name, repo_type=repo_type, timeout=_SECONDS)
    except GatedRepoError:
        return True
    except Exception:  # their classes vary with the version of the Hub client and its HTTP library
        return False
    return True
