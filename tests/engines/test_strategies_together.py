"""What a matched run does by itself, on several processes: one level for all, a gate, or nothing at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from hf_flerm import FLeRMConfig, FLeRMTrainer, RateProfile, Research
from hf_flerm.rates.per_example.linear_head import LinearHead
from tests.shared.distributed import (
    ACCUMULATED,
    DROPOUT,
    PAIR,
    STABLE,
    UNEVEN,
    as_on_gpus,
    drawn_by_all,
    outcome,
)
from tests.shared.processes import launch
from tests.shared.training import (
    MODELS,
    Rows,
    assert_identical,
    assert_same_run,
    flerm_callback,
    make_trainer,
    recorded,
    train,
)

# A level counts from step 16 on. The checkpoint lies between two measurements that do.
MEASURED = (0, 8, 16, 20)
STOP, STEPS = 18, 22
RESEARCH = Research(probes=2, probe_batch_size=4)
FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["GPT2Block"]}}
ENGINES: dict[str, dict[str, Any]] = {"ddp": {}, "fsdp2": FSDP}
OUT_OF_BALANCE = 30.0


@dataclass(frozen=True)
class Case:
    """A target that differs from its base so that it gets another policy.

    Attributes:
        model: One of `MODELS`.
        options: How the target is trained; the base is trained by AdamW.
    """

    model: str
    options: Mapping[str, Any]


# With momentum, because torch cannot load the state of an FSDP optimizer that has none.
BY_SGD: dict[str, Any] = {"extra": {"optimizer_cls_and_kwargs": (SGD, {"lr": 1e-3, "momentum": 0.9})}}
CASES = {
    "level": Case("full", BY_SGD),
    "level, accumulated": Case("full", {**BY_SGD, "gradient_accumulation_steps": 2}),
    "gate": Case("lora", {}),
}


def base_of(case: Case, folder: Path) -> RateProfile:
    """The profile of a training by AdamW; of LoRA with B far out of balance, so that the gate opens."""
    config = FLeRMConfig(measure_steps=MEASURED, research=RESEARCH)
    options = {"max_steps": STEPS, "learning_rate": 1e-3, **STABLE}
    base = recorded(folder, MODELS[case.model](), flerm=config, **options)
    rates = {name: rates * (OUT_OF_BALANCE if "lora_B" in name else 1.0) for name, rates in base.rates.items()}
    return RateProfile(base.steps, rates, base.metadata, base.joint_rates)


def matched(
    folder: Path, case: Case, base: RateProfile, batch: int, resume: Path | None = None, **options: Any
) -> dict[str, Any]:
    config = FLeRMConfig(mode="match", profile=base, max_change=1e6, measure_steps=MEASURED, research=RESEARCH)
    saving = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": STOP, "per_device_train_batch_size": batch}
    settings = {"learning_rate": 1e-3, **STABLE, **saving, **case.options, **options}
    trainer = make_trainer(folder, MODELS[case.model](), config, **settings)
    assert isinstance(trainer, FLeRMTrainer)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return {**outcome(trainer), "evidence": flerm_callback(trainer).evidence}


def matched_together(folder: Path, engine: str, bases: Mapping[str, RateProfile]) -> dict[str, Any]:
    """What each process has of every case; a run that was stopped is that which never was."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        if engine == "fsdp2":
            as_on_gpus(patch)
        for name, case in CASES.items():
            place = folder / name
            found[name] = matched(place, case, bases[name], 2, **ENGINES[engine])
            resume = place / f"checkpoint-{STOP}"
            again = matched(folder / "again", case, bases[name], 2, resume, **ENGINES[engine])
            for part in ("weights", "scales", "profile"):
                assert_identical(again[part], found[name][part], f"{name}, {part}")
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_levels_and_gates_are_those_of_one_process(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = {name: base_of(case, tmp_path / "base") for name, case in CASES.items()}
    first, second = launch(matched_together, PAIR, tmp_path, tmp_path, engine, bases)
    drawn_by_all(monkeypatch, PAIR)
    if engine == "fsdp2":  # no head is skipped in shards
        monkeypatch.setattr(LinearHead, "saves_work", staticmethod(lambda *args: False))
    for name, case in CASES.items():
        one, other = first[name], second[name]
        alone = matched(tmp_path / "alone", case, bases[name], 2 * PAIR)
        for part in ("scales", "profile"):
            assert one[part] == other[part], "bit for bit"
        assert one["evidence"].steps == alone["evidence"].steps == MEASURED
        assert one["scales"] == pytest.approx(alone["scales"], rel=1e-3)
        for tensor, weight in alone["weights"].items():
            assert torch.equal(one["weights"][tensor], other["weights"][tensor])
            torch.testing.assert_close(one["weights"][tensor], weight, rtol=1e-3, atol=1e-4)
        if name == "gate":
            scales = {tensor: scale for tensor, scale in one["scales"].items() if "lora_B" in tensor}
            assert min(scales.values()) > OUT_OF_BALANCE / 2, "the gate is open"
        else:
            (scale,) = set(one["scales"].values())
            assert scale == pytest.approx(math.exp(one["evidence"].log_level))
            assert scale > 2.0, "SGD at AdamW's learning rate moves the outputs too little"
            assert_close(one["evidence"].levels, alone["evidence"].levels)


def assert_close(levels: Tensor, expected: Tensor) -> None:
    """Levels are logarithms: absolute differences are relative errors."""
    assert bool(levels.isfinite().all())
    torch.testing.assert_close(levels, expected, rtol=0.0, atol=1e-3)


def unchanged_runs(folder: Path) -> None:
    """A target that is its base, with dropout, accumulation and a short last batch; other probes than the base's."""
    options: dict[str, Any] = {**ACCUMULATED, "data": Rows(UNEVEN), "max_steps": STOP}
    for model in MODELS.values():
        base = recorded(folder / "base", model(DROPOUT), flerm=FLeRMConfig(measure_steps=MEASURED), **options)
        plain = train(make_trainer(folder, model(DROPOUT), **options))
        config = FLeRMConfig(mode="match", profile=base, measure_steps=MEASURED, seed=1)
        trainer = make_trainer(folder, model(DROPOUT), config, **options)
        assert_same_run(train(trainer), plain, same_groups=False)
        run = flerm_callback(trainer)
        assert run.evidence is not None
        assert run.evidence.steps == MEASURED[:3]
        assert bool(run.evidence.log_quotients.isfinite().any(0).all()), "everything was compared"
        assert bool((run.evidence.log_quotients.nan_to_num() != 0).any()), "and not all was the same"
        assert set(run.scales.values()) == {1.0}


def test_where_nothing_changed_training_is_bit_identical(tmp_path: Path) -> None:
    """Of LoRA, which is held back by a gate, and of all weights, which are held in any case."""
    launch(unchanged_runs, PAIR, tmp_path, tmp_path)
