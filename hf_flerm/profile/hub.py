"""Download the file of a profile from the Hub, and upload files in one commit. This module handles bytes only.

`huggingface_hub.ModelHubMixin` is not used: it writes a `config.json` and a card, which in a model's repository would
replace the model's, and it reads a model's `config.json` as the arguments of the profile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, HfUri, ModelCard, hf_hub_download, parse_hf_uri
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import logging

from .file import PROFILE_NAME, RateProfileError

logger = logging.get_logger(__name__)

_LOG_IN = "log in with `hf auth login`, or give a token"
# The first matching class is used, so subclasses come first: GatedRepoError is a RepositoryNotFoundError, and
# LocalEntryNotFoundError is an EntryNotFoundError.
_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, f"the repository is gated. Ask for access on its page, then {_LOG_IN}"),
    (
        RepositoryNotFoundError,
        f"the repository does not exist or is private. Check its name, or {_LOG_IN}",
    ),
    (RevisionNotFoundError, "the repository has no such revision. Check the name of the branch, tag or commit"),
    (LocalEntryNotFoundError, "the file is not in the cache, and the Hub could not be reached"),
    (EntryNotFoundError, "the repository has no such file. Was its run recorded with FLeRM?"),
)
_REFUSALS = {
    401: f"you are not logged in, or the token is invalid: {_LOG_IN}",
    403: "the token lacks the permission: use another one",
}
_TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP status codes after which a retry may succeed
_ADDRESSES = ("hf://", "http://", "https://")
_WAITS = (1, 2, 4)  # seconds before each retry

Result = TypeVar("Result")


def download(source: str, *, revision: str | None = None, subfolder: str | None = None, **options: Any) -> Path:
    """Download the file of a profile from the Hub into the cache.

    Args:
        source: A repository: its id, its id with a revision and subfolder (`org/repo@revision/subfolder`), an `hf://`
            address or one of the website.
        revision: Branch, tag or commit of the repository.
        subfolder: Folder inside the repository.
        **options: Further arguments of `hf_hub_download`.

    Returns:
        The path of the file.

    Raises:
        RateProfileError: If there is no such file.
    """
    with _explained(f"{source!r} is not a folder, a file or a repository with {PROFILE_NAME}"):
        _check_id(source)
        repo_id, address_revision, address_subfolder = _address(source)
        for what, given, in_address in (
            ("revision", revision, address_revision),
            ("subfolder", subfolder, address_subfolder),
        ):
            if given and in_address and given != in_address:
                raise ValueError(
                    f"the address contains {what} {in_address!r}, but {what}={given!r} was passed. Pass only one"
                )
        return Path(
            hf_hub_download(
                repo_id,
                PROFILE_NAME,
                subfolder=subfolder or address_subfolder,
                revision=revision or address_revision,
                **options,
            )
        )


def upload(
    repo_id: str,
    make_files: Callable[[str, ModelCard | None], Mapping[str, bytes]],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    **commit: Any,
) -> CommitInfo:
    """Upload files in one commit: the repository gets all of them or none.

    Args:
        repo_id: The repository; created if it does not exist.
        make_files: Called with the address under which others will find the files, and the existing card (None if
            there is none). Returns `{file name: content}`.
        subfolder: Folder inside the repository for all of the files; its card is the README.md there.
        revision: Branch to commit to; created if it does not exist.
        private: Whether a new repository is private. None: the default of its owner.
        token: Hub token. None: the token of the logged-in user.
        create_pr: Open a pull request with the commit.
        **commit: Further arguments of `HfApi.create_commit`.

    Raises:
        RateProfileError: If the Hub refuses the commit or cannot be reached.
    """
    api = HfApi(token=token)
    folder = PurePosixPath(subfolder or "")
    with _explained(f"{repo_id!r} could not be pushed to"):
        repo_id = _with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            _with_retries(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        card = _card(repo_id, str(folder / REPOCARD_NAME), revision, token)
        files = make_files(_written(repo_id, revision, subfolder), card)
        additions = [CommitOperationAdd(str(folder / name), content) for name, content in files.items()]
        pushed: CommitInfo = _with_retries(
            lambda: api.create_commit(repo_id, additions, revision=revision, create_pr=create_pr, **commit)
        )
    return pushed


def _check_id(source: str) -> None:
    """Raise ValueError if a source that is not on disk cannot be a repository either, so that the Hub is not asked."""
    owner, slash, name = source.partition("@")[0].partition("/")
    if not slash:
        raise ValueError("there is no such file or folder, and a repository on the Hub is written owner/name")
    if owner in ("", ".", "..", "~") or (not source.startswith(_ADDRESSES) and "/" in name):
        raise ValueError("there is no such file or folder")


def _address(source: str) -> tuple[str, str | None, str | None]:
    """Split the address of a profile on the Hub into repository, revision and subfolder."""
    is_address = source.startswith(_ADDRESSES)
    if not is_address and "@" not in source:
        return source, None, None
    address = parse_hf_uri(source if is_address else f"hf://{source}")
    if address.type != "model":
        raise ValueError(f"profiles are stored in model repositories, but this is a {address.type}")
    inside = PurePosixPath(address.path_in_repo)
    folder = inside.parent if inside.name == PROFILE_NAME else inside
    return address.id, address.revision, None if folder == PurePosixPath() else str(folder)


def _written(repo_id: str, revision: str | None, subfolder: str | None) -> str:
    """Return the address of these parts; the inverse of `_address`."""
    if revision is None and subfolder is None:
        return repo_id
    return HfUri("model", repo_id, revision, subfolder or "").to_uri()


def _card(repo_id: str, path: str, revision: str | None, token: str | bool | None) -> ModelCard | None:
    """Download the card of a repository; None if it has none.

    The cache is bypassed, so that an edited card is not overwritten with an old one.
    """
    try:
        file = hf_hub_download(repo_id, path, revision=revision, token=token, force_download=True)
    except LocalEntryNotFoundError:  # an EntryNotFoundError, but the Hub could not be reached
        raise
    except EntryNotFoundError:
        return None
    card: ModelCard = ModelCard.load(file)
    return card


@contextmanager
def _explained(failed: str) -> Iterator[None]:
    """Context manager: turn any exception into a RateProfileError that says what failed, why and what to do.

    All exceptions are caught, because their classes vary with the version of the Hub client and its HTTP library.
    """
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        advice = next((text for kind, text in _ADVICE if isinstance(error, kind)), _REFUSALS.get(status))
        reason = " ".join(str(error.__cause__ or error).split())
        raise RateProfileError(f"{failed}: {advice or reason}." + (f" ({reason:.500})" if advice else "")) from error


def _with_retries(call: Callable[[], Result]) -> Result:
    """Call the Hub, and retry after a delay on transient HTTP errors."""
    for wait in _WAITS:
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in _TRANSIENT:
                raise
            logger.warning(f"the Hub answered {error.response.status_code}; trying again in {wait} s.")
            time.sleep(wait)
    return call()
