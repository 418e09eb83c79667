"""What is installed: the built packages, what an import costs, which extra a missing library belongs to."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_wheel_and_sdist_hold_the_package_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    rooms = {f"hf_flerm/{path.name}" for path in (ROOT / "hf_flerm").iterdir() if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
        (about,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA"))
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert installed == rooms
    assert {"hf_flerm/py.typed", "hf_flerm/__init__.pyi"} <= installed
    assert "Requires-Dist: torch" in about
    assert "Provides-Extra: report" in about
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert rooms | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= sources
    assert not any(name.startswith(("tests", "examples", ".venv")) for name in sources)


def test_an_import_loads_nothing_heavy() -> None:
    """Transformers' own import is lazy, too: what takes seconds comes with the first name that needs it."""
    code = "import sys, hf_flerm; print(sorted({'torch', 'transformers', 'peft', 'matplotlib'} & sys.modules.keys()))"
    assert python(code) == "[]"


def test_every_public_name_is_there() -> None:
    assert (
        python("import hf_flerm; print([getattr(hf_flerm, n).__name__ for n in dir(hf_flerm)] == dir(hf_flerm))")
        == "True"
    )


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
    from importlib import import_module

    from hf_flerm import RateProfile

    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"need[s]? {missing}: pip install 'hf_flerm\[{extra}\]'"):
        getattr(import_module(f"hf_flerm.{room}"), call)(RateProfile([0], {"w": [1.0]}))
