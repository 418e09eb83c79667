"""Every command through the entry point of the package: its help, a good case, a bad case."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from hf_flerm import FLeRMConfig, RateProfile
from hf_flerm.cli import app
from tests.shared.profiles import REPO
from tests.shared.training import gpt2, lora, recorded

COMMANDS = ("plan", "sweep", "inspect", "validate", "diff", "average", "map", "plot", "report", "push", "pull")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: a recorded profile, another one, one of a matched run, one of LoRA, and models' configs."""
    folder = tmp_path_factory.mktemp("profiles")
    found = recorded(folder / "run", gpt2())
    found.save_pretrained(folder / "one")
    twice = {name: 2 * rates for name, rates in found.rates.items()}
    RateProfile(found.steps, twice, found.metadata, found.joint_rates).save_pretrained(folder / "two")
    recorded(folder / "run", gpt2(width=32), flerm=FLeRMConfig("match", found)).save_pretrained(folder / "matched")
    recorded(folder / "run", lora()).save_pretrained(folder / "lora")
    gpt2(layers=4).config.save_pretrained(folder / "deep")
    lora().save_pretrained(folder / "adapter")
    return folder


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    """What the shell would see of `hf-flerm words`."""
    command = next(iter(entry_points(group="console_scripts", name="hf-flerm")))
    monkeypatch.setattr(sys, "argv", ["hf-flerm", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as left:
        command.load()()
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *words: run(capsys, monkeypatch, *words)


def test_help_names_every_command_and_the_exit_codes(shell) -> None:
    code, out, _ = shell("--help")
    assert code == 0
    assert all(f" {command} " in out for command in COMMANDS)
    assert "2 wrong input" in out
    assert "--show-completion" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(shell, command: str) -> None:
    code, out, _ = shell(command, "--help")
    assert code == 0
    assert f"hf-flerm {command}" in out


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "{0}/nowhere"),
        ("validate", "{0}/deep/config.json"),
        ("diff", "{0}/one", "{0}/nowhere"),
        ("average", "{0}/one", "-o", "{0}/mean"),
        ("average", "{0}/one", "{0}/lora", "-o", "{0}/mean"),
        ("map", "{0}/deep", "{0}/lora"),
        ("plan", "{0}/nowhere", "{0}/one", "{0}/one"),
        ("plan", "{0}/deep", "{0}/nowhere", "{0}/one"),
        ("plan", "{0}/deep", "{0}/one", "{0}/one", "--optim", "none"),
        ("plan", "{0}/deep", "{0}/one", "{0}/one", "--adapter", "{0}/nowhere"),
        ("sweep", "{0}/nowhere", "{0}/one", "-o", "{0}/bad"),
        ("sweep", "{0}/deep", "{0}/nowhere", "-o", "{0}/bad"),
        ("sweep", "{0}/deep", "{0}/one", "--adapter", "{0}/nowhere", "-o", "{0}/bad"),
        ("plot", "{0}/one", "--what", "sweep", "-o", "{0}/bad.png"),
        ("plot", "{0}/one", "--what", "multipliers", "-o", "{0}/bad.png"),
        ("plot", "{0}/one", "-o", "{0}/bad.doc"),
        ("plot", "{0}/one", "-o", "{0}/bad"),
        ("report", "{0}/one", "-o", "{0}/bad.png"),
        ("report", "{0}/one", "-o", "{0}/one/rate_profile.safetensors/bad.html"),
        ("average", "{0}/one", "{0}/two", "-o", "{0}/bad.safetensors"),
        ("pull", "{0}/one", "-o", "{0}/one/rate_profile.safetensors"),
        ("push", "{0}/nowhere", "me/tuned"),
        ("push", "{0}/one", "no/such/id"),
        ("pull", "me/nowhere", "-o", "{0}/bad"),
        ("diff", "{0}/one"),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_bad_input_is_named_and_exits_with_2(shell, base: Path, hub, words: tuple[str, ...]) -> None:
    code, out, err = shell(*(word.format(base) for word in words))
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert "Warning" not in err
    is_wrong_usage = err.startswith("Usage: ") and f"hf-flerm {words[0]} " in err
    assert is_wrong_usage or (err.startswith("error: ") and err.count("\n") == 1)
    assert not list(base.glob("bad*"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("inspect", "nope"), "'nope' is not a folder.* no such file or folder, and a repository .* owner/name"),
        (("inspect", "nope@main"), "no such file or folder, and a repository on the Hub is written owner/name"),
        (("inspect", "./nope"), "'./nope' is not a folder.* there is no such file or folder\\.$"),
        (("inspect", "/no/pe"), "there is no such file or folder\\.$"),
        (("inspect", "runs/no/pe"), "there is no such file or folder\\.$"),
        (("inspect", "{0}/text"), "text is not a whole safetensors file"),
        (("map", "nope", "{0}/one"), "the model 'nope' does not exist.* no repository was found on the Hub"),
        (("map", "./nope", "{0}/one"), "the model './nope' does not exist: there is no such file or folder"),
        (("map", "{0}/text", "{0}/one"), "the model '.*text' is a file; it must be a folder or a repository"),
        (("map", "{0}/deep", "{0}/one", "--adapter", "nope"), "the adapter 'nope' does not exist"),
        (("plan", "nope", "{0}/text", "{0}/one"), "the model 'nope' does not exist"),
        (("plan", "{0}/deep", "nope", "{0}/one"), "the data set 'nope' does not exist"),
        (("plan", "{0}/deep", "no data", "{0}/one"), "the data set 'no data' does not exist"),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_what_does_not_exist_is_said_without_asking_the_hub_for_files(
    shell, base: Path, hub, words: tuple[str, ...], expected: str
) -> None:
    (base / "text").write_text("The old cat sat on the mat.")
    hub.requests.clear()
    code, _, err = shell(*(word.format(base) for word in words))
    assert code == 2
    assert re.search(expected, err.strip()), err
    assert not [request for request in hub.requests if "/resolve/" in str(request)]


def test_every_option_has_help_and_completion() -> None:
    for name, command in get_command(app).commands.items():
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)


def test_inspect(shell, base: Path) -> None:
    code, out, _ = shell("inspect", base / "one")
    assert code == 0
    assert "0.01, linear" in out
    assert "transformer.h.*.attn.c_attn.weight" in out
    found = RateProfile.from_pretrained(base / "one")
    content = json.loads(shell("inspect", base / "one", "--json")[1])
    assert content["steps"] == found.steps.tolist()
    rates = [found.rates[f"transformer.h.{layer}.attn.c_attn.weight"] for layer in (0, 1)]
    expected = (rates[0] * rates[1]).sqrt().tolist()
    assert content["kinds"]["transformer.h.*.attn.c_attn.weight"] == {"tensors": 2, "rates": pytest.approx(expected)}


def test_validate(shell, base: Path) -> None:
    assert shell("validate", base / "one")[:2] == (0, "valid: 28 tensors, 4 steps\n")
    assert json.loads(shell("validate", base / "one", "--json")[1])["valid"] is True


def test_diff_says_by_its_exit_code_whether_profiles_differ(shell, base: Path) -> None:
    assert shell("diff", base / "one", base / "one")[:2] == (0, "equal\n")
    code, out, _ = shell("diff", base / "one", base / "two", "--json")
    content = json.loads(out)
    assert code == 1
    assert content["largest"] == pytest.approx(0.5)
    assert content["kinds"]["transformer.wte.weight"] == pytest.approx([2.0] * 4)
    assert shell("diff", base / "one", base / "two", "--tolerance", "0.51")[0] == 0
    assert shell("diff", base / "one", base / "two", "--tolerance", "0.49")[0] == 1
    found = RateProfile.from_pretrained(base / "one")
    together = {"global": {"": 4 * found.joint_rates["global"][""]}}
    RateProfile(found.steps, found.rates, found.metadata, found.joint_rates | together).save_pretrained(base / "joint")
    code, out, _ = shell("diff", base / "one", base / "joint", "--json")
    assert (code, json.loads(out)["largest"]) == (1, pytest.approx(0.75))
    code, out, _ = shell("diff", base / "one", base / "lora")
    assert code == 1
    assert "only in first" in out


def test_average(shell, base: Path, tmp_path: Path) -> None:
    code, out, _ = shell("average", base / "one", base / "two", "-o", tmp_path)
    assert (code, Path(out.strip()).parent) == (0, tmp_path)
    one = RateProfile.from_pretrained(base / "one")
    for name, rates in RateProfile.from_pretrained(tmp_path).rates.items():
        assert torch.allclose(rates, one.rates[name] * 2**0.5, rtol=1e-12)
    assert json.loads(shell("average", base / "one", base / "two", "-o", tmp_path, "--json")[1])["averaged_over"] == 2


def test_map(shell, base: Path) -> None:
    code, out, err = shell("map", base / "deep", base / "one", "--depth", "joint")
    assert code == 0
    assert "warning" not in err
    assert "joint rate: transformer.h.*.attn.c_attn.weight" in out
    units = json.loads(shell("map", base / "deep", base / "one", "--json")[1])["units"]
    name = "transformer.h.3.attn.c_attn.weight"
    half = RateProfile.from_pretrained(base / "one").rates["transformer.h.1.attn.c_attn.weight"] / 2
    assert units[name] == {
        "sources": ["transformer.h.1.attn.c_attn.weight"],
        "shares": {name: 1.0},
        "rates": pytest.approx(half.tolist()),
    }
    assert shell("map", base / "deep", base / "lora", "--adapter", base / "adapter")[0] == 0


def test_map_takes_the_order_of_version_0_1_where_folders_leave_no_doubt(shell, base: Path, tmp_path: Path) -> None:
    wanted = shell("map", base / "deep", base / "one")[1]
    for first in (base / "one", base / "one" / "rate_profile.safetensors"):
        code, out, err = shell("map", first, base / "deep")
        assert (code, out) == (0, wanted)
        assert err == f"warning: the model comes first: hf-flerm map {base / 'deep'} {first}\n"
    both = shutil.copytree(base / "one", tmp_path / "both")
    shutil.copy(base / "deep" / "config.json", both)
    assert shell("map", both, base / "deep")[0] == 2, "a model with a profile, and a model without one"
    assert shell("map", base / "deep", both)[:2] == (0, wanted)


@pytest.mark.parametrize(("what", "source"), [("rates", "one"), ("layers", "one"), ("multipliers", "matched")])
def test_plot(shell, base: Path, tmp_path: Path, what: str, source: str) -> None:
    file = tmp_path / "new" / f"{what}.png"
    assert shell("plot", base / source, "--what", what, "-o", file)[:2] == (0, f"{file}\n")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert json.loads(shell("plot", base / source, "--what", what, "-o", file, "--json")[1]) == {"file": str(file)}


def test_report(shell, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "report.html"
    assert shell("report", base / "one", "-o", file)[:2] == (0, f"{file}\n")
    assert "transformer.wte.weight" in file.read_text(encoding="utf-8")
    assert json.loads(shell("report", base / "one", "-o", file, "--json")[1]) == {"file": str(file)}


def test_push_and_pull(shell, base: Path, tmp_path: Path, hub) -> None:
    code, out, _ = shell("push", base / "one", REPO, "--subfolder", "seed-0", "--message", "From the shell", "--json")
    assert code == 0
    assert json.loads(out)["commit"] == hub.repos[REPO].branches["main"]
    assert hub.repos[REPO].messages[-1] == "From the shell"
    code, out, _ = shell("pull", f"{REPO}@main/seed-0", "-o", tmp_path)
    assert code == 0
    assert Path(out.strip()).read_bytes() == (base / "one" / "rate_profile.safetensors").read_bytes()
    assert shell("push", base / "one", REPO, "--create-pr")[1] == f"{hub.endpoint}/{REPO}/discussions/1\n"


def test_json_has_no_number_that_json_does_not_know(shell, tmp_path: Path) -> None:
    hostile = RateProfile([0], {"w": [1.0]}, {"matching": {"scales": {"w": 1e6, "v": 0.0}}})
    hostile.save_pretrained(tmp_path)
    code, out, _ = shell("inspect", tmp_path, "--json")
    assert (code, json.loads(out)["scales"]) == (0, {"w": None, "v": 1.0})
