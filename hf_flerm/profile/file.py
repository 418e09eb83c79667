"""The file `rate_profile.safetensors`: written atomically, read as untrusted input.

tensor `steps`                       int64 [S]: optimizer steps
a tensor per canonical name          float64 [S]: rates
metadata key `hf_flerm`              sorted JSON: `schema_version`, `joint_rates`, and the profile's metadata
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

PROFILE_NAME = "rate_profile.safetensors"
SCHEMA_VERSION = 1
STEPS = "steps"
_METADATA_KEY = "hf_flerm"
_VERSION = "schema_version"
_JOINT_RATES = "joint_rates"
RESERVED = {_VERSION, _JOINT_RATES}
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})/")  # in the cache of the Hub
_LENGTH_BYTES = 8  # of the header's length, with which a safetensors file begins
# Limits on a file, checked before it is parsed. Reading a file at the limits takes about a second and 200 MB of memory.
# A large run stays below them: LoRA on 80 layers (1,120 tensors), measured at 1,000 steps, makes 22 MB with a header of
# 13 MB, 1,100 objects, 4,000 lists and 650,000 values. Objects and lists are counted in the safetensors header (one and
# two per tensor) and in the metadata, values by commas.
_LIMITS = {
    "bytes": 2**26,
    "bytes of header": 2**25,
    "tensors": 30_000,
    "JSON objects": 40_000,
    "JSON lists": 300_000,
    "JSON values": 2_000_000,
}
_MEASURE_LESS = "Measure less often (measure_every)."
_MARKS = {"{": "JSON objects", "[": "JSON lists", ",": "JSON values"}

Rows = Mapping[str, NDArray[np.float64]]


class RateProfileError(ValueError):
    """A rate profile, its file or its repository is invalid or cannot be used."""


def check_name(name: str) -> None:
    """Raise RateProfileError if `name` cannot be the name of a parameter in torch.

    Names from a file are printed and joined to paths: control characters and slashes must not pass.
    """
    if not name.isprintable() or not all(name.split(".")) or "/" in name or "\\" in name:
        raise RateProfileError(
            f"{name!r:.200} cannot be the name of a parameter in a profile: names are printable parts without slashes, "
            "joined by dots."
        )


Content = tuple[NDArray[np.int64], dict[str, NDArray[np.float64]], dict[str, Any], dict[str, dict[str, Any]]]


def serialize(
    steps: NDArray[np.int64], rates: Rows, metadata: Mapping[str, Any], joint_rates: Mapping[str, Rows]
) -> bytes:
    """Return the bytes of a file. Equal content gives equal bytes.

    Args:
        steps: Int64 [S].
        rates: `{canonical name: float64 [S]}`.
        metadata: JSON-serializable.
        joint_rates: `{granularity: {path: float64 [S]}}`.

    Raises:
        RateProfileError: If the content exceeds a limit, so that the file could not be read again.
    """
    joint = {
        granularity: {path: row.tolist() for path, row in rows.items()} for granularity, rows in joint_rates.items()
    }
    entries = {_VERSION: SCHEMA_VERSION, **metadata, **({_JOINT_RATES: joint} if joint else {})}
    text = json.dumps(entries, sort_keys=True, allow_nan=False)
    try:
        content = save({STEPS: steps, **rates}, metadata={_METADATA_KEY: text})
    except SafetensorError as error:
        raise RateProfileError(f"the profile cannot be written: {error}. {_MEASURE_LESS}") from error
    header_bytes = int.from_bytes(content[:_LENGTH_BYTES], "little")
    found = {"bytes": len(content), "bytes of header": header_bytes, "tensors": len(rates) + 1}
    found |= {counted: content[:header_bytes].count(mark.encode()) for mark, counted in _MARKS.items()}
    for counted, number in found.items():
        if number > _LIMITS[counted]:
            raise RateProfileError(
                f"the profile cannot be written: it has {number:,} {counted}, a file can hold {_LIMITS[counted]:,}. "
                f"{_MEASURE_LESS}"
            )
    return content


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file; its folder is created if it does not exist. Return its path.

    The write is atomic, even if the process dies: the file is written under another name in the same folder and renamed
    when it is on disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"_{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # temporary files are private to their user
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path


def local_file(path: Path, subfolder: str | None = None) -> Path | None:
    """Return the file of a profile that is stored at `path`, a folder or the file; None if `path` does not exist.

    Args:
        path: A folder or a file.
        subfolder: Folder inside the folder.

    Raises:
        RateProfileError: If the folder has no profile.
    """
    if path.is_dir():
        file = path / (subfolder or "") / PROFILE_NAME
        if not file.is_file():
            raise RateProfileError(
                f"there is no {PROFILE_NAME} in {file.parent}. A recorded run writes it into its output folder and its "
                "checkpoints. FLeRMTrainer.save_model also writes it; with FLeRMCallback, call callback.save(folder)."
            )
        return file
    return path if path.is_file() else None


def commit_in(path: Path) -> str | None:
    """Return the commit of a file in the cache of the Hub, from its path; None for another file."""
    found = _SNAPSHOT.search(path.as_posix())
    return found and found[1]


def parse(path: Path) -> Content:
    """Read the file at `path`; see `parse_bytes`.

    Reads all bytes at once, so a concurrent write gives the old profile or an error, never a mixture.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LIMITS["bytes"] + 1)
    except OSError as error:
        raise RateProfileError(f"{path} cannot be read: {error}") from error
    return parse_bytes(content, path)


def parse_bytes(content: bytes, path: Path) -> Content:
    """Read the bytes of a file. Nothing in them is executed or trusted; time and memory are bounded.

    Args:
        content: The bytes.
        path: The file, for messages.

    Returns:
        Steps, rates, metadata and joint rates. `RateProfile` also checks their names and values.

    Raises:
        RateProfileError: If the bytes are not a complete, valid profile.
    """
    _check_limit(len(content), "bytes", path)
    if not content.startswith(b"{", _LENGTH_BYTES):  # where the header of every safetensors file begins
        raise RateProfileError(f"{path} is not a whole safetensors file, as a rate profile is.")
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    _check_limit(length, "bytes of header", path)
    header_text = content[_LENGTH_BYTES : _LENGTH_BYTES + length].decode("utf-8", "replace")
    _check_marks(header_text, path)
    try:
        entries = dict(sorted(deserialize(content)))
    except SafetensorError as error:
        raise RateProfileError(f"{path} is not a whole safetensors file: {error}") from error
    _check_limit(len(entries), "tensors", path)
    header = _object(header_text, "header", path)
    strings = header.get("__metadata__", {})
    text = strings.get(_METADATA_KEY) if isinstance(strings, dict) else None
    if not isinstance(text, str) or STEPS not in entries:
        raise RateProfileError(f"{path} is not a rate profile: it lacks the {_METADATA_KEY!r} metadata or {STEPS!r}.")
    metadata = _object(text, f"{_METADATA_KEY!r} metadata", path)
    version = metadata.pop(_VERSION, None)
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise RateProfileError(
            f"{path} has schema version {version!r:.50}; this hf_flerm reads up to {SCHEMA_VERSION}. Upgrade hf_flerm."
        )
    for name, entry in entries.items():
        wanted = "I64" if name == STEPS else "F64"
        if entry["dtype"] != wanted:
            raise RateProfileError(f"{name!r:.200} in {path} is {entry['dtype']}; it must be {wanted}.")
        if entry["shape"] != entries[STEPS]["shape"] or len(entry["shape"]) != 1:
            raise RateProfileError(
                f"{name!r:.200} in {path} has shape {entry['shape']}, {STEPS!r} has {entries[STEPS]['shape']}: "
                "they must be rows of one length."
            )
    joint = metadata.pop(_JOINT_RATES, {})
    if not isinstance(joint, dict) or not all(isinstance(groups, dict) for groups in joint.values()):
        raise RateProfileError(f"the joint rates of {path} are not JSON objects of lists.")
    steps = np.frombuffer(entries.pop(STEPS)["data"], "<i8")
    rates = np.frombuffer(b"".join(entry["data"] for entry in entries.values()), "<f8")
    rows = rates.reshape(len(entries), len(steps))
    return steps, dict(zip(entries, rows, strict=True)), metadata, joint


def _object(text: str, what: str, path: Path) -> dict[str, Any]:
    """Parse a JSON object. Duplicate keys are refused, because parsers differ in which one they keep."""
    _check_marks(text, path)
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise RateProfileError(f"the {what} of {path} is not JSON: {error!s:.300}") from error
    if not isinstance(value, dict):
        raise RateProfileError(f"the {what} of {path} is not a JSON object.")
    return value


def _check_marks(text: str, path: Path) -> None:
    """Raise RateProfileError if parsing the JSON could use too much memory."""
    for mark, counted in _MARKS.items():
        _check_limit(text.count(mark), counted, path)


def _check_limit(found: int, counted: str, path: Path) -> None:
    if found > _LIMITS[counted]:
        raise RateProfileError(f"{path} is not a rate profile: it has more than {_LIMITS[counted]:,} {counted}.")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("duplicate key")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")
