"""What the repository holds: no pickles, nothing at the top level by accident, YAML that loads."""

from __future__ import annotations

import pickle
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from tests.shared import ROOT

FOLDERS = {".ci", ".github", "examples", "hf_flerm", "profiles", "tests"}
FILES = {
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "constraints.txt",
    "pyproject.toml",
}
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def is_pickle(path: Path) -> bool:
    """By its name, by the first bytes of protocols 2 to 5, or because it is an archive as `torch.save` writes it."""
    if path.suffix in PICKLES:
        return True
    with path.open("rb") as file:
        head = file.read(2)
    if head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    return zipfile.is_zipfile(path) and any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())


def test_no_tracked_file_is_a_pickle() -> None:
    assert not [path for path in tracked() if is_pickle(ROOT / path)]


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickles_are_recognized_by_their_content(protocol: int, tmp_path: Path) -> None:
    plain, archive, text = tmp_path / "plain", tmp_path / "archive", tmp_path / "text.md"
    plain.write_bytes(pickle.dumps({"a": 1}, protocol))
    torch.save({"a": 1}, archive, pickle_protocol=protocol)
    text.write_text("nothing")
    assert [is_pickle(path) for path in (plain, archive, text)] == [True, True, False]


def test_nothing_else_lies_at_the_top_level() -> None:
    paths = tracked()
    assert {path.parts[0] for path in paths if len(path.parts) > 1} == FOLDERS
    assert {path.name for path in paths if len(path.parts) == 1} == FILES


def test_tests_run_outside_the_checkout() -> None:
    """So that a relative path in a test, or in a code block of the documentation, cannot leave a file in it."""
    assert ROOT not in (Path.cwd(), *Path.cwd().parents)


@pytest.mark.parametrize(
    "path",
    [path for path in tracked() if path.suffix in {".cff", ".yaml", ".yml"}],
    ids=lambda path: path.as_posix(),
)
def test_yaml_loads(path: Path) -> None:
    assert isinstance(yaml.safe_load((ROOT / path).read_text()), dict)
