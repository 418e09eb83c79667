"""`rate_profile.safetensors`: where it lies, what is in it, and that it is whole."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

PROFILE_NAME = "rate_profile.safetensors"
SCHEMA_VERSION = 1
STEPS = "steps"
_METADATA_KEY = "hf_flerm"
_VERSION = "schema_version"
_JOINT_RATES = "joint_rates"
RESERVED = {_VERSION, _JOINT_RATES}

Groups = Mapping[str, Mapping[str, Tensor]]


class RateProfileError(ValueError):
    """Something is wrong with a rate profile, its file or its repository."""


def serialize(steps: Tensor, rates: Mapping[str, Tensor], metadata: Mapping[str, Any], joint_rates: Groups) -> bytes:
    """Make the content of a file: a tensor per parameter and the steps; everything else is one sorted JSON text.

    Args:
        steps: Int64 [S].
        rates: `{canonical name: float64 [S]}`.
        metadata: What JSON can hold.
        joint_rates: `{granularity: {path: float64 [S]}}`.

    Returns:
        The same bytes for the same content.

    Raises:
        RateProfileError: If there is more JSON than a file takes.
    """
    joint = {
        granularity: {path: row.tolist() for path, row in rows.items()} for granularity, rows in joint_rates.items()
    }
    content = {_VERSION: SCHEMA_VERSION, **metadata, **({_JOINT_RATES: joint} if joint else {})}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    try:
        return save({STEPS: steps, **rates}, metadata={_METADATA_KEY: text})
    except SafetensorError as error:
        raise RateProfileError(
            f"the profile cannot be written, its JSON text of {len(text) / 1e6:.0f} MB may be more than a safetensors "
            f"file takes: {error}. Measure less often (measure_every)."
        ) from error


def write_whole(folder: Path, content: bytes) -> Path:
    """Write the file of a folder; it is whole or absent, also if the process dies meanwhile.

    Args:
        folder: Made if it is not there.
        content: Of the file.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f"_{PROFILE_NAME}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, folder / PROFILE_NAME)
        except BaseException:
            os.unlink(file.name)
            raise
    return folder / PROFILE_NAME


def find(source: str | os.PathLike[str], revision: str | None, subfolder: str | None, token: str | bool | None) -> Path:
    """Find the file of a folder or repository; see `RateProfile.from_pretrained`.

    Args:
        source: A folder, a file, or the id of a repository on the Hub.
        revision: Branch, tag or commit of the repository.
        subfolder: Folder inside the folder or repository.
        token: Hub token.

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
            raise RateProfileError(f"there is no {PROFILE_NAME} in {path.parent}. Was the run recorded with FLeRM?")
        return path
    try:
        return Path(hf_hub_download(str(source), PROFILE_NAME, subfolder=subfolder, revision=revision, token=token))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise RateProfileError(
            f"{str(source)!r} is no folder, no file and no repository that holds {PROFILE_NAME}: {error}"
        ) from error


def parse(path: Path) -> tuple[Tensor, dict[str, Tensor], dict[str, Any], dict[str, dict[str, Any]]]:
    """Read a file; nothing in it is executed or trusted.

    Args:
        path: The file.

    Returns:
        Steps, rates, metadata and joint rates, to be checked by `RateProfile`.

    Raises:
        RateProfileError: If it is no whole profile.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            text = (file.metadata() or {}).get(_METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise RateProfileError(f"{path} is not a whole safetensors file: {error}") from error
    if text is None or STEPS not in tensors:
        raise RateProfileError(f"{path} is not a rate profile: it lacks the {_METADATA_KEY!r} metadata or {STEPS!r}.")
    try:
        metadata = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RateProfileError(f"the {_METADATA_KEY!r} metadata of {path} is not JSON: {error}") from error
    version = metadata.pop(_VERSION, None) if isinstance(metadata, dict) else None
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise RateProfileError(
            f"{path} has schema version {version!r}; this hf_flerm reads up to {SCHEMA_VERSION}. Upgrade hf_flerm."
        )
    for name, tensor in tensors.items():
        wanted = torch.int64 if name == STEPS else torch.float64
        if tensor.dtype != wanted:
            raise RateProfileError(f"{name!r} in {path} is {tensor.dtype}; it must be {wanted}.")
    joint = metadata.pop(_JOINT_RATES, {})
    if not isinstance(joint, dict) or not all(isinstance(groups, dict) for groups in joint.values()):
        raise RateProfileError(f"the joint rates of {path} are not JSON objects of lists.")
    return tensors.pop(STEPS), tensors, metadata, joint


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")
