"""`RateProfile` keeps its numbers to the bit, and its files whole or absent."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import hf_flerm.profile.file
from hf_flerm import RateProfile, RateProfileError
from hf_flerm.profile.rate_profile import PROFILE_NAME, SCHEMA_VERSION

RATES = {"h.1.w": [0.1, 1 / 3, 7e-12], "h.0.w": [0.0, 5e300, math.pi]}


def profile(**changes: Any) -> RateProfile:
    values: dict[str, Any] = {"steps": [0, 2, 10], "rates": RATES, "metadata": {"seed": 3, "nested": {"a": [1, None]}}}
    return RateProfile(**{**values, **changes})


def written(
    path: Path, tensors: dict[str, Tensor] | None = None, metadata: Any = "profile", key: str = "hf_flerm"
) -> Path:
    """A safetensors file that may not be a profile; a text as `metadata` is written as it is."""
    file = path / PROFILE_NAME
    values = {"steps": torch.tensor([0, 2]), "w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    text = json.dumps({"schema_version": SCHEMA_VERSION}) if metadata == "profile" else metadata
    save_file({**values, **(tensors or {})}, file, None if text is None else {key: text})
    return file


def test_contract() -> None:
    it = profile()
    assert it.names == ["h.1.w", "h.0.w"]
    assert it.steps.dtype == torch.int64
    assert it.steps.tolist() == [0, 2, 10]
    assert {name: values.dtype for name, values in it.rates.items()} == dict.fromkeys(RATES, torch.float64)
    assert {name: values.tolist() for name, values in it.rates.items()} == RATES
    assert it.metadata == {"seed": 3, "nested": {"a": [1, None]}}


def test_owns_its_numbers() -> None:
    steps, rates = torch.tensor([0, 1]), torch.tensor([1.0, 2.0], dtype=torch.float64)
    it = RateProfile(steps, {"w": rates})
    steps += 5
    rates *= 2
    assert it == RateProfile([0, 1], {"w": [1.0, 2.0]})


@pytest.mark.parametrize("place", ["folder", "file", "text", "subfolder"])
def test_round_trip_is_byte_equal(tmp_path: Path, place: str) -> None:
    original = profile()
    file = original.save_pretrained(tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / PROFILE_NAME
    assert file.read_bytes() == original.to_bytes()
    loaded = {
        "folder": lambda: RateProfile.from_pretrained(file.parent),
        "file": lambda: RateProfile.from_pretrained(file),
        "text": lambda: RateProfile.from_pretrained(str(file.parent)),
        "subfolder": lambda: RateProfile.from_pretrained(tmp_path / "new", subfolder="folder"),
    }[place]()
    assert loaded == original
    assert loaded.to_bytes() == original.to_bytes()
    assert loaded.metadata == original.metadata
    assert {name: values.tolist() for name, values in loaded.rates.items()} == RATES
    assert loaded.steps.dtype == torch.int64
    assert {values.dtype for values in loaded.rates.values()} == {torch.float64}


def test_a_profile_stands_for_itself() -> None:
    it = profile()
    assert RateProfile.from_pretrained(it) is it


def test_a_profile_without_steps_round_trips(tmp_path: Path) -> None:
    empty = RateProfile([], {"w": []})
    assert RateProfile.from_pretrained(empty.save_pretrained(tmp_path)) == empty
    with pytest.raises(RateProfileError, match="holds no step"):
        empty.at(0)


def test_bytes_depend_on_the_content_alone() -> None:
    one = RateProfile([0], {"a": [1.0], "b": [2.0]}, {"x": 1, "y": 2})
    other = RateProfile([0], {"b": [2.0], "a": [1.0]}, {"y": 2, "x": 1})
    assert one.to_bytes() == other.to_bytes()
    assert one == other
    assert one != RateProfile([0], {"a": [1.0], "b": [math.nextafter(2.0, 3.0)]}, {"x": 1, "y": 2})
    assert one != RateProfile([0], {"a": [1.0], "b": [2.0]}, {"x": 1, "y": 3})


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    with safe_open(profile().save_pretrained(tmp_path), framework="pt") as file:
        assert set(file.keys()) == {"steps", *RATES}
        assert list(file.metadata()) == ["hf_flerm"]
        text = file.metadata()["hf_flerm"]
    assert json.loads(text) == {"schema_version": SCHEMA_VERSION, "seed": 3, "nested": {"a": [1, None]}}
    assert text == json.dumps(json.loads(text), sort_keys=True)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 8.0), (2, 8.0), (4, 2.0), (12, 6.0), (3, 5.0), (6, 3.0), (11, 5.5), (13, 6.0), (10**9, 6.0)],
    ids=["before", "first", "second", "last", "between", "quarter", "late", "after", "long after"],
)
def test_at(step: int, rate: float) -> None:
    it = RateProfile([2, 4, 12], {"w": [8.0, 2.0, 6.0], "v": [0.0, 0.0, 0.0]})
    assert it.at(step) == {"w": rate, "v": 0.0}


def test_appended() -> None:
    first = RateProfile([0], {"a": [1.0], "b": [2.0]}, {"seed": 1})
    second = first.appended(5, {"b": 4.0, "a": 3.0})
    assert second == RateProfile([0, 5], {"a": [1.0, 3.0], "b": [2.0, 4.0]}, {"seed": 1})
    assert first.steps.tolist() == [0]
    with pytest.raises(RateProfileError, match=r"only in this profile \[b\]; only in the new rates \[c\]"):
        first.appended(5, {"a": 1.0, "c": 1.0})
    with pytest.raises(RateProfileError, match=r"strictly increasing.*\[0, 0\]"):
        first.appended(0, {"a": 1.0, "b": 1.0})


def test_average_is_geometric() -> None:
    one = RateProfile([0, 1], {"a": [1.0, 0.0], "b": [4.0, 3.0]}, {"seed": 1, "model": "m"})
    two = RateProfile([0, 1], {"b": [9.0, 3.0], "a": [8.0, 5.0]}, {"seed": 2, "model": "m"})
    three = RateProfile([0, 1], {"a": [27.0, 7.0], "b": [6.0, 3.0]}, {"seed": 3, "model": "m"})
    average = RateProfile.average([one, two, three])
    assert average.steps.tolist() == [0, 1]
    assert average.rates["a"].tolist() == pytest.approx([6.0, 0.0], rel=1e-14)
    assert average.rates["b"].tolist() == pytest.approx([6.0, 3.0], rel=1e-14)
    assert average.metadata == {"model": "m", "averaged_over": 3}


def test_average_takes_whatever_says_where_a_profile_is(tmp_path: Path) -> None:
    profiles = [RateProfile([0], {"a": [rate]}) for rate in (2.0, 8.0)]
    file = profiles[1].save_pretrained(tmp_path)
    for other in (file, str(file), tmp_path, str(tmp_path)):
        assert RateProfile.average([profiles[0], other]).at(0) == {"a": pytest.approx(4.0)}
    with pytest.raises(RateProfileError, match="nowhere"):
        RateProfile.average([profiles[0], tmp_path / "nowhere"])


def test_average_over_seeds_keeps_what_the_runs_share() -> None:
    profiles = [
        RateProfile(
            [0],
            {"a": [1.0]},
            {
                "flerm": {"metric": "fisher", "seed": seed},
                "training_arguments": {"learning_rate": 0.01, "seed": seed, "optim_args": None if seed else "x=1"},
                "matching": {"scales": {"a": float(seed), "b": 1.0}},
                f"of seed {seed}": {"b": 1},
            },
        )
        for seed in range(3)
    ]
    assert RateProfile.average(profiles).metadata == {
        "flerm": {"metric": "fisher"},
        "training_arguments": {"learning_rate": 0.01},
        "averaged_over": 3,
    }


@pytest.mark.parametrize("unit", ["output", "positions", "metric"])
def test_average_refuses_rates_of_other_units(unit: str) -> None:
    profiles = [RateProfile([0], {"a": [1.0]}, {"flerm": {unit: value}}) for value in ("one", "other")]
    with pytest.raises(RateProfileError, match=f"{unit} is one of one, other"):
        RateProfile.average(profiles)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "no profile to average"),
        ([{"a": [1.0]}, {"b": [1.0]}], r"only in the first profile \[a\]; only in another one \[b\]"),
    ],
)
def test_average_refuses(others: list[dict[str, list[float]]], message: str) -> None:
    with pytest.raises(RateProfileError, match=message):
        RateProfile.average([RateProfile([0], rates) for rates in others])


def test_average_refuses_other_steps() -> None:
    with pytest.raises(RateProfileError, match=r"steps differ: \[0\] and \[1\]"):
        RateProfile.average([RateProfile([0], {"a": [1.0]}), RateProfile([1], {"a": [1.0]})])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": [0, 2, 2]}, r"strictly increasing.*\[0, 2, 2\]"),
        ({"steps": [0, 3, 2]}, r"strictly increasing.*\[0, 3, 2\]"),
        ({"steps": [-1, 2, 3]}, r"from 0; got \[-1, 2, 3\]"),
        ({"steps": [[0, 2, 10]]}, r"one row.*\[\[0, 2, 10\]\]"),
        ({"steps": 0}, "one row"),
        ({"steps": [0.0, 2.5, 10.0]}, "2.5"),
        ({"rates": {}}, "at least one parameter"),
        ({"rates": {"good": [1.0, 1.0, 1.0], "bad": [1.0, math.nan, 1.0]}}, "'bad' must be finite"),
        ({"rates": {"good": [1.0, 1.0, 1.0], "bad": [1.0, math.inf, 1.0]}}, "'bad' must be finite"),
        ({"rates": {"good": [1.0, 1.0, 1.0], "bad": [1.0, -1e-9, 1.0]}}, "'bad' must be finite and not negative"),
        ({"rates": {"bad": [1.0, 2.0]}}, r"'bad' have shape \(2,\); there are 3 steps"),
        ({"rates": {"bad": [[1.0, 2.0, 3.0]]}}, r"'bad' have shape \(1, 3\)"),
        ({"rates": {"bad": 1.0}}, r"'bad' have shape \(\)"),
        ({"rates": {"steps": [1.0, 2.0, 3.0]}}, "'steps' cannot be the name"),
        ({"rates": {"": [1.0, 2.0, 3.0]}}, "'' cannot be the name"),
        ({"metadata": {"bad": math.nan}}, "metadata"),
        ({"metadata": {"bad": {1, 2}}}, "metadata"),
        ({"metadata": {"schema_version": 7}}, "schema_version"),
    ],
    ids=lambda value: str(value)[:48] if isinstance(value, dict) else "",
)
def test_wrong_content_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RateProfileError, match=message):
        profile(**changes)


def test_an_error_is_a_value_error() -> None:
    assert issubclass(RateProfileError, ValueError)


def test_missing_folder_file_and_repository(tmp_path: Path) -> None:
    with pytest.raises(RateProfileError, match=f"no {PROFILE_NAME} in .*{tmp_path.name}"):
        RateProfile.from_pretrained(tmp_path)
    with pytest.raises(RateProfileError, match=f"no {PROFILE_NAME} in .*deep"):
        RateProfile.from_pretrained(tmp_path, subfolder="deep")
    with pytest.raises(RateProfileError, match="nowhere"):
        RateProfile.from_pretrained(tmp_path / "nowhere")


def test_missing_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        assert args == ("someone/somewhere", PROFILE_NAME)
        asked = {"subfolder": "sub", "revision": "v1", "token": "secret"}
        assert asked.items() <= kwargs.items()
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hf_flerm.profile.hub, "hf_hub_download", offline)
    with pytest.raises(RateProfileError, match=r"'someone/somewhere' .*no network") as caught:
        RateProfile.from_pretrained("someone/somewhere", subfolder="sub", revision="v1", token="secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 7, 40, -1])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    file = profile().save_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(RateProfileError, match=f"{re.escape(str(file))} is not a whole safetensors file"):
        RateProfile.from_pretrained(tmp_path)


def test_a_text_file_is_no_profile(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("rates: high\n" * 20)
    with pytest.raises(RateProfileError, match=re.escape(str(file))):
        RateProfile.from_pretrained(file)


@pytest.mark.parametrize(
    ("tensors", "metadata", "key", "message"),
    [
        ({}, None, "", "is not a rate profile.*'hf_flerm'"),
        ({}, "{}", "format", "is not a rate profile.*'hf_flerm'"),
        ({}, "{not json", "hf_flerm", "'hf_flerm' metadata of .* is not JSON"),
        ({}, "[" * 100_000, "hf_flerm", "'hf_flerm' metadata of .* is not JSON"),
        ({}, "[1]", "hf_flerm", "'hf_flerm' metadata of .* is not a JSON object"),
        ({}, "{}", "hf_flerm", "schema version None"),
        ({}, json.dumps({"schema_version": SCHEMA_VERSION + 1}), "hf_flerm", "schema version 2.*Upgrade"),
        ({}, json.dumps({"schema_version": "1"}), "hf_flerm", "schema version '1'"),
        ({}, '{"schema_version": 1, "bad": NaN}', "hf_flerm", "metadata"),
        ({"w": torch.ones(2)}, "profile", "hf_flerm", r"'w' in .* is F32; it must be F64"),
        ({"w": torch.tensor([1, 2])}, "profile", "hf_flerm", r"'w' in .* is I64; it must be F64"),
        ({"steps": torch.tensor([0.0, 2.0])}, "profile", "hf_flerm", r"'steps' in .* must be I64"),
        ({"steps": torch.tensor([2, 0])}, "profile", "hf_flerm", "strictly increasing"),
        ({"v": torch.ones(3, dtype=torch.float64)}, "profile", "hf_flerm", r"'v' in .* has shape \[3\]"),
        ({"v": torch.ones(2, 1, dtype=torch.float64)}, "profile", "hf_flerm", r"'v' in .* has shape \[2, 1\]"),
        ({"v": torch.tensor([1.0, math.nan], dtype=torch.float64)}, "profile", "hf_flerm", "'v' must be finite"),
        ({"v": torch.tensor([1.0, math.inf], dtype=torch.float64)}, "profile", "hf_flerm", "'v' must be finite"),
    ],
    ids=[
        "no metadata",
        "other metadata",
        "not JSON",
        "nested too deeply",
        "a list",
        "no schema",
        "newer schema",
        "schema as text",
        "NaN in metadata",
        "float32 rates",
        "integer rates",
        "float steps",
        "unsorted steps",
        "too long",
        "two-dimensional",
        "NaN",
        "infinite",
    ],
)
def test_wrong_file_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: str | None, key: str, message: str
) -> None:
    file = written(tmp_path, tensors, metadata, key)
    with pytest.raises(RateProfileError, match=message) as caught:
        RateProfile.from_pretrained(tmp_path)
    assert str(file) in str(caught.value)


def test_the_helper_writes_a_profile_unless_told_otherwise(tmp_path: Path) -> None:
    assert RateProfile.from_pretrained(written(tmp_path)) == RateProfile([0, 2], {"w": [1.0, 2.0]})


def test_a_file_without_steps_or_rates(tmp_path: Path) -> None:
    metadata = {"hf_flerm": json.dumps({"schema_version": SCHEMA_VERSION})}
    save_file({"w": torch.ones(2, dtype=torch.float64)}, tmp_path / PROFILE_NAME, metadata)
    with pytest.raises(RateProfileError, match="lacks the 'hf_flerm' metadata or 'steps'"):
        RateProfile.from_pretrained(tmp_path)
    save_file({"steps": torch.tensor([0])}, tmp_path / PROFILE_NAME, metadata)
    with pytest.raises(RateProfileError, match="at least one parameter"):
        RateProfile.from_pretrained(tmp_path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    old = profile()
    old.save_pretrained(tmp_path)

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(OSError, match="no space left"):
            RateProfile([0], {"w": [1.0]}).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [PROFILE_NAME]
    assert RateProfile.from_pretrained(tmp_path) == old


def test_what_is_too_large_for_a_file_is_refused_as_such(tmp_path: Path) -> None:
    """A safetensors header holds 100 MB at most, and everything but rates and steps is in it."""
    old = profile()
    old.save_pretrained(tmp_path)
    large = profile(metadata={"text": "x" * 100_000_000})
    with pytest.raises(RateProfileError, match=r"cannot be written: .*(header too large|file can hold).*measure_every"):
        large.save_pretrained(tmp_path)
    assert RateProfile.from_pretrained(tmp_path) == old


def test_the_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("replace", Path(a).parent)), replace(a, b)))
    profile().save_pretrained(tmp_path)
    assert order == ["fsync", ("replace", tmp_path)]


JOINT = {"module": {"fc": [1.0, 2.0]}, "global": {"": [3.0, 0.5]}}


def test_joint_rates_survive_the_file(tmp_path: Path) -> None:
    profile = RateProfile([0, 1], {"w": [1.0, 2.0]}, {"seed": 1}, JOINT)
    profile.save_pretrained(tmp_path)
    again = RateProfile.from_pretrained(tmp_path)
    assert again == profile
    assert {key: {path: row.tolist() for path, row in rows.items()} for key, rows in again.joint_rates.items()} == JOINT
    assert again.metadata == {"seed": 1}


def test_joint_rates_are_appended_and_averaged() -> None:
    profile = RateProfile([0], {"w": [1.0]}, joint_rates={"global": {"": [4.0]}})
    longer = profile.appended(3, {"w": 2.0}, {"global": {"": 9.0}})
    assert longer.joint_rates["global"][""].tolist() == [4.0, 9.0]
    other = RateProfile([0, 3], {"w": [1.0, 1.0]}, joint_rates={"global": {"": [1.0, 4.0]}})
    assert RateProfile.average([longer, other]).joint_rates["global"][""].tolist() == pytest.approx([2.0, 6.0])
    bare = RateProfile([0, 3], {"w": [1.0, 1.0]})
    assert RateProfile.average([longer, bare]).joint_rates == {}
    with pytest.raises(RateProfileError, match=r"only in this profile's joint rates \[global\]"):
        profile.appended(3, {"w": 2.0})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1.0], "have shape"),
        (["a", "b"], "not a row of numbers"),
        ([1.0, None], "not a row of numbers"),
        ([10**400, 1.0], "not a row of numbers|must be finite"),
        ([[1.0], [2.0]], "have shape"),
        ([-1.0, 2.0], "must be finite and not negative"),
        ({"a": 1}, "not a row of numbers"),
        (7.0, "have shape"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_hostile_joint_rates_are_refused(tmp_path: Path, row: Any, message: str) -> None:
    text = json.dumps({"schema_version": 1, "joint_rates": {"module": {"fc": row}}})
    tensors = {"steps": torch.tensor([0, 1]), "w": torch.ones(2, dtype=torch.float64)}
    save_file(tensors, tmp_path / PROFILE_NAME, metadata={"hf_flerm": text})
    with pytest.raises(RateProfileError, match=message):
        RateProfile.from_pretrained(tmp_path)


@pytest.mark.parametrize("joint", [[1], "text", {"module": [1.0]}, {"module": None}], ids=repr)
def test_joint_rates_of_another_form_are_refused(tmp_path: Path, joint: Any) -> None:
    text = json.dumps({"schema_version": 1, "joint_rates": joint})
    tensors = {"steps": torch.tensor([0]), "w": torch.ones(1, dtype=torch.float64)}
    save_file(tensors, tmp_path / PROFILE_NAME, metadata={"hf_flerm": text})
    with pytest.raises(RateProfileError, match=r"joint rates of .* are not JSON objects"):
        RateProfile.from_pretrained(tmp_path)
