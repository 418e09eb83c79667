"""`RateProfile`: rates by parameter name at recorded steps, with their provenance, in one safetensors file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .names import preview

PROFILE_NAME = "rate_profile.safetensors"
SCHEMA_VERSION = 1
_METADATA_KEY = "hf_flerm"
_STEPS = "steps"


class RateProfileError(ValueError):
    """Something is wrong with a rate profile, its file or its repository."""


class RateProfile:
    """Function-space learning rates of one run.

    Args:
        steps: Optimizer steps at which the rates were measured (0 = the first update), strictly increasing, int64 [S].
        rates: `{canonical parameter name: float64 [S]}` in output units per unit learning rate, finite and >= 0.
        metadata: Where the rates come from; anything that JSON can hold.

    Raises:
        RateProfileError: If any of these is not so.
    """

    def __init__(
        self,
        steps: Tensor | Sequence[int],
        rates: Mapping[str, Tensor | Sequence[float]],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.steps = torch.as_tensor(steps).to(torch.int64, copy=True)
        self.rates = {name: torch.as_tensor(values, dtype=torch.float64).clone() for name, values in rates.items()}
        self.metadata = dict(metadata or {})
        if not torch.equal(self.steps.double(), torch.as_tensor(steps).double()):
            raise RateProfileError(f"steps must be whole numbers; got {torch.as_tensor(steps).tolist()}.")
        if self.steps.ndim != 1 or bool((self.steps < 0).any()) or bool((self.steps.diff() <= 0).any()):
            raise RateProfileError(
                f"steps must be one row of strictly increasing steps from 0; got {self.steps.tolist()}."
            )
        if "schema_version" in self.metadata:
            raise RateProfileError("'schema_version' is not for metadata: the file's own version goes there.")
        try:
            json.dumps(self.metadata, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RateProfileError(f"the metadata cannot be written as JSON: {error}") from error
        if not self.rates:
            raise RateProfileError("a profile needs the rates of at least one parameter; got none.")
        for name, values in self.rates.items():
            if not name or name == _STEPS:
                raise RateProfileError(f"{name!r} cannot be the name of a parameter in a profile; rename it.")
            if values.shape != self.steps.shape:
                raise RateProfileError(
                    f"the rates of {name!r} have shape {tuple(values.shape)}; there are {len(self.steps)} steps."
                )
            if not bool(values.isfinite().all()) or bool((values < 0).any()):
                raise RateProfileError(f"the rates of {name!r} must be finite and not negative; got {values.tolist()}.")

    @property
    def names(self) -> list[str]:
        """Canonical parameter names."""
        return list(self.rates)

    def __repr__(self) -> str:
        return f"RateProfile({len(self.rates)} parameters, steps {self.steps.tolist()})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RateProfile) and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]

    def at(self, step: int) -> dict[str, float]:
        """Rates at a step.

        Args:
            step: Optimizer step.

        Returns:
            `{name: rate}`, linear between recorded steps, and the nearest recorded rate before and after them.

        Raises:
            RateProfileError: If nothing was recorded.
        """
        if not len(self.steps):
            raise RateProfileError("the profile holds no step: its run ended before its first measurement.")
        right = int(torch.searchsorted(self.steps, step).clamp(max=len(self.steps) - 1))
        left = right if self.steps[right] <= step or right == 0 else right - 1
        span = float(self.steps[right] - self.steps[left])
        part = (step - float(self.steps[left])) / span if span else 0.0
        rates = torch.stack(list(self.rates.values()))
        row = rates[:, left] + (rates[:, right] - rates[:, left]) * part
        return dict(zip(self.rates, row.tolist(), strict=True))

    def appended(self, step: int, rates: Mapping[str, float]) -> RateProfile:
        """A profile with one more step.

        Args:
            step: After the last one.
            rates: The rates of the same parameters.

        Returns:
            A new profile.

        Raises:
            RateProfileError: If the names differ or the step is not later.
        """
        check_names(self.rates, rates, "this profile", "the new rates")
        return RateProfile(
            [*self.steps.tolist(), step],
            {name: [*values.tolist(), rates[name]] for name, values in self.rates.items()},
            self.metadata,
        )

    @staticmethod
    def average(profiles: Sequence[RateProfile]) -> RateProfile:
        """Average profiles geometrically, for instance over seeds.

        Args:
            profiles: Profiles with the same names and steps.

        Returns:
            A profile with the metadata that all share; 0 where any has rate 0.

        Raises:
            RateProfileError: If there is none, or names or steps differ.
        """
        if not profiles:
            raise RateProfileError("there is no profile to average.")
        first = profiles[0]
        for other in profiles[1:]:
            check_names(first.rates, other.rates, "the first profile", "another one")
            if not torch.equal(first.steps, other.steps):
                raise RateProfileError(f"the steps differ: {first.steps.tolist()} and {other.steps.tolist()}.")
        rates = {name: torch.stack([p.rates[name] for p in profiles]).log().mean(0).exp() for name in first.rates}
        shared = {k: v for k, v in first.metadata.items() if all(p.metadata.get(k) == v for p in profiles)}
        return RateProfile(first.steps, rates, {**shared, "averaged_over": len(profiles)})

    def to_bytes(self) -> bytes:
        """Serialize.

        Returns:
            The content of a `rate_profile.safetensors`; the same for the same profile.
        """
        text = json.dumps({"schema_version": SCHEMA_VERSION, **self.metadata}, sort_keys=True, allow_nan=False)
        return save({_STEPS: self.steps, **self.rates}, metadata={_METADATA_KEY: text})

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write `rate_profile.safetensors`; the file is whole or absent, also if the process dies meanwhile.

        Args:
            directory: Made if it is not there.

        Returns:
            The file.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        content = self.to_bytes()
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

    @classmethod
    def from_pretrained(
        cls,
        source: RateProfile | str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
    ) -> RateProfile:
        """Load a profile.

        Args:
            source: A profile (returned as it is), a folder, a file, or the id of a repository on the Hub.
            revision: Branch, tag or commit of the repository.
            subfolder: Folder inside the folder or repository.
            token: Hub token.

        Returns:
            The profile.

        Raises:
            RateProfileError: If it cannot be found or is not a whole and valid profile.
        """
        if isinstance(source, RateProfile):
            return source
        path = Path(source)
        if path.is_dir():
            path = path / (subfolder or "") / PROFILE_NAME
            if not path.is_file():
                raise RateProfileError(f"there is no {PROFILE_NAME} in {path.parent}. Was the run recorded with FLeRM?")
        elif not path.is_file():
            try:
                path = Path(
                    hf_hub_download(str(source), PROFILE_NAME, subfolder=subfolder, revision=revision, token=token)
                )
            except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
                raise RateProfileError(
                    f"{str(source)!r} is no folder, no file and no repository that holds {PROFILE_NAME}: {error}"
                ) from error
        return _read(path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload rate profile",
    ) -> str:
        """Upload `rate_profile.safetensors` to a repository, made if it is not there.

        Args:
            repo_id: The repository.
            private: Whether a new repository is private.
            revision: Branch to commit to.
            token: Hub token.
            commit_message: Message of the commit.

        Returns:
            The address of the commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_file(
            path_or_fileobj=self.to_bytes(),
            path_in_repo=PROFILE_NAME,
            repo_id=repo_id,
            revision=revision,
            commit_message=commit_message,
        )
        return str(commit.commit_url)

    def plot(self) -> Any:
        """Draw rates over steps by tensor kind; see `hf_flerm.plotting.plot_profile`.

        Returns:
            The matplotlib figure.
        """
        from .plotting import plot_profile

        return plot_profile(self)


def check_names(base: Mapping[str, Any], other: Mapping[str, Any], base_label: str, other_label: str) -> None:
    """Refuse two mappings whose names differ.

    Args:
        base: One mapping.
        other: The other.
        base_label: What the first is, for the message.
        other_label: What the second is.

    Raises:
        RateProfileError: Names both set differences.
    """
    if base.keys() == other.keys():
        return
    raise RateProfileError(
        f"the parameter names differ: only in {base_label} {preview(base.keys() - other.keys())}; "
        f"only in {other_label} {preview(other.keys() - base.keys())}."
    )


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _read(path: Path) -> RateProfile:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            text = (file.metadata() or {}).get(_METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise RateProfileError(f"{path} is not a whole safetensors file: {error}") from error
    if text is None or _STEPS not in tensors:
        raise RateProfileError(f"{path} is not a rate profile: it lacks the {_METADATA_KEY!r} metadata or {_STEPS!r}.")
    try:
        metadata = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RateProfileError(f"the {_METADATA_KEY!r} metadata of {path} is not JSON: {error}") from error
    version = metadata.pop("schema_version", None) if isinstance(metadata, dict) else None
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise RateProfileError(
            f"{path} has schema version {version!r}; this hf_flerm reads up to {SCHEMA_VERSION}. Upgrade hf_flerm."
        )
    wanted = {name: torch.int64 if name == _STEPS else torch.float64 for name in tensors}
    for name, tensor in tensors.items():
        if tensor.dtype != wanted[name]:
            raise RateProfileError(f"{name!r} in {path} is {tensor.dtype}; it must be {wanted[name]}.")
    try:
        return RateProfile(tensors.pop(_STEPS), tensors, metadata)
    except RateProfileError as error:
        raise RateProfileError(f"{path}: {error}") from error
