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
from ..model.names import Place, preview, tensor_places, trainable_parameters, without_prefix
from ..profile.rate_profile import RateProfile, RateProfileError
from .blocks import Indices, Overlaps, block_indices, names_of_kind, overlapping, stack_blocks, with_indices


@dataclass(frozen=True)
class Unit:
    """Tensors of the target that are matched together to a rate of the base, and share one scale.

    Attributes:
        name: Path of the tensor, module or block that the rate belongs to, without PEFT's prefix: in the base for
            `depth="joint"`, else in the target. The unit of everything has the name "".
        kind: The name with `*` for the indices of blocks.
        sources: Names in the base of the tensors, modules or blocks whose rates were used.
        rates: The rate that the unit should have at the steps of the base, float64 [S].
        shares: `{canonical name in the target: part of the tensor's update that belongs to this unit}`. A part below 1
            is possible only for `depth="joint"`, where a target block may lie between two base blocks.
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
    """The rates of a base, mapped to a target. `str()` of it is a table of what corresponds to what.

    Attributes:
        base: Profile of the base.
        units: `{name: unit}`; every trained tensor of the target is in one, or among `unmatched`.
        unmatched: Trained tensors of the target for which the base has no rate.
        unused: Tensors, modules or blocks of the base that the target does not have.
        policy: What happens to the unmatched tensors; see `unmatched` in `map_profile`.
        depth: How the rate of a base block was given to target blocks; see `map_profile`.
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
        """All trained tensors as one unit. Its scale is that of the unmatched tensors if the policy is "global".

        Raises:
            RateProfileError: If the base has no joint rate of everything.
        """
        wanted = _rates(self.base, "global")[""]
        return Unit("", "", ("",), wanted, dict.fromkeys(self.shapes, 1.0))

    @property
    def measured_units(self) -> dict[str, Unit]:
        """The units whose scales are estimated: `units`, and `everything` where unmatched tensors need its scale."""
        needs_everything = self.policy == "global" and self.unmatched
        return {**self.units, **({"": self.everything} if needs_everything else {})}

    def tensor_scales(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Turn scales of units into scales of tensors.

        A tensor that belongs to several units in parts has the geometric mean of their scales, weighted by the parts.

        Args:
            logs: `{unit: logarithm of its scale}` of the `measured_units`.

        Returns:
            `{canonical name: scale}` of every trained tensor.
        """
        log_scales = dict.fromkeys(self.shapes, 0.0)
        for unit in self.units.values():
            for name, share in unit.shares.items():
                log_scales[name] += share * logs[unit.name]
        scales = {name: math.exp(log) for name, log in log_scales.items()}
        if self.policy == "freeze":
            scales.update(dict.fromkeys(self.unmatched, 0.0))
        if self.policy == "global":
            scales.update(dict.fromkeys(self.unmatched, math.exp(logs.get("", 0.0))))
        return scales

    @property
    def profile(self) -> RateProfile:
        """The base's rates under the names of the target's tensors.

        Raises:
            RateProfileError: If a unit has several tensors, whose joint rate is no rate of each.
        """
        joint = [name for name, unit in self.units.items() if not _is_whole_tensor(unit)]
        if joint:
            raise RateProfileError(
                f"{preview(joint)} are matched by the joint rate of several tensors, so single tensors have no rate. "
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
                how = "as it is" if len(sources) == len(names) else f"{self.depth} split"
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

    Tensors correspond by name; PEFT's prefix and the adapter's name do not matter. Blocks correspond by their position
    among the blocks that have such a tensor: the first third of the target's blocks to the first third of the base's.

    Args:
        base: Profile of the base run: a `RateProfile`, a folder, a file, or a repository on the Hub.
        model: The target, with its adapter; its trainable parameters are mapped.
        granularity: What is matched and has a scale of its own: each "tensor"; each "module" (the joint rate of all
            that is trained of it, such as LoRA's A and B or a weight and its bias); each "block"; or everything
            together ("global").
        depth: How the rate of a base block is given to the m blocks that it becomes. "equal": 1/m each, as in the
            paper; right if their effects add up. "sqrt": 1/sqrt(m) each; right if their effects are orthogonal.
            "copy": all of it to each. "joint": the m copies of a tensor together get it, measured with their
            interaction.
        unmatched: What happens to tensors that the base has no rate for. "error" refuses them, and names in the base
            that the target lacks; "global" gives them the scale of everything together; "nominal" leaves their learning
            rate as it is; "freeze" does not train them.

    Raises:
        RateProfileError: If names differ and `unmatched` is "error", if no name is common, or if the base lacks the
            joint rates that the granularity needs.
        ValueError: If an option is not allowed, or `model` is no module.
    """
    check_choice("granularity", granularity, values(Granularity))
    check_choice("depth", depth, values(Depth))
    check_choice("unmatched", unmatched, values(Unmatched))
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is {model!r:.100}; it must be a torch module, with the adapter that will be trained. The "
            "profile comes first, then the model; `hf-flerm map` takes folders."
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
        # {indices: name in the profile} of the base's side of this kind
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
            f"profile and model share no {granularity} by name: the profile has {preview(mapped.unused)}, the model "
            f"{preview(mapped.unmatched)}. {advice}record a base whose trainable parameters have these names."
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
    """`{name without PEFT's prefix: name in the profile}`."""
    found: dict[str, str] = {}
    for name in names:
        if found.setdefault(without_prefix(name), name) != name:
            raise RateProfileError(
                f"the profile has {without_prefix(name)!r} twice, with PEFT's prefix and without. Remove one of them."
            )
    return found


def _targets(model: nn.Module, names: Iterable[str], granularity: str) -> dict[str, dict[Indices, list[str]]]:
    """`{kind: {indices of blocks: names of the tensors that are matched together}}`, kinds without PEFT's prefix."""
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
    """One unit per base block: all target blocks that overlap it, each with the part of its update that does."""
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
    """One unit per target block, whose rate is put together from the base blocks that overlap it.

    With p = 2 for "sqrt" and 1 otherwise, rate^p is the sum over those base blocks of part x (base rate)^p. The part
    is that of the base block, so that every base block's total of rate^p is kept; for "copy" it is that of the target
    block, which makes a mean.
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
    """`{name or path: float64 [S]}`; raises RateProfileError if the profile has no joint rates of this granularity."""
    if granularity == "tensor":
        return base.rates
    rates = base.joint_rates.get(granularity, {})
    if not rates or (granularity == "global" and "" not in rates):
        raise RateProfileError(
            f"the profile holds no joint rates by {granularity}, only rates by tensor. Record it again with this "
            "version, or match with granularity='tensor'."
        )
    return rates


def _path_and_kind(name: str, place: Place, granularity: str) -> tuple[str, str]:
    """Path and kind of the tensor, module or block that a tensor is matched with."""
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
        `{granularity: {path: {name: 1.0}}}` for every granularity but "tensor"; 1.0 stands for the whole update.
    """
    places = tensor_places(model)
    coarse = [granularity for granularity in values(Granularity) if granularity != "tensor"]
    groups: dict[str, dict[str, dict[str, float]]] = {granularity: {} for granularity in coarse}
    for name in names:
        for granularity, by_path in groups.items():
            by_path.setdefault(_path_and_kind(name, places[name], granularity)[0], {})[name] = 1.0
    return groups


def _is_whole_tensor(unit: Unit) -> bool:
    """Whether the unit is one tensor with all of its update."""
    return list(unit.shares.values()) == [1.0]


def _sizes(shapes: Iterable[tuple[int, ...]]) -> str:
    return " or ".join("x".join(map(str, shape)) or "scalar" for shape in sorted(shapes)) or "?"
