"""Which rates of a base which tensors of a target must have together: other depth, width, rank, adapter, wrappers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..engines import engine_of
from ..model.names import Place, preview, tensor_places, trainable_parameters, without_prefix
from ..profile.rate_profile import RateProfile, RateProfileError
from .blocks import block_indices, names_of_kind, overlapping, stack_blocks, with_indices

GRANULARITIES = ("tensor", "module", "block", "global")
DEPTHS = ("joint", "equal", "sqrt", "copy")
UNMATCHED = ("error", "global", "nominal", "freeze")


@dataclass(frozen=True)
class Unit:
    """Tensors of the target that move its outputs together as far as a part of the base did.

    Attributes:
        name: What it stands for in the base or, where the base's rates were split, in the target.
        kind: The name with the indices of blocks replaced by `*`.
        sources: Names in the base: of tensors, or of modules or blocks.
        rates: The rate that is wanted at the base's steps, float64 [S].
        shares: `{canonical name in the target: the part of its update that belongs to this unit}`.
    """

    name: str
    kind: str
    sources: tuple[str, ...]
    rates: Tensor
    shares: Mapping[str, float]


@dataclass(frozen=True)
class ProfileMap:
    """A base profile as a target sees it; `str()` of it is a report.

    Attributes:
        base: The base's profile.
        units: What is matched, by name.
        unmatched: Trained tensors of the target for which the base has no rate.
        unused: Tensors, modules or blocks of the base that the target does not have.
        policy: What becomes of the unmatched: one of `UNMATCHED`.
        depth: How the rate of a base block goes to the blocks that it becomes.
        shapes: `{canonical name: shape}` of the target.
    """

    base: RateProfile
    units: Mapping[str, Unit]
    unmatched: tuple[str, ...]
    unused: tuple[str, ...]
    policy: str
    depth: str
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def everything(self) -> Unit:
        """All that is trained, as one unit; `unmatched="global"` gives its scale to what has none of its own.

        Raises:
            RateProfileError: If the base has no joint rate of everything.
        """
        wanted = _rates(self.base, "global")[""]
        return Unit("", "", ("",), wanted, dict.fromkeys(self.shapes, 1.0))

    @property
    def measured_units(self) -> dict[str, Unit]:
        """What a scale is estimated for, by name."""
        needs_everything = self.policy == "global" and self.unmatched
        return {**self.units, **({"": self.everything} if needs_everything else {})}

    def tensor_scales(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Scales of tensors from log-scales of units.

        Args:
            logs: `{unit: log-scale}` of `measured_units`.

        Returns:
            `{canonical name: scale}` of every trained tensor.
        """
        sums = dict.fromkeys(self.shapes, 0.0)
        for unit in self.units.values():
            for name, share in unit.shares.items():
                sums[name] += share * logs[unit.name]
        scales = {name: math.exp(log) for name, log in sums.items()}
        if self.policy == "freeze":
            scales.update(dict.fromkeys(self.unmatched, 0.0))
        if self.policy == "global":
            scales.update(dict.fromkeys(self.unmatched, math.exp(logs.get("", 0.0))))
        return scales

    @property
    def profile(self) -> RateProfile:
        """The base's rates under the names of the target's tensors.

        Raises:
            RateProfileError: If a unit is several tensors together, so that none has a rate of its own.
        """
        joint = [name for name, unit in self.units.items() if list(unit.shares.values()) != [1.0]]
        if joint:
            raise RateProfileError(
                f"{preview(joint)} are matched by the joint rate of several tensors, which have none of their own. "
                "Map with depth='equal' or 'sqrt' and granularity='tensor'."
            )
        rates = {name: unit.rates for unit in self.units.values() for name in unit.shares}
        return RateProfile(self.base.steps, rates, self.base.metadata)

    def __str__(self) -> str:
        recorded = self.base.about.shapes
        rows = [("base", "target", "how")]
        for kind in dict.fromkeys(unit.kind for unit in self.units.values()):
            units = [unit for unit in self.units.values() if unit.kind == kind]
            sources = dict.fromkeys(source for unit in units for source in unit.sources)
            names = dict.fromkeys(name for unit in units for name in unit.shares)
            before = {recorded[source] for source in sources if source in recorded}
            after = {self.shapes[name] for name in names}
            is_joint = any(list(unit.shares.values()) != [1.0] for unit in units)
            how = "joint rate" if is_joint else "as it is" if len(sources) == len(names) else f"{self.depth} split"
            rows.append(
                (f"{len(sources)} x {_sizes(before)}", f"{len(names)} x {_sizes(after)}", f"{how}: {kind or '*'}")
            )
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows]
        lines += [f"not in the base: {preview(self.unmatched)}"] if self.unmatched else []
        lines += [f"not in the target: {preview(self.unused)}"] if self.unused else []
        return "\n".join(lines)


def map_profile(
    base: RateProfile | str | os.PathLike[str],
    model: nn.Module,
    *,
    granularity: str = "tensor",
    depth: str = "equal",
    unmatched: str = "error",
) -> ProfileMap:
    """Map a profile onto a model of another depth, width, rank or adapter.

    Tensors are found by name, without PEFT's prefix; blocks by their rank among those of the base (or the target) that
    have such a tensor: the first third of the target's blocks stands where the first third of the base's did.

    Args:
        base: Profile of the base run: a `RateProfile`, a folder, a file or a repository.
        model: The target; what is mapped are its trainable parameters.
        granularity: What has a rate of its own: each `tensor`, each `module` (LoRA's A and B, a weight and its bias:
            the joint rate of what is trained of it, whatever that is), each `block`, or everything (`global`).
        depth: Where a base block becomes m blocks: `equal` gives each 1/m of its rate (the paper's: their effects
            add), `sqrt` 1/sqrt(m), `copy` all of it; `joint` asks that the m copies of a tensor together have it,
            whatever their interaction.
        unmatched: `error` refuses tensors without a counterpart, on either side. Tensors that the base does not have
            get the scale of everything together (`global`), none (`nominal`), or do not move (`freeze`).

    Returns:
        The map.

    Raises:
        RateProfileError: If names differ and `unmatched` is `error`, if nothing is common, or if the base lacks the
            joint rates that the granularity needs.
    """
    for value, allowed in ((granularity, GRANULARITIES), (depth, DEPTHS), (unmatched, UNMATCHED)):
        if value not in allowed:
            raise ValueError(f"{value!r} is not one of {', '.join(allowed)}.")
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is {model!r:.100}; it must be a torch module, with the adapter that will be trained. The "
            "profile comes first, then the model; `hf-flerm map` takes folders."
        )
    base = RateProfile.from_pretrained(base)
    parameters = trainable_parameters(model)
    places = tensor_places(model)
    sources: dict[str, str] = {}
    for name in _rates(base, granularity):
        if sources.setdefault(without_prefix(name), name) != name:
            raise RateProfileError(
                f"{without_prefix(name)!r} is in the profile twice, with PEFT's prefix and without: which?"
            )
    members: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    plain = {without_prefix(_group(name, places[name], granularity)[0]) for name in parameters}
    for name in parameters:
        path, kind = _group(name, places[name], granularity)
        members.setdefault(
            (without_prefix(kind), block_indices(without_prefix(path), without_prefix(kind))), []
        ).append(name)
    units: dict[str, Unit] = {}
    used: set[str] = set()
    for kind in dict.fromkeys(kind for kind, _ in members):
        known = names_of_kind(sources, kind)
        targets = [indices for found, indices in members if found == kind]
        same_blocks = stack_blocks(sources, kind) == stack_blocks(plain, kind)
        overlaps = overlapping(known, targets, same_blocks)
        used |= {sources[known[origin]] for origin, _ in overlaps}
        for unit in _units(kind, overlaps, known, sources, members, _rates(base, granularity), depth):
            units[unit.name] = unit
    matched = {name for unit in units.values() for name in unit.shares}
    engine = engine_of(model)
    result = ProfileMap(
        base,
        units,
        tuple(name for name in parameters if name not in matched),
        tuple(name for name in sources.values() if name not in used),
        unmatched,
        depth,
        {name: tuple(engine.shape(parameter)) for name, parameter in parameters.items()},
    )
    _check(result, granularity)
    return result


def _check(found: ProfileMap, granularity: str) -> None:
    if not found.units:
        coarser = GRANULARITIES[GRANULARITIES.index(granularity) + 1 :]
        advice = f"Match by granularity={' or '.join(map(repr, coarser))} (another adapter, full fine-tuning), or "
        raise RateProfileError(
            f"profile and model share no {granularity} by name: the profile has {preview(found.unused)}, the model "
            f"{preview(found.unmatched)}. {advice}record a base whose trainable parameters have these names."
        )
    if found.policy == "global" and found.unmatched:
        _rates(found.base, "global")
    if found.policy == "error" and (found.unmatched or found.unused):
        others = ", ".join(repr(policy) for policy in UNMATCHED if policy != "error")
        raise RateProfileError(
            f"the parameter names differ: only in the profile {preview(found.unused)}; only in the model "
            f"{preview(found.unmatched)}. Record a base whose trainable parameters have these names, match by "
            f"granularity='module' (another adapter), or say with unmatched={others} what becomes of the rest."
        )


def _units(
    kind: str,
    overlaps: Mapping[tuple[tuple[int, ...], tuple[int, ...]], tuple[Fraction, Fraction]],
    known: Mapping[tuple[int, ...], str],
    sources: Mapping[str, str],
    members: Mapping[tuple[str, tuple[int, ...]], list[str]],
    rates: Mapping[str, Tensor],
    depth: str,
) -> Iterator[Unit]:
    """The units of one kind: one for each base block if they are matched jointly, else one for each target block."""
    power = {"joint": 1, "equal": 1, "sqrt": 2, "copy": 1}[depth]
    by_base = depth == "joint"
    for key in known if by_base else dict.fromkeys(target for _, target in overlaps):
        parts = {pair: parts for pair, parts in overlaps.items() if pair[0 if by_base else 1] == key}
        if not parts:
            continue
        names = tuple(sources[known[origin]] for origin in dict.fromkeys(origin for origin, _ in parts))
        if by_base:
            wanted = rates[names[0]]
            shares = {n: float(part) for (_, target), (part, _) in parts.items() for n in members[kind, target]}
        else:
            pieces = [
                rates[sources[known[origin]]] ** power * float(of_target if depth == "copy" else of_base)
                for (origin, _), (of_target, of_base) in parts.items()
            ]
            wanted = torch.stack(pieces).sum(0) ** (1 / power)
            shares = dict.fromkeys(members[kind, key], 1.0)
        yield Unit(with_indices(kind, key), kind, names, wanted, shares)


def _rates(base: RateProfile, granularity: str) -> Mapping[str, Tensor]:
    if granularity == "tensor":
        return base.rates
    found = base.joint_rates.get(granularity, {})
    if not found or (granularity == "global" and "" not in found):
        raise RateProfileError(
            f"the profile holds no joint rates by {granularity}, only rates by tensor. Record it again with this "
            "version, or match with granularity='tensor'."
        )
    return found


def _group(name: str, place: Place, granularity: str) -> tuple[str, str]:
    """The path of what has a rate of its own, and its kind."""
    return {
        "tensor": (name, place.kind),
        "module": (place.module, place.module_kind),
        "block": (place.block, place.block_kind),
        "global": ("", ""),
    }[granularity]


def joint_groups(model: nn.Module, names: Iterable[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Group tensors by what has a joint rate.

    Args:
        model: Any module.
        names: Canonical names of its tensors.

    Returns:
        `{granularity: {path: {name: 1, its whole update}}}` for all granularities but `tensor`.
    """
    places = tensor_places(model)
    groups: dict[str, dict[str, dict[str, float]]] = {granularity: {} for granularity in GRANULARITIES[1:]}
    for name in names:
        for granularity, found in groups.items():
            found.setdefault(_group(name, places[name], granularity)[0], {})[name] = 1.0
    return groups


def _sizes(shapes: Iterable[tuple[int, ...]]) -> str:
    return " or ".join("x".join(map(str, shape)) or "scalar" for shape in sorted(shapes)) or "?"
