"""The documentation: every code block of README and site runs, every script too, and the site is built strictly."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from hf_flerm import FLeRMConfig, FLeRMTrainer, RateProfile
from hf_flerm.cli import app
from tests.shared import ROOT
from tests.shared.hub_server import Hub

SITE = ROOT / "examples" / "docs"
TUTORIALS = ROOT / "examples" / "tutorials"
PAGES = [ROOT / "README.md", *sorted(SITE.rglob("*.md"))]
RUNNABLE = [page for page in PAGES if re.search(r"^```(python|shell)$", page.read_text(), re.MULTILINE)]
LANGUAGES = {
    "python",
    "shell",
    "text",
    "bibtex",
    "eval-rst",
    "literalinclude",
    "include",
    "toctree",
    "container",
    "glossary",
}


def flerm_command(words: list[str]) -> None:
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, result.output


def pip_command(words: list[str]) -> None:
    assert words[1] == "install"
    extra = re.fullmatch(r"(?:\.|hf_flerm)(?:\[(\w+)\])?", words[2])
    assert extra
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra[1] is None or extra[1] in project["optional-dependencies"]


def make_command(words: list[str]) -> None:
    assert re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def script_command(words: list[str]) -> None:
    """Scripts and their files are there; the tutorials are run by a test of their own."""
    files = [word for word in words if word.endswith((".py", ".yaml"))]
    assert files
    assert all((ROOT / file).is_file() for file in files)


def torchrun_command(words: list[str]) -> None:
    get_args_parser().parse_args(words[1:])
    script_command(words)


COMMANDS: Mapping[str, Callable[[list[str]], None]] = {
    "hf-flerm": flerm_command,
    "pip": pip_command,
    "make": make_command,
    "python": script_command,
    "accelerate": script_command,
    "torchrun": torchrun_command,
    "pytest": script_command,
}


def run_commands(example: Example) -> None:
    for line in example.parsed.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            COMMANDS[words[0]](words)


def without_numbers(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "#", text)


def parsers() -> list[CodeBlockParser]:
    """Python runs, shell commands run or are checked, and a text is what the Python before it has printed."""
    printed = StringIO()
    python = PythonEvaluator()

    def run(example: Example) -> None:
        printed.seek(0)
        printed.truncate()
        with redirect_stdout(printed):
            python(example)

    def compare(example: Example) -> None:
        lines = without_numbers(printed.getvalue()).splitlines()
        told = without_numbers(example.parsed).splitlines()
        assert not {line for line in told if line.strip() not in ("", "...")} - set(lines)

    return [
        CodeBlockParser(language="python", evaluator=run),
        CodeBlockParser(language="shell", evaluator=run_commands),
        CodeBlockParser(language="text", evaluator=compare),
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the quick start records."""
    folder = tmp_path_factory.mktemp("recorded")
    task = tiny_task()
    task["args"].output_dir = str(folder / "runs")
    trainer = FLeRMTrainer(
        model=task["small"], args=task["args"], train_dataset=task["data"], flerm=FLeRMConfig(mode="record")
    )
    trainer.train()
    trainer.rate_profile.save_pretrained(folder / "base")
    return folder / "base"


def tiny_task() -> dict[str, Any]:
    return runpy.run_path(str(SITE / "tiny.py"))


@pytest.fixture
def _own_accelerator() -> Iterator[None]:
    """Accelerate keeps its state for the whole process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.mark.usefixtures("_own_accelerator")
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_code_blocks_run(
    page: Path,
    base: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document = Document.parse(str(page), *parsers())
    monkeypatch.chdir(tmp_path)
    for name in ("base", "copy"):
        shutil.copytree(base, tmp_path / name)
    profile = RateProfile.from_pretrained(base)
    repo = hub.repo("org/tuned-small", {"rate_profile.safetensors": profile.to_bytes()})
    repo.branches["v1"] = repo.branches["main"]
    task = tiny_task()
    document.namespace.update(task, torch=torch, FLeRMConfig=FLeRMConfig, FLeRMTrainer=FLeRMTrainer)
    document.namespace["model"] = task["small"]
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_code_block_is_of_a_kind_that_is_not_run(page: Path) -> None:
    fences = re.findall(r"^\s*````?\{?([\w-]+)", page.read_text(), re.MULTILINE)
    assert set(fences) <= LANGUAGES
    assert len(re.findall(r"^\s*```", page.read_text(), re.MULTILINE)) == 2 * len(fences)
    assert "\n    make " not in page.read_text()


@pytest.mark.parametrize(("name", "options"), [("ranks", ["--rates", "1e-3", "3e-3"]), ("optimizer", [])])
def test_tutorials_run(name: str, options: list[str], tmp_path: Path) -> None:
    script = runpy.run_path(str(TUTORIALS / f"{name}.py"))
    script["main"](["--steps", "4", "--output", str(tmp_path), *options])
    assert (tmp_path / f"{name}.md").read_text().startswith("| ")


def test_a_profile_is_shared(hub: Hub, tmp_path: Path) -> None:
    script = runpy.run_path(str(TUTORIALS / "share.py"))
    script["main"](["--output", str(tmp_path)])
    assert (tmp_path / "README.md").read_text().count("## Function-space learning rates") == 1
    script["main"](["--output", str(tmp_path / "pushed"), "--push", "org/tuned-small"])
    pushed = hub.repos["org/tuned-small"].files()["rate_profile.safetensors"]
    assert pushed == (tmp_path / "pushed" / "rate_profile.safetensors").read_bytes()


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", str(SITE), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "class hf_flerm." in re.sub(r"<[^>]+>", "", (tmp_path / "api.html").read_text())


def test_readmes_links_lead_somewhere() -> None:
    """Those of the site are checked when it is built."""
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
    assert not [link for link in links if "://" not in link and not (ROOT / link.partition("#")[0]).exists()]
    assert links
