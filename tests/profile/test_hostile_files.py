"""A profile is data from anywhere: whatever is in a file, it is a profile or a `RateProfileError`, soon and cheaply."""

from __future__ import annotations

import json
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from hf_flerm import RateProfile
from hf_flerm.profile.rate_profile import PROFILE_NAME, RateProfileError
from hf_flerm.transfer.mapping import map_profile
from hf_flerm.transfer.rules import change_between
from tests.shared.training import gpt2

CASES = int(os.environ.get("HF_FLERM_FUZZ_CASES", 5000))  # four in five of bytes, the others of JSON
SECONDS, MEGABYTES = 1.0, 200
MODEL = gpt2()


def real() -> RateProfile:
    names = [name for name, _ in MODEL.named_parameters()]
    metadata = {
        "flerm": {"output": "logits", "mode": "record"},
        "kinds": {name: name for name in names},
        "shapes": {name: [1, 2] for name in names},
        "adapters": {"default": {"r": 4, "lora_alpha": 8, "peft_type": "LORA"}},
        "training_arguments": {"learning_rate": 1e-3},
    }
    rates = {name: [1.0, 0.5, 0.25] for name in names}
    return RateProfile([0, 1, 4], rates, metadata, {"global": {"": [3.0, 2.0, 1.0]}})


REAL = real().to_bytes()
HEADER_BYTES = struct.unpack("<Q", REAL[:8])[0]
HEADER = json.loads(REAL[8 : 8 + HEADER_BYTES])
DATA = REAL[8 + HEADER_BYTES :]


def content(header: Any, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def used(file: Path) -> RateProfile | None:
    """Load a file and do with it what runs do; None if it is refused. It must be quick, once in three times."""
    for _ in range(3):
        start = time.process_time()
        profile = _used(file)
        if time.process_time() - start < SECONDS:
            return profile
    raise AssertionError(f"{file} took more than {SECONDS} s")


def _used(file: Path) -> RateProfile | None:
    try:
        profile = RateProfile.from_pretrained(file)
        assert RateProfile.from_pretrained(profile) is profile
        assert str(profile)
        if len(profile.steps):
            profile.at(1)
            map_profile(profile, MODEL, unmatched="nominal")
        change_between(profile, MODEL)
    except RateProfileError:
        return None
    return profile


def test_the_real_file_is_taken(tmp_path: Path) -> None:
    file = tmp_path / PROFILE_NAME
    file.write_bytes(content(HEADER))
    assert used(file) == real()


# --- fuzzers ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / PROFILE_NAME


def test_bytes_that_were_changed(file: Path) -> None:
    """Bits flip, parts are cut out, doubled, moved and replaced, most of them in the header."""
    numbers = random.Random(0)
    taken = 0
    for _ in range(CASES * 4 // 5):
        mutated = bytearray(REAL)
        for _ in range(numbers.randint(1, 4)):
            at = numbers.randint(0, numbers.choice([40, HEADER_BYTES, len(mutated)]))
            length = numbers.choice([0, 1, 2, 8, 64])
            elsewhere = numbers.randint(0, len(mutated))
            other = numbers.choice(
                [numbers.randbytes(length), numbers.choice(TOKENS), bytes(mutated[elsewhere : elsewhere + length]), b""]
            )
            mutated[at : at + length] = other
        file.write_bytes(mutated)
        taken += used(file) is not None
    assert 0 < taken < CASES / 2


TOKENS = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"-1", b"1e999", b"NaN", b"\\u0000", b"\xff", b'"steps"']
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 30),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["F64", "I64", "F32", "BF16", "F8_E4M3", "../../x", "hf_flerm", "steps", "\x00", "{}", "[[["]),
)
TREES = st.recursive(
    LEAVES, lambda tree: st.one_of(st.lists(tree, max_size=4), st.dictionaries(st.text(max_size=8), tree, max_size=4))
)


@seed(0)
@settings(max_examples=CASES // 5, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_json_that_was_changed(file: Path, data: st.DataObject) -> None:
    """Somewhere in the header or in its metadata stands another JSON value."""
    header = json.loads(json.dumps(HEADER))
    metadata = json.loads(header["__metadata__"]["hf_flerm"])
    for _ in range(data.draw(st.integers(1, 3))):
        spot = data.draw(st.sampled_from([header, metadata]))
        while True:
            keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(spot[key], (dict, list)) and data.draw(st.booleans()):
                spot = spot[key]
                continue
            change = data.draw(st.sampled_from(["replace", "delete", "rename"]))
            if change == "replace" or isinstance(spot, list):
                spot[key] = data.draw(TREES)
            elif change == "delete":
                del spot[key]
            else:
                spot[data.draw(st.one_of(st.text(max_size=12), st.sampled_from(["steps", "__metadata__", "../x"])))] = (
                    spot.pop(key)
                )
            break
    if isinstance(header.get("__metadata__"), dict) and "hf_flerm" in header["__metadata__"]:
        header["__metadata__"]["hf_flerm"] = json.dumps(metadata)
    file.write_bytes(content(header))
    used(file)


# --- what is large, or meant ill ----------------------------------------------------------------------------------


def entry(start: int, stop: int, dtype: str = "F64", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(stop - start) // 8], "data_offsets": [start, stop]}


def twice(name: str) -> bytes:
    return content(f"{json.dumps(HEADER)[:-1]}, {json.dumps({name: HEADER[name]})[1:]}".encode())


def described(**rates: dict[str, Any]) -> dict[str, Any]:
    metadata = {"hf_flerm": json.dumps({"schema_version": 1})}
    return {"__metadata__": metadata, "steps": entry(0, 8, "I64"), **rates}


def with_metadata(text: str) -> bytes:
    return content({**HEADER, "__metadata__": {"hf_flerm": text}})


def many_names(count: int) -> bytes:
    names = ",".join(f'"w{i}":{{"dtype":"F64","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    return content(b"{" + names.encode() + b"}", b"")


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "not a whole safetensors file"),
    "a header of 2^63 bytes": (lambda: struct.pack("<Q", 2**63) + b"{}", "bytes of header"),
    "a header of 33 MB": (lambda: content(b'{"a":"' + b"x" * 34_000_000 + b'"}'), "bytes of header"),
    "65 MB": (lambda: content(HEADER, b"\0" * 68_000_000), "more than 67,108,864 bytes"),
    "a million names": (lambda: many_names(1_000_000), "more than"),
    "30,001 names": (lambda: many_names(30_001), "more than 30,000 tensors"),
    "lists in metadata": (lambda: with_metadata('{"a":[' + "[]," * 5_000_000 + "[]]}"), "JSON lists"),
    "numbers in metadata": (lambda: with_metadata('{"a":[' + "1," * 10_000_000 + "1]}"), "JSON values"),
    "objects in metadata": (lambda: with_metadata('{"a":[' + '{"a":1},' * 2_000_000 + "1]}"), "JSON objects"),
    "nested lists": (lambda: with_metadata('{"a":' + "[" * 200_000 + "]" * 200_000 + "}"), "JSON"),
    "nested objects": (lambda: with_metadata('{"a":' * 90_000 + "1" + "}" * 90_000), "JSON"),
    "a number of a million digits": (lambda: with_metadata('{"a":' + "9" * 1_000_000 + "}"), "JSON"),
    "infinity in metadata": (lambda: with_metadata('{"schema_version":1,"a":1e999}'), "JSON"),
    "a key twice": (lambda: with_metadata('{"schema_version":1,"schema_version":1}'), "duplicate key"),
    "a name twice": (lambda: twice("steps"), "duplicate key"),
    "a path as a name": (lambda: content(described(**{"../../w": entry(8, 16)}), b"\0" * 16), "cannot be the name"),
    "an absolute path": (lambda: content(described(**{"/etc/w": entry(8, 16)}), b"\0" * 16), "cannot be the name"),
    "a windows path": (lambda: content(described(**{"c:\\w": entry(8, 16)}), b"\0" * 16), "cannot be the name"),
    "a terminal's code": (lambda: content(described(**{"\x1b[2J": entry(8, 16)}), b"\0" * 16), "cannot be the name"),
    "an empty name": (lambda: content(described(**{"": entry(8, 16)}), b"\0" * 16), "cannot be the name"),
    "settings that are none": (lambda: with_metadata('{"schema_version":1,"flerm":3}'), "'flerm' in the metadata"),
    "kinds that are none": (lambda: with_metadata('{"schema_version":1,"kinds":{"w":3}}'), "'kinds' in the metadata"),
    "a version that is a truth": (lambda: with_metadata('{"schema_version":true}'), "schema version True"),
    "negative rates": (lambda: content(described(w=entry(8, 16)), b"\0" * 8 + struct.pack("<d", -1.0)), "not negative"),
    "steps twice": (
        lambda: content(
            {**described(w=entry(16, 32)), "steps": entry(0, 16, "I64")}, struct.pack("<qqdd", 3, 3, 1.0, 1.0)
        ),
        "strictly increasing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_soon_and_cheaply(tmp_path: Path, case: str) -> None:
    make, message = HOSTILE[case]
    file = tmp_path / PROFILE_NAME
    file.write_bytes(make())
    start = time.process_time()
    with pytest.raises(RateProfileError, match=message) as caught:
        RateProfile.from_pretrained(tmp_path)
    assert time.process_time() - start < 2 * SECONDS  # on a busy machine
    tracemalloc.start()
    try:
        with pytest.raises(RateProfileError, match=message):
            RateProfile.from_pretrained(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEGABYTES * 1e6
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 2_000


def test_what_cannot_be_read_again_is_not_written(tmp_path: Path) -> None:
    many = {f"w{index}": torch.ones(1) for index in range(30_000)}
    with pytest.raises(RateProfileError, match=r"it has 30,001 tensors, a file can hold 30,000\. Measure less often"):
        RateProfile([0], many).save_pretrained(tmp_path)
    assert not (tmp_path / PROFILE_NAME).exists()


def test_a_folder_in_the_files_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / PROFILE_NAME).mkdir()
    with pytest.raises(RateProfileError, match=f"no {PROFILE_NAME}"):
        RateProfile.from_pretrained(tmp_path)
