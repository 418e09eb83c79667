"""Results of the runs of an axis: numbers, a table, a picture."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from workload import spread, standard_error

STABLE = 1.0  # nats per token above the best of a sweep
WORTH = 0.05  # a regret, in nats per token, that is worth something
NEAR = 1.5  # a factor on a learning rate that costs little
ALLOWED = 0.01  # nats per token above the better of plain and rule
LEADING = ("plain", "rule", "default", "without rules")  # columns that come first
# Pattern of axes: what changes, and what a matched run without options does about it.
CHANGES: Mapping[str, tuple[str, str]] = {
    r"-width": ("width, from scratch", "muP's rule, and nothing beyond it"),
    r"-depth": ("depth, from scratch", "blocks start at 1 / depth; each kind of tensor follows its own rates"),
    r"-init": ("neither size, adapter nor optimizer", "nothing"),
    r"-gaussian": ("LoRA rank, `gaussian`", "out of balance: each kind of tensor follows its own rates"),
    r"-(default|dora|pissa|classifier-rank)": ("LoRA rank, default, DoRA, PiSSA", "in balance: muA's rule, here 1"),
    r"-(rslora|alpha|batch)": ("LoRA alpha, or rank with another scaling (rsLoRA)", "in balance: muA's rule"),
    r"-full": ("LoRA to full fine-tuning", "a tenth, times one factor for all tensors from step 16 on"),
    r"^adamw-|-muon": ("optimizer", "the rule where there is one; else one factor for all tensors from step 16 on"),
    r"": ("other", ""),
}
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
    plans: dict[str, list[float]] = field(default_factory=dict)  # learning rates by method, then by seed
    # Advised factors and standard errors of their logarithms, by method, then by seed; older files have none.
    advised: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    alone: dict[str, dict[str, Any]] = field(default_factory=dict)  # `plan` without a base, {"base" or "target": plan}

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

    def planned(self, method: str) -> float:
        """The factor of `plan`, a geometric mean over seeds."""
        return math.exp(mean(math.log(rate / self.base_rate) for rate in self.plans[method]))

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

    def regret(self, method: str) -> float:
        """The mean of `regrets`."""
        return mean(self.regrets(method))

    @property
    def reference(self) -> float:
        """The regret of the better of plain and rule."""
        return min(self.regret(method) for method in ("plain", "rule") if method in self.at_base_rate)

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
    """Results of all axes as Markdown: by change, of every method, and of `plan`. Comments separate the parts."""
    found = dict.fromkeys(method for study in studies for method in study.at_base_rate)
    methods = list(dict.fromkeys([*LEADING, *found]))
    lines = [
        "Regret at the base's best learning rate, nats per token.",
        "",
        "<!-- by change -->",
        *_by_change(studies),
    ]
    for method in ("default", "without rules", "fisher"):
        lines += _verdict([study for study in studies if method in study.methods], method)
    lines += [
        "",
        "<!-- by axis -->",
        "| axis | shift, decades | stable lr, base | target | " + " | ".join(methods) + " |",
        "|---|---|---|---|" + "---|" * len(methods),
    ]
    for study in studies:
        cells = [_cell(study, method) for method in methods]
        edges = f"{edge(study.base)} | {edge(study.plain)}"
        lines.append(f"| {study.axis} | {study.shift:+.2f} | {edges} | " + " | ".join(cells) + " |")
    means = [_mean(studies, method) for method in methods]
    lines.append("| mean (axes on which it converges) |  |  |  | " + " | ".join(means) + " |")
    lines += ["", "<!-- plan -->", *_plans(studies), "", "<!-- alone -->", *_alone(studies), "", "<!-- end -->"]
    return "\n".join([*lines, ""])


def summary(studies: Sequence[Study], unseen: Sequence[Study]) -> str:
    """Mean regrets of plain and matched training by change, for the README.

    Args:
        studies: Those that the strategy was chosen on: a row for each change.
        unseen: The others: one row for all.
    """
    rows: dict[str, Sequence[Study]] = {change: members for (change, _), members in _grouped(studies).items()}
    rows = {**rows, "**all of these**": studies, "**other models and changes, frozen before**": unseen}
    lines = ["| what changes from small to big (pairs) | `Trainer` | `FLeRMTrainer` |", "|---|---|---|"]
    for name, members in rows.items():
        cells = [f"{mean(study.regret(method) for study in members):.3f}" for method in ("plain", "default")]
        lines.append(f"| {name} ({len(members)}) | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _grouped(studies: Sequence[Study]) -> dict[tuple[str, str], list[Study]]:
    """Studies by what changes, as in `CHANGES`."""
    groups: dict[tuple[str, str], list[Study]] = {}
    for study in studies:
        change = next(change for pattern, change in CHANGES.items() if re.search(pattern, study.axis))
        groups.setdefault(change, []).append(study)
    return groups


def _by_change(studies: Sequence[Study]) -> list[str]:
    heads = " | ".join(LEADING)
    lines = [f"| what changes | what a matched run does | axes | {heads} |", "|---|---|---|" + "---|" * len(LEADING)]
    for (name, action), members in _grouped(studies).items():
        cells = [_mean(members, method) for method in LEADING]
        lines.append(f"| {name} | {action} | {len(members)} | {' | '.join(cells)} |")
    return [*lines, "", "Means over the axes on which a method converges; their number is in parentheses."]


def _verdict(studies: Sequence[Study], method: str) -> list[str]:
    """Count on how many axes a method is good, and say where it harms; nothing without a study of it."""
    if not studies:
        return []
    good = [study for study in studies if study.regret(method) <= study.reference + ALLOWED]
    harms = {study.axis: study.regret(method) - study.regret("plain") for study in studies}
    worst = max(harms, key=lambda axis: harms[axis])
    amount = f"{harms[worst]:.3f}" if math.isfinite(harms[worst]) else "divergence"
    harm = f"Its largest harm over plain is {amount}, on {worst}." if harms[worst] > 0 else "It harms on no axis."
    moved = [study for study in studies if study.regret("plain") > WORTH]
    left = [study.axis for study in moved if not study.regret(method) <= study.regret("plain") / 4]
    return [
        "",
        f"`{method}` is within {ALLOWED} nats of the better of plain and rule, or better, on {len(good)} of "
        f"{len(studies)} axes; its mean regret is {_mean(studies, method)}, that of plain {_mean(studies, 'plain')}. "
        f"{harm} On {len(moved)} axes the base's learning rate costs more than {WORTH} nats; at most a quarter of that "
        f"is left on {len(moved) - len(left)} of them" + (f", not on {', '.join(left)}." if left else "."),
    ]


def _alone(studies: Sequence[Study]) -> list[str]:
    """What `plan` finds without a base, beside the optima of the sweeps; a side of several axes appears once."""
    rows: dict[tuple[float, float], str] = {}
    ratios, covered = [], []
    for study in studies:
        for side, sweep in (("base", study.base), ("target", study.plain)):
            if side not in study.alone or not sweep:
                continue
            found, best = study.alone[side], optimum(sweep)
            key = (found["learning_rate"], best)
            if key in rows:
                continue
            low, high = found["range"]
            steps = sum(look["steps"] for look in found["looks"])
            doubt = "; ".join(found["doubts"])
            rows[key] = (
                f"| {study.axis}, {side} | {best:.3g} | {key[0]:.3g} | {key[0] / best:.2f} | "
                f"{low:.3g} to {high:.3g} | {len(found['looks'])} | {steps} | {doubt} |"
            )
            ratios.append(abs(math.log(key[0] / best)))
            covered.append(low <= best <= high)
    if not rows:
        return []

    def within(factor: float) -> int:
        return sum(ratio <= math.log(factor) for ratio in ratios)

    return [
        "`plan` without a base: the learning rate that it finds for each side of the axes, and that of its sweep.",
        "",
        "| side | best lr | planned | / best | 68 % range | looks | steps | doubts |",
        "|---|---|---|---|---|---|---|---|",
        *rows.values(),
        "",
        f"Without a base, `plan` is within a factor of 1.5 of the sweep's best on {within(1.5)} of {len(rows)} sides, "
        f"within 2 on {within(2)}, within 3 on {within(3)}. The stated 68 % range covers {sum(covered)}.",
    ]


def _plans(studies: Sequence[Study]) -> list[str]:
    found = dict.fromkeys(method for study in studies for method in study.plans)
    methods = sorted(found, key=lambda method: method != "default")
    heads = " | ".join(f"planned, {method} | / wanted" for method in methods)
    lines = [
        "`plan`: the factor on the learning rate that it finds, and the factor that the sweeps find (wanted: the "
        "target's optimum over the base's, each interpolated between the points of its sweep).",
        "",
        f"| axis | base's best lr | target's best lr | wanted | 90 % of resampled seeds | {heads} |",
        "|---|---|---|---|---|" + "---|---|" * len(methods),
    ]
    for study in studies:
        low, high = study.wanted_range
        rates = f"{optimum(study.base):.3g} | {optimum(study.plain):.3g} | {study.wanted:.3g} | {low:.2g} to {high:.2g}"
        cells = [_plan_cells(study, method) for method in methods]
        lines.append(f"| {study.axis} | {rates} | {' | '.join(cells)} |")
    for method in methods:
        planned = [study for study in studies if method in study.plans]
        ratios = [study.planned(method) / study.wanted for study in planned]
        near, rough = (sum(_near(ratio, factor) for ratio in ratios) for factor in (NEAR, 2))
        open_ = sum(_near(study.planned(method) / _nearest(study, method)) for study in planned)
        lines += [
            "",
            f"By {method}, `plan` is within a factor of {NEAR} of the wanted factor on {near} of {len(planned)} axes, "
            f"within 2 on {rough}, and within {NEAR} of the range that the seeds leave open on {open_}."
            + _coverage(planned, method),
        ]
    return lines


def _coverage(studies: Sequence[Study], method: str) -> str:
    """Say how often the wanted factor lies in the stated range; empty if no study has stored ranges."""
    inside = [
        abs(math.log(study.wanted / value)) <= error
        for study in studies
        for value, error in study.advised.get(method, [])
    ]
    return f" The stated 68 % range covers {sum(inside)} of {len(inside)} runs." if inside else ""


def _nearest(study: Study, method: str) -> float:
    """The factor within the range of wanted factors that is nearest to the planned one."""
    low, high = study.wanted_range
    return min(max(study.planned(method), low), high)


def _plan_cells(study: Study, method: str) -> str:
    if method not in study.plans:
        return " | "
    planned = study.planned(method)
    return f"{planned:.3g} | {planned / study.wanted:.2f}"


def _near(ratio: float, factor: float = NEAR) -> bool:
    return 1 / factor <= ratio <= factor


def _cell(study: Study, method: str) -> str:
    if method not in study.at_base_rate:
        return ""
    return "refused" if method in study.errors else written(study.regrets(method))


def _mean(studies: Sequence[Study], method: str) -> str:
    regrets = [study.regret(method) for study in studies if method in study.at_base_rate]
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
