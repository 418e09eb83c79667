"""Differences between the trainings of base and target that matching cannot account for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..model.name_text import preview
from ..optimizer.behavior import without_precision
from ..profile.metadata import ProfileMetadata

_PHASES = "rates are compared step by step, and the same step is now in another phase of training"
_UNSTABLE = 1.0  # nats by which one step changes the predictions of a base whose learning rate is too high
_ABOUT_EQUAL = 0.1  # relative difference in the number of steps that does not matter


@dataclass(frozen=True)
class Difference:
    """One setting in which the target differs from the base.

    Attributes:
        what: The setting.
        base: Its value in the base, as text.
        target: Its value in the target, as text.
        meaning: What follows for the transfer.
    """

    what: str
    base: str
    target: str
    meaning: str

    def __str__(self) -> str:
        return f"{self.what}: {self.base} in the base, {self.target} here; {self.meaning}."


def differences(base: ProfileMetadata, target: ProfileMetadata) -> list[Difference]:
    """Compare settings that should be equal in base and target; a setting that one of the two lacks is left out.

    Not compared: what is to be transferred across (model, adapter, rank), and the data. A fingerprint differs between
    two preparations of the same text, and another part of the same data does no harm.

    Args:
        base: Metadata of the base's profile.
        target: Metadata of the target's profile, which exists as soon as its training begins.
    """
    return [*_learning_rate(base, target), *_optimizer(base, target), *_course(base, target)]


def instability(base: ProfileMetadata) -> str:
    """Return a warning if the base's learning rate was at the edge of stability; empty if not, or if not known.

    The sign is a measured step that changed the predictions by more than one nat: in the Fisher metric, the change of
    the outputs is sqrt(2 KL) of the predictions before and after the step. It was chosen on eight small GPT-2 and Llama
    models at 0.3 to 10 times their best learning rate, without warm-up; cases above one nat:

        times the best rate     0.3, 0.56   1        1.78     3.16     10
        above one nat           0 of 16     2 of 8   6 of 8   6 of 8   8 of 8

    At the best rate, the two were those for which 1.78 times as much cost 0.4 and 1.0 nats; at 1.78 times, three of the
    six lost at most 0.03 nats; at 3.16 times, the two below one nat lost 0.4 and 0.6. A spike between measured steps is
    not seen.
    """
    if base.largest_change is None or base.units.get("metric") != "fisher":
        return ""
    step, change = base.largest_change
    nats = change**2 / 2
    if nats <= _UNSTABLE:
        return ""
    return (
        f"the base's learning rate may be at the edge of stability: its step {step} changed the predictions by "
        f"{nats:.2g} nats (to first order), and learning rates that are transferred from it will be as close to "
        "diverging. Lower it, or lengthen the base's warm-up, and record the base again."
    )


def _learning_rate(base: ProfileMetadata, target: ProfileMetadata) -> Iterator[Difference]:
    """Compare each tensor with the base's tensors of its kind: Muon and AdamW have different rates in one run."""
    rates = target.learning_rates
    tensors: dict[tuple[float, float], list[str]] = {}
    for name, was in base.learning_rates_for(target.kinds).items():
        if name in rates and not math.isclose(was, rates[name], rel_tol=1e-6):
            tensors.setdefault((was, rates[name]), []).append(name)
    for (was, now), names in tensors.items():
        of = "" if len(names) == len(rates) else f" of {preview(names)}"
        meaning = (
            f"this run's updates will change the outputs {now / was:.3g} times as much as the base's. Use the base's "
            "learning rate; FLeRM scales it"
        )
        yield Difference(f"learning rate{of}", f"{was:g}", f"{now:g}", meaning)


def _optimizer(base: ProfileMetadata, target: ProfileMetadata) -> Iterator[Difference]:
    was, now = _algorithms(base), _algorithms(target)
    if was and now and was != now:
        meaning = (
            "the level of the learning rate can be transferred, but not the balance between kinds of tensor, which "
            "depends on the optimizer"
        )
        yield Difference("optimizer", " and ".join(was), " and ".join(now), meaning)
    else:
        theirs, own = base.optimizer_options, target.optimizer_options
        for key in sorted(key for key in theirs.keys() & own.keys() if theirs[key] != own[key]):
            meaning = "matching corrects the size of the updates for it, not their direction"
            yield Difference(f"the optimizer's {key}", str(theirs[key]), str(own[key]), meaning)
    decayed, decays = base.weight_decay, target.weight_decay
    if decayed is not None and decays is not None and decayed != decays:
        yield Difference("weight decay", f"{decayed:g}", f"{decays:g}", "it is not matched; this run keeps its own")


def _course(base: ProfileMetadata, target: ProfileMetadata) -> Iterator[Difference]:
    """Batch size, learning-rate schedule and length."""
    if base.batch_size and target.batch_size and base.batch_size != target.batch_size:
        meaning = (
            "matching repeats the base's change of the outputs per step, while a larger batch usually allows a larger "
            "one"
        )
        yield Difference("examples per step", str(base.batch_size), str(target.batch_size), meaning)
    if base.schedule and target.schedule and base.schedule != target.schedule:
        yield Difference("learning-rate schedule", base.schedule, target.schedule, _PHASES)
    length = "a longer training usually needs a lower learning rate, which the base's rates do not tell"
    for what, was, now, meaning in (
        ("warm-up steps", base.warmup_steps, target.warmup_steps, _PHASES),
        ("training steps", base.total_steps, target.total_steps, length),
    ):
        if was is not None and now is not None and not math.isclose(was, now, rel_tol=_ABOUT_EQUAL):
            yield Difference(what, str(was), str(now), meaning)


def _algorithms(about: ProfileMetadata) -> list[str]:
    """The names of the optimizers that stepped the tensors, else the class of the optimizer; empty if not known."""
    names = [*about.algorithms.values()] or [about.optimizer_class or ""]
    return sorted({without_precision(name) for name in names if name})
