"""`RateProfile`: rates by parameter name at recorded steps, with their provenance, in one safetensors file."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, ModelCard
from torch import Tensor
from transformers.utils import extract_commit_hash

from ..model.names import preview
from . import hub
from .file import (
    PROFILE_NAME,
    SCHEMA_VERSION,
    STEPS,
    RateProfileError,
    check_name,
    parse,
    serialize,
    write_whole,
)
from .metadata import AVERAGED_OVER, MATCHING, UNITS, ProfileMetadata, check_metadata

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
        commit_hash: The commit of the repository that the profile was read from; None for other profiles. It is not
            stored in the file, whose bytes do not depend on where it is stored.

    Raises:
        RateProfileError: If an argument is malformed.
    """

    def __init__(
        self,
        steps: Tensor | Sequence[int],
        rates: Mapping[str, Tensor | Sequence[float]],
        metadata: Mapping[str, Any] | None = None,
        joint_rates: Mapping[str, Mapping[str, Tensor | Sequence[float]]] | None = None,
    ) -> None:
        self.steps = torch.as_tensor(steps).to(torch.int64, copy=True)
        self.rates = _rows(rates)
        self.joint_rates = {granularity: _rows(groups) for granularity, groups in (joint_rates or {}).items()}
        self.metadata = dict(metadata or {})
        self.commit_hash: str | None = None
        if not torch.equal(self.steps.double(), torch.as_tensor(steps).double()):
            raise RateProfileError(f"steps must be whole numbers; got {torch.as_tensor(steps).tolist()!s:.200}.")
        if self.steps.ndim != 1 or bool((self.steps < 0).any()) or bool((self.steps.diff() <= 0).any()):
            raise RateProfileError(
                f"steps must be one row of strictly increasing steps from 0; got {self.steps.tolist()!s:.200}."
            )
        check_metadata(self.metadata)
        if not self.rates:
            raise RateProfileError("a profile needs the rates of at least one parameter; got none.")
        if STEPS in self.rates:
            raise RateProfileError(f"{STEPS!r} cannot be the name of a parameter in a profile; rename it.")
        for group in (self.rates, *self.joint_rates.values()):
            self._check_rows(group)
        for name in self.rates:
            check_name(name)
        for path in {path for groups in self.joint_rates.values() for path in groups if path}:
            check_name(path)

    def _check_rows(self, rows: Mapping[str, Tensor]) -> None:
        for name, values in rows.items():
            if values.shape != self.steps.shape:
                raise RateProfileError(
                    f"the rates of {name!r} have shape {tuple(values.shape)}; there are {len(self.steps)} steps."
                )
        table = torch.stack([*rows.values(), self.steps.new_zeros(self.steps.shape).double()])
        wrong = (~table.isfinite() | (table < 0)).any(1)
        if bool(wrong.any()):
            name, values = list(rows.items())[int(wrong.int().argmax())]
            raise RateProfileError(
                f"the rates of {name!r} must be finite and not negative; got {values.tolist()!s:.200}."
            )

    @property
    def names(self) -> list[str]:
        """Canonical parameter names."""
        return list(self.rates)

    @property
    def about(self) -> ProfileMetadata:
        """Typed view of the metadata."""
        return ProfileMetadata(self.metadata)

    def __repr__(self) -> str:
        return f"RateProfile({len(self.rates)} parameters, steps {self.steps.tolist()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RateProfile) and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]

    def at(self, step: int) -> dict[str, float]:
        """Return `{name: rate}` at an optimizer step: linear between recorded steps, constant before and after them.

        Raises:
            RateProfileError: If no step was recorded.
        """
        rates = torch.stack(list(self.rates.values()), 1)
        return dict(zip(self.rates, self.interpolated(rates, step).tolist(), strict=True))

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
        if not len(self.steps):
            raise RateProfileError("the profile holds no step: its run ended before the first measurement.")
        # right: index of the first recorded step >= `step`, else of the last one. left: right - 1 strictly between two
        # recorded steps, else right.
        right = int(torch.searchsorted(self.steps, step).clamp(max=len(self.steps) - 1))
        left = right if self.steps[right] <= step or right == 0 else right - 1
        span = float(self.steps[right] - self.steps[left])
        part = (step - float(self.steps[left])) / span if span else 0.0
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
        check_names(self.rates, rates, "this profile", "the new rates")
        joint = joint_rates or {}
        check_names(self.joint_rates, joint, "this profile's joint rates", "the new ones")
        for granularity, groups in self.joint_rates.items():
            check_names(groups, joint[granularity], f"this profile's joint rates by {granularity}", "the new ones")
        return RateProfile(
            [*self.steps.tolist(), step],
            {name: [*values.tolist(), rates[name]] for name, values in self.rates.items()},
            self.metadata,
            {
                granularity: {path: [*values.tolist(), joint[granularity][path]] for path, values in groups.items()}
                for granularity, groups in self.joint_rates.items()
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
        first = loaded[0]
        for other in loaded[1:]:
            check_names(first.rates, other.rates, "the first profile", "another one")
            if not torch.equal(first.steps, other.steps):
                raise RateProfileError(f"the steps differ: {first.steps.tolist()} and {other.steps.tolist()}.")
        for unit in UNITS:
            found = {p.about.units[unit] for p in loaded if unit in p.about.units}
            if len(found) > 1:
                raise RateProfileError(f"the profiles cannot be averaged: {unit} is one of {', '.join(sorted(found))}.")
        shared = _common([{key: value for key, value in p.metadata.items() if key != MATCHING} for p in loaded])
        joint = {
            granularity: _geometric_mean([p.joint_rates[granularity] for p in loaded])
            for granularity, groups in first.joint_rates.items()
            if all(p.joint_rates.get(granularity, {}).keys() == groups.keys() for p in loaded)
        }
        rates = _geometric_mean([p.rates for p in loaded])
        return RateProfile(first.steps, rates, {**shared, AVERAGED_OVER: len(loaded)}, joint)

    def to_bytes(self) -> bytes:
        """Return the bytes of `rate_profile.safetensors`. Equal profiles give equal bytes."""
        return serialize(self.steps, self.rates, self.metadata, self.joint_rates)

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
        path = hub.find(
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


def _rows(rates: Mapping[str, Tensor | Sequence[float]]) -> dict[str, Tensor]:
    rows = {}
    for name, values in rates.items():
        try:
            rows[name] = torch.as_tensor(values, dtype=torch.float64).clone()
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise RateProfileError(f"the rates of {name!r} are not a row of numbers: {error}") from error
    return rows


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


def _geometric_mean(profiles: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([rates[name] for rates in profiles]).log().mean(0).exp() for name in profiles[0]}
