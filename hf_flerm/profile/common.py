"""Load the same profile on all processes of a run. Nodes may have separate disks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from transformers.utils import logging

from ..engines.processes import any_process, broadcast_bytes
from .file import parse_bytes
from .rate_profile import PROFILE_NAME, RateProfile, RateProfileError

logger = logging.get_logger(__name__)


def base_profile(source: RateProfile | str | os.PathLike[str] | None) -> RateProfile | None:
    """Load the profile that a run is matched to, the same on all processes; a collective call.

    Args:
        source: A profile, a folder, a file or a repository; None if the run is not matched.

    Raises:
        RateProfileError: On every process, if it cannot be loaded; see `common_profile`.
    """
    return common_profile("the profile", lambda: None if source is None else RateProfile.from_pretrained(source))


def common_profile(what: str, read: Callable[[], RateProfile | None]) -> RateProfile | None:
    """Read a profile and broadcast it from the first process to all others; a collective call.

    Args:
        what: Name of the profile in messages.
        read: Reads it on this process; returns None if there is none.

    Returns:
        The profile of the first process, also on processes that could not read it; None if the first has none.

    Raises:
        RateProfileError: On every process, if the first cannot read the profile or another has one with other rates.
    """
    state = PartialState()
    if state.num_processes == 1:
        return read()
    local, content, failure = None, b"", None
    try:
        local = read()
        content = local.to_bytes() if local is not None else b""
    except Exception as error:  # raised below, on every process: none may wait for one that has failed
        failure = error
    commit = (local is not None and local.commit_hash) or ""
    content, first_commit, reason = (
        broadcast_bytes(part) for part in (content, commit.encode(), str(failure or "").encode())
    )
    if reason:
        raise RateProfileError(f"{what} cannot be read on the first process: {reason.decode()}") from failure
    first = RateProfile(*parse_bytes(content, Path(PROFILE_NAME))) if content else None
    (differs,) = any_process([local is not None and (first is None or _rates(local) != _rates(first))])
    if differs:
        raise RateProfileError(
            f"{what} is not the same on all {state.num_processes} processes. Give the same file to every node, or "
            "to the first node alone."
        )
    if first is not None:
        first.commit_hash = first_commit.decode() or None
        if local is None:
            reason_here = f": {failure}" if failure else "."
            logger.warning(f"{what} is not on this node; using the profile of the first process{reason_here}")
    return first


def _rates(profile: RateProfile) -> bytes:
    """Return the bytes without metadata, which may differ between nodes (for example a random data set fingerprint)."""
    return RateProfile(profile.steps, profile.rates, None, profile.joint_rates).to_bytes()
