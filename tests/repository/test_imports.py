"""Imports run one way through the folders, and no file imports another in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hf_flerm"

# What each folder may import besides itself, and what the modules of the top level may.
ALLOWED = {
    "choices": set(),
    "version": set(),
    "model": set(),
    "engines": {"choices", "model"},
    "optimizer": {"choices", "model", "engines"},
    "rates": {"choices", "model", "engines", "optimizer"},
    "profile": {"choices", "model", "engines", "optimizer", "rates"},
    "transfer": {"choices", "model", "engines", "optimizer", "rates", "profile"},
    "config": {"choices", "rates", "profile"},
    "training": {"choices", "config", "model", "engines", "optimizer", "rates", "profile", "transfer"},
    "planning": {"choices", "config", "model", "engines", "optimizer", "rates", "profile", "transfer", "training"},
    "trainer": {"config", "engines", "optimizer", "profile", "training", "planning"},
    "show": {"choices", "model", "rates", "profile", "transfer", "planning"},
    "cli": {"", "choices", "config", "model", "profile", "transfer", "planning", "show"},
}


def modules() -> dict[str, Path]:
    """`{dotted name inside the package: file}`; a package is named for its `__init__.py`, the top level is ""."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports anywhere in its file, lazily or for type checking, too."""
    file = MODULES[name]
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            elif node.module and node.module.partition(".")[0] == "hf_flerm":
                base = node.module.split(".")[1:]
            else:
                continue
            path = ".".join(part for part in base if part)
            deeper = {f"{path}.{alias.name}".lstrip(".") for alias in node.names}
            found |= (deeper & MODULES.keys()) or {path}
        elif isinstance(node, ast.Import):
            inside = [alias.name for alias in node.names if alias.name.partition(".")[0] == "hf_flerm"]
            found |= {path.removeprefix("hf_flerm").lstrip(".") for path in inside}
    return found - {name}


def folder(name: str) -> str:
    return name.partition(".")[0]


def test_every_folder_has_a_rule() -> None:
    assert {folder(name) for name in MODULES} - {""} == ALLOWED.keys()


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {""}))
def test_module_imports_only_what_lies_below_it(name: str) -> None:
    wrong = {other for other in imported(name) if folder(other) not in ALLOWED[folder(name)] | {folder(name)}}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_rules_allow_no_circle_of_folders() -> None:
    order = list(ALLOWED)
    for above, below in ALLOWED.items():
        assert all(order.index(other) < order.index(above) for other in below - {""})


def test_no_circle_of_modules() -> None:
    arrows = {name: imported(name) & MODULES.keys() for name in MODULES if name}
    while leaves := [name for name, targets in arrows.items() if not targets - {""} & arrows.keys()]:
        for name in leaves:
            del arrows[name]
    assert not arrows, f"in a circle, or importing one: {arrows}"


LOADED_WITHOUT = [  # in one process, from the lowest up
    ("hf_flerm.choices", ("torch",)),
    ("hf_flerm.cli", ("numpy", "torch", "huggingface_hub.hf_api")),
    ("hf_flerm.rates.probe", ("hf_flerm.profile", "hf_flerm.transfer", "hf_flerm.training")),
    ("hf_flerm.profile.rate_profile", ("hf_flerm.transfer", "hf_flerm.training", "hf_flerm.show", "matplotlib")),
    ("hf_flerm.transfer.mapping", ("hf_flerm.training",)),
]


def test_modules_are_loaded_without_what_lies_above() -> None:
    code = f"""
import importlib, sys
for module, unwanted in {LOADED_WITHOUT!r}:
    importlib.import_module(module)
    print(*(f"{{module}} loads {{name}};" for name in unwanted if name in sys.modules), end="")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == ""


def test_reading_profiles_loads_no_torch() -> None:
    """`hf-flerm inspect` takes half a second; torch and transformers alone take several."""
    code = f"""
import sys, tempfile
from hf_flerm.cli import app
with tempfile.TemporaryDirectory() as folder:
    for words in {READING!r}:
        app([word.format(file={str(PROFILE)!r}, folder=folder) for word in words], standalone_mode=False)
        print("done", *{{"torch", "transformers", "peft", "huggingface_hub.hf_api"}} & sys.modules.keys())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line for line in result.stdout.splitlines() if line.startswith("done")] == ["done"] * len(READING)


PROFILE = PACKAGE.parent / "profiles/llama-lora-r16-default-adamw"
READING = [
    ["inspect", "{file}"],
    ["validate", "{file}"],
    ["diff", "{file}", "{file}"],
    ["average", "{file}", "{file}", "-o", "{folder}"],
    ["plot", "{file}", "-o", "{folder}/rates.png"],
    ["report", "{file}", "-o", "{folder}/report.html"],
]
