"""TRL's trainers: recording leaves no trace, matching acts, and the function is what each trainer trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import geometric_mean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from hf_flerm import FLeRMCallback, FLeRMConfig, FLeRMMixin, FLeRMRun, RateProfile, plan
from hf_flerm.profile.rate_profile import PROFILE_NAME
from hf_flerm.rates.outputs import MeasuredOutput
from hf_flerm.training.trl_tasks import trl_task
from tests.shared.processes import launch
from tests.shared.training import Outcome, assert_identical, flerm_callback, gpt2, scaled, train, weights_of

STEPS = 3
BATCH = 4
WORDS = [f"w{index}" for index in range(28)]
CONFIG = FLeRMConfig(measure_steps=range(STEPS))


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def texts(count: int, least: int, most: int, seed: int) -> list[str]:
    random = torch.Generator().manual_seed(seed)

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=random))

    sizes = [least + draw(most - least + 1) for _ in range(count)]
    return ["".join(f" {WORDS[draw(len(WORDS))]}" for _ in range(size)) for size in sizes]


def policy(dropout: float = 0.1, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=1, eos_token_id=1, pad_token_id=0))


def rewarder(dropout: float = 0.1, seed: int = 0) -> GPT2ForSequenceClassification:
    torch.manual_seed(seed)
    return GPT2ForSequenceClassification(
        GPT2Config(**{**policy(dropout).config.to_dict(), "num_labels": 1, "architectures": None})
    )


def completions(count: int = 16) -> Dataset:
    return Dataset.from_dict({"prompt": texts(count, 2, 4, 0), "completion": texts(count, 2, 5, 1)})


def preferences(count: int = 16) -> Dataset:
    return Dataset.from_dict(
        {"prompt": texts(count, 2, 4, 0), "chosen": texts(count, 2, 5, 1), "rejected": texts(count, 2, 5, 2)}
    )


def lengths(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **more,
    }


def sft(folder: Path, seed: int = 0, kind: type = SFTTrainer, **more: Any) -> dict[str, Any]:
    own = {name: more.pop(name) for name in list(more) if name in ("packing", "padding_free", "max_length")}
    return {
        "class": kind,
        "model": policy(seed=seed),
        "args": SFTConfig(**options(folder, **own)),
        "train_dataset": completions(48 if own.get("packing") else 16),
        "processing_class": tokenizer(),
        **more,
    }


def packed(folder: Path, seed: int = 0) -> dict[str, Any]:
    return sft(folder, seed, packing=True, max_length=24)


def flattened(folder: Path, seed: int = 0) -> dict[str, Any]:
    return sft(folder, seed, padding_free=True, max_length=None)


def dpo(folder: Path, seed: int = 0) -> dict[str, Any]:
    return {
        "class": DPOTrainer,
        "model": policy(seed=seed),
        "ref_model": policy(seed=seed),
        "args": DPOConfig(**options(folder)),
        "train_dataset": preferences(),
        "processing_class": tokenizer(),
    }


def reward(folder: Path, seed: int = 0) -> dict[str, Any]:
    return {
        "class": RewardTrainer,
        "model": rewarder(seed=seed),
        "args": RewardConfig(**options(folder)),
        "train_dataset": preferences(),
        "processing_class": tokenizer(),
    }


def grpo(folder: Path, seed: int = 0) -> dict[str, Any]:
    return {
        "class": GRPOTrainer,
        "model": policy(seed=seed),
        "reward_funcs": lengths,
        "args": GRPOConfig(**options(folder, num_generations=2, max_completion_length=6)),
        "train_dataset": completions().remove_columns("completion"),
        "processing_class": tokenizer(),
    }


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "sft": sft,
    "sft-packed": packed,
    "sft-padding-free": flattened,
    "dpo": dpo,
    "reward": reward,
    "grpo": grpo,
}


def made(case: dict[str, Any], flerm: FLeRMConfig | None = None, probe_dataset: Any = None) -> Trainer:
    kind = case.pop("class")
    return kind(**case, callbacks=[] if flerm is None else [FLeRMCallback(flerm, probe_dataset)])


def run_once(trainer: Trainer, **resume: Any) -> Outcome:
    torch.manual_seed(0)
    return train(trainer, **resume)


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


SHIFTS = {
    "reward": {"transformer.ln_f.bias"}
}  # all rewards alike, and the loss sees differences: its gradient is rounding


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_recording_changes_nothing_and_matching_acts(tmp_path: Path, case: str) -> None:
    plain = made(CASES[case](tmp_path))
    expected = run_once(plain)
    trainer = made(CASES[case](tmp_path), CONFIG)
    outcome = run_once(trainer)
    profile = flerm_callback(trainer).rate_profile
    assert profile.steps.tolist() == list(range(STEPS))
    moved = set(profile.names) - SHIFTS.get(case, set())
    assert all(profile.rates[name].all() for name in moved), profile.rates
    for part in ("weights", "random_state", "witnessed"):
        assert_identical(getattr(outcome, part), getattr(expected, part), part)
    assert_identical([log["loss"] for log in outcome.logs], [log["loss"] for log in expected.logs])

    base = scaled(profile, dict.fromkeys(profile.names, 8.0))
    matched = made(CASES[case](tmp_path), FLeRMConfig(mode="match", profile=base, measure_steps=range(STEPS)))
    run_once(matched)
    scales = flerm_callback(matched).scales
    assert 1.5 < geometric_mean(scales.values()) < 16
    assert matched.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]

    planning = made(CASES[case](tmp_path))
    torch.manual_seed(0)
    assert plan(planning, profile=profile, steps=STEPS).steps == STEPS
    again = run_once(planning)
    for part in ("weights", "random_state", "logs"):
        assert_identical(getattr(again, part), getattr(expected, part), part)


def test_probing_with_prompts_of_ones_own_changes_nothing(tmp_path: Path) -> None:
    """They are completed once before training, to see whether that can be done."""
    plain = run_once(made(grpo(tmp_path)))
    outcome = run_once(made(grpo(tmp_path), CONFIG, completions().remove_columns("completion")))
    for part in ("weights", "random_state", "witnessed"):
        assert_identical(getattr(outcome, part), getattr(plain, part), part)


def probed_batch(trainer: Trainer, config: FLeRMConfig = CONFIG) -> tuple[Any, dict[str, Any]]:
    loader = trainer.get_train_dataloader()
    task = trl_task(trainer.args, trainer.model, loader, trainer.processing_class)
    return task, dict(task.collate_fn([loader.dataset[index] for index in range(BATCH)]))


@pytest.mark.filterwarnings("ignore")
def test_sft_looks_at_completions_alone(tmp_path: Path) -> None:
    trainer = made(sft(tmp_path))
    task, batch = probed_batch(trainer)
    assert task.positions == "labels"
    prompts = [len(text.split()) for text in completions()["prompt"][:BATCH]]
    for length, labels in zip(prompts, batch["labels"], strict=True):
        assert (labels[:length] == -100).all()
        assert (labels[length : length + 2] != -100).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["sft-packed", "sft-padding-free"])
def test_packed_rows_are_probed_as_the_documents_in_them(tmp_path: Path, case: str) -> None:
    trainer = made(CASES[case](tmp_path))
    _, batch = probed_batch(trainer)
    rows = [trainer.get_train_dataloader().dataset[index] for index in range(BATCH)]
    tokens = [
        ids[end - length : end]
        for row in rows
        for ids, sizes in [(row["input_ids"], row.get("seq_lengths") or [len(row["input_ids"])])]
        for length, end in zip(sizes, torch.tensor(sizes).cumsum(0).tolist(), strict=True)
    ]
    assert len(tokens) > BATCH or case != "sft-packed"
    found = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert found == tokens
    # The same function: what the model makes of a packed row is what it makes of its documents.
    model = trainer.model.eval()
    flat = trainer.data_collator(rows)
    assert flat["input_ids"].shape[0] == 1
    with torch.no_grad():
        whole = model(input_ids=flat["input_ids"], position_ids=flat["position_ids"], use_cache=False).logits[0]
        apart = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(apart[batch["attention_mask"].bool()], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_dpo_looks_at_both_completions_and_leaves_the_reference_alone(tmp_path: Path) -> None:
    trainer = made(dpo(tmp_path), CONFIG)
    task, batch = probed_batch(trainer)
    assert task.positions == "labels"
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert len(batch["labels"]) == 2 * BATCH
    original = trainer.data_collator([trainer.train_dataset[index] for index in range(BATCH)])
    assert torch.equal(batch["labels"] != -100, original["completion_mask"] != 0)
    before = weights_of(trainer.ref_model)
    trainer.train()
    assert_identical(weights_of(trainer.ref_model), before)
    assert not set(map(id, trainer.ref_model.parameters())) & {id(p) for p in trainer.model.parameters()}


@pytest.mark.filterwarnings("ignore")
def test_a_reward_model_is_its_reward(tmp_path: Path) -> None:
    trainer = made(reward(tmp_path), CONFIG)
    trainer.train()
    metadata = flerm_callback(trainer).rate_profile.metadata["flerm"]
    assert (metadata["output"], metadata["positions"]) == ("logits", "attention_mask")
    _, batch = probed_batch(trainer)
    values = MeasuredOutput()(trainer.model, batch)
    assert values.values.shape == (2 * BATCH, 1)
    assert values.count() == 2 * BATCH


@pytest.mark.filterwarnings("ignore")
def test_grpo_looks_at_completions_of_its_own(tmp_path: Path) -> None:
    trainer = made(grpo(tmp_path))
    torch.manual_seed(0)
    task, batch = probed_batch(trainer)
    assert task.positions == "labels"
    prompts = tokenizer()(text=completions()["prompt"][:BATCH])["input_ids"]
    width = max(map(len, prompts))
    assert batch["input_ids"].shape[1] <= width + 6
    for ids, mask, labels, prompt in zip(
        *(batch[k] for k in ("input_ids", "attention_mask", "labels")), prompts, strict=True
    ):
        assert ids[:width][mask[:width].bool()].tolist() == prompt
        assert (labels[:width] == -100).all()
        completion = ids[width:].tolist()
        length = completion.index(1) + 1 if 1 in completion else len(completion)
        assert labels[width:].tolist() == completion[:length] + [-100] * (len(completion) - length)
        assert mask[width:].tolist() == [1] * length + [0] * (len(completion) - length)


@pytest.mark.filterwarnings("ignore")
def test_grpo_takes_completions_that_are_given(tmp_path: Path) -> None:
    rows = [{"input_ids": [3, 4, 5 + index], "labels": [-100, 4, 5 + index]} for index in range(8)]
    trainer = made(grpo(tmp_path), CONFIG, Dataset.from_list(rows))
    trainer.train()
    assert flerm_callback(trainer).rate_profile.steps.tolist() == list(range(STEPS))


@pytest.mark.filterwarnings("ignore")
def test_the_same_run_as_trainer_sft_and_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One training, written three ways, has one profile."""
    monkeypatch.setattr("transformers.Trainer._get_train_sampler", lambda *_: None)
    rows = [{"input_ids": list(range(3 + index % 4, 13 + index % 4))} for index in range(BATCH * STEPS)]
    more = {"weight_decay": 0.0, "max_grad_norm": 0.0, "adam_epsilon": 1e-4, "optim": "adamw_torch"}
    flerm = FLeRMConfig(measure_steps=range(STEPS), positions="labels")
    collate = DataCollatorForLanguageModeling(tokenizer(), mlm=False)

    by_sft = SFTTrainer(
        policy(0.0),
        SFTConfig(**options(tmp_path, **more)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[FLeRMCallback(flerm)],
    )
    by_sft.train()
    by_trainer = Trainer(
        policy(0.0),
        TrainingArguments(**options(tmp_path, **more)),
        train_dataset=Dataset.from_list(rows),
        data_collator=collate,
        callbacks=[FLeRMCallback(flerm)],
    )
    by_trainer.train()
    model = policy(0.0)
    loader = DataLoader(rows, BATCH, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    run = FLeRMRun(model, optimizer, flerm, loader)
    for batch in loader:
        model(**batch, num_items_in_batch=batch["labels"].numel()).loss.backward()
        with run.step():
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for other in (flerm_callback(by_sft).rate_profile, flerm_callback(by_trainer).rate_profile):
        assert other.steps.tolist() == run.profile.steps.tolist() == list(range(STEPS))
        for name, rates in run.profile.rates.items():
            torch.testing.assert_close(other.rates[name], rates, rtol=1e-3, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", [Dataset.from_list, list], ids=["datasets", "list"])
def test_random_numbers_that_a_collator_holds_are_left_alone(tmp_path: Path, kind: Callable[..., Any]) -> None:
    """Transformers' collator for masked language models holds some, if it is given a seed."""
    rows = [{"input_ids": list(range(3 + index % 4, 13 + index % 4))} for index in range(BATCH * STEPS)]
    masking = tokenizer()
    masking.add_special_tokens({"mask_token": WORDS[-1]})

    def outcome(*callbacks: FLeRMCallback) -> Outcome:
        collate = DataCollatorForLanguageModeling(masking, seed=42)
        args = TrainingArguments(**options(tmp_path))
        data = kind(rows)
        return run_once(Trainer(policy(), args, train_dataset=data, data_collator=collate, callbacks=[*callbacks]))

    plain, recorded = outcome(), outcome(FLeRMCallback(CONFIG))
    assert_identical(recorded.weights, plain.weights)
    assert_identical([log["loss"] for log in recorded.logs], [log["loss"] for log in plain.logs])


class FLeRMSFTTrainer(FLeRMMixin, SFTTrainer):
    """The two in one name."""


@pytest.mark.filterwarnings("ignore")
def test_the_mixin_records_saves_and_resumes(tmp_path: Path) -> None:
    plain = run_once(made(sft(tmp_path / "plain")))

    def mixed(**more: Any) -> FLeRMSFTTrainer:
        case = sft(tmp_path / "mixed", kind=FLeRMSFTTrainer)
        case["args"] = SFTConfig(**options(tmp_path / "mixed", save_strategy="steps", save_steps=2))
        case.pop("class")
        return FLeRMSFTTrainer(**case, **more)

    trainer = mixed(flerm=CONFIG)
    outcome = run_once(trainer)
    assert_identical(outcome.weights, plain.weights)
    assert (tmp_path / "mixed" / "checkpoint-2" / PROFILE_NAME).is_file()
    trainer.save_model(str(tmp_path / "saved"))
    assert RateProfile.from_pretrained(tmp_path / "saved") == trainer.rate_profile

    match = FLeRMConfig(mode="match", profile=trainer.rate_profile, measure_steps=range(STEPS), granularity="block")
    whole = mixed(flerm=match)
    run_once(whole)
    resumed = mixed(flerm=match)
    run_once(resumed, resume_from_checkpoint=str(tmp_path / "mixed" / "checkpoint-2"))
    assert_identical(weights_of(resumed.model), weights_of(whole.model))
    assert resumed.flerm_callback.scales == whole.flerm_callback.scales


def test_a_trainer_whose_function_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="KTOConfig is not supported; supported are SFTConfig, DPOConfig"):
        trl_task(KTOConfig(**options(tmp_path)), gpt2(), None, None)
    assert trl_task(TrainingArguments(**{**options(tmp_path)}), gpt2(), None, None).positions == "attention_mask"


def test_what_the_user_says_of_positions_counts(tmp_path: Path) -> None:
    trainer = made(sft(tmp_path), FLeRMConfig(measure_steps=(0,), positions="attention_mask"))
    trainer.train()
    assert flerm_callback(trainer).rate_profile.metadata["flerm"]["positions"] == "attention_mask"


RAW = {"sft": completions, "sft-packed": completions, "dpo": preferences, "reward": preferences}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", RAW)
def test_probe_data_that_is_not_tokenized_is_refused_before_training(tmp_path: Path, case: str) -> None:
    raw = RAW[case]()
    trainer = made(CASES[case](tmp_path), CONFIG, raw)
    before = weights_of(trainer.model)
    with pytest.raises(ValueError, match=r"no batch can be collated from the probe data set: KeyError") as caught:
        trainer.train()
    columns = trainer.get_train_dataloader().dataset.column_names
    assert f"It has the columns {raw.column_names}, the training set has {columns}." in str(caught.value)
    assert_identical(weights_of(trainer.model), before)
    # What the message tells to do.
    trainer = made({**CASES[case](tmp_path), "eval_dataset": raw})
    trainer.add_callback(FLeRMCallback(CONFIG, trainer.eval_dataset))
    trainer.train()
    assert flerm_callback(trainer).rate_profile.steps.tolist() == list(range(STEPS))


@pytest.mark.filterwarnings("ignore")
def test_grpo_needs_prompts_or_completions_to_probe_with(tmp_path: Path) -> None:
    trainer = made(grpo(tmp_path), CONFIG, completions().rename_column("prompt", "question"))
    with pytest.raises(ValueError, match=r"KeyError\('prompt'\).*the training set has \['prompt'\]"):
        trainer.train()


@pytest.mark.filterwarnings("ignore")
def test_completions_are_not_sampled_from_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_flerm.training.trl_tasks.engine_of", lambda model: SimpleNamespace(sharded=True))
    trainer = made(grpo(tmp_path), CONFIG)
    with pytest.raises(
        ValueError, match="from a sharded model: pass a probe_dataset with the columns input_ids and labels"
    ):
        trainer.train()


def runs_together(folder: Path) -> dict[str, Any]:
    """Of a trainer whose probes sample completions, each process its own."""
    plain = run_once(made(grpo(folder)))
    trainer = made(grpo(folder), CONFIG)
    outcome = run_once(trainer)
    for part in ("weights", "random_state", "witnessed"):
        assert_identical(getattr(outcome, part), getattr(plain, part), part)
    profile = flerm_callback(trainer).rate_profile
    base = scaled(profile, dict.fromkeys(profile.names, 8.0))
    matched = made(grpo(folder), FLeRMConfig(mode="match", profile=base, measure_steps=(0,)))
    run_once(matched)
    return {
        "steps": profile.steps.tolist(),
        "profile": profile.to_bytes(),
        "scales": flerm_callback(matched).scales,
        "weights": weights_of(matched.model),
    }


def test_grpo_on_two_processes(tmp_path: Path) -> None:
    first, second = launch(runs_together, 2, tmp_path, tmp_path)
    assert_identical(first, second)
    assert first["steps"] == list(range(STEPS))
    assert 1.5 < geometric_mean(first["scales"].values()) < 16
