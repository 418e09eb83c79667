"""What is installed: the built packages, what an import costs, which extra a missing library belongs to."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from hf_flerm import RateProfile
from tests.shared import ROOT

HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "matplotlib", "plotly", "jinja2"}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def command(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The console script that the wheel installs, run in a home of its own beside that installation alone."""
    site, home = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("home")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site), "HOME": str(home), "COLUMNS": "200", **variables}
        script = [str(site / "bin" / "hf-flerm"), *words]
        return subprocess.run(script, env=environment, cwd=home, capture_output=True, text=True)

    return run


def test_wheel_and_sdist_hold_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    files = [path for path in (ROOT / "hf_flerm").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    package = {path.relative_to(ROOT).as_posix() for path in files}
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
        (about,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA"))
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert installed == package
    assert {"hf_flerm/py.typed", "hf_flerm/__init__.pyi"} <= installed
    assert "Requires-Dist: torch" in about
    assert "Provides-Extra: report" in about
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert package | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= sources
    assert not any(name.startswith(("tests", "examples", ".venv")) for name in sources)


def test_an_import_loads_nothing_heavy() -> None:
    """Transformers' own import is lazy, too: what takes seconds comes with the first name that needs it."""
    assert python(f"import sys, hf_flerm; print(sorted({HEAVY} & sys.modules.keys()))") == "[]"


def test_the_command_loads_nothing_heavy_for_its_help() -> None:
    """Every completion of the shell pays for what the command imports."""
    code = (
        "from hf_flerm.cli import app; from typer.testing import CliRunner; import sys; "
        "assert CliRunner().invoke(app, ['plan', '--help']).exit_code == 0; "
        f"print(sorted({HEAVY} & sys.modules.keys()))"
    )
    assert python(code) == "[]"


def test_every_public_name_is_there() -> None:
    code = (
        "import hf_flerm; names = [name for name in dir(hf_flerm) if name != '__version__']; "
        "print(len(names) > 10 and [getattr(hf_flerm, name).__name__ for name in names] == names)"
    )
    assert python(code) == "True"


@pytest.mark.parametrize(
    ("missing", "room", "call", "extra"),
    [
        ("matplotlib", "plotting", "plot_profile", "plot"),
        ("plotly", "report", "report", "report"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    missing: str, room: str, call: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"need[s]? {missing}: pip install 'hf_flerm\[{extra}\]'"):
        getattr(import_module(f"hf_flerm.show.{room}"), call)(RateProfile([0], {"w": [1.0]}))


@pytest.mark.parametrize(
    "name", ["plan", "sweep", "inspect", "validate", "diff", "average", "map", "plot", "report", "push", "pull"]
)
def test_the_installed_command_helps_and_names_what_it_lacks(command, name: str) -> None:
    helped, wrong = command(name, "--help"), command(name)
    assert (helped.returncode, wrong.returncode) == (0, 2)
    assert f"Usage: hf-flerm {name}" in helped.stdout
    assert "Missing" in wrong.stderr


def test_the_installed_command_reads_a_profile_or_says_why_not(command, tmp_path: Path) -> None:
    RateProfile([0, 1], {"w": [1.0, 2.0]}).save_pretrained(tmp_path)
    good, bad = command("validate", str(tmp_path)), command("validate", str(tmp_path / "nowhere.safetensors"))
    assert (good.returncode, good.stdout) == (0, "valid: 1 tensors, 2 steps\n")
    assert bad.returncode == 2
    assert "nowhere.safetensors" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_the_shell_completes_commands(command) -> None:
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown, installed = command("--show-completion", "bash", **named), command("--install-completion", "bash", **named)
    assert (shown.returncode, installed.returncode) == (0, 0)
    assert "complete -o default -F _hf_flerm_completion hf-flerm" in shown.stdout
    completed = command(_HF_FLERM_COMPLETE="complete_bash", COMP_WORDS="hf-flerm p", COMP_CWORD="1")
    assert completed.stdout.split() == ["plan", "plot", "push", "pull"]
