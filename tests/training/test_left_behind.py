"""A run that is refused, interrupted or cut short leaves nothing behind in the optimizer and in the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from hf_flerm import FLeRMConfig, FLeRMRun, RateProfile
from hf_flerm.model.names import trainable_parameters
from hf_flerm.optimizer.param_groups import raw_optimizer
from hf_flerm.rates.model_call import ModelCallError
from hf_flerm.rates.outputs import MeasuredOutput
from hf_flerm.rates.probe import RateProbe
from tests.shared.training import (
    BATCH,
    Rows,
    assert_identical,
    flerm_callback,
    flerm_config,
    gpt2,
    make_trainer,
    recorded,
    scaled,
    some_factors,
    weights_of,
)


def num_hooks(optimizer: Any) -> int:
    raw: Any = raw_optimizer(optimizer)
    registries = ("step_pre", "step_post", "state_dict_pre", "load_state_dict_pre")
    return sum(len(getattr(raw, f"_optimizer_{registry}_hooks")) for registry in registries)


def match(**options: Any) -> FLeRMConfig:
    names = trainable_parameters(gpt2())
    return flerm_config(mode="match", profile=RateProfile([0], {name: [1.0] for name in names}), **options)


def refuse(*args: Any, **kwargs: Any) -> None:
    raise ModelCallError("this model cannot be run")


def test_a_refused_run_leaves_the_optimizer_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    optimizer, loader = AdamW(model.parameters()), DataLoader(Rows(), BATCH)
    with monkeypatch.context() as patch:
        patch.setattr(MeasuredOutput, "check", refuse)
        with pytest.raises(ModelCallError):
            FLeRMRun(model, optimizer, match(), loader)
    assert num_hooks(optimizer) == 0
    run = FLeRMRun(model, optimizer, match(), loader)
    run.close()
    assert num_hooks(optimizer) == 0


@pytest.mark.parametrize("alone", [False, True], ids=["trainer", "callback"])
@pytest.mark.parametrize("refusing", [(MeasuredOutput, "check"), (FLeRMRun, "resume")], ids=["made", "resumed"])
def test_a_trainer_that_was_refused_can_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusing: tuple[type, str], alone: bool
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = make_trainer(tmp_path, gpt2(), match(), alone=alone, **saving)
    trainer.train()
    again = {"resume_from_checkpoint": str(tmp_path / "checkpoint-1")}
    with monkeypatch.context() as patch:
        patch.setattr(*refusing, refuse)
        with pytest.raises(ModelCallError):
            trainer.train(**again)
    assert num_hooks(trainer.optimizer) == 0
    trainer.train(**again)
    assert flerm_callback(trainer).rate_profile.steps.tolist() == [0, 1]


def test_an_interrupted_measurement_leaves_the_weights_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_trainer(tmp_path, gpt2(), max_steps=1, lr_scheduler_type="constant")
    plain.train()
    model = gpt2()
    trainer = make_trainer(tmp_path, model, FLeRMConfig(), lr_scheduler_type="constant")
    measure = RateProbe.measure

    def interrupted(*args: Any, **kwargs: Any) -> None:
        measure(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(RateProbe, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_identical(weights_of(model), weights_of(plain.model))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert num_hooks(trainer.optimizer) == 0


class Fails(SGD):
    """Raises at its third step, when it has updated the weights."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.count += 1
        if self.count == 3:
            raise KeyboardInterrupt
        return result


def save(optimizer: Optimizer) -> dict[str, Any]:
    return optimizer.state_dict()


def load(optimizer: Optimizer) -> dict[str, Any]:
    model = gpt2()
    optimizer.load_state_dict(SGD(model.parameters(), lr=0.5).state_dict())
    return optimizer.state_dict()


@pytest.mark.parametrize("use", [save, load])
def test_a_checkpoint_after_a_step_that_has_raised_has_the_groups_of_the_user(
    tmp_path: Path, use: Callable[[Optimizer], dict[str, Any]]
) -> None:
    options = {"max_steps": 4, "lr_scheduler_type": "constant"}
    base = recorded(tmp_path, gpt2(), **options)
    config = flerm_config(mode="match", profile=scaled(base, some_factors(gpt2())), pool="unit", measure_steps=(0,))
    model = gpt2()
    optimizer = Fails(model.parameters(), lr=0.25)
    trainer = make_trainer(tmp_path, model, config, alone=True, extra={"optimizers": (optimizer, None)}, **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(set(flerm_callback(trainer).scales.values())) > 1
    (group,) = use(optimizer)["param_groups"]
    assert group["lr"] == {save: 0.25, load: 0.5}[use]
    assert group["params"] == list(range(len(trainable_parameters(model))))


def test_a_step_that_nobody_sees_is_told_of(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    model = gpt2()
    optimizer: Any = SGD(model.parameters(), lr=0.1)

    def own_step(closure: Any = None) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)

    optimizer.step = own_step
    trainer = make_trainer(tmp_path, model, FLeRMConfig(), extra={"optimizers": (optimizer, None)}, max_steps=2)
    trainer.train()
    assert "no scheduled step reached SGD" in warnings_of()[-1]
