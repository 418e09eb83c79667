"""`RateProfile`: rates by parameter name at recorded steps, with their provenance, in one safetensors file."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..model.name_text import preview
from .file import (
    PROFILE_NAME,
    SCHEMA_VERSION,
    RateProfileError,
    commit_in,
    local_file,
    parse,
    serialize,
    write_whole,
)
from .metadata import AVERAGED_OVER, MATCHING, UNITS, ProfileMetadata, check_metadata
from .table import RateTable, Row

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, ModelCard
    from torch import Tensor

__all__ = ["PROFILE_NAME", "SCHEMA_VERSION", "RateProfile", "RateProfileError", "check_names", "shared_files"]


class RateProfile:
    """Function-space learning rates of one run.

    Args:
        steps: Optimizer steps at which the rates were measured (0 = the first update), strictly increasing, int64 [S].
        rates: `{canonical parameter name: float64 [S]}` in output units per unit learning rate, finite and >= 0.
        metadata: How the rates were measured, JSON-serializable; `about` is a typed view.
        joint_rates: `{granularity: {path: float64 [S]}}`: the joint rates of all trained tensors of a module, a block
            or the model.

    Attributes:
        table: The same numbers as NumPy arrays, checked. `steps`, `rates` and `joint_rates` are views of it.
        commit_hash: The commit of the repository that the profile was read from; None for other profiles. It is not
            stored in the file, whose bytes do not depend on where it is stored.

    Raises:
        RateProfileError: If an argument is malformed.
    """

    def __init__(
        self,
        steps: Tensor | NDArray[Any] | Sequence[int],
        rates: Mapping[str, Tensor | NDArray[Any] | Sequence[float]],
        metadata: Mapping[str, Any] | None = None,
        joint_rates: Mapping[str, Mapping[str, Tensor | NDArray[Any] | Sequence[float]]] | None = None,
    ) -> None:
        self.table = RateTable(steps, rates, joint_rates or {})
        self.metadata = dict(metadata or {})
        self.commit_hash: str | None = None
        check_metadata(self.metadata)

    @cached_property
    def steps(self) -> Tensor:
        """Optimizer steps at which the rates were measured, int64 [S]."""
        return _tensor(self.table.steps)

    @cached_property
    def rates(self) -> dict[str, Tensor]:
        """`{canonical parameter name: float64 [S]}`."""
        return _tensors(self.table.rates)

    @cached_property
    def joint_rates(self) -> dict[str, dict[str, Tensor]]:
        """`{granularity: {path: float64 [S]}}`."""
        return {name: _tensors(groups) for name, groups in self.table.joint_rates.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the tensors, which a copy makes again: they share the memory of `table`."""
        return {"table": self.table, "metadata": self.metadata, "commit_hash": self.commit_hash}

    @property
    def names(self) -> list[str]:
        """Canonical parameter names."""
        return list(self.table.rates)

    @property
    def about(self) -> ProfileMetadata:
        """Typed view of the metadata."""
        return ProfileMetadata(self.metadata)

    def __repr__(self) -> str:
        return f"RateProfile({len(self.names)} parameters, steps {self.table.steps.tolist()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RateProfile) and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]

    def at(self, step: int) -> dict[str, float]:
        """Return `{name: rate}` at an optimizer step: linear between recorded steps, constant before and after them.

        Raises:
            RateProfileError: If no step was recorded.
        """
        left, right, part = self.table.neighbors(step)
        return {name: float(row[left] + (row[right] - row[left]) * part) for name, row in self.table.rates.items()}

    def interpolated(self, series: Tensor, step: int) -> Tensor:
        """Interpolate values given at the profile's steps: linear between them, constant before and after.

        Args:
            series: One value or row of values per recorded step, [S, ...].
            step: Optimizer step.

        Returns:
            The value or row at `step`, [...].

        Raises:
            RateProfileError: If no step was recorded.
        """
        left, right, part = self.table.neighbors(step)
        return series[left] + (series[right] - series[left]) * part

    def appended(
        self,
        step: int,
        rates: Mapping[str, float],
        joint_rates: Mapping[str, Mapping[str, float]] | None = None,
    ) -> RateProfile:
        """Return a new profile with one more step.

        Args:
            step: An optimizer step after the last recorded one.
            rates: `{name: rate}` of the same parameters.
            joint_rates: `{granularity: {path: rate}}` of the same groups.

        Raises:
            RateProfileError: If names differ or the step is not later.
        """
        table, joint = self.table, joint_rates or {}
        check_names(table.rates, rates, "this profile", "the new rates")
        check_names(table.joint_rates, joint, "this profile's joint rates", "the new ones")
        for granularity, groups in table.joint_rates.items():
            check_names(groups, joint[granularity], f"this profile's joint rates by {granularity}", "the new ones")
        return RateProfile(
            np.append(table.steps, step),
            {name: np.append(row, rates[name]) for name, row in table.rates.items()},
            self.metadata,
            {
                granularity: {path: np.append(row, joint[granularity][path]) for path, row in groups.items()}
                for granularity, groups in table.joint_rates.items()
            },
        )

    @staticmethod
    def average(profiles: Sequence[RateProfile | str | os.PathLike[str]]) -> RateProfile:
        """Average profiles geometrically, for instance over seeds.

        Args:
            profiles: Profiles with the same names and steps: objects, folders, files or repositories.

        Returns:
            A profile with the metadata that all share, also inside nested objects. A rate is 0 where any profile has 0.
            The scales of matched runs are dropped, because they belong to single runs.

        Raises:
            RateProfileError: If there is no profile, one cannot be loaded, or names, steps, output, positions or metric
                differ.
        """
        if not profiles:
            raise RateProfileError("there is no profile to average.")
        loaded = [RateProfile.from_pretrained(profile) for profile in profiles]
        tables = [profile.table for profile in loaded]
        first = tables[0]
        for other in tables[1:]:
            check_names(first.rates, other.rates, "the first profile", "another one")
            if not np.array_equal(first.steps, other.steps):
                raise RateProfileError(f"the steps differ: {first.steps.tolist()} and {other.steps.tolist()}.")
        for unit in UNITS:
            found = {p.about.units[unit] for p in loaded if unit in p.about.units}
            if len(found) > 1:
                raise RateProfileError(f"the profiles cannot be averaged: {unit} is one of {', '.join(sorted(found))}.")
        shared = _common([{key: value for key, value in p.metadata.items() if key != MATCHING} for p in loaded])
        joint = {
            granularity: _geometric_mean([table.joint_rates[granularity] for table in tables])
            for granularity, groups in first.joint_rates.items()
            if all(table.joint_rates.get(granularity, {}).keys() == groups.keys() for table in tables)
        }
        rates = _geometric_mean([table.rates for table in tables])
        return RateProfile(first.steps, rates, {**shared, AVERAGED_OVER: len(loaded)}, joint)

    def to_bytes(self) -> bytes:
        """Return the bytes of `rate_profile.safetensors`. Equal profiles give equal bytes."""
        return serialize(self.table.steps, self.table.rates, self.metadata, self.table.joint_rates)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write `rate_profile.safetensors`. The write is atomic, even if the process dies.

        Args:
            directory: Created if it does not exist.

        Returns:
            The path of the file.
        """
        return write_whole(Path(directory) / PROFILE_NAME, self.to_bytes())

    @classmethod
    def from_pretrained(
        cls,
        source: RateProfile | str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> RateProfile:
        """Load a profile.

        Args:
            source: A profile (returned unchanged), a folder, a file, or a repository on the Hub: its id, its id with a
                revision and subfolder (`org/repo@revision/subfolder`), an `hf://` address or one of the website.
            revision: Branch, tag or commit of the repository.
            subfolder: Folder inside the folder or repository.
            token: Hub token. None: the token of the logged-in user. False: none.
            cache_dir: Folder for downloads. None: the cache of the Hub client.
            force_download: Download again, even if the file is in the cache.
            local_files_only: Use the cache without asking the Hub, as with `HF_HUB_OFFLINE=1`.

        Raises:
            RateProfileError: If the profile cannot be found, or is not a whole and valid profile.
        """
        if isinstance(source, RateProfile):
            return source
        if not isinstance(source, (str, os.PathLike)):
            raise RateProfileError(
                f"{source!r:.100} is not a profile: it must be a RateProfile, a folder, a file or a repository."
            )
        path = local_file(Path(source), subfolder)
        if path is None:
            from . import hub  # here, because the client of the Hub takes longer to load than a file to read

            path = hub.download(
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
        profile.commit_hash = commit_in(path)
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

        Everything else in the repository is unchanged, including the rest of its card. Pushing the same profile again
        changes nothing. The picture is left out if matplotlib is not installed (`pip install 'hf_flerm[plot]'`).

        Args:
            repo_id: The repository; created if it does not exist.
            subfolder: Folder inside the repository for all of these files; its card is the README.md there.
            revision: Branch to commit to; created if it does not exist.
            private: Whether a new repository is private. None: the default of its owner.
            token: Hub token. None: the token of the logged-in user.
            commit_message: First line of the commit message.
            commit_description: The rest of the commit message.
            create_pr: Open a pull request with the commit, for instance on a repository of someone else.

        Returns:
            The commit, with `commit_url`, `oid` and `pr_url`.

        Raises:
            RateProfileError: If the Hub refuses the commit or cannot be reached. The repository then has either all
                of the files or none.
        """
        from . import hub

        return hub.upload(
            repo_id,
            lambda address, card: shared_files(self, address, card),
            subfolder=subfolder,
            revision=revision,
            private=private,
            token=token,
            commit_message=commit_message,
            commit_description=commit_description,
            create_pr=create_pr,
        )

    def plot(self) -> Any:
        """Return a matplotlib figure of the rates by kind of tensor; see `hf_flerm.show.plotting.plot_profile`."""
        return pkgutil.resolve_name("hf_flerm.show.plotting:plot_profile")(self)


def shared_files(profile: RateProfile, address: str, card: ModelCard | None = None) -> dict[str, bytes]:
    """Return the files of a folder or repository that shares a profile: the profile, its card and its picture.

    Loads `hf_flerm.show.card` on demand, because that module depends on this one.

    Args:
        profile: The profile.
        address: Repository id with which others load the profile.
        card: The existing card. Only the profile's section in it is changed.

    Returns:
        `{file name: content}`.
    """
    files: dict[str, bytes] = pkgutil.resolve_name("hf_flerm.show.card:profile_files")(profile, address, card)
    return files


def check_names(base: Mapping[str, Any], other: Mapping[str, Any], base_label: str, other_label: str) -> None:
    """Raise RateProfileError, naming both set differences, if two mappings differ in their parameter names.

    Args:
        base: `{canonical name: ...}`.
        other: `{canonical name: ...}` to compare with `base`.
        base_label: What `base` is, for the message.
        other_label: What `other` is.
    """
    if base.keys() == other.keys():
        return
    raise RateProfileError(
        f"the parameter names differ: only in {base_label} {preview(base.keys() - other.keys())}; "
        f"only in {other_label} {preview(other.keys() - base.keys())}."
    )


def _tensors(rows: Mapping[str, Row]) -> dict[str, Tensor]:
    return {name: _tensor(row) for name, row in rows.items()}


def _tensor(array: NDArray[Any]) -> Tensor:
    """Return a tensor that shares the memory of an array."""
    import torch  # here, because the command line reads profiles without torch

    return torch.from_numpy(array)


def _common(objects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entries that are equal in all objects. Nested objects are compared recursively."""
    first, *others = objects
    common = {}
    for key, value in first.items():
        values = [other[key] for other in others if key in other]
        if len(values) < len(others):
            continue
        if all(other == value for other in values):
            common[key] = value
        elif all(isinstance(other, Mapping) for other in (value, *values)):
            common[key] = _common([value, *values])
    return common


def _geometric_mean(profiles: Sequence[Mapping[str, Row]]) -> dict[str, Row]:
    with np.errstate(divide="ignore"):  # the logarithm of 0
        return {name: np.exp(np.mean([np.log(rates[name]) for rates in profiles], axis=0)) for name in profiles[0]}
