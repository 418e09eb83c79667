"""The linter, the formatter and the type checker pass; README and site say what the committed results say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import ROOT


@pytest.mark.parametrize(
    "command",
    [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]],
    ids=["ruff-check", "ruff-format", "mypy"],
)
def test_tool_passes(command: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("result", sorted((ROOT / "examples" / "results").rglob("*.md")), ids=lambda path: path.stem)
def test_readme_or_site_quotes_the_committed_results(result: Path) -> None:
    """README holds their text, a page of the site includes their file."""
    pages = [*(ROOT / "examples" / "docs").rglob("*.md")]
    included = {
        (page.parent / place).resolve()
        for page in pages
        for place in re.findall(r"^```\{include\} (\S+)", page.read_text(), re.MULTILINE)
    }
    assert result.resolve() in included or result.read_text().strip() in (ROOT / "README.md").read_text()


def test_readme_holds_nothing_older_than_the_committed_results() -> None:
    results = {path.read_text().strip() for path in (ROOT / "examples" / "results").rglob("*.md")}
    quoted = re.findall(r"<!-- examples/\S+ -->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert {text.strip() for text in quoted} <= results
    assert quoted


def test_reports_are_what_the_committed_studies_say() -> None:
    """Every number in a report of studies, and in the README's summary, comes from the JSON files beside it."""
    results = ROOT / "examples" / "results"
    reports = {results / "studies": results / "studies.md"}
    reports |= {file.parent: file for file in results.glob("*/studies.md")}
    code = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT / "examples" / "studies")!r}]
import run
print(run.summarized(Path({str(results)!r})) == Path({str(results / "summary.md")!r}).read_text())
for folder, report in {[(str(folder), str(file)) for folder, file in reports.items()]!r}:
    print(run.rendered([Path(folder, f"{{name}}.json") for name in run.AXES]) == Path(report).read_text())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True"] * (1 + len(reports))
