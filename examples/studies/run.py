"""One study per axis of transfer: how well does the base's best learning rate work for the target, and what helps?

    python examples/studies/run.py

Per axis: a sweep of the base (recorded), a sweep of the target with `Trainer`, and the target at the base's best
learning rate with the published rule and with every method. A sweep is extended until its best is not at an end.
Results are stored by the settings of the run, so an interrupted study continues, and a new method costs only its own
runs; `--again` discards the results of a method whose code has changed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import hashlib
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from io import StringIO
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import axes
import developed
import held_out
import torch
import unseen
from axes import Axis, Side, grid_index, grid_rate
from baselines import equal_rates
from report import Study, combined, picture, summary, table
from workload import arguments, in_parallel, pretrained, processes, quiet, trained

from hf_flerm import FLeRMConfig, RateProfile, Research, plan

AXES: Mapping[str, Axis] = {**axes.AXES, **developed.DEVELOPED, **unseen.UNSEEN, **held_out.HELD_OUT}


@dataclass(frozen=True)
class Method:
    """A way of matching: options of `FLeRMConfig` and `Research`, and how the base is recorded and its profile read."""

    options: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Path], RateProfile] = RateProfile.from_pretrained
    base: str = "record"


EUCLIDEAN = {"metric": "euclidean"}
UNRULED = {"rules": "none", "policy": "follow"}  # as version 0.1 matched
METHODS: dict[str, Method] = {
    "default": Method(),
    "without rules": Method({"rules": "none"}),
    "always follow": Method({"policy": "follow"}),
    "always one level": Method({"policy": "level"}),
    "rules alone": Method({"policy": "hold"}),
    "flerm": Method({**EUCLIDEAN, **UNRULED}, base="record, euclidean"),
    "fisher": Method(UNRULED),
    "joint over depth": Method({**EUCLIDEAN, **UNRULED, "depth": "joint"}, base="record, euclidean"),
    "the latest alone": Method({**EUCLIDEAN, **UNRULED, "beta": 0.0}, base="record, euclidean"),
    "equal rates": Method({**EUCLIDEAN, **UNRULED}, read=equal_rates, base="record, euclidean"),
    "paper": Method(
        {**EUCLIDEAN, **UNRULED, "pool": "unit", "probes": 20, "beta": 0.9, "measure_steps": (0, 100)},
        base="record, euclidean",
    ),
}
PLAN = "plan"
ALONE = "plan without a base"
FIRST_RATE = 1e-4  # where it starts, whatever the side
BASES = {
    "record": FLeRMConfig(mode="record", metric="fisher", research=Research(probes=8)),
    "record, euclidean": FLeRMConfig(mode="record", metric="euclidean", research=Research(probes=8)),
}
RESEARCH = {entry.name for entry in fields(Research)}
MOST_EXTENSIONS = 6


@dataclass(frozen=True)
class Job:
    """One run, by a method of `BASES` or `METHODS`, or without FLeRM by "plain" or "rule"."""

    axis: str
    method: str
    learning_rate: float
    seed: int
    steps: int

    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on. Axes that have a run in common share its result."""
        axis = AXES[self.axis]
        common = {**axis.settings(), "steps": self.steps, "learning_rate": self.learning_rate, "seed": self.seed}
        if self.method in BASES:
            return {"side": axis.base.settings(), **common, "method": self.method}
        target = {"side": axis.target.settings(), **common}
        if self.method == "plain":
            return {**target, "method": "plain"}
        if self.method == "rule":
            return {**target, "method": axis.rule.text if axis.rule else None}
        method = METHODS[self.method]
        profile = {"base": replace(self, method=method.base).settings(), "read": method.read.__name__}
        return {**target, "method": self.config(), **profile}

    def config(self) -> dict[str, Any]:
        """Options of matching. `depth` is left out where the depth does not change, so that methods share runs."""
        axis = AXES[self.axis]
        options = dict(METHODS[self.method].options)
        if options.get("policy") == "follow":
            options |= axis.flerm
        return {name: value for name, value in options.items() if name != "depth" or axis.changes_depth}

    def trainer_options(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": AXES[self.axis].warmup,
            "max_steps": self.steps,
            "max_grad_norm": 1.0,
            "seed": self.seed,
            "per_device_train_batch_size": AXES[self.axis].batch_size,
        }

    def folder(self, output: Path) -> Path:
        text = json.dumps(self.settings(), sort_keys=True)
        return output / "runs" / hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Result:
    """The result of a run. The loss is None if it is not finite."""

    loss: float | None
    seconds: float = 0.0
    measuring_seconds: float = 0.0
    scales: dict[str, float] = field(default_factory=dict)
    error: str | None = None


def train(job: Job, output: Path) -> tuple[Job, Result]:
    """Train once, or read the stored result. An exception is returned as a result but not stored."""
    file = job.folder(output) / "result.json"
    if file.exists():
        return job, Result(**json.loads(file.read_text())["result"])
    quiet()
    logging.getLogger("hf_flerm").setLevel(logging.ERROR)  # the results say which tensors were scaled
    torch.set_num_threads(1)
    try:
        result = _train(job, output)
    except Exception as error:
        return job, Result(None, error=f"{type(error).__name__}: {error}")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"settings": job.settings(), "result": asdict(result)}, indent=1))
    partial.rename(file)
    return job, result


def _train(job: Job, output: Path) -> Result:
    axis = AXES[job.axis]
    side = axis.base if job.method in BASES else axis.target
    flerm = BASES.get(job.method)
    if job.method in METHODS:
        method = METHODS[job.method]
        profile = method.read(replace(job, method=method.base).folder(output))
        options = job.config()
        research = Research(**{name: options.pop(name) for name in RESEARCH & options.keys()})
        flerm = FLeRMConfig(mode="match", profile=profile, research=research, **{"metric": "fisher", **options})
    model = side.build(job.seed)
    rule = axis.rule if job.method == "rule" else None
    loss, trainer = trained(
        model,
        axis.data(),
        flerm,
        optimizer=side.make_optimizer(model, job.learning_rate, rule),
        **job.trainer_options(),
    )
    if job.method in BASES:
        trainer.rate_profile.save_pretrained(job.folder(output))
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    return Result(
        loss if math.isfinite(loss) else None,
        logged["train_runtime"],
        logged.get("flerm/seconds", 0.0),
        {key.removeprefix("flerm/scale/"): value for key, value in logged.items() if key.startswith("flerm/scale/")},
    )


def planned(job: Job, output: Path) -> tuple[Job, dict[str, Any]]:
    """Return what `plan` finds for the target from this job's profile; stored like a run."""
    file = job.folder(output) / f"plan-{job.axis}.json"
    if not file.exists():
        quiet()
        torch.set_num_threads(1)
        axis = AXES[job.axis]
        with TemporaryDirectory() as scratch, redirect_stdout(StringIO()):
            advice = plan(
                axis.target.build(job.seed),
                arguments(scratch, disable_tqdm=True, **job.trainer_options()),
                axis.data()[0],
                str(file.parent),
                optimizer=lambda model: axis.target.make_optimizer(model, job.learning_rate),
                granularity=axis.flerm.get("granularity"),
            )
        found = {
            "learning_rate": advice.learning_rate,
            "decision": advice.decision,
            "advised": asdict(advice.advised),
            "overall": asdict(advice.overall),
            "evidence": advice.evidence.to_record(),
            "words": str(advice),
        }
        file.write_text(json.dumps(found, indent=1))
    return job, json.loads(file.read_text())


def planned_alone(job: Job, side_name: str, output: Path) -> dict[str, Any]:
    """Return what `plan` finds for a side of an axis without a profile; stored by what it depends on."""
    axis = AXES[job.axis]
    side: Side = getattr(axis, side_name)
    settings = {"side": side.settings(), **axis.settings(), "steps": job.steps, "seed": job.seed, "start": FIRST_RATE}
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    file = output / "alone" / f"{name}.json"
    if not file.exists():
        quiet()
        torch.set_num_threads(1)
        with TemporaryDirectory() as scratch, redirect_stdout(StringIO()):
            advice = plan(
                side.build(job.seed),
                arguments(scratch, disable_tqdm=True, **{**job.trainer_options(), "learning_rate": FIRST_RATE}),
                axis.data()[0],
                optimizer=lambda model: side.make_optimizer(model, FIRST_RATE),
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"settings": settings, "error": advice.error, **advice.to_dict()}, indent=1))
    return json.loads(file.read_text())


@dataclass
class Runner:
    """The runs of one study, in a pool of processes."""

    axis: Axis
    seeds: list[int]
    steps: int | None
    output: Path
    pool: Executor
    seconds: dict[str, float] = field(default_factory=dict)  # per run, by method

    def jobs(self, method: str, rates: list[float]) -> list[Job]:
        steps = self.steps or self.axis.steps
        return [Job(self.axis.name, method, rate, seed, steps) for rate in rates for seed in self.seeds]

    def run(self, method: str, rates: list[float], results: dict[Job, Result]) -> None:
        """Add the results of these runs to `results`, those that are not there."""
        calls = [(job, self.output) for job in self.jobs(method, rates) if job not in results]
        results.update(in_parallel(self.pool, train, calls, f"{self.axis.name}, {method}") if calls else ())

    def sweep(self, method: str, rates: list[float]) -> dict[float, list[float]]:
        """Losses by learning rate; the grid grows until the best is not at one of its ends."""
        results: dict[Job, Result] = {}
        for _ in range(MOST_EXTENSIONS + 1):
            self.run(method, rates, results)
            losses = {rate: [loss_of(results[job]) for job in self.jobs(method, [rate])] for rate in sorted(rates)}
            best = min(losses, key=lambda rate: mean(losses[rate]))
            beyond = {min(losses): -1, max(losses): 1}.get(best)
            if beyond is None:
                break
            rates = [grid_rate(grid_index(best) + beyond)]
            rates = sorted({*losses, *rates})
        self.seconds[method] = mean(result.seconds for result in results.values())
        return losses

    def distinct(self, methods: list[str]) -> list[str]:
        """Without methods that are one with an earlier one here: ways of splitting a depth, where it stays the same."""
        found: dict[str, str] = {}
        for method in methods:
            job = Job(self.axis.name, method, 0.0, 0, 0)
            found.setdefault(method if method in (PLAN, ALONE) else json.dumps(job.settings(), sort_keys=True), method)
        return list(found.values())

    def study(self, methods: list[str]) -> Study:
        study = self.predictions(methods)
        study.plain = self.sweep("plain", sorted({*self.axis.target.rates, study.base_rate}))
        if self.axis.rule:
            self.add_methods(study, ["rule"])
        return study

    def predictions(self, methods: list[str]) -> Study:
        """A study of the base's sweep and the methods, before the target has been swept."""
        study = Study(self.axis.name, self.axis.claim, self.axis.rule.text if self.axis.rule else None, self.seeds)
        study.base = self.sweep("record", list(self.axis.base.rates))
        self.add_methods(study, methods)
        return study

    def add_methods(self, study: Study, methods: list[str]) -> None:
        """Run methods at the base's best learning rate and `plan`, and add the results to a study with both sweeps."""
        rate = study.base_rate
        bases = dict.fromkeys(METHODS[method].base for method in methods if method in METHODS)
        for base in [*bases, *(["record"] if PLAN in methods else [])]:
            self.run(base, [rate], {})
        for method in methods:
            if method == ALONE:
                job = self.jobs("record", [rate])[0]
                sides = ("base", "target")
                found = list(self.pool.map(planned_alone, [job] * 2, sides, [self.output] * 2))
                study.alone = dict(zip(sides, found, strict=True))
                continue
            if method == PLAN:
                jobs = self.jobs("record", [rate])
                advice = dict(in_parallel(self.pool, planned, [(job, self.output) for job in jobs], PLAN))
                found = [advice[job] for job in jobs]
                study.plans["default"] = [each["learning_rate"] for each in found]
                # Plans of older versions hold no advised factor.
                advised = [each["advised"] for each in found if "advised" in each]
                study.advised["default"] = [(each["value"], each["error"]) for each in advised]
                continue
            results: dict[Job, Result] = {}
            self.run(method, [rate], results)
            ordered = [results[job] for job in self.jobs(method, [rate])]
            self.seconds[method] = mean(result.seconds for result in ordered)
            study.methods[method] = [loss_of(result) for result in ordered]
            study.scales[method] = [result.scales for result in ordered]
            errors = [result.error for result in ordered if result.error]
            if errors:
                study.errors[method] = errors[0]
        study.seconds = {**study.seconds, **self.seconds}


def loss_of(result: Result) -> float:
    return math.inf if result.loss is None else result.loss


def forget(axis: Axis, method: str, output: Path) -> None:
    """Drop what is kept of a method on an axis, at whatever learning rate and seed."""
    probe = Job(axis.name, method, 0.0, 0, 0).settings()
    for file in (output / "runs").glob("*/result.json"):
        settings = json.loads(file.read_text())["settings"]
        same = ("side", "method", "data", "read")
        if all(settings.get(key) == json.loads(json.dumps(probe.get(key))) for key in same):
            file.unlink()


def rendered(files: list[Path]) -> str:
    """Return the report of the studies in those of these files that exist."""
    studies = [Study.from_json(file.read_text()) for file in files if file.exists()]
    return "\n".join([combined(studies), *map(table, studies)])


def summarized(results: Path) -> str:
    """Return the README's table of the studies in the folders `studies` and `unseen` of `results`."""
    files = ([results / folder / f"{name}.json" for name in AXES] for folder in ("studies", "unseen"))
    return summary(*([Study.from_json(file.read_text()) for file in some if file.exists()] for some in files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=", ".join(AXES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", choices=[*METHODS, PLAN, ALONE], default=[*METHODS, PLAN, ALONE])
    parser.add_argument("--again", nargs="*", choices=METHODS, default=[], help="methods to run again")
    parser.add_argument("--stored", type=Path, help="folder of studies, AXIS.json, to add methods to")
    parser.add_argument(
        "--predict", type=Path, help="write what the methods and plan say to this folder, and sweep no target"
    )
    parser.add_argument("--render", type=Path, help="folder of studies, AXIS.json: only write their report")
    parser.add_argument("--summarize", type=Path, help="folder of results: only write the README's table, summary.md")
    parser.add_argument("--steps", type=int, help="of every run, in place of the axis's own")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("runs/studies"))
    options = parser.parse_args()
    unknown = [name for name in options.axes if name not in AXES]
    if unknown:
        parser.error(f"no axis is called {', '.join(unknown)}; there are {', '.join(AXES)}")
    if options.render:
        (options.render / "studies.md").write_text(rendered([options.render / f"{name}.json" for name in AXES]))
        return
    if options.summarize:
        (options.summarize / "summary.md").write_text(summarized(options.summarize))
        return
    quiet()
    pretrained(progress=True)
    if not set(options.axes or AXES).isdisjoint(unseen.UNSEEN):
        unseen.pretrain()
    if not set(options.axes or AXES).isdisjoint(held_out.HELD_OUT):
        held_out.pretrain()
    if not set(options.axes or AXES).isdisjoint(developed.DEVELOPED):
        developed.pretrained_qwen()
    with processes(options.workers) as pool:
        for name in options.axes or AXES:
            for method in options.again:
                forget(AXES[name], method, options.output)
            runner = Runner(AXES[name], options.seeds, options.steps, options.output, pool)
            if options.predict:
                study = runner.predictions(runner.distinct(options.methods))
                options.predict.mkdir(parents=True, exist_ok=True)
                (options.predict / f"{name}.json").write_text(study.to_json())
                continue
            if options.stored:
                study = Study.from_json((options.stored / f"{name}.json").read_text())
                runner.add_methods(study, runner.distinct(options.methods))
            else:
                study = runner.study(runner.distinct(options.methods))
            folder = options.output / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "study.json").write_text(study.to_json())
            (folder / "study.md").write_text(table(study))
            picture(study, folder / "study.png")
    report = rendered([options.output / name / "study.json" for name in AXES])
    (options.output / "studies.md").write_text(report)
    print(f"\n{report[: report.index('<!-- end -->')]}\nWritten to {options.output}: studies.md")


if __name__ == "__main__":
    main()
