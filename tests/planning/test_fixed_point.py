"""A learning rate from signal and curvature: in closed form, where the best one is known, and from far away."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.optimization import Adafactor, AdafactorSchedule

from hf_flerm import FLeRMConfig, FLeRMTrainer, plan
from hf_flerm.planning.curvature import AT_BEST, CurvatureProbe, Look
from hf_flerm.planning.fixed_point import search, wanted_rate
from hf_flerm.planning.plan import Plan
from tests.shared.plans import arguments, lora
from tests.shared.training import Rows, gpt2

CURVATURES = torch.tensor([1.0, 2.0, 4.0])


class Bowl(nn.Module):
    """loss = sum_i c_i (w_i - x_i)^2 / 2, averaged over examples x."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.steep = nn.Parameter(torch.tensor([3.0, -2.0])), nn.Parameter(torch.tensor([1.0]))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        distance = torch.cat([self.flat, self.steep]) - x
        return {"loss": (CURVATURES * distance.square()).sum(-1).mean() / 2}


class Points(Dataset[Any]):
    """Examples around 0."""

    def __init__(self, spread: float, count: int = 64) -> None:
        self.points = spread * torch.randn(count, 3, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.points[index]}


def bowl_options(folder: Path, **options: Any) -> Any:
    given = {"remove_unused_columns": False, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **options}
    return arguments(folder, **given)


def looked_at(folder: Path, learning_rate: float, spread: float, steps: int = 8) -> Look:
    probe = CurvatureProbe(steps)
    model = Bowl()
    args = bowl_options(folder, learning_rate=learning_rate, max_steps=steps)
    optimizer = SGD(model.parameters(), lr=learning_rate)
    trainer = Trainer(model, args, train_dataset=Points(spread), optimizers=(optimizer, None), callbacks=[probe])
    probe.trainer = trainer
    trainer.train()
    return probe.look(learning_rate, trainer.state.global_step)


def test_signal_and_curvature_of_a_quadratic(tmp_path: Path) -> None:
    """Gradient descent on equal examples: m = lr sum g^2 and h = lr^2 sum c g^2 with g = c w, step by step."""
    lr, w = 0.1, torch.tensor([3.0, -2.0, 1.0])
    look = looked_at(tmp_path, lr, spread=0.0)
    signal, curvature = [], []
    for step in range(8):
        g = CURVATURES * w
        if step >= 2 and (step - 2) % 4 == 0:
            signal.append([lr * g[:2].square().sum(), lr * g[2] ** 2])
            curvature.append([lr**2 * (CURVATURES * g.square())[:2].sum(), lr**2 * CURVATURES[2] * g[2] ** 2])
        w = w - lr * g
    for row, (m, h) in enumerate(zip(signal, curvature, strict=True)):
        torch.testing.assert_close(look.signal[row], torch.tensor([m] * 4, dtype=torch.float64), rtol=1e-4, atol=0.0)
        torch.testing.assert_close(
            look.curvature[row], torch.tensor([h] * 4, dtype=torch.float64), rtol=1e-3, atol=1e-7
        )
    assert look.kinds == ("flat", "steep")
    assert look.error == pytest.approx(0.0, abs=0.2)  # only steps differ


def test_the_error_is_the_scatter_of_the_ratio_over_batches() -> None:
    """Against the standard deviation of log(sum h / sum m) over many sets of batches."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Look:
        m = 1 + 0.3 * torch.randn(6, 4, 1, generator=generator, dtype=torch.float64)
        h = 2 + 0.5 * torch.randn(6, 4, 1, generator=generator, dtype=torch.float64)
        return Look(0.1, 8, m, h, ("all",), (1.0,))

    looks = [drawn() for _ in range(400)]
    logs = torch.tensor([math.log(look.ratio) for look in looks])
    stated = math.sqrt(sum(look.error**2 for look in looks) / len(looks))
    assert stated == pytest.approx(logs.std().item(), rel=4 / math.sqrt(2 * 400))


def test_a_kind_wants_what_makes_its_slope_zero() -> None:
    m, h = torch.tensor([[[1.0, 4.0]]]), torch.tensor([[[2.0, 1.0]]])
    look = Look(0.1, 1, m, h, ("a", "b"), (1.0,))
    assert look.ratio == pytest.approx(3 / 5)
    assert look.by_kind == {"a": pytest.approx(0.5 * 3 / 5), "b": pytest.approx(4 * 3 / 5)}


def test_negative_curvature_says_nothing_of_kinds_and_only_that_the_rate_is_too_low() -> None:
    m, h = torch.tensor([[[1.0, 4.0]]]), torch.tensor([[[2.0, -3.0]]])
    look = Look(1.0, 1, m, h, ("a", "b"), (1.0,))
    assert look.by_kind == {}
    assert look.excess == -math.inf
    assert wanted_rate([look]) == pytest.approx(16.0)  # nothing is known but the direction
    share = math.log(30) / (math.log(30) + math.log(4))
    assert wanted_rate([look, bare(16.0, AT_BEST * 4)]) == pytest.approx(16.0**share)
    Plan((look,)).to_dict()


def test_steps_within_a_warmup_count_as_what_they_would_be_after_it(tmp_path: Path) -> None:
    """On a quadratic, h / m is proportional to the learning rate of the step."""
    probes = []
    for warmup in (0, 40):
        probes.append(probe := CurvatureProbe(8))
        args = bowl_options(
            tmp_path, learning_rate=1e-4, max_steps=100, warmup_steps=warmup, lr_scheduler_type="constant_with_warmup"
        )
        model = Bowl()
        optimizer = SGD(model.parameters(), lr=1e-4)
        trainer = Trainer(model, args, train_dataset=Points(0.0), optimizers=(optimizer, None), callbacks=[probe])
        probe.trainer = trainer
        trainer.train()
    plain, warmed = (probe.look(1e-4, 8) for probe in probes)
    assert plain.warmup == 1.0
    assert warmed.ratio < plain.ratio / 5
    assert warmed.excess == pytest.approx(plain.excess, abs=0.3)
    assert Plan((warmed,)).error > Plan((plain,)).error


def bare(learning_rate: float, ratio: float, losses: tuple[float, ...] = (1.0, 0.5)) -> Look:
    one = torch.ones(4, 2, 1, dtype=torch.float64)
    return Look(learning_rate, 8, one, one * ratio, ("all",), losses)


@pytest.mark.parametrize("power", [0.8, 1.0, 1.6])
@pytest.mark.parametrize("start", [1e-2, 1.0, 1e2])
def test_the_search_arrives_from_a_hundred_times_too_low_or_too_high(start: float, power: float) -> None:
    """The ratio is a power of the learning rate; beyond 5 times the best one, training diverges."""

    def look(rate: float) -> Look:
        return bare(rate, AT_BEST * rate**power, (1.0, 0.5 if rate < 5 else math.nan))

    looks = search(look, start, looks=6)
    assert 1 / 1.3 < wanted_rate(looks) < 1.3


def test_a_learning_rate_between_two_looks_is_interpolated() -> None:
    looks = [bare(1.0, AT_BEST / math.e), bare(16.0, AT_BEST * math.e)]
    assert wanted_rate(looks) == pytest.approx(4.0)
    looks = [bare(1.0, AT_BEST / math.e), bare(16.0, AT_BEST, (1.0, math.nan))]
    share = 1 / (math.log(6) + 1)  # of what is too high, only that is known: a factor of 6
    assert wanted_rate(looks) == pytest.approx(16.0**share)


def test_a_learning_rate_that_a_lower_one_beats_is_too_high_whatever_its_curvature() -> None:
    """Of two learning rates with the right ratio, the one that leaves the lower loss counts."""
    good, beaten = bare(1.0, AT_BEST / math.e, (3.0, 1.0)), bare(4.0, AT_BEST, (3.0, 1.3))
    assert wanted_rate([good, beaten]) == pytest.approx(4.0 ** (1 / (math.log(6) + 1)))
    assert wanted_rate([good, bare(4.0, AT_BEST, (3.0, 1.1))]) == pytest.approx(4.0)  # within a tenth of the decrease
    assert wanted_rate([good, bare(4.0, AT_BEST, (3.0, 0.5))]) == pytest.approx(4.0)

    def look(rate: float) -> Look:
        """From scratch: above the best learning rate, 1, the ratio stays, and the loss gets worse."""
        return bare(rate, AT_BEST * min(1.0, rate), (3.0, 1.0 + 0.5 * abs(math.log(rate))))

    for start in (10.0, 0.01):
        assert 0.7 < wanted_rate(search(look, start, looks=6)) < 1.5


def test_a_signal_that_noise_hides_is_not_taken_for_a_step_that_is_too_long() -> None:
    noise = torch.tensor([[[3.0], [-4.0]], [[2.0], [-3.0]]], dtype=torch.float64)
    curvature = torch.ones_like(noise)
    hidden = Look(1.0, 8, noise, curvature, ("all",), (1.0, 1.0))
    assert hidden.excess == -math.inf
    assert "noise exceeds the signal" in Plan((hidden,)).doubts[0]
    rising = Look(1.0, 8, -1 + 0.1 * noise, curvature, ("all",), (1.0, 1.0))
    assert rising.excess == math.inf


def test_what_makes_an_answer_doubtful_is_said() -> None:
    assert Plan((bare(1.0, AT_BEST),)).doubts == []
    assert "did not fall" in Plan((bare(1.0, AT_BEST, (1.0, 2.0, 2.0, 2.0, 2.0)),)).doubts[0]
    few = Look(1.0, 2, one := torch.ones(2, 2, 1), AT_BEST * one, ("all",), (1.0, 0.5))
    assert Plan((few,)).doubts == ["only 2 steps were measured: give more steps"]
    assert "curves downwards" in Plan((bare(1.0, -AT_BEST),)).doubts[0]
    assert "ended far from it, at 1:" in Plan((bare(1.0, AT_BEST / 30),)).doubts[0]
    m = torch.tensor([[[3.0], [-1.0]]], dtype=torch.float64)  # ratios to the mean 3, -1; those of |m| 1.5, 0.5
    noisy = Plan((Look(1.0, 8, m, m.abs() * AT_BEST / 2, ("all",), (1.0, 0.5)),))
    assert noisy.last.error == pytest.approx(math.sqrt(2 * 1.5**2 / 2))
    assert "about 5 times as many examples" in noisy.doubts[0]  # (1.5 / 0.7)^2, rounded up
    assert f"Signal and curvature are not to be trusted: {noisy.doubts[0]}." in str(noisy)
    assert str(noisy).startswith(f"Do not rely on {noisy.learning_rate:.3g} for all tensors.")


def test_a_bowl_of_one_curvature_is_told_the_step_that_reaches_its_floor(tmp_path: Path) -> None:
    """Without noise h / m is lr times a mean curvature: at AT_BEST, that mean times the learning rate is AT_BEST."""
    args = bowl_options(tmp_path, learning_rate=1e-3, max_steps=24)
    found = plan(Bowl(), args, Points(0.0), optimizer=lambda model: SGD(model.parameters(), lr=1.0), steps=16)
    assert found.doubts == []
    assert 1 / 4 < found.learning_rate / AT_BEST < 1.3
    assert str(found).startswith(f"Use {found.learning_rate:.3g} for all tensors.\nAt ")
    low, high = found.range
    assert low < found.learning_rate < high


@pytest.mark.parametrize("make", [gpt2, lora])
def test_planning_without_a_base_leaves_no_trace(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = FLeRMTrainer(model=model, args=arguments(tmp_path), train_dataset=Rows(), flerm=FLeRMConfig())
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    found = trainer.plan(steps=6, looks=2)
    drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(tmp_path.iterdir())
    assert found.to_dict()["looks"][0]["learning_rate"] == trainer.args.learning_rate
    again = plan(make(), arguments(tmp_path), Rows(), steps=6, looks=2)
    assert again.to_dict() == found.to_dict()


def test_dropout_is_off_while_slopes_are_compared(tmp_path: Path) -> None:
    """With dropout, the two gradients would be those of two networks."""

    def ratio(p: float) -> float:
        probe = CurvatureProbe(4)
        model = gpt2()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
        trainer = Trainer(model, arguments(tmp_path, max_steps=4, learning_rate=1e-4), train_dataset=Rows())
        trainer.add_callback(probe)
        probe.trainer = trainer
        slopes: list[tuple[Tensor, Tensor]] = []
        measured = probe._measured

        def kept(before: Any) -> Any:
            slopes.append(measured(before)[1:])
            return 0.0, *slopes[-1]

        probe._measured = kept
        trainer.train()
        signal, curvature = slopes[0]
        return abs((curvature.sum() / signal.sum()).item())

    assert ratio(0.5) < 0.1  # at so small a learning rate, the slope hardly changes along the step


def test_a_tiny_learning_rate_is_too_low_however_the_batches_differ(tmp_path: Path) -> None:
    """The loss is followed on the same batches, so that those that are harder are not taken for a divergence."""
    look = looked_at(tmp_path, 1e-7, spread=20.0, steps=40)
    assert not look.has_diverged
    assert look.losses == pytest.approx([look.losses[0]] * len(look.losses), rel=1e-3)
    assert look.excess < -1.0
    assert looked_at(tmp_path, 1.0, spread=0.0, steps=40).has_diverged  # 4 times the learning rate of the steepest


@pytest.mark.parametrize(("options", "message"), [({"looks": 0}, "looks is 0"), ({"steps": 0}, "steps is 0")])
def test_bad_numbers_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(gpt2(), arguments(tmp_path), Rows(), **options)
    with pytest.raises(ValueError, match="the learning rate is 0"):
        plan(gpt2(), arguments(tmp_path, learning_rate=0.0), Rows())


def test_adamw_on_a_transformer_is_found_from_both_sides(tmp_path: Path) -> None:
    def found(start: float) -> float:
        args = arguments(tmp_path, learning_rate=start, max_steps=48, lr_scheduler_type="constant")
        return plan(gpt2(), args, Rows(), optimizer=lambda m: AdamW(m.parameters(), lr=1.0), steps=32).learning_rate

    low, high = found(1e-4), found(1.0)
    assert 1 / 2 < low / high < 2


@pytest.mark.parametrize("max_steps", [1, 5])
def test_a_training_shorter_than_a_look_is_looked_at(tmp_path: Path, max_steps: int) -> None:
    """The same numbers as a look that asks for no more steps than there are."""
    args = bowl_options(tmp_path, learning_rate=1e-2, max_steps=max_steps)

    def found(steps: int) -> Plan:
        return plan(Bowl(), args, Points(1.0), optimizer=lambda m: SGD(m.parameters(), lr=1.0), steps=steps, looks=1)

    assert found(64).to_dict() == found(max_steps).to_dict()
    assert 0 < found(64).last.ratio < math.inf


def test_a_schedule_without_a_warmup_has_none_whatever_the_arguments_say(tmp_path: Path) -> None:
    args = bowl_options(tmp_path, learning_rate=1e-3, max_steps=100, warmup_steps=90)
    assert args.lr_scheduler_type == "constant"
    assert plan(Bowl(), args, Points(0.0), steps=8, looks=1).last.warmup == 1.0


class Stops(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


class Exhausted(IterableDataset[Any]):
    """A stream that can be read once."""

    def __init__(self) -> None:
        self.rows = iter([{"x": point["x"]} for point in (Points(1.0)[index] for index in range(30))])

    def __iter__(self) -> Iterator[Any]:
        yield from self.rows


def test_a_look_that_says_nothing_is_an_error_that_says_why(tmp_path: Path) -> None:
    def refused(message: str, model: nn.Module, rate: float = 1e-2, data: Any = None, **options: Any) -> None:
        own = {"accelerator_config": {"dispatch_batches": False}}
        args = bowl_options(tmp_path, learning_rate=rate, max_steps=12, **own)
        with pytest.raises(ValueError, match=message):
            plan(model, args, Points(1.0) if data is None else data, steps=12, **options)

    broken = Bowl()
    with torch.no_grad():
        broken.flat.fill_(math.nan)
    refused("the loss is nan before the first step", broken)
    refused("the weights do not change at learning rate 1e-12", Bowl(), 1e-12)
    refused("training ended after 1 steps", Bowl(), callbacks=[Stops()])
    refused("yields nothing when it is read a second time", Bowl(), data=Exhausted())
    refused("the learning rate is inf", Bowl(), math.inf)
    refused("train_dataset is empty", Bowl(), data=Points(1.0, count=0))


def test_an_optimizer_that_chooses_its_learning_rate_is_refused(tmp_path: Path) -> None:
    model = Bowl()
    optimizer = Adafactor(model.parameters())  # relative steps
    made = optimizer, AdafactorSchedule(optimizer)
    trainer = Trainer(model, bowl_options(tmp_path), train_dataset=Points(1.0), optimizers=made)
    with pytest.raises(ValueError, match="Adafactor chooses its learning rate itself"):
        plan(trainer)
