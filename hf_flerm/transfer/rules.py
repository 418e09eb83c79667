"""What the rules of the field say of the learning rate when a model's width, depth, rank or adapter changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..engines import engine_of
from ..model.names import resolve_names, tensor_kinds, trainable_parameters, without_prefix
from ..profile.metadata import Adapter
from ..profile.rate_profile import RateProfile, RateProfileError

_LORA_RANK_DIM = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}


@dataclass(frozen=True)
class Change:
    """How a target differs from a base; every ratio is target / base, 1 where it cannot be told.

    Attributes:
        width: Ratio of the sizes of matrices, the rank of an adapter left aside.
        depth: Ratio of the numbers of blocks that are trained.
        rank: Ratio of LoRA ranks.
        scaling: Ratio of the factors on LoRA's output (alpha / r, or alpha / sqrt(r) for rsLoRA).
        base_adapter: PEFT's name for the base's adapter; None for none.
        target_adapter: The target's.
    """

    width: float = 1.0
    depth: float = 1.0
    rank: float = 1.0
    scaling: float = 1.0
    base_adapter: str | None = None
    target_adapter: str | None = None

    @property
    def ratios(self) -> dict[str, float]:
        """The sizes that changed: `{name: ratio}`."""
        sizes = {"width": self.width, "depth": self.depth, "rank": self.rank}
        return {name: ratio for name, ratio in sizes.items() if ratio != 1.0}


@dataclass(frozen=True)
class Rule:
    """A rule of the field.

    Attributes:
        text: What it says.
        source: Where it says so.
        applies: Whether it has something to say of a change.
        factor: What it multiplies the base's learning rate by.
    """

    text: str
    source: str
    applies: Callable[[Change], bool]
    factor: Callable[[Change], float]


def _both_lora(change: Change) -> bool:
    return change.base_adapter == change.target_adapter == "LORA"


def _full(change: Change) -> bool:
    return change.base_adapter is None and change.target_adapter is None


RULES: Sequence[Rule] = (
    Rule(
        "muA: lr ~ scaling^(-1/2) rank^(-1/2) width^(-1/2); alpha / r: rank-invariant, rsLoRA: rank^(-1/4)",
        "arXiv 2602.06204",
        lambda change: _both_lora(change) and (change.rank, change.scaling, change.width) != (1.0, 1.0, 1.0),
        lambda change: (change.scaling * change.rank * change.width) ** -0.5,
    ),
    Rule(
        "full fine-tuning wants a tenth of LoRA's learning rate",
        "Schulman et al., LoRA Without Regret, 2025",
        lambda change: change.base_adapter == "LORA" and change.target_adapter is None,
        lambda change: 0.1,
    ),
    Rule(
        "LoRA wants ten times the learning rate of full fine-tuning",
        "Schulman et al., LoRA Without Regret, 2025",
        lambda change: change.base_adapter is None and change.target_adapter == "LORA",
        lambda change: 10.0,
    ),
    Rule(
        "muP: hidden matrices at lr / width (AdamW)",
        "arXiv 2203.03466",
        lambda change: _full(change) and change.width != 1.0,
        lambda change: 1 / change.width,
    ),
    Rule(
        "depth-muP: blocks at lr / sqrt(depth)",
        "arXiv 2310.02244",
        lambda change: _full(change) and change.depth != 1.0,
        lambda change: change.depth**-0.5,
    ),
)


def change_between(base: RateProfile, model: nn.Module) -> Change:
    """Find how a model differs from the one that a profile was recorded on.

    Args:
        base: Profile with the metadata of its run.
        model: The target.

    Returns:
        The change; what the metadata does not tell counts as unchanged.
    """
    parameters = trainable_parameters(model)
    kinds = tensor_kinds(model)
    engine = engine_of(model)
    after = _by_kind({name: tuple(engine.shape(p)) for name, p in parameters.items()}, kinds)
    before = _by_kind(base.about.shapes, base.about.kinds)
    common = before.keys() & after.keys()
    widths, ranks = [], []
    for kind in common:
        old, new = before[kind][0], after[kind][0]
        if len(old) != 2 or len(new) != 2:
            continue
        rank_dim = next((dim for part, dim in _LORA_RANK_DIM.items() if part in kind.split(".")), None)
        ratios = [b / a for a, b in zip(old, new, strict=True)]
        if rank_dim is not None:
            ranks.append(ratios.pop(rank_dim))
        widths.append(max(ratios) if len(ratios) == 1 else (ratios[0] * ratios[1]) ** 0.5)
    depths = [len(after[kind]) / len(before[kind]) for kind in common if "*" in kind]
    old_adapter = next(iter(base.about.adapters), None)
    new_adapter = next((Adapter(config.to_dict()) for config in getattr(model, "peft_config", {}).values()), None)
    return Change(
        width=median(widths) if widths else 1.0,
        depth=median(depths) if depths else 1.0,
        rank=median(ranks) if ranks else 1.0,
        scaling=(new_adapter.scaling if new_adapter else 1.0) / (old_adapter.scaling if old_adapter else 1.0),
        base_adapter=old_adapter.method if old_adapter else None,
        target_adapter=new_adapter.method if new_adapter else None,
    )


def mup_param_groups(model: nn.Module, base: RateProfile, learning_rate: float, **options: Any) -> list[dict[str, Any]]:
    """Param groups by muP's learning-rate rule for AdamW: hidden matrices at lr / width, everything else at lr.

    A baseline, to compare with. Hidden are the matrices of repeated blocks, and others both of whose sizes have grown.

    Args:
        model: The target.
        base: Profile of the narrow base, with the shapes of its tensors.
        learning_rate: The base's.
        **options: Other options of every group.

    Returns:
        Groups for an optimizer; source: Yang et al., Tensor Programs V (arXiv 2203.03466), table 8.

    Raises:
        RateProfileError: If the profile does not tell the shape of a tensor of the model.
    """
    parameters, kinds, engine = trainable_parameters(model), tensor_kinds(model), engine_of(model)
    before = _by_kind(base.about.shapes, base.about.kinds)
    groups: dict[float, list[nn.Parameter]] = {}
    for (name, path), parameter in zip(resolve_names(model, parameters).items(), parameters.values(), strict=True):
        kind = without_prefix(kinds[name])
        shape = engine.shape(parameter)
        if kind not in before or len(before[kind][0]) != len(shape):
            raise RateProfileError(
                f"the profile does not tell what shape {name!r} (here {tuple(shape)}) had in the base. "
                "Record a base of the same architecture."
            )
        ratios = [new / old for old, new in zip(before[kind][0], shape, strict=True)]
        is_hidden = len(shape) == 2 and ("*" in kind or min(ratios) > 1)
        fan_in = 0 if isinstance(model.get_submodule(path.rpartition(".")[0]), Conv1D) else 1
        groups.setdefault(1 / ratios[fan_in] if is_hidden else 1.0, []).append(parameter)
    return [{"params": tensors, "lr": learning_rate * factor, **options} for factor, tensors in groups.items()]


def _by_kind(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str]) -> dict[str, list[tuple[int, ...]]]:
    """Shapes by kind, without PEFT's prefix; where a kind is not known, every number in a name is a block's."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        kind = kinds.get(name) or re.sub(r"\.\d+(?=\.)", ".*", name)
        found.setdefault(without_prefix(kind), []).append(shape)
    return found
