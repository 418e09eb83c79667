"""`sweep`: train copies of a model at several learning rates, and read the best one between them."""

from __future__ import annotations

import math
import os
import pkgutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, overload

from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ...config import FLeRMConfig
from ...model.isolation import kept_random_state
from ...optimizer.param_groups import raw_optimizer
from ...profile.metadata import SWEEP, SWEEP_OPTIMUM, SWEEP_RUNS
from ...profile.rate_profile import RateProfile
from ...training.callback import FLeRMCallback
from ..checks import check_sweep
from ..copied_trainer import copied_model, nominal_learning_rate, quiet_arguments
from ..fixed_point import STEPS_OF_A_LOOK, Plan, looks_of
from ..trial import OptimizerFactory, Trial
from .folder import SweepFolder, settings_of
from .run import Recipe, SweepRun
from .search import Grid, lowest_point, minimum

logger = logging.get_logger(__name__)
_LOOKS = 4  # at most, to find the middle of the grid


@dataclass(frozen=True)
class Sweep:
    """The result of `sweep`. `str()` gives the learning rate to use, what it follows from, and all runs.

    Attributes:
        learning_rate: Where the loss is lowest: the vertex of a parabola, in the logarithm of the learning rate,
            through the best learning rate of the grid and its two neighbors.
        best: The best learning rate of the grid. `profile` was recorded there.
        range: The two neighbors of `best`, between which the optimum lies if the loss has a single minimum. It begins
            at 0, or ends at inf, if the grid was not extended further.
        runs: All runs, by learning rate and seed.
        minimized: What the losses are: "evaluation loss" or "training loss".
        profile: The profile of the run at `best` with the first seed. Its metadata hold the sweep.
    """

    learning_rate: float
    best: float
    range: tuple[float, float]
    runs: tuple[SweepRun, ...]
    minimized: str
    profile: RateProfile

    @property
    def losses(self) -> dict[float, tuple[float, ...]]:
        """`{learning rate: losses, one per seed}`, inf for a run that diverged; without runs that were stopped early.

        It can be drawn with `hf_flerm.show.plotting.plot_losses({"base": sweep.losses})`.
        """
        return _losses(self.runs)

    @property
    def steps(self) -> int:
        """Optimizer steps of all runs together."""
        return sum(run.steps for run in self.runs)

    @property
    def reason(self) -> str:
        """What the learning rate follows from, in one sentence."""
        lowest = f"The {self.minimized} is lowest at {self.best:g} ({mean(self.losses[self.best]):.4g})"
        if self.is_at_end:
            return f"{lowest}, at the end of the grid, so that the optimum may lie further out."
        low, high = self.range
        return f"{lowest}; it is higher at {low:g} and at {high:g}, so that the optimum lies between these two."

    @property
    def is_at_end(self) -> bool:
        """Whether the best learning rate is the first or last of the largest grid: then it is no optimum."""
        return self.range[0] == 0 or math.isinf(self.range[1])

    def plot(self) -> Any:
        """Return a matplotlib figure of the losses; see `hf_flerm.show.plotting.plot_sweep`."""
        return pkgutil.resolve_name("hf_flerm.show.plotting:plot_sweep")(self.profile)

    def to_dict(self) -> dict[str, Any]:
        """Return the sweep as values that JSON can hold; what is not finite is None."""
        return {
            "learning_rate": self.learning_rate,
            "best": self.best,
            "range": [bound if math.isfinite(bound) else None for bound in self.range],
            "is_at_end": self.is_at_end,
            "reason": self.reason,
            "minimized": self.minimized,
            "runs": _rows(self.runs),
            "steps": self.steps,
        }

    def __str__(self) -> str:
        rows = [f"{'learning rate':>13}  seed  {self.minimized}"]
        for run in self.runs:
            result = {
                "complete": f"{run.loss:.5g}",
                "stopped": f"stopped after {run.steps} steps: it could not win",
                "diverged": f"diverged after {run.steps} steps",
            }[run.end]
            rows.append(f"{run.learning_rate:>13.6g}  {run.seed:>4}  {result}")
        decision = f"Use {self.learning_rate:.3g}."
        return "\n".join([decision, self.reason, "", *rows, "", f"{len(self.runs)} runs, {self.steps} training steps."])


@overload
def sweep(
    model: Trainer,
    *,
    folder: str | os.PathLike[str] | None = None,
    around: float | None = None,
    seeds: Sequence[int] | None = None,
    refine: int = 0,
    probe_dataset: Dataset[Any] | None = None,
    config: FLeRMConfig | None = None,
) -> Sweep: ...


@overload
def sweep(
    model: nn.Module,
    args: TrainingArguments,
    train_dataset: Dataset[Any],
    eval_dataset: Dataset[Any] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    around: float | None = None,
    seeds: Sequence[int] | None = None,
    refine: int = 0,
    optimizer: OptimizerFactory | None = None,
    data_collator: Any = None,
    probe_dataset: Dataset[Any] | None = None,
    config: FLeRMConfig | None = None,
) -> Sweep: ...


def sweep(
    model: nn.Module | Trainer,
    args: TrainingArguments | None = None,
    train_dataset: Dataset[Any] | None = None,
    eval_dataset: Dataset[Any] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    around: float | None = None,
    seeds: Sequence[int] | None = None,
    refine: int = 0,
    optimizer: OptimizerFactory | None = None,
    data_collator: Any = None,
    probe_dataset: Dataset[Any] | None = None,
    config: FLeRMConfig | None = None,
) -> Sweep:
    """Find the best learning rate by training copies of a model, each at another learning rate and to its end.

    It begins with five learning rates a factor sqrt(10) apart and goes on in the direction in which the loss falls, up
    to a factor of 1000, until the best one has a worse one on each side. The optimum is read between them, as the
    minimum of a parabola. A run is stopped when it diverges, and when it is not next to the best one and cannot win any
    more (`hf_flerm.planning.sweep.run.cannot_win`).

    Each run is recorded. Every finished run is kept in `folder`, with the profile of the best one: a sweep that was
    interrupted goes on from there when it is called again. Nothing else changes: the model, its trainer, the random
    number generators, and the rest of the disk.

    Args:
        model: The model, as it will be trained; or the trainer that will train it, of any class that is derived from
            `Trainer`. A trainer brings everything that a training needs: `args`, `train_dataset`, `eval_dataset`,
            `optimizer` and `data_collator` cannot be given with it.
        args: The training arguments.
        train_dataset: The training set.
        eval_dataset: The evaluation set, on which the loss after training is minimized; of several, their mean loss.
            None: the training loss is minimized, its mean over the last quarter of the steps. That is a fair measure
            only while no example is seen twice.
        folder: Where to keep the runs. It holds runs of one sweep; learning rates, seeds and refinement may change
            from call to call. None: the folder `sweep` in `args.output_dir`.
        around: The learning rate in the middle. None: what `plan` finds, starting at that of the optimizer that the
            trainer was given, else of `args`; where it starts, if the answer is doubtful.
        seeds: Seeds of the order of the data and of dropout; the model is the same. With several, the first one finds
            the best learning rate, and the others run there and at its neighbors. None: `args.seed`.
        refine: How often the spacing of the grid is halved around the best learning rate. Each time costs about two
            more runs.
        optimizer: Function that creates the optimizer of a model, if `args.optim` does not name it.
        data_collator: Collate function of the training.
        probe_dataset: Examples to probe with. None: those of the trainer's `FLeRMCallback`, else of the training set.
        config: Options of the recording. None: those of the trainer's `FLeRMCallback`, else the defaults.

    Raises:
        TypeError: If a trainer is given and something that it brings, too; or a model without args.
        ValueError: If an argument is not allowed, the training set holds texts that nothing tokenizes, several
            processes run, `folder` holds a sweep with other settings, or every run diverged.
    """
    given: dict[str, Any] = {
        "args": args,
        "train_dataset": train_dataset,
        "eval_dataset": eval_dataset,
        "optimizer": optimizer,
        "data_collator": data_collator,
    }
    if not isinstance(model, Trainer):
        if not isinstance(model, nn.Module) or args is None:
            raise TypeError("sweep needs a trainer, or a model (torch.nn.Module) and its TrainingArguments.")
    elif doubled := [name for name, value in given.items() if value is not None]:
        raise TypeError(f"sweep(trainer) takes {', '.join(doubled)} from the trainer: do not give them, too.")
    else:
        given = {name: getattr(model, name) for name in ("args", "train_dataset", "eval_dataset", "data_collator")}
    own: TrainingArguments = given["args"]
    seeds = [own.seed] if seeds is None else list(seeds)
    check_sweep(around, seeds, refine, given["train_dataset"], given["data_collator"])
    with _trainer(model, **given) as trainer:
        if trainer.state.global_step:
            logger.warning(
                f"the trainer has made {trainer.state.global_step} steps already: the copies start from the weights "
                "and the optimizer that it has now. Make a new trainer to sweep a training from its beginning."
            )
        callback = next((c for c in trainer.callback_handler.callbacks if isinstance(c, FLeRMCallback)), None)
        config = replace(config or (callback.config if callback else FLeRMConfig()), mode="record", profile=None)
        if callback is not None and probe_dataset is None:
            probe_dataset = callback.probe_dataset
        recipe = Recipe(trainer, config, probe_dataset)
        kept = SweepFolder(Path(str(own.output_dir), "sweep") if folder is None else Path(folder))
        kept.claim(settings_of(recipe))
        grid = Grid(_middle(trainer, kept) if around is None else around, refine)
        return _result(recipe, kept, grid, seeds)


def _result(recipe: Recipe, folder: SweepFolder, grid: Grid, seeds: Sequence[int]) -> Sweep:
    """Train what is not in the folder yet, and read the optimum."""
    runs: dict[tuple[int, int], SweepRun] = {}  # by point of the grid and seed

    def loss(point: int, seed: int, *, must_end: bool) -> float:
        rate = grid.learning_rate(point)
        known = runs.get((point, seed)) or folder.read(rate, seed)
        if known is None or (must_end and known.end == "stopped"):
            complete = [run for run in runs.values() if run.seed == seed and run.end == "complete"]
            best = None if must_end else min(complete, key=lambda run: run.loss, default=None)
            found, profile = recipe.train(rate, seed, best)
            clear_device_cache(garbage_collection=True)  # parts of the copy refer to each other
            known = replace(found, steps=found.steps + (known.steps if known else 0))  # it was trained twice
            folder.write(known, profile)
        runs[point, seed] = known
        return known.loss

    best = lowest_point(loss, seeds, grid.refine)
    losses = {rate: mean(of) for rate, of in _losses(runs.values()).items()}
    low, middle, high = (grid.learning_rate(point) for point in (best - 1, best, best + 1))
    optimum = middle
    if low in losses and high in losses:
        worst = max(loss for loss in losses.values() if math.isfinite(loss))
        optimum *= grid.factor ** minimum(losses[low], losses[middle], losses[high], worst)
    found = tuple(sorted(runs.values(), key=lambda run: (run.learning_rate, run.seed)))
    profile = folder.profile(runs[best, seeds[0]])
    sweep = {
        SWEEP: [[rate, loss if math.isfinite(loss) else None] for rate, loss in losses.items()],
        SWEEP_RUNS: _rows(found),
        SWEEP_OPTIMUM: optimum,
    }
    profile = RateProfile(profile.steps, profile.rates, {**profile.metadata, **sweep}, profile.joint_rates)
    profile.save_pretrained(folder.path)
    return Sweep(
        learning_rate=optimum,
        best=middle,
        range=(low if low in losses else 0.0, high if high in losses else math.inf),
        runs=found,
        minimized="training loss" if recipe.trainer.eval_dataset is None else "evaluation loss",
        profile=profile,
    )


def _losses(runs: Iterable[SweepRun]) -> dict[float, tuple[float, ...]]:
    found: dict[float, tuple[float, ...]] = {}
    for run in sorted(runs, key=lambda run: (run.learning_rate, run.seed)):
        if run.end != "stopped":
            found[run.learning_rate] = (*found.get(run.learning_rate, ()), run.loss)
    return found


def _rows(runs: Iterable[SweepRun]) -> list[dict[str, Any]]:
    """The runs as values for JSON, without the losses of single steps."""
    return [
        {
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "end": run.end,
            "loss": run.loss if math.isfinite(run.loss) else None,
            "steps": run.steps,
        }
        for run in runs
    ]


@contextmanager
def _trainer(
    model: nn.Module | Trainer,
    args: TrainingArguments,
    train_dataset: Dataset[Any],
    eval_dataset: Dataset[Any] | None,
    data_collator: Any,
    optimizer: OptimizerFactory | None = None,
) -> Iterator[Trainer]:
    """Context manager: the given trainer, or a new one for a copy of the model. It is not trained itself."""
    if isinstance(model, Trainer):
        yield model
        return
    with tempfile.TemporaryDirectory() as scratch, kept_random_state(args.device):
        copied = copied_model(model)
        quiet = quiet_arguments(args, scratch, args.learning_rate)
        quiet.disable_tqdm = args.disable_tqdm
        trainer = Trainer(
            model=copied,
            args=quiet,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            optimizers=(optimizer(copied) if optimizer else None, None),
        )
        yield trainer


def _middle(trainer: Trainer, folder: SweepFolder) -> float:
    """The learning rate that `plan` finds, if it is not doubtful; kept in the folder."""
    known = folder.read_middle()
    if known is not None:
        return known
    start = _learning_rate(trainer)
    found = Plan(looks_of(Trial.of(trainer, None, None), start, STEPS_OF_A_LOOK, _LOOKS))
    middle = start if found.doubts else found.learning_rate
    folder.write_middle(middle, found.to_dict())
    return middle


def _learning_rate(trainer: Any) -> float:
    """The learning rate that a trainer would train with.

    Raises:
        ValueError: If it has none above 0.
    """
    rate = trainer.args.learning_rate
    if trainer.optimizer is not None:
        rate = nominal_learning_rate(raw_optimizer(trainer.optimizer))
    elif trainer.optimizer_cls_and_kwargs is not None:
        rate = trainer.optimizer_cls_and_kwargs[1].get("lr", rate)
    if rate is None or not 0 < rate < math.inf:
        raise ValueError(f"the learning rate of the training is {rate}. Give around, the one to begin with.")
    return float(rate)
