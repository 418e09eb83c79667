"""The linter, the formatter and the type checker pass; the README says what the committed results say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command",
    [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]],
    ids=["ruff-check", "ruff-format", "mypy"],
)
def test_tool_passes(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("room", sorted((ROOT / "hf_flerm").glob("*.py")), ids=lambda path: path.name)
def test_rooms_hold_one_idea(room: Path) -> None:
    assert len(room.read_text().splitlines()) <= 350


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples" / "results").glob("*.md")))
def test_readme_quotes_the_committed_results(name: str) -> None:
    result = (ROOT / "examples" / "results" / name).read_text().strip()
    assert result in (ROOT / "README.md").read_text()
