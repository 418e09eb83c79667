"""`trainer.plan` and `plan(trainer)`: they use what the trainer has, and training afterwards is as if never planned."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from trl.trainer.utils import add_fused_lm_head

from hf_flerm import FLeRMCallback, FLeRMConfig, FLeRMMixin, FLeRMTrainer, RateProfile, plan
from hf_flerm.planning.copied_trainer import copied_model, set_learning_rate
from tests.shared.training import Rows, arguments, assert_same_run, gpt2, make_trainer, recorded, train

DROPOUT = 0.1
STEPS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RateProfile:
    return recorded(tmp_path_factory.mktemp("base"), gpt2())


class Halves(TrainerCallback):
    """Acts on training: halves the gradients of one tensor at every second step, and counts."""

    def __init__(self) -> None:
        self.steps = 0

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1
        if self.steps % 2:
            kwargs["model"].lm_head.weight.grad.mul_(0.5)


class Draws(FLeRMMixin, Trainer):
    """Draws from a generator of its own at every step, and collects the losses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generator = random.Random(5)
        self.losses: dict[str, list[float]] = {"train": []}

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs) * (1 + self.generator.random())
        self.losses["train"].append(loss.item())
        return loss


def with_scheduler(model: nn.Module, rate: float = 1e-2) -> dict[str, Any]:
    optimizer = SGD(model.parameters(), lr=rate, momentum=0.9)
    return {"optimizers": (optimizer, LambdaLR(optimizer, lambda step: 0.9**step))}


def with_class(model: nn.Module, rate: float = 1e-2) -> dict[str, Any]:
    return {"optimizer_cls_and_kwargs": (AdamW, {"lr": rate, "params": [*model.parameters()]})}


EXTRA: dict[str, Callable[..., dict[str, Any]]] = {
    "created": lambda model: {},
    "an instance and a scheduler": with_scheduler,
    "a class": with_class,
}


@pytest.mark.parametrize("given", EXTRA)
def test_training_after_planning_is_as_if_never_planned(tmp_path: Path, base: RateProfile, given: str) -> None:
    def made() -> FLeRMTrainer:
        model = gpt2(DROPOUT)
        return make_trainer(tmp_path, model, FLeRMConfig(), callbacks=[Halves()], extra=EXTRA[given](model))

    expected = train(made())
    trainer = made()
    before = set(tmp_path.rglob("*"))
    found = trainer.plan(base, steps=STEPS)
    assert found.steps == STEPS
    assert set(tmp_path.rglob("*")) == before
    assert trainer.state.global_step == 0
    assert not trainer.flerm_callback.has_begun
    assert_same_run(train(trainer), expected)


def test_a_trainer_of_ones_own_and_its_state_are_used_and_left(tmp_path: Path, base: RateProfile) -> None:
    def made() -> Draws:
        return Draws(model=gpt2(), args=arguments(tmp_path), train_dataset=Rows(), flerm=FLeRMConfig())

    trainer = made()
    trainer.plan(base, steps=STEPS)
    assert trainer.losses == {"train": []}
    assert trainer.generator.getstate() == random.Random(5).getstate()
    assert_same_run(train(trainer), train(made()))


def test_a_trainer_says_what_its_parts_say(tmp_path: Path, base: RateProfile) -> None:
    """By the method, and with the callback on a plain `Trainer`; a callback that acts on training acts on the copy."""
    parts = plan(gpt2(width=32), arguments(tmp_path), Rows(), base, steps=STEPS).to_dict()
    for alone in (False, True):
        trainer = make_trainer(tmp_path, gpt2(width=32), FLeRMConfig(), alone=alone)
        found = plan(trainer, profile=base, steps=STEPS) if alone else trainer.plan(base, steps=STEPS)
        assert found.to_dict() == parts
    acting = make_trainer(tmp_path, gpt2(width=32), callbacks=[callback := Halves()])
    assert plan(acting, profile=base, steps=STEPS).to_dict() != parts
    assert callback.steps == 0


def test_options_and_probe_examples_of_the_callback_are_used(tmp_path: Path, base: RateProfile) -> None:
    probes = Rows(seed=3)
    callback = FLeRMCallback(FLeRMConfig(seed=4), probes)
    trainer = Trainer(model=gpt2(), args=arguments(tmp_path), train_dataset=Rows(), callbacks=[callback])
    found = plan(trainer, profile=base, steps=STEPS).to_dict()
    options = {"steps": STEPS, "probe_dataset": probes, "config": FLeRMConfig(seed=4)}
    assert found == plan(gpt2(), arguments(tmp_path), Rows(), base, **options).to_dict()


@pytest.mark.parametrize("given", ["an instance and a scheduler", "a class"])
def test_a_given_optimizer_gets_the_learning_rate_of_the_base(tmp_path: Path, base: RateProfile, given: str) -> None:
    """However large its own is: the measurements are those at the base's."""
    found = []
    for rate in (1e-2, 0.3):
        model = gpt2()
        trainer = make_trainer(tmp_path, model, extra=EXTRA[given](model, rate))
        found.append(plan(trainer, profile=base, steps=STEPS).overall.value)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_param_groups_keep_the_ratios_of_their_learning_rates() -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for default, expected in (
        (1e-3, [0.5, 8.0]),
        (7.0, [0.03125, 0.5]),
    ):  # the default if a group has it, or the largest
        optimizer = SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 1.6e-2}], lr=1e-3)
        optimizer.defaults["lr"] = default
        set_learning_rate(optimizer, 0.5)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)


def patched_by_trl(model: Any) -> None:
    add_fused_lm_head(model)


def patched_by_a_bound_method(model: Any) -> None:
    forward = model.forward
    model.forward = MethodType(functools.wraps(forward)(lambda self, *args, **kwargs: forward(*args, **kwargs)), model)


def patched_by_a_hook(model: Any) -> None:
    head = model.lm_head

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = args[0].new_zeros(()) + nn.functional.one_hot(args[0], 32).float() @ head.weight
        return output

    model.register_forward_hook(hook)


@pytest.mark.parametrize("patch", [patched_by_trl, patched_by_a_bound_method, patched_by_a_hook])
def test_functions_that_refer_to_the_model_refer_to_the_copy_in_the_copy(patch: Callable[[Any], None]) -> None:
    model: Any = gpt2()
    patch(model)
    tokens = Rows().tokens[:2]
    before = model(tokens).logits
    copied: Any = copied_model(model)
    assert torch.equal(copied(tokens).logits, before)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.zero_()
    assert not copied(tokens).logits.any()
    assert torch.equal(model(tokens).logits, before)


def test_what_a_trainer_brings_is_not_given_too(tmp_path: Path, base: RateProfile) -> None:
    trainer: Any = make_trainer(tmp_path, gpt2())
    with pytest.raises(TypeError, match="takes args, train_dataset from the trainer"):
        plan(trainer, arguments(tmp_path), Rows(), base)
    with pytest.raises(TypeError, match=r"a trainer, or a model .* and its TrainingArguments"):
        plan(gpt2(), profile=base)  # type: ignore[call-overload]


def test_a_callback_that_cannot_be_copied_is_left_out_with_a_warning(
    tmp_path: Path, base: RateProfile, warnings_of: Callable[[], list[str]]
) -> None:
    callback = Halves()
    callback.file = open(tmp_path / "log", "w")  # type: ignore[attr-defined]  # noqa: SIM115
    trainer = make_trainer(tmp_path, gpt2(), callbacks=[callback])
    plan(trainer, profile=base, steps=1)
    callback.file.close()  # type: ignore[attr-defined]
    assert callback.steps == 0
    assert any("Halves cannot be copied" in warning for warning in warnings_of())
