"""Published rules for the learning rate when width, depth, rank or adapter change: muP, depth-muP, muA, LoRA."""

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
    """How a target differs from a base. Ratios are target / base, 1 if not known.

    Attributes:
        width: Median over the trained matrices of the ratio of sizes (geometric mean of both dimensions; a rank is left
            out).
        depth: Ratio of the numbers of trained blocks.
        rank: Ratio of the LoRA ranks.
        scaling: Ratio of the factors on LoRA's output (alpha / r, or alpha / sqrt(r) for rsLoRA).
        base_adapter: The base's adapter by PEFT's name ("LORA", "VERA", ...; "DORA" for LoRA with `use_dora`), or None.
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
        """`{"width", "depth" or "rank": ratio}` of the sizes that differ."""
        sizes = {"width": self.width, "depth": self.depth, "rank": self.rank}
        return {name: ratio for name, ratio in sizes.items() if ratio != 1.0}


@dataclass(frozen=True)
class Rule:
    """A published rule for the learning rate.

    Attributes:
        text: The rule in words.
        source: The paper.
        applies: Whether the rule applies to a change.
        factor: The factor on the base's learning rate.
    """

    text: str
    source: str
    applies: Callable[[Change], bool]
    factor: Callable[[Change], float]


def _both_lora(change: Change) -> bool:
    """Whether base and target are trained with LoRA."""
    return change.base_adapter == change.target_adapter == "LORA"


def _without_adapter(change: Change) -> bool:
    """Whether base and target are trained without an adapter."""
    return change.base_adapter is None and change.target_adapter is None


RULES: Sequence[Rule] = (
    Rule(
        "muA: lr ~ (scaling * rank * width)^(-1/2), so independent of rank for alpha / r, rank^(-1/4) for rsLoRA",
        "arXiv 2602.06204",
        lambda change: _both_lora(change) and (change.rank, change.scaling, change.width) != (1.0, 1.0, 1.0),
        lambda change: (change.scaling * change.rank * change.width) ** -0.5,
    ),
    Rule(
        "full fine-tuning: a tenth of LoRA's learning rate",
        "Schulman et al., LoRA Without Regret, 2025",
        lambda change: change.base_adapter == "LORA" and change.target_adapter is None,
        lambda change: 0.1,
    ),
    Rule(
        "LoRA: ten times the learning rate of full fine-tuning",
        "Schulman et al., LoRA Without Regret, 2025",
        lambda change: change.base_adapter is None and change.target_adapter == "LORA",
        lambda change: 10.0,
    ),
    Rule(
        "muP: hidden matrices at lr / width (AdamW)",
        "arXiv 2203.03466",
        lambda change: _without_adapter(change) and change.width != 1.0,
        lambda change: 1 / change.width,
    ),
    Rule(
        "depth-muP: blocks at lr / sqrt(depth)",
        "arXiv 2310.02244",
        lambda change: _without_adapter(change) and change.depth != 1.0,
        lambda change: change.depth**-0.5,
    ),
)


def change_between(base: RateProfile, model: nn.Module) -> Change:
    """Compare the base of a profile with a model. Ratios that the metadata do not determine are 1."""
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
        ratios = [new_size / old_size for old_size, new_size in zip(old, new, strict=True)]
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
    """Make param groups by muP's rule for AdamW: hidden matrices at learning rate / width ratio, the rest unchanged.

    Source: Yang et al., Tensor Programs V (arXiv 2203.03466), table 8. Hidden matrices are
    those in repeated blocks, and others with both dimensions larger than in the base. The width ratio is that of the
    input dimension.

    Args:
        model: The target.
        base: Profile of the narrow base, with the shapes of its tensors in the metadata.
        learning_rate: The base's learning rate.
        **options: Further options for every param group, such as `weight_decay`.

    Returns:
        Param groups for an optimizer.

    Raises:
        RateProfileError: If the profile does not hold the shape of a tensor of the model.
    """
    parameters, kinds, engine = trainable_parameters(model), tensor_kinds(model), engine_of(model)
    before = _by_kind(base.about.shapes, base.about.kinds)
    groups: dict[float, list[nn.Parameter]] = {}
    for (name, path), parameter in zip(resolve_names(model, parameters).items(), parameters.values(), strict=True):
        kind = without_prefix(kinds[name])
        shape = engine.shape(parameter)
        if kind not in before or len(before[kind][0]) != len(shape):
            raise RateProfileError(
                f"the profile does not hold the shape that {name!r} (here {tuple(shape)}) had in the base. "
                "Record a base of the same architecture."
            )
        ratios = [new / old for old, new in zip(before[kind][0], shape, strict=True)]
        is_hidden = len(shape) == 2 and ("*" in kind or min(ratios) > 1)
        # Conv1D of GPT-2 keeps its weight as [in, out], everything else as [out, in].
        fan_in = 0 if isinstance(model.get_submodule(path.rpartition(".")[0]), Conv1D) else 1
        groups.setdefault(1 / ratios[fan_in] if is_hidden else 1.0, []).append(parameter)
    return [{"params": tensors, "lr": learning_rate * factor, **options} for factor, tensors in groups.items()]


def _by_kind(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str]) -> dict[str, list[tuple[int, ...]]]:
    """Return `{kind without PEFT's prefix: shapes}`. If a kind is unknown, every index in a name becomes `*`."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        kind = kinds.get(name) or re.sub(r"\.\d+(?=\.)", ".*", name)
        found.setdefault(without_prefix(kind), []).append(shape)
    return found
