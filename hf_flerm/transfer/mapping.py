"""Map the rates of a base to the tensors of a target that differs in depth, width, rank, adapter or wrappers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..choices import Depth, Granularity, Unmatched, check_choice, values
from ..engines import engine_of
from ..model.name_text import preview, without_prefix
from ..model.names import Place, tensor_places, trainable_parameters
from ..profile.rate_profile import RateProfile, RateProfileError
from .blocks import Indices, Overlaps, block_indices, names_of_kind, overlapping, stack_blocks, with_indices


@dataclass(frozen=True)
class Unit:
    """A set of target tensors that are matched to one rate of the base and share a scale.

    Attributes:
        name: Path of the tensor, module or block that the rate belongs to, without PEFT's prefix: in the base for
            `depth="joint"`, else in the target. The unit of the whole model has the name "".
        kind: The name with `*` for the indices of blocks.
        sources: Names in the base of the tensors, modules or blocks whose rates were used.
        rates: The rate that the unit should have at the steps of the base, float64 [S].
        shares: `{canonical name in the target: fraction of the tensor's update that belongs to this unit}`. A fraction
            below 1 is possible only for `depth="joint"`, where a target block may lie between two base blocks.
    """

    name: str
    kind: str
    sources: tuple[str, ...]
    rates: Tensor
    shares: Mapping[str, float]

    @property
    def is_joint(self) -> bool:
        """Whether several tensors are matched together."""
        return len(self.shares) > 1


@dataclass(frozen=True)
class ProfileMap:
    """The rates of a base, mapped to a target. `str()` gives a table of the correspondence.

    Attributes:
        base: Profile of the base.
        units: `{name: unit}`; every trained tensor of the target is in a unit or in `unmatched`.
        unmatched: Trained tensors of the target for which the base has no rate.
        unused: Tensors, modules or blocks of the base that have no match in the target.
        policy: What happens to the unmatched tensors; see `unmatched` in `map_profile`.
        depth: How the rates of base blocks were split over target blocks; see `map_profile`.
        shapes: `{canonical name: shape}` of the trained tensors of the target.
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
        """The unit of all trained tensors. If the policy is "global", unmatched tensors get its scale.

        Raises:
            RateProfileError: If the base has no joint rate of the whole model.
        """
        wanted = _rates(self.base, "global")[""]
        return Unit("", "", ("",), wanted, dict.fromkeys(self.shapes, 1.0))

    @property
    def measured_units(self) -> dict[str, Unit]:
        """The units whose scales are estimated: `units`, and `everything` if unmatched tensors need its scale."""
        needs_everything = self.policy == "global" and self.unmatched
        return {**self.units, **({"": self.everything} if needs_everything else {})}

    def tensor_scales(self, log_scales: Mapping[str, float]) -> dict[str, float]:
        """Turn scales of units into scales of tensors.

        A tensor that belongs to several units gets the geometric mean of their scales, weighted by its shares.

        Args:
            log_scales: `{unit: logarithm of its scale}` of the `measured_units`.

        Returns:
            `{canonical name: scale}` of every trained tensor.
        """
        by_tensor = dict.fromkeys(self.shapes, 0.0)
        for unit in self.units.values():
            for name, share in unit.shares.items():
                by_tensor[name] += share * log_scales[unit.name]
        scales = {name: math.exp(log) for name, log in by_tensor.items()}
        if self.policy == "freeze":
            scales.update(dict.fromkeys(self.unmatched, 0.0))
        if self.policy == "global":
            scales.update(dict.fromkeys(self.unmatched, math.exp(log_scales.get("", 0.0))))
        return scales

    @property
    def profile(self) -> RateProfile:
        """A profile with the rates of the base by the names of the target's tensors.

        Raises:
            RateProfileError: If a unit has several tensors: a joint rate is not the rate of each.
        """
        not_single = [name for name, unit in self.units.items() if not _is_whole_tensor(unit)]
        if not_single:
            raise RateProfileError(
                f"{preview(not_single)} are matched by the joint rate of several tensors; single tensors have no rate. "
                "Map with granularity='tensor' and depth='equal' or 'sqrt'."
            )
        rates = {name: unit.rates for unit in self.units.values() for name in unit.shares}
        return RateProfile(self.base.steps, rates, self.base.metadata)

    def __str__(self) -> str:
        base_shapes = self.base.about.shapes
        rows = [("base", "target", "how")]
        for kind in dict.fromkeys(unit.kind for unit in self.units.values()):
            units = [unit for unit in self.units.values() if unit.kind == kind]
            sources = dict.fromkeys(source for unit in units for source in unit.sources)
            names = dict.fromkeys(name for unit in units for name in unit.shares)
            before = {base_shapes[source] for source in sources if source in base_shapes}
            after = {self.shapes[name] for name in names}
            if not all(map(_is_whole_tensor, units)):
                how = "joint rate"
            else:
                how = "unchanged" if len(sources) == len(names) else f"{self.depth} split"
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

    Tensors correspond by name, without PEFT's prefix and the adapter's name. Blocks correspond by relative position
    among the blocks with this tensor: the first third of the target's blocks to the first third of the base's.

    Args:
        base: Profile of the base run: a `RateProfile`, a folder, a file, or a repository on the Hub.
        model: The target, with its adapter; its trainable parameters are mapped.
        granularity: What gets its own scale: each "tensor"; each "module" (by the joint rate of its trained tensors,
            such as LoRA's A and B or a weight and its bias); each "block"; or the whole model ("global").
        depth: How the rate of a base block is split over the m target blocks that correspond to it. "equal": 1/m each,
            as in the paper; right if the output changes of the m blocks are parallel. "sqrt": 1/sqrt(m) each; right if
            they are orthogonal. "copy": the whole rate to each. "joint": the m tensors together get the rate, measured
            with their interaction.
        unmatched: What happens to tensors without a rate in the base. "error" raises, also if names of the base are not
            in the target; "global" uses the scale of the whole model; "nominal" keeps their learning rate; "freeze"
            sets it to 0.

    Raises:
        RateProfileError: If names differ and `unmatched` is "error", if no name matches, or if the base lacks the joint
            rates that the granularity needs.
        ValueError: If an option is not allowed, or `model` is not a module.
    """
    check_choice("granularity", granularity, values(Granularity))
    check_choice("depth", depth, values(Depth))
    check_choice("unmatched", unmatched, values(Unmatched))
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is {model!r:.100}; it must be a torch module, with the adapter that will be trained. Pass the "
            "profile first, then the model. The command `hf-flerm map` takes folders."
        )
    base = RateProfile.from_pretrained(base)
    rates = _rates(base, granularity)
    base_names = _names_without_prefix(rates)
    parameters = trainable_parameters(model)
    targets = _targets(model, parameters, granularity)
    target_names = [with_indices(kind, indices) for kind, blocks in targets.items() for indices in blocks]
    units: dict[str, Unit] = {}
    used: set[str] = set()
    for kind, tensors in targets.items():
        # For instance, kind "h.*.fc.weight", base with 2 blocks and target with 3:
        #   sources   {(0,): "h.0.fc.weight", (1,): "h.1.fc.weight"}, names in the profile
        #   tensors   {(0,): ["h.0.fc.weight"], (1,): [...], (2,): [...]}, names in the target
        #   overlaps  {((0,), (0,)): (1, 2/3), ((0,), (1,)): (1/2, 1/3), ...}; see `overlapping`
        sources = {indices: base_names[name] for indices, name in names_of_kind(base_names, kind).items()}
        same_blocks = stack_blocks(base_names, kind) == stack_blocks(target_names, kind)
        overlaps = overlapping(sources, tensors, same_blocks)
        used |= {sources[indices] for indices, _ in overlaps}
        if depth == "joint":
            found = _joint_units(kind, overlaps, sources, tensors, rates)
        else:
            found = _split_units(kind, overlaps, sources, tensors, rates, depth)
        units |= {unit.name: unit for unit in found}
    matched = {name for unit in units.values() for name in unit.shares}
    engine = engine_of(model)
    mapped = ProfileMap(
        base,
        units,
        tuple(name for name in parameters if name not in matched),
        tuple(name for name in base_names.values() if name not in used),
        unmatched,
        depth,
        {name: tuple(engine.shape(parameter)) for name, parameter in parameters.items()},
    )
    _check(mapped, granularity)
    return mapped


def _check(mapped: ProfileMap, granularity: str) -> None:
    """Raise RateProfileError if the map cannot be used."""
    if not mapped.units:
        coarser = values(Granularity)[values(Granularity).index(granularity) + 1 :]
        advice = f"Match by granularity={' or '.join(map(repr, coarser))} (another adapter, full fine-tuning), or "
        raise RateProfileError(
            f"profile and model have no {granularity} name in common: the profile has {preview(mapped.unused)}, the "
            f"model {preview(mapped.unmatched)}. {advice}record a base whose trainable parameters have these names."
        )
    if mapped.policy == "global" and mapped.unmatched:
        _rates(mapped.base, "global")
    if mapped.policy == "error" and (mapped.unmatched or mapped.unused):
        others = ", ".join(repr(policy) for policy in values(Unmatched) if policy != "error")
        raise RateProfileError(
            f"the parameter names differ: only in the profile {preview(mapped.unused)}; only in the model "
            f"{preview(mapped.unmatched)}. Record a base whose trainable parameters have these names, match by "
            f"granularity='module' (another adapter), or choose what happens to the rest with unmatched={others}."
        )


def _names_without_prefix(names: Iterable[str]) -> dict[str, str]:
    """Return `{name without PEFT's prefix: name in the profile}`."""
    found: dict[str, str] = {}
    for name in names:
        if found.setdefault(without_prefix(name), name) != name:
            raise RateProfileError(
                f"the profile has {without_prefix(name)!r} twice, with and without PEFT's prefix. Remove one of them."
            )
    return found


def _targets(model: nn.Module, names: Iterable[str], granularity: str) -> dict[str, dict[Indices, list[str]]]:
    """Return `{kind without PEFT's prefix: {indices of blocks: names of the tensors that are matched together}}`."""
    places = tensor_places(model)
    targets: dict[str, dict[Indices, list[str]]] = {}
    for name in names:
        path, kind = map(without_prefix, _path_and_kind(name, places[name], granularity))
        targets.setdefault(kind, {}).setdefault(block_indices(path, kind), []).append(name)
    return targets


def _joint_units(
    kind: str,
    overlaps: Overlaps,
    sources: Mapping[Indices, str],
    tensors: Mapping[Indices, list[str]],
    rates: Mapping[str, Tensor],
) -> Iterator[Unit]:
    """Yield a unit for each base block: the target blocks that overlap it, each with the fraction that overlaps."""
    for origin, source in sources.items():
        parts = {target: of_target for (base, target), (of_target, _) in overlaps.items() if base == origin}
        if parts:
            shares = {name: float(part) for target, part in parts.items() for name in tensors[target]}
            yield Unit(with_indices(kind, origin), kind, (source,), rates[source], shares)


def _split_units(
    kind: str,
    overlaps: Overlaps,
    sources: Mapping[Indices, str],
    tensors: Mapping[Indices, list[str]],
    rates: Mapping[str, Tensor],
    depth: str,
) -> Iterator[Unit]:
    """Yield a unit for each target block, with a rate computed from the base blocks that overlap it.

    rate^p is the sum over these base blocks of fraction x (base rate)^p, with p = 2 for "sqrt" and p = 1 otherwise. The
    fraction is that of the base block, so that the sum of rate^p over its target blocks is kept. For "copy" it is that
    of the target block, so that the rate is a mean.
    """
    power = 2 if depth == "sqrt" else 1
    for target in dict.fromkeys(target for _, target in overlaps):
        parts = {base: pair for (base, other), pair in overlaps.items() if other == target}
        pieces = [
            rates[sources[base]] ** power * float(of_target if depth == "copy" else of_base)
            for base, (of_target, of_base) in parts.items()
        ]
        wanted = torch.stack(pieces).sum(0) ** (1 / power)
        names = tuple(sources[base] for base in parts)
        yield Unit(with_indices(kind, target), kind, names, wanted, dict.fromkeys(tensors[target], 1.0))


def _rates(base: RateProfile, granularity: str) -> Mapping[str, Tensor]:
    """Return `{name or path: float64 [S]}`; raise RateProfileError if the profile lacks these joint rates."""
    if granularity == "tensor":
        return base.rates
    rates = base.joint_rates.get(granularity, {})
    if not rates or (granularity == "global" and "" not in rates):
        raise RateProfileError(
            f"the profile has no joint rates by {granularity}. Record it again with this version, or match with "
            "granularity='tensor'."
        )
    return rates


def _path_and_kind(name: str, place: Place, granularity: str) -> tuple[str, str]:
    """Return path and kind of the tensor, module or block with which a tensor is matched."""
    return {
        "tensor": (name, place.kind),
        "module": (place.module, place.module_kind),
        "block": (place.block, place.block_kind),
        "global": ("", ""),
    }[granularity]


def joint_groups(model: nn.Module, names: Iterable[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Group tensors by the modules and blocks whose joint rates a run records.

    Args:
        model: Any module.
        names: Canonical names of the tensors.

    Returns:
        `{granularity: {path: {name: 1.0}}}` for every granularity but "tensor"; 1.0 is the share of the update.
    """
    places = tensor_places(model)
    coarse = [granularity for granularity in values(Granularity) if granularity != "tensor"]
    groups: dict[str, dict[str, dict[str, float]]] = {granularity: {} for granularity in coarse}
    for name in names:
        for granularity, by_path in groups.items():
            by_path.setdefault(_path_and_kind(name, places[name], granularity)[0], {})[name] = 1.0
    return groups


def _is_whole_tensor(unit: Unit) -> bool:
    """Whether the unit is one tensor with its whole update."""
    return list(unit.shares.values()) == [1.0]


def _sizes(shapes: Iterable[tuple[int, ...]]) -> str:
    return " or ".join("x".join(map(str, shape)) or "scalar" for shape in sorted(shapes)) or "?"
