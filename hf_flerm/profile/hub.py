"""Profiles in folders and on the Hub: found, fetched, saved and pushed.

`huggingface_hub.ModelHubMixin` is not the base: it writes a `config.json` and a card of its own, which in a model's
repository would replace the model's, and it reads a model's `config.json` as if it were the profile's arguments.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
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
from transformers.utils import extract_commit_hash, logging

from .file import PROFILE_NAME, RateProfileError, parse, write_whole

logger = logging.get_logger(__name__)

_LOG_IN = "log in with `hf auth login`, or give a token"
_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, f"the repository is gated. Ask for access on its page, then {_LOG_IN}"),
    (
        RepositoryNotFoundError,
        f"there is no such repository, or it is private. Check its name, or {_LOG_IN}",
    ),
    (RevisionNotFoundError, "the repository has no such revision. Check the name of the branch, tag or commit"),
    (LocalEntryNotFoundError, "it is not in the cache, and the Hub could not be asked"),
    (EntryNotFoundError, "the repository has no such file. Was its run recorded with FLeRM?"),
)
_REFUSALS = {401: f"the Hub does not know who you are: {_LOG_IN}", 403: "the token may not do this: use another one"}
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_WAITS = (1, 2, 4)  # seconds

Shared = TypeVar("Shared", bound="SharedProfile")
Result = TypeVar("Result")


class SharedProfile(ABC):
    """What makes a profile one that can be saved, loaded and shared.

    Attributes:
        commit_hash: The commit of the repository that the profile was read from; None for one from anywhere else. It is
            not part of the file, whose bytes are the same wherever it lies.
    """

    commit_hash: str | None = None

    @abstractmethod
    def __init__(self, *content: Any) -> None: ...

    @abstractmethod
    def to_bytes(self) -> bytes:
        """Serialize."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write `rate_profile.safetensors`; the file is whole or absent, also if the process dies meanwhile.

        Args:
            directory: Made if it is not there.

        Returns:
            The file.
        """
        return write_whole(Path(directory), self.to_bytes())

    @classmethod
    def from_pretrained(
        cls: type[Shared],
        source: Shared | str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Shared:
        """Load a profile.

        Args:
            source: A profile (returned as it is), a folder, a file, or a repository on the Hub: its id, its id with a
                revision and subfolder (`org/repo@revision/subfolder`), an `hf://` address or one of the website.
            revision: Branch, tag or commit of the repository.
            subfolder: Folder inside the folder or repository.
            token: Hub token. None: the one that is logged in. False: none.
            cache_dir: Where what is fetched is kept. None: the Hub client's cache.
            force_download: Fetch it again, also if it is in the cache.
            local_files_only: Take it from the cache without asking the Hub, as with `HF_HUB_OFFLINE=1`.

        Returns:
            The profile.

        Raises:
            RateProfileError: If it cannot be found or is not a whole and valid profile.
        """
        if isinstance(source, cls):
            return source
        if not isinstance(source, (str, os.PathLike)):
            raise RateProfileError(
                f"{source!r:.100} is no profile: it must be a RateProfile, a folder, a file or a repository."
            )
        path = find(
            os.fspath(source),
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        content = parse(path)
        try:
            profile = cls(*content)
        except RateProfileError as error:
            raise RateProfileError(f"{path}: {error}") from error
        profile.commit_hash = extract_commit_hash(str(path), None)
        return profile

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload rate profile",
        commit_description: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload `rate_profile.safetensors`, its picture and a section of the model card, in one commit.

        Whatever else is in the repository stays as it is, also the rest of its card. Pushing the same profile again
        changes nothing. The picture is left out where matplotlib is not installed (`pip install 'hf_flerm[plot]'`).

        Args:
            repo_id: The repository, made if it is not there.
            subfolder: Folder inside of it for all of this; its card is the README.md there.
            revision: Branch to commit to, made if it is not there.
            private: Whether a new repository is private. None: as its owner's settings say.
            token: Hub token. None: the one that is logged in.
            commit_message: First line of the commit.
            commit_description: The rest of it.
            create_pr: Open a pull request with the commit, for instance on a repository of someone else.

        Returns:
            The commit, with `commit_url`, `oid` and `pr_url`.

        Raises:
            RateProfileError: If the Hub refuses it or cannot be reached. The repository then has all of it or nothing.
        """
        from ..show.card import profile_files

        api = HfApi(token=token)
        folder = PurePosixPath(subfolder or "")
        with _explained(f"{repo_id!r} could not be pushed to"):
            repo_id = _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                _patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
            card = _card(repo_id, str(folder / REPOCARD_NAME), revision, token)
            files = profile_files(self, _written(repo_id, revision, subfolder), card)  # type: ignore[arg-type]
            return _patiently(
                lambda: api.create_commit(
                    repo_id,
                    [CommitOperationAdd(str(folder / name), content) for name, content in files.items()],
                    commit_message=commit_message,
                    commit_description=commit_description,
                    revision=revision,
                    create_pr=create_pr,
                )
            )


def find(source: str, *, revision: str | None, subfolder: str | None, **download: Any) -> Path:
    """Find the file of a folder or repository; see `SharedProfile.from_pretrained`.

    Args:
        source: A folder, a file, or a repository on the Hub.
        revision: Branch, tag or commit of the repository.
        subfolder: Folder inside the folder or repository.
        **download: What else `hf_hub_download` takes.

    Returns:
        The file.

    Raises:
        RateProfileError: If there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        path = path / (subfolder or "") / PROFILE_NAME
        if not path.is_file():
            raise RateProfileError(
                f"there is no {PROFILE_NAME} in {path.parent}. A run that is recorded writes it into its output folder "
                "and checkpoints; so does save_model of FLeRMTrainer and FLeRMMixin, but not with FLeRMCallback alone, "
                "whose save(folder) does."
            )
        return path
    with _explained(f"{source!r} is no folder, no file and no repository that holds {PROFILE_NAME}"):
        repo_id, own_revision, own_subfolder = _address(source)
        for what, given, own in (("revision", revision, own_revision), ("subfolder", subfolder, own_subfolder)):
            if given and own and given != own:
                raise ValueError(f"it names {what} {own!r}, and {what}={given!r} was given as well. Give one of them")
        return Path(
            hf_hub_download(
                repo_id,
                PROFILE_NAME,
                subfolder=subfolder or own_subfolder,
                revision=revision or own_revision,
                **download,
            )
        )


def _address(source: str) -> tuple[str, str | None, str | None]:
    """Repository, revision and subfolder of what stands for a profile on the Hub."""
    is_address = source.startswith(("hf://", "http://", "https://"))
    if not is_address and "@" not in source:
        return source, None, None
    address = parse_hf_uri(source if is_address else f"hf://{source}")
    if address.type != "model":
        raise ValueError(f"profiles lie in model repositories, and this is a {address.type}")
    inside = PurePosixPath(address.path_in_repo)
    folder = inside.parent if inside.name == PROFILE_NAME else inside
    return address.id, address.revision, None if folder == PurePosixPath() else str(folder)


def _written(repo_id: str, revision: str | None, subfolder: str | None) -> str:
    """What `_address` reads."""
    if revision is None and subfolder is None:
        return repo_id
    return HfUri("model", repo_id, revision, subfolder or "").to_uri()


def _card(repo_id: str, path: str, revision: str | None, token: str | bool | None) -> ModelCard | None:
    """The card that a repository has; not from the cache: what others wrote since must not be lost."""
    try:
        file = hf_hub_download(repo_id, path, revision=revision, token=token, force_download=True)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
    card: ModelCard = ModelCard.load(file)
    return card


@contextmanager
def _explained(failed: str) -> Iterator[None]:
    """Say what failed, why, and what to do, whatever the client or the HTTP library of its version raised."""
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        advice = next((text for kind, text in _ADVICE if isinstance(error, kind)), _REFUSALS.get(status))
        reason = " ".join(str(error.__cause__ or error).split())
        raise RateProfileError(f"{failed}: {advice or reason}." + (f" ({reason:.500})" if advice else "")) from error


def _patiently(call: Callable[[], Result]) -> Result:
    """Call the Hub again where it said that it is busy or broken just now."""
    for wait in _WAITS:
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in _TRANSIENT:
                raise
            logger.warning(f"the Hub answered {error.response.status_code}; trying again in {wait} s.")
            time.sleep(wait)
    return call()
