"""`sweep`: it finds the learning rate that a closed form says is best, goes on after a failure, and leaves no trace."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import SGD
from transformers import Trainer, TrainingArguments

from hf_flerm import FLeRMConfig, FLeRMTrainer, RateProfile, Research, Sweep, sweep
from hf_flerm.planning.sweep.run import Recipe, cannot_win
from hf_flerm.planning.sweep.search import LIMIT, Grid, lowest_point, minimum
from hf_flerm.show.plotting import close, plot_sweep
from tests.shared.training import Rows, assert_same_run, gpt2, make_trainer, random_state, train, weights_of

STEPS = 20
START = (2.0, 1.0)
QUICK = FLeRMConfig(measure_steps=[0], research=Research(probes=1, probes_per_batch=1))


@pytest.fixture(autouse=True, scope="module")
def _fast_garbage_collection() -> Iterator[None]:
    """A sweep collects garbage after every run, which looks through all objects that a test session has."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Quadratic(nn.Module):
    """A linear model with two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)
        self.linear.weight.data = torch.tensor([START])

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = self.linear(inputs)
        return {"loss": ((outputs - labels) ** 2).mean() / 2, "logits": outputs}


# The loss is (w1^2 + 4 w2^2) / 4, so that gradient descent multiplies w1 by 1 - rate / 2 and w2 by 1 - 2 rate.
DATA = Dataset.from_dict({"inputs": [[1.0, 0.0], [0.0, 2.0]], "labels": [[0.0], [0.0]]}).with_format("torch")


def closed_form(rate: float) -> float:
    first, second = START[0] * (1 - rate / 2) ** STEPS, START[1] * (1 - 2 * rate) ** STEPS
    return (first**2 + 4 * second**2) / 4


def best_of_a_full_grid(middle: float) -> tuple[float, float]:
    """The best learning rate of the grid, and the vertex of the parabola through it and its neighbors."""
    rates = middle * 10 ** (np.arange(-LIMIT, LIMIT + 1) / 2)
    losses = np.array([closed_form(rate) for rate in rates])
    best = int(losses.argmin())
    a, b, _ = np.polyfit(np.log(rates[best - 1 : best + 2]), losses[best - 1 : best + 2], 2)
    return rates[best], math.exp(-b / (2 * a))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given = {"learning_rate": 0.3, "max_steps": STEPS, "per_device_train_batch_size": 2, **options}
    return TrainingArguments(
        str(folder),
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **given,
    )


def swept(folder: Path, **options: Any) -> Sweep:
    return sweep(Quadratic(), arguments(folder), DATA, DATA, config=QUICK, **{"around": 0.3, **options})


def told(losses: Sequence[float] | Callable[[int, int], float]) -> tuple[Any, list[tuple[int, int, bool]]]:
    """A loss for `lowest_point`, and the list of what it is asked."""
    asked = []

    def loss(point: int, seed: int, *, must_end: bool) -> float:
        asked.append((point, seed, must_end))
        return float(losses(point, seed))

    return loss, asked


@pytest.mark.parametrize("best", [-6, -5, -3, -2, -1, 0, 1, 2, 4, 6])
def test_the_search_finds_a_single_minimum_wherever_it_lies_in_the_largest_grid(best: int) -> None:
    loss, asked = told(lambda point, seed: abs(point - best + 0.1))
    assert lowest_point(loss, [0], refine=0) == best
    points = {point for point, *_ in asked}
    assert points == set(range(min(-2, max(best - 1, -6)), max(2, min(best + 1, 6)) + 1))
    ended = {point for point, _, must_end in asked if must_end}
    assert {point for point in (best - 1, best, best + 1) if abs(point) <= LIMIT} <= ended


def test_only_what_is_not_next_to_the_best_may_be_stopped() -> None:
    loss, asked = told(lambda point, seed: abs(point - 0.1))
    lowest_point(loss, [0], refine=0)
    assert asked[:5] == [(0, 0, True), (1, 0, True), (-1, 0, True), (2, 0, False), (-2, 0, False)]
    loss, asked = told(lambda point, seed: abs(point - 1.1))
    lowest_point(loss, [0], refine=0)
    assert asked[:5] == [(0, 0, True), (1, 0, True), (-1, 0, False), (2, 0, True), (-2, 0, False)]


def test_the_search_ends_at_the_ends_and_where_everything_diverges() -> None:
    assert lowest_point(told(lambda point, seed: -point)[0], [0], refine=0) == LIMIT
    assert lowest_point(told(lambda point, seed: point)[0], [0], refine=0) == -LIMIT
    # The five first learning rates diverge; below, the lower the worse.
    diverging = told(lambda point, seed: math.inf if point > -4 else -point)[0]
    assert lowest_point(diverging, [0], refine=0) == -4
    with pytest.raises(ValueError, match="every training diverged"):
        lowest_point(told(lambda point, seed: math.inf)[0], [0], refine=0)


@pytest.mark.parametrize(("refine", "best"), [(1, 3), (1, -2), (2, 5), (3, -11)])
def test_a_refined_search_finds_the_point_between(refine: int, best: int) -> None:
    loss, asked = told(lambda point, seed: (point - best) ** 2)
    assert lowest_point(loss, [0], refine=refine) == best
    assert len({point for point, *_ in asked}) <= 5 + 1 + 3 * refine


def test_the_mean_over_seeds_decides_in_the_end() -> None:
    """The first seed says 0, the mean of both 2, on the way over 1."""
    loss, asked = told(lambda point, seed: (point - 4 * seed) ** 2 + 0.1 * point)
    assert lowest_point(loss, [0], refine=0) == 0
    assert lowest_point(loss, [0, 1], refine=0) == 2
    assert {point for point, seed, _ in asked if seed == 1} == {-1, 0, 1, 2, 3}


def test_the_minimum_is_that_of_a_parabola() -> None:
    for place in (-0.5, -0.2, 0.0, 0.37):
        lower, middle, higher = (3 * (x - place) ** 2 + 5 for x in (-1, 0, 1))
        assert minimum(lower, middle, higher, worst=99) == pytest.approx(place)
    assert minimum(2, 1, math.inf, worst=4) == minimum(2, 1, 4, worst=4) == -0.25
    assert minimum(math.inf, 1, math.nan, worst=4) == minimum(1, 1, 1, worst=1) == 0


def test_a_grid_has_the_same_learning_rates_when_it_is_refined() -> None:
    coarse, fine = Grid(3e-4, 0), Grid(3e-4, 2)
    assert [coarse.learning_rate(point) for point in range(-6, 7)] == [
        fine.learning_rate(4 * point) for point in range(-6, 7)
    ]
    assert coarse.learning_rate(2) == pytest.approx(3e-3)
    assert fine.learning_rate(1) / 3e-4 == pytest.approx(10**0.125, rel=1e-5)


def test_a_run_cannot_win_once_it_is_behind_by_more_than_half_of_what_the_best_still_gains() -> None:
    """The best falls by 1 in 40 steps, the other one at a fraction of its speed: it is behind by (1 - f) s / 40."""
    best = [1 - step / 40 for step in range(40)]
    for fraction in (0.1, 0.5, 0.9):
        other = [1 - fraction * step / 40 for step in range(40)]
        first = next(step for step in range(41) if cannot_win(other[:step], best))
        # Means over 4 steps are those of 1.5 steps before; (1 - f) s = (38.5 - 1.5 - s) / 2 with s such a place.
        place = 37.5 / (3 - 2 * fraction) if fraction < 1 else math.inf
        assert first - 2.5 == pytest.approx(place, abs=1.0)
    assert not any(cannot_win(best[:step], best) for step in range(41))
    assert not cannot_win([5.0, 5.0, 5.0], best), "fewer steps than are averaged"


@pytest.mark.parametrize("middle", [0.3, 3e-3, 20.0])
def test_the_optimum_is_that_of_the_full_grid(tmp_path: Path, middle: float) -> None:
    """From a learning rate that is right, 100 times too low, and so high that runs diverge; in fewer steps."""
    found = swept(tmp_path, around=middle)
    best, vertex = best_of_a_full_grid(middle)
    assert found.best == pytest.approx(best, rel=1e-5)
    assert found.learning_rate == pytest.approx(vertex, rel=1e-3)
    assert found.range == pytest.approx((best / math.sqrt(10), best * math.sqrt(10)), rel=1e-5)
    assert not found.is_at_end
    assert found.minimized == "evaluation loss"
    for rate, losses in found.losses.items():
        if math.isfinite(losses[0]):
            assert losses == (pytest.approx(closed_form(rate), rel=1e-3),)
    assert found.steps < len(found.runs) * STEPS
    assert ("diverged" in {run.end for run in found.runs}) == (middle == 20.0)
    unfinished = {run.learning_rate for run in found.runs if run.end != "complete"}
    assert unfinished
    assert all(closed_form(rate) > closed_form(best) for rate in unfinished)
    assert str(found).startswith(f"Use {found.learning_rate:.3g}.\nThe evaluation loss is lowest at {best:g} (")


def test_without_an_evaluation_set_the_last_quarter_counts(tmp_path: Path) -> None:
    found = sweep(
        Quadratic(), arguments(tmp_path, learning_rate=0.2), DATA, config=QUICK, around=0.2, folder=tmp_path / "kept"
    )
    assert found.minimized == "training loss"
    run = next(run for run in found.runs if run.learning_rate == 0.2)
    steps = np.arange(STEPS)
    curve = ((START[0] * 0.9**steps) ** 2 + 4 * (START[1] * 0.6**steps) ** 2) / 4
    assert run.training_losses == pytest.approx(curve, rel=1e-4)
    assert run.loss == pytest.approx(curve[-STEPS // 4 :].mean(), rel=1e-4)
    assert not (tmp_path / "sweep").exists()


def test_the_profile_is_that_of_the_best_run_and_holds_the_sweep(tmp_path: Path) -> None:
    found = swept(tmp_path, seeds=[3, 4])
    saved = RateProfile.from_pretrained(tmp_path / "sweep")
    assert saved.to_bytes() == found.profile.to_bytes()
    trainer = FLeRMTrainer(
        model=Quadratic(), args=arguments(tmp_path / "other", learning_rate=found.best, seed=3), train_dataset=DATA,
        flerm=QUICK,
    )  # fmt: skip
    trainer.train()
    added = {"sweep", "sweep_runs", "sweep_optimum"}
    assert saved.rates.keys() == trainer.rate_profile.rates.keys()
    assert {key: value for key, value in saved.metadata.items() if key not in added} == trainer.rate_profile.metadata
    about = saved.about
    assert about.learning_rate == found.best
    assert about.sweep_losses == found.losses
    assert about.sweep_optimum == found.learning_rate
    assert about.sweep == {rate: np.mean(losses) for rate, losses in found.losses.items()}
    assert len(about.sweep_losses[found.best]) == 2
    rows = {(row["learning_rate"], row["seed"]): row for row in saved.metadata["sweep_runs"]}
    assert rows.keys() == {(run.learning_rate, run.seed) for run in found.runs}
    assert {row["end"] for row in rows.values()} == {"complete", "stopped"}
    figure = found.plot()
    (lines,) = [[line for line in axes.get_lines() if len(line.get_xdata()) == 2] for axes in figure.axes]
    assert found.learning_rate in [line.get_xdata()[0] for line in lines]
    close(figure)
    with pytest.raises(ValueError, match="holds no sweep"):
        plot_sweep(trainer.rate_profile)


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever forward pass it was at: finished runs are not trained again, and the result is the same."""
    expected = swept(tmp_path / "whole").to_dict()
    trained: list[float] = []
    one_run, forward = Recipe.train, Quadratic.forward

    def noted(self: Recipe, rate: float, *args: Any) -> Any:
        trained.append(rate)
        return one_run(self, rate, *args)

    def failing(self: Quadratic, inputs: Tensor, labels: Tensor) -> Any:
        left.pop()  # raises at the end
        return forward(self, inputs, labels)

    monkeypatch.setattr(Recipe, "train", noted)
    monkeypatch.setattr(Quadratic, "forward", failing)
    for calls in (5, 30, 40):
        left = [None] * calls
        with pytest.raises(IndexError):
            swept(tmp_path / "broken")
    left = [None] * 1000
    assert swept(tmp_path / "broken").to_dict() == expected
    repeated = len(trained) - len(set(trained))
    assert repeated == 3, "the run that was interrupted, each time"
    trained.clear()
    assert swept(tmp_path / "broken").to_dict() == expected
    assert trained == []
    kept = tmp_path / "broken" / "sweep" / "runs"
    (unfinished,) = kept.glob(f"{expected['best']:g}-*/run.json")
    unfinished.unlink()  # as if it had been killed between the profile and the run
    assert swept(tmp_path / "broken").to_dict() == expected
    assert trained == [expected["best"]]
    more = swept(tmp_path / "broken", seeds=[42, 5])
    assert {run.seed for run in more.runs} == {42, 5}
    assert trained[1:] == [run.learning_rate for run in sorted_by_training(more)]


def sorted_by_training(found: Sweep) -> list[Any]:
    """The runs of the second seed: at the best point, below and above."""
    low, high = found.range
    order = [found.best, pytest.approx(low), pytest.approx(high)]
    return [next(run for run in found.runs if run.seed == 5 and run.learning_rate == rate) for rate in order]


def test_a_folder_holds_one_sweep(tmp_path: Path) -> None:
    swept(tmp_path)
    with pytest.raises(ValueError, match=r"other settings: arguments.max_steps was 20, is 5; .*Give another folder"):
        sweep(Quadratic(), arguments(tmp_path, max_steps=5, weight_decay=0.1), DATA, DATA, config=QUICK)
    other = Quadratic()
    other.linear.weight.data += 1
    with pytest.raises(ValueError, match=r"other settings: weights was '\w+', is '\w+'\. Give"):
        sweep(other, arguments(tmp_path), DATA, DATA, config=QUICK)
    with pytest.raises(ValueError, match=r"other settings: eval_dataset was 'Dataset of 2 examples, .* is None"):
        sweep(Quadratic(), arguments(tmp_path), DATA, config=QUICK)
    file = next(tmp_path.rglob("run.json"))
    file.write_text(json.dumps({"loss": 1}))
    with pytest.raises(ValueError, match=r"run.json is not a run of a sweep.*Delete it"):
        swept(tmp_path)


@pytest.mark.parametrize("given", ["model", "trainer"])
def test_a_sweep_leaves_no_trace(tmp_path: Path, given: str) -> None:
    """With dropout; the training afterwards is as if there had been no sweep."""

    def made() -> FLeRMTrainer:
        extra = {"eval_dataset": Rows(seed=1)}
        return make_trainer(tmp_path / "run", gpt2(0.1, layers=1), QUICK, extra=extra, max_steps=3)

    expected = train(made())
    trainer = made()
    before, drawn = weights_of(trainer.model), random_state()
    options: dict[str, Any] = {"folder": tmp_path / "kept", "around": 1e-2}
    if given == "model":
        found = sweep(trainer.model, trainer.args, Rows(), Rows(seed=1), config=QUICK, **options)
    else:
        found = trainer.sweep(**options)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer.model).items())
    for now, then in zip(random_state(), drawn, strict=True):
        assert torch.equal(now, then) if isinstance(now, Tensor) else now == then
    assert {path.name for path in tmp_path.iterdir()} <= {"kept", "run"}
    assert not list((tmp_path / "run").rglob("run.json"))
    assert not trainer.flerm_callback.has_begun
    assert trainer.state.global_step == 0
    assert_same_run(train(trainer), expected)
    # A run is what the trainer itself would do at this learning rate.
    args = {"learning_rate": found.best, "max_steps": 3}
    alone = make_trainer(tmp_path / "run", gpt2(0.1, layers=1), extra={"eval_dataset": Rows(seed=1)}, **args)
    alone.train()
    assert found.losses[found.best] == (pytest.approx(alone.evaluate()["eval_loss"], rel=1e-6),)


def test_a_given_optimizer_is_copied_and_says_where_to_begin(tmp_path: Path) -> None:
    model = Quadratic()
    optimizer = SGD(model.parameters(), lr=0.5)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, learning_rate=1e-5),
        train_dataset=DATA,
        eval_dataset={"one": DATA, "other": DATA},
        optimizers=(optimizer, None),
    )
    found = sweep(trainer, config=QUICK)
    planned = json.loads((tmp_path / "sweep" / "plan.json").read_text())
    assert planned["plan"]["looks"][0]["learning_rate"] == 0.5
    assert float(f"{planned['middle']:.6g}") in found.losses
    assert found.learning_rate == pytest.approx(best_of_a_full_grid(planned["middle"])[1], rel=1e-3)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert torch.equal(model.linear.weight.data, torch.tensor([START]))
    parts = sweep(
        Quadratic(), arguments(tmp_path / "parts", learning_rate=1e-5), DATA, DATA, config=QUICK,
        optimizer=lambda model: SGD(model.parameters(), lr=0.5),
    )  # fmt: skip
    assert parts.losses == found.losses
    (tmp_path / "sweep" / "plan.json").write_text(json.dumps({"middle": 0.25}))
    assert 0.25 in sweep(trainer, config=QUICK).losses  # what was planned is not planned again


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "around": ({"around": 0.0}, "around is 0.0; it must be a learning rate above 0"),
    "no seeds": ({"seeds": []}, r"seeds is \[\]; it must be one or more different whole numbers"),
    "twice": ({"seeds": [1, 1]}, r"seeds is \[1, 1\]"),
    "refine": ({"refine": -1}, "refine is -1; it must be a whole number from 0 to 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_trained(tmp_path: Path, case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        swept(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_sweep_needs_what_a_training_needs(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="needs a trainer, or a model"):
        sweep(Quadratic())
    trainer = Trainer(model=Quadratic(), args=arguments(tmp_path, learning_rate=0.0), train_dataset=DATA)
    with pytest.raises(TypeError, match="takes args, eval_dataset from the trainer"):
        sweep(trainer, arguments(tmp_path), eval_dataset=DATA)
    with pytest.raises(ValueError, match=r"learning rate of the training is 0.0\. Give around"):
        sweep(trainer)
    with pytest.raises(ValueError, match="sweep needs the training set"):
        sweep(Quadratic(), arguments(tmp_path), None)
    texts = Dataset.from_dict({"text": ["a", "b"]})
    with pytest.raises(ValueError, match=r"holds texts .* call sweep\(trainer, \.\.\.\)"):
        sweep(Quadratic(), arguments(tmp_path), texts)


def test_a_trainer_that_has_trained_is_warned_of(tmp_path: Path, warnings_of: Callable[[], list[str]]) -> None:
    trainer = Trainer(model=Quadratic(), args=arguments(tmp_path, max_steps=2), train_dataset=DATA)
    trainer.train()
    with pytest.raises(ValueError, match="every training diverged"):
        sweep(trainer, config=QUICK, around=1e30)
    assert "the trainer has made 2 steps already" in warnings_of()[0]
