"""One version, that of `pyproject.toml`, wherever the package or the repository names it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

import hf_flerm
from hf_flerm.cli import app
from tests.shared import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text()


def in_project(pattern: str) -> str:
    found = re.search(pattern, PROJECT, re.MULTILINE)
    assert found
    return found[1]


def test_the_package_tells_the_version_of_the_project() -> None:
    assert hf_flerm.__version__ == in_project(r'^version = "(.+)"$')
    assert "__version__" in dir(hf_flerm)


def test_the_version_costs_no_import_of_a_heavy_library() -> None:
    code = (
        "import sys, hf_flerm; assert 'importlib.metadata' not in sys.modules; hf_flerm.__version__; "
        "assert not {'torch', 'transformers', 'peft', 'datasets', 'accelerate'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("words", [["--version"], ["--version", "plan"]])
def test_the_command_tells_its_version(words: list[str]) -> None:
    """Also before a command that lacks its arguments."""
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.output) == (0, f"hf_flerm {hf_flerm.__version__}\n")


def test_the_help_names_the_version_option() -> None:
    assert "--version" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output


def test_citation_and_changelog_are_of_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == hf_flerm.__version__
    released = re.findall(r"^## (\d\S*) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == hf_flerm.__version__


def test_citation_has_the_license_and_keywords_of_the_project() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == in_project(r'^license = "(.+)"$')
    assert citation["keywords"] == re.findall(r'"([^"]+)"', in_project(r"^keywords = \[(.+)\]$"))


def test_pre_commit_formats_with_the_pinned_ruff() -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (rev,) = [entry["rev"] for entry in repositories if entry["repo"].endswith("/ruff-pre-commit")]
    assert f"ruff=={rev.removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_workflow_runs_the_makefile_on_the_pythons_that_are_declared() -> None:
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["checks"]
    pythons = {run["target"]: run["python"] for run in job["strategy"]["matrix"]["include"]}
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert pythons.keys() == {"lint", "test", "test-lowest", "docs"} <= set(targets)
    assert set(pythons.values()) == set(re.findall(r"Python :: (3\.\d+)", PROJECT))
    assert f">={pythons['test-lowest']}" == in_project(r'^requires-python = "(.+)"$')
