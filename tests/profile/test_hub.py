"""Profiles pushed and pulled by the unmodified clients, over HTTP, to and from a Hub on the loopback interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants, snapshot_download
from peft import PeftModel
from transformers import GPT2LMHeadModel

import hf_flerm.profile.hub
from hf_flerm import FLeRMConfig, RateProfile, RateProfileError
from hf_flerm.profile.rate_profile import PROFILE_NAME
from tests.shared.hub_server import READ, WRITE, Fault, Hub
from tests.shared.profiles import REPO, profile
from tests.shared.training import flerm_callback, gpt2, lora, make_trainer, recorded

WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What our own retries would have waited for."""
    waited: list[float] = []
    monkeypatch.setattr(hf_flerm.profile.hub.time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("lfs", [False, True], ids=["inline", "lfs"])
def test_a_file_comes_back_byte_for_byte(hub: Hub, lfs: bool, tmp_path: Path) -> None:
    hub.lfs = lfs
    commit = profile().push_to_hub(REPO)
    pulled = RateProfile.from_pretrained(REPO)
    assert pulled.to_bytes() == profile().to_bytes() == hub.repos[REPO].files()[PROFILE_NAME]
    assert pulled.commit_hash == commit.oid
    assert hub.repos[REPO].lfs == ({PROFILE_NAME} if lfs else set())
    assert set(hub.repos[REPO].files()) == {PROFILE_NAME, "README.md", "rate_profile.png"}
    assert pulled.save_pretrained(tmp_path / "again").read_bytes() == profile().to_bytes()


@pytest.mark.parametrize("lfs", [False, True], ids=["inline", "lfs"])
def test_pushing_twice_changes_nothing(hub: Hub, lfs: bool) -> None:
    hub.lfs = lfs
    profile().push_to_hub(REPO)
    before = hub.repos[REPO].files()
    profile().push_to_hub(REPO)
    assert hub.repos[REPO].files() == before
    profile(2.0).push_to_hub(REPO)
    assert hub.repos[REPO].files()["README.md"].decode().count("## Function-space learning rates") == 1


def test_revision_and_subfolder_in_every_notation(hub: Hub) -> None:
    profile(1.0).push_to_hub(REPO, commit_message="first")
    profile(2.0).push_to_hub(REPO, revision="wide", commit_message="second")
    profile(3.0).push_to_hub(REPO, subfolder="rank/16")
    assert hub.repos[REPO].messages[1:3] == ["first", "second"]
    assert RateProfile.from_pretrained(REPO) == profile(1.0)
    commit = hub.repos[REPO].branches["wide"]
    for source, options in (
        (REPO, {"revision": "wide"}),
        (REPO, {"revision": commit}),
        (f"{REPO}@wide", {}),
        (f"{REPO}@{commit}", {}),
        (f"hf://{REPO}@wide/{PROFILE_NAME}", {}),
        (f"https://huggingface.co/{REPO}/blob/wide/{PROFILE_NAME}", {}),
    ):
        found = RateProfile.from_pretrained(source, **options)
        assert found == profile(2.0), source
        assert found.commit_hash == commit, source
    for source, options in (
        (REPO, {"subfolder": "rank/16"}),
        (f"{REPO}@main/rank/16", {}),
        (f"hf://{REPO}/rank/16", {}),
    ):
        assert RateProfile.from_pretrained(source, **options) == profile(3.0), source
    with pytest.raises(RateProfileError, match="contains revision 'wide', but revision='main' was passed"):
        RateProfile.from_pretrained(f"{REPO}@wide", revision="main")
    with pytest.raises(RateProfileError, match="this is a dataset"):
        RateProfile.from_pretrained(f"hf://datasets/{REPO}")


def test_the_address_in_a_card_of_a_subfolder_loads(hub: Hub) -> None:
    profile(3.0).push_to_hub(REPO, subfolder="rank/16")
    card = hub.repos[REPO].files()["rank/16/README.md"].decode()
    address = card.partition('profile="')[2].partition('"')[0]
    assert RateProfile.from_pretrained(address) == profile(3.0)


def test_private_and_pull_request(hub: Hub) -> None:
    profile().push_to_hub(REPO, private=True)
    assert hub.repos[REPO].private
    commit = profile(2.0).push_to_hub(REPO, create_pr=True, commit_message="Wider")
    assert commit.pr_url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert RateProfile.from_pretrained(REPO) == profile()
    assert RateProfile.from_pretrained(REPO, revision="refs/pr/1") == profile(2.0)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("me/nowhere", {}, "'me/nowhere' .*the repository does not exist or is private"),
        ("me/plain", {}, "'me/plain' .*no such file. Was its run recorded"),
        ("me/plain", {"revision": "old"}, "no such revision"),
        ("me/gated", {"token": READ}, "gated. Ask for access"),
        ("me/private", {"token": False}, "the repository does not exist or is private.*hf auth login"),
        ("me/plain", {"token": "hf_wrong"}, "the token is invalid"),
    ],
)
def test_a_refused_download_is_explained(hub: Hub, source: str, options: dict[str, Any], message: str) -> None:
    content = {PROFILE_NAME: profile().to_bytes()}
    hub.repo("me/plain", {"config.json": b"{}"})
    hub.repo("me/gated", content, gated=True)
    hub.repo("me/private", content, private=True)
    with pytest.raises(RateProfileError, match=message) as caught:
        RateProfile.from_pretrained(source, **options)
    assert "hf_wrong" not in str(caught.value)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_wrong", "the token is invalid"),
        (READ, "token lacks the permission"),
        (False, "hf auth login"),
    ],
)
def test_a_refused_upload_changes_nothing(hub: Hub, token: str | bool, message: str) -> None:
    hub.repo(REPO, {"README.md": b"mine"})
    with pytest.raises(RateProfileError, match=f"'{REPO}' could not be pushed to: .*({message})"):
        profile().push_to_hub(REPO, token=token)
    assert hub.repos[REPO].files() == {"README.md": b"mine"}


@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.parametrize("request_line", ["repos/create", "/preupload/", "/commit/"])
def test_an_upload_survives_a_busy_hub(hub: Hub, waits: list[float], status: int, request_line: str) -> None:
    hub.faults.append(Fault(request_line, status, times=2))
    profile().push_to_hub(REPO)
    assert waits == [1, 2]
    assert hub.repos[REPO].files()[PROFILE_NAME] == profile().to_bytes()


def test_an_upload_gives_up_on_a_broken_hub(hub: Hub, waits: list[float]) -> None:
    hub.repo(REPO)
    hub.faults.append(Fault("/commit/", 500, times=99))
    with pytest.raises(RateProfileError, match=r"could not be pushed to: .*500"):
        profile().push_to_hub(REPO)
    assert waits == [1, 2, 4]
    assert hub.repos[REPO].files() == {}


@pytest.mark.parametrize("status", [429, 500])
def test_a_download_survives_a_busy_hub(hub: Hub, status: int) -> None:
    hub.repo(REPO, {PROFILE_NAME: profile().to_bytes()})
    hub.faults.append(Fault("HEAD", status, times=2))
    assert RateProfile.from_pretrained(REPO) == profile()


def test_a_cut_download_goes_on(hub: Hub) -> None:
    hub.repo(REPO, {PROFILE_NAME: profile().to_bytes()})
    hub.faults.append(Fault("GET", None, times=1))
    assert RateProfile.from_pretrained(REPO) == profile()
    assert sum(line.startswith("GET") for line in hub.requests) == 2


def test_a_cut_lfs_upload_goes_on(hub: Hub) -> None:
    hub.lfs = True
    hub.faults.append(Fault("PUT /lfs", None, times=1))
    profile().push_to_hub(REPO)
    assert hub.repos[REPO].files()[PROFILE_NAME] == profile().to_bytes()


def test_a_cut_commit_changes_nothing_and_can_be_repeated(hub: Hub) -> None:
    hub.repo(REPO, {"config.json": b"{}"})
    hub.faults.append(Fault("/commit/", None, times=1))
    with pytest.raises(RateProfileError, match=f"'{REPO}' could not be pushed to: "):
        profile().push_to_hub(REPO)
    assert set(hub.repos[REPO].files()) == {"config.json"}
    profile().push_to_hub(REPO)
    assert RateProfile.from_pretrained(REPO) == profile()


def test_offline_takes_what_the_cache_has(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repo(REPO, {PROFILE_NAME: profile().to_bytes()})
    with pytest.raises(RateProfileError, match="not in the cache"):
        RateProfile.from_pretrained(REPO, local_files_only=True)
    RateProfile.from_pretrained(REPO)
    asked = len(hub.requests)
    assert RateProfile.from_pretrained(REPO, local_files_only=True) == profile()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert RateProfile.from_pretrained(REPO) == profile()
    with pytest.raises(RateProfileError, match="not in the cache"):
        RateProfile.from_pretrained("me/other")
    assert len(hub.requests) == asked


def test_a_cache_of_ones_own_and_a_forced_download(hub: Hub, tmp_path: Path) -> None:
    hub.repo(REPO, {PROFILE_NAME: profile().to_bytes()})
    for force, downloads in ((False, 1), (False, 1), (True, 2)):
        RateProfile.from_pretrained(REPO, cache_dir=tmp_path / "own", force_download=force)
        assert sum(line.startswith("GET") for line in hub.requests) == downloads
    assert list((tmp_path / "own").glob(f"models--*/snapshots/*/{PROFILE_NAME}"))


def test_an_existing_card_keeps_its_text(hub: Hub) -> None:
    mine = "---\nlicense: mit\ntags:\n- mine\nlibrary_name: peft\nbase_model: org/base\n---\n\n# My model\n\nWords.\n"
    hub.repo(REPO, {"README.md": mine.encode(), "config.json": b"{}"})
    for rate in (1.0, 2.0):
        profile(rate).push_to_hub(REPO)
    card = ModelCard(hub.repos[REPO].files()["README.md"].decode())
    assert card.text.startswith("\n# My model\n\nWords.\n\n<!-- hf_flerm: rate profile -->\n")
    assert card.text.count("<!-- hf_flerm: rate profile -->") == 1
    assert (card.data.license, card.data.library_name, card.data.base_model) == ("mit", "peft", "org/base")
    assert card.data.tags == ["mine", "hf_flerm", "rate-profile", "function-space-learning-rates"]
    assert hub.repos[REPO].files()["config.json"] == b"{}"


def test_what_others_wrote_into_the_card_meanwhile_is_kept(hub: Hub) -> None:
    profile().push_to_hub(REPO)
    repo = hub.repos[REPO]
    files = repo.files()
    repo.commit("main", {**files, "README.md": files["README.md"] + b"\nAdded since.\n"}, "edit")
    profile(2.0).push_to_hub(REPO)
    assert repo.files()["README.md"].endswith(b"\nAdded since.\n")


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_strategy_takes_the_profile_along(hub: Hub, tmp_path: Path, kind: str, strategy: str) -> None:
    model = {"full": gpt2, "lora": lora}[kind]()
    trainer = make_trainer(
        tmp_path / "run",
        model,
        FLeRMConfig(),
        push_to_hub=True,
        hub_model_id=REPO,
        hub_token=WRITE,
        hub_strategy=strategy,
        hub_always_push=True,
        save_strategy="steps",
        save_steps=3,
    )
    trainer.train()
    trainer._finish_current_push()
    repo = hub.repos[REPO]
    if strategy != "end":
        assert {WEIGHTS[kind], PROFILE_NAME} <= set(repo.files())
    folders = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-3", "checkpoint-6"]}.get(strategy, [])
    for folder in folders:
        assert {f"{folder}/{WEIGHTS[kind]}", f"{folder}/{PROFILE_NAME}"} <= set(repo.files())
    for _ in range(2):
        trainer.push_to_hub()
    files = repo.files()
    assert files[PROFILE_NAME] == trainer.rate_profile.to_bytes()
    assert files["README.md"].decode().count("## Function-space learning rates") == 1
    assert "rate_profile.png" in files
    if strategy == "end":
        ids = torch.arange(8).unsqueeze(0)
        loaded = GPT2LMHeadModel.from_pretrained(REPO) if kind == "full" else PeftModel.from_pretrained(gpt2(), REPO)
        assert torch.equal(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)
        matched = make_trainer(tmp_path / "target", {"full": gpt2, "lora": lora}[kind](), FLeRMConfig("match", REPO))
        assert matched.flerm_callback.base == trainer.rate_profile
        assert matched.flerm_callback.base.commit_hash == repo.branches["main"]


def test_the_callback_alone_takes_the_profile_along(hub: Hub, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "run",
        gpt2(),
        FLeRMConfig(),
        alone=True,
        push_to_hub=True,
        hub_model_id=REPO,
        hub_token=WRITE,
        hub_strategy="all_checkpoints",
        hub_always_push=True,
        save_strategy="steps",
        save_steps=3,
    )
    trainer.train()
    trainer.push_to_hub()
    files = hub.repos[REPO].files()
    assert files[PROFILE_NAME] == flerm_callback(trainer).rate_profile.to_bytes()
    assert f"checkpoint-3/{PROFILE_NAME}" in files
    assert "## Function-space learning rates" not in files["README.md"].decode()
    assert RateProfile.from_pretrained(REPO) == flerm_callback(trainer).rate_profile


def test_a_matched_run_says_which_commit_its_base_came_from(hub: Hub, tmp_path: Path) -> None:
    base = recorded(tmp_path / "base", gpt2())
    commit = base.push_to_hub(REPO).oid
    pulled = recorded(tmp_path / "one", gpt2(width=32), flerm=FLeRMConfig("match", REPO))
    local = recorded(tmp_path / "two", gpt2(width=32), flerm=FLeRMConfig("match", base))
    assert pulled.metadata["matching"].pop("base_commit") == commit
    assert pulled == local


def test_a_snapshot_holds_the_profile(hub: Hub) -> None:
    profile().push_to_hub(REPO)
    folder = snapshot_download(REPO, cache_dir=Path(constants.HF_HUB_CACHE))
    assert RateProfile.from_pretrained(folder) == profile()
    assert RateProfile.from_pretrained(folder).commit_hash == hub.repos[REPO].branches["main"]


@pytest.mark.endpoint
def test_the_real_hub() -> None:
    repo = os.environ["HF_FLERM_TEST_REPO"]
    commit = profile().push_to_hub(repo, private=True)
    pulled = RateProfile.from_pretrained(repo, revision=commit.oid)
    assert pulled.to_bytes() == profile().to_bytes()
    assert pulled.commit_hash == commit.oid
