"""Results of the runs of an axis: numbers, a table, a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean

from workload import spread, standard_error

STABLE = 1.0  # nats per token above the best of a sweep
WORTH = 0.05  # a regret, in nats per token, that is worth something
NEAR = 1.5  # a factor on a learning rate that costs little
Sweep = dict[float, list[float]]


@dataclass
class Study:
    """Validation losses of an axis, in nats per token: of sweeps by learning rate, then by seed."""

    axis: str
    claim: str
    rule: str | None
    seeds: list[int]
    base: Sweep = field(default_factory=dict)
    plain: Sweep = field(default_factory=dict)
    methods: dict[str, list[float]] = field(default_factory=dict)
    scales: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    plans: dict[str, list[float]] = field(default_factory=dict)  # learning rates by metric, then by seed
    plan_errors: list[float] = field(default_factory=list)  # stated errors of their logarithms, by seed
    plan_decisions: list[str] = field(default_factory=list)  # by seed

    @property
    def wanted(self) -> float:
        """The factor that the sweeps find: the target's optimum over the base's, each interpolated in its sweep."""
        return optimum(self.plain) / optimum(self.base)

    @property
    def wanted_range(self) -> tuple[float, float]:
        """The middle nine tenths of `wanted` over all resamplings of the seeds of base and target."""
        bases, targets = resampled(self.base), resampled(self.plain)
        found = sorted(target / base for base in bases for target in targets)
        return found[len(found) // 20], found[-1 - len(found) // 20]

    def planned(self, metric: str) -> float:
        """The factor of `plan`, a geometric mean over seeds."""
        return math.exp(mean(math.log(rate / self.base_rate) for rate in self.plans[metric]))

    @property
    def base_rate(self) -> float:
        """The base's best learning rate, at which all methods train the target."""
        return best_rate(self.base)

    @property
    def shift(self) -> float:
        """Decades from the base's best learning rate to the target's."""
        return math.log10(best_rate(self.plain) / self.base_rate)

    @property
    def at_base_rate(self) -> dict[str, list[float]]:
        return {"plain": self.plain[self.base_rate], **self.methods}

    @property
    def best_losses(self) -> list[float]:
        """For each seed the best of the target's own sweep."""
        return [min(losses) for losses in zip(*self.plain.values(), strict=True)]

    def regrets(self, method: str) -> list[float]:
        """Losses minus the best of the target's own sweep, seed by seed."""
        return [loss - best for loss, best in zip(self.at_base_rate[method], self.best_losses, strict=True)]

    @property
    def winner(self) -> str:
        """The method with the smallest regret."""
        return min(self.at_base_rate, key=lambda method: mean(self.at_base_rate[method]))

    def behind(self, method: str, other: str) -> bool:
        """Whether a method loses to another by more than the standard error of their difference, seed by seed."""
        pairs = zip(self.at_base_rate[method], self.at_base_rate[other], strict=True)
        differences = [loss - best for loss, best in pairs]
        return not mean(differences) <= (standard_error(differences) if all(map(math.isfinite, differences)) else 0)

    def to_json(self) -> str:
        """As JSON; a loss that is not finite is null."""
        return json.dumps(_finite(asdict(self)), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Study:
        values = json.loads(text)
        for name in ("base", "plain"):
            values[name] = {float(rate): _losses(losses) for rate, losses in values[name].items()}
        values["methods"] = {method: _losses(losses) for method, losses in values["methods"].items()}
        return cls(**values)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _losses(values: Sequence[float | None]) -> list[float]:
    return [math.inf if value is None else value for value in values]


def best_rate(sweep: Sweep) -> float:
    return min(sweep, key=lambda rate: mean(sweep[rate]))


def optimum(sweep: Sweep) -> float:
    """The best learning rate: of a parabola in log(lr) through the sweep's best and its neighbors."""
    rates = sorted(sweep)
    best = rates.index(best_rate(sweep))
    if not 0 < best < len(rates) - 1:
        return rates[best]
    low, middle, high = (mean(sweep[rate]) for rate in rates[best - 1 : best + 2])
    bend = low - 2 * middle + high
    if not math.isfinite(bend) or bend <= 0:
        return rates[best]
    offset = (low - high) / (2 * bend)
    step = math.log(rates[best + 1] / rates[best] if offset > 0 else rates[best] / rates[best - 1])
    return rates[best] * math.exp(offset * step)


def resampled(sweep: Sweep) -> list[float]:
    """The optimum of a sweep for every way of drawing as many seeds as there are, with replacement."""
    seeds = range(len(next(iter(sweep.values()))))
    draws = product(seeds, repeat=len(seeds))
    return [optimum({rate: [losses[seed] for seed in draw] for rate, losses in sweep.items()}) for draw in draws]


def edge(sweep: Sweep) -> str:
    """The largest learning rate of a sweep up to which training is stable: less than `STABLE` above its best."""
    limit = mean(sweep[best_rate(sweep)]) + STABLE
    above = [rate for rate in sorted(sweep) if rate >= best_rate(sweep)]
    unstable = next((index for index, rate in enumerate(above) if not mean(sweep[rate]) < limit), None)
    return f"≥ {above[-1]:g}" if unstable is None else f"{above[max(unstable - 1, 0)]:g}"


def written(values: Sequence[float]) -> str:
    return spread(values) if all(map(math.isfinite, values)) else "diverges"


def table(study: Study) -> str:
    """One axis as Markdown."""
    rule = study.rule or "none, or the learning rate as it is"
    lines = [
        f"## {study.axis}",
        "",
        f"{study.claim}. Rule: {rule}.",
        "",
        f"Best lr: base {study.base_rate:g}, target {best_rate(study.plain):g}, a shift of {study.shift:+.2f} decades. "
        f"Largest stable lr: base {edge(study.base)}, target {edge(study.plain)}.",
        "",
        "| at the base's best lr | loss | regret | seconds per run |",
        "|---|---|---|---|",
    ]
    for method, losses in study.at_base_rate.items():
        seconds = f"{study.seconds[method]:.1f}" if method in study.seconds else ""
        outcome = f"{written(losses)} | {written(study.regrets(method))}"
        if method in study.errors:
            outcome = study.errors[method].replace("|", "\\|").replace("\n", " ")[:200] + " | "
        lines.append(f"| {method} | {outcome} | {seconds} |")
    lines += [
        f"| target's own best | {written(study.best_losses)} | | |",
        f"| base at its best | {written(study.base[study.base_rate])} | | {study.seconds['record']:.1f} |",
        "",
        f"Mean ± standard error over seeds {', '.join(map(str, study.seeds))}.",
        "",
    ]
    return "\n".join(lines)


def combined(studies: Sequence[Study]) -> str:
    """Regrets of every method on every axis as Markdown."""
    methods = list(dict.fromkeys(method for study in studies for method in study.at_base_rate))
    lines = [
        "Regret at the base's best learning rate, nats per token.",
        "",
        "| axis | shift, decades | stable lr, base | target | " + " | ".join(methods) + " |",
        "|---|---|---|---|" + "---|" * len(methods),
    ]
    for study in studies:
        cells = [_cell(study, method) for method in methods]
        edges = f"{edge(study.base)} | {edge(study.plain)}"
        lines.append(f"| {study.axis} | {study.shift:+.2f} | {edges} | " + " | ".join(cells) + " |")
    means = [_mean(studies, method) for method in methods]
    lines.append("| mean (axes on which it converges) |  |  |  | " + " | ".join(means) + " |")
    for method in ("flerm", "fisher"):
        lines += ["", *verdicts([study for study in studies if method in study.methods], method)]
    lines += [
        "",
        "`plan`: the factor on the learning rate that it finds, and the factor that the sweeps find (wanted: the "
        "target's optimum over the base's, each interpolated between the points of its sweep).",
        "",
        *_plans(studies),
    ]
    return "\n".join([*lines, ""])


def _plans(studies: Sequence[Study]) -> list[str]:
    metrics = list(dict.fromkeys(metric for study in studies for metric in study.plans))
    heads = " | ".join(f"planned, {metric} | / wanted" for metric in metrics)
    lines = [
        f"| axis | base's best lr | target's best lr | wanted | 90 % of resampled seeds | {heads} |",
        "|---|---|---|---|---|" + "---|---|" * len(metrics),
    ]
    for study in studies:
        low, high = study.wanted_range
        rates = f"{optimum(study.base):.3g} | {optimum(study.plain):.3g} | {study.wanted:.3g} | {low:.2g} to {high:.2g}"
        cells = [_plan_cells(study, metric) for metric in metrics]
        lines.append(f"| {study.axis} | {rates} | {' | '.join(cells)} |")
    for metric in metrics:
        planned = [study for study in studies if metric in study.plans]
        near = [study for study in planned if _near(study.planned(metric) / study.wanted)]
        open_ = [study for study in planned if _near(study.planned(metric) / _nearest(study, metric))]
        rough = [study for study in planned if _near(study.planned(metric) * study.base_rate / optimum(study.plain))]
        lines += [
            "",
            f"By {metric} rates, `plan` is within a factor of {NEAR} of the wanted factor on {len(near)} of "
            f"{len(planned)} axes, and of the range that the seeds leave open on {len(open_)}. If it starts from the "
            "best point of the base's sweep (a quarter of a decade from the next) instead of its optimum, on "
            f"{len(rough)}.",
        ]
    return lines


def _nearest(study: Study, metric: str) -> float:
    """The factor within the range of wanted factors that is nearest to the planned one."""
    low, high = study.wanted_range
    return min(max(study.planned(metric), low), high)


def _plan_cells(study: Study, metric: str) -> str:
    if metric not in study.plans:
        return " | "
    planned = study.planned(metric)
    return f"{planned:.3g} | {planned / study.wanted:.2f}"


def verdicts(studies: Sequence[Study], method: str) -> list[str]:
    """Say on which axes a method is the best, and on which it recovers most of what the base's learning rate costs."""
    beaten = [f"{study.axis} ({study.winner})" for study in studies if study.behind(method, study.winner)]
    moved = [study for study in studies if mean(study.regrets("plain")) > WORTH]
    left = [study.axis for study in moved if not mean(study.regrets(method)) <= mean(study.regrets("plain")) / 4]
    return [
        f"`{method}` is the best method, or within a standard error of it, on {len(studies) - len(beaten)} of "
        f"{len(studies)} axes. Another one is better on {', '.join(beaten) or 'none'}.",
        "",
        f"On {len(moved)} axes the base's learning rate costs more than {WORTH} nats. `{method}` recovers at least "
        f"three quarters of that on {len(moved) - len(left)} of them, but not on {', '.join(left) or 'any other'}.",
    ]


def _near(ratio: float) -> bool:
    return 1 / NEAR <= ratio <= NEAR


def _cell(study: Study, method: str) -> str:
    if method not in study.at_base_rate:
        return ""
    return "refused" if method in study.errors else written(study.regrets(method))


def _mean(studies: Sequence[Study], method: str) -> str:
    regrets = [mean(study.regrets(method)) for study in studies if method in study.at_base_rate]
    converged = [regret for regret in regrets if math.isfinite(regret)]
    return f"{mean(converged):.3f} ({len(converged)})" if converged else ""


def picture(study: Study, path: Path) -> None:
    """Losses against learning rates; a star for every method at the base's best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for sweep, name, style, color in (
        (study.base, "base, Trainer", "o--", "#999999"),
        (study.plain, "target, Trainer", "s-", "#0072b2"),
    ):
        rates = [rate for rate in sorted(sweep) if all(map(math.isfinite, sweep[rate]))]
        errors = [standard_error(sweep[rate]) for rate in rates]
        panel.errorbar(
            rates, [mean(sweep[rate]) for rate in rates], errors, fmt=style, color=color, label=name, capsize=2
        )
    for method, losses in study.methods.items():
        if method not in study.errors and all(map(math.isfinite, losses)):
            panel.plot([study.base_rate], [mean(losses)], "*", markersize=13, label=f"target, {method}", zorder=3)
    panel.axvline(study.base_rate, color="#999999", linestyle=":", linewidth=1)
    means = [mean(losses) for sweep in (study.base, study.plain, study.methods) for losses in sweep.values()]
    finite = [loss for loss in means if math.isfinite(loss)]
    panel.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="validation loss (nats per token)",
        title=study.axis,
        ylim=(min(finite) - 0.1, min(max(finite), min(finite) + 2) + 0.1),
    )
    panel.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
