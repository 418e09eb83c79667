"""Published rules for the learning rate when width, depth, rank, adapter or optimizer change.

`prior_scales` makes of them the learning-rate scales that a matched run starts from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
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
        base_optimizer: The algorithms that stepped the base, such as "AdamW" or "AdamW, Muon"; None if not known or not
            compared.
        target_optimizer: Those of the target.
    """

    width: float = 1.0
    depth: float = 1.0
    rank: float = 1.0
    scaling: float = 1.0
    base_adapter: str | None = None
    target_adapter: str | None = None
    base_optimizer: str | None = None
    target_optimizer: str | None = None

    @property
    def of_optimizer(self) -> bool:
        """Whether base and target are known to have optimizers of different classes."""
        return None not in (self.base_optimizer, self.target_optimizer) and self.base_optimizer != self.target_optimizer

    @property
    def of_adapter(self) -> bool:
        """Whether the adapters are of different methods, or only one of the two has an adapter."""
        return self.base_adapter != self.target_adapter

    @property
    def is_none(self) -> bool:
        """Whether neither size, adapter nor optimizer changed."""
        return not (self.of_optimizer or self.of_adapter or self.ratios or self.scaling != 1.0)

    @property
    def ratios(self) -> dict[str, float]:
        """`{"width", "depth" or "rank": ratio}` of the sizes that differ."""
        sizes = {"width": self.width, "depth": self.depth, "rank": self.rank}
        return {name: ratio for name, ratio in sizes.items() if ratio != 1.0}


@dataclass(frozen=True)
class TargetTensor:
    """What the rules need to know of one trained tensor of the target.

    Attributes:
        shape: Its shape.
        in_block: Whether it is in a stack of repeated blocks.
        fan_in: Target / base of the input dimension of a matrix; 1 if not known.
        is_hidden: Whether it is a matrix between hidden layers: in a block, or with both dimensions larger than in the
            base.
        algorithm: What steps it; None if not known.
    """

    shape: tuple[int, ...]
    in_block: bool
    fan_in: float
    is_hidden: bool
    algorithm: str | None


@dataclass(frozen=True)
class Rule:
    """A published rule for the learning rate.

    Attributes:
        text: The rule in words.
        source: The paper.
        applies: Whether the rule applies to a change.
        factor: The factor on the base's learning rate, if all tensors have the same.
        of_tensor: The factor on one tensor's learning rate that a matched run starts from; None: `factor` is only
            shown.
    """

    text: str
    source: str
    applies: Callable[[Change], bool]
    factor: Callable[[Change], float]
    of_tensor: Callable[[Change, TargetTensor], float] | None = None


def _both_lora(change: Change) -> bool:
    """Whether base and target are trained with LoRA."""
    return change.base_adapter == change.target_adapter == "LORA"


def _without_adapter(change: Change) -> bool:
    """Whether base and target are trained without an adapter."""
    return change.base_adapter is None and change.target_adapter is None


_ADAM = ("Adam", "AdamW")
_MUON = "Muon"
_LION = ("Lion",)

RULES: Sequence[Rule] = (
    Rule(
        "muA: lr ~ (scaling * rank * width)^(-1/2), so independent of rank for alpha / r, rank^(-1/4) for rsLoRA",
        "arXiv 2602.06204",
        lambda change: _both_lora(change) and (change.rank, change.scaling, change.width) != (1.0, 1.0, 1.0),
        lambda change: (change.scaling * change.rank * change.width) ** -0.5,
        lambda change, tensor: (change.scaling * change.rank * change.width) ** -0.5,
    ),
    Rule(
        "full fine-tuning: a tenth of LoRA's learning rate",
        "Schulman et al., LoRA Without Regret, 2025",
        lambda change: change.base_adapter == "LORA" and change.target_adapter is None,
        lambda change: 0.1,
        lambda change, tensor: 0.1,
    ),
    Rule(
        "LoRA: ten times the learning rate of full fine-tuning",
        "Schulman et al., LoRA Without Regret, 2025",
        lambda change: change.base_adapter is None and change.target_adapter == "LORA",
        lambda change: 10.0,
        lambda change, tensor: 10.0,
    ),
    Rule(
        "muP: hidden matrices at lr / width (AdamW)",
        "arXiv 2203.03466",
        lambda change: _without_adapter(change) and change.width != 1.0,
        lambda change: 1 / change.width,
        lambda change, tensor: 1 / tensor.fan_in if tensor.is_hidden else 1.0,
    ),
    Rule(
        "depth-muP: blocks at lr / sqrt(depth)",
        "arXiv 2310.02244",
        lambda change: _without_adapter(change) and change.depth != 1.0,
        lambda change: change.depth**-0.5,
    ),
    # On the depth axes of examples/studies this is a better start than depth-muP, and never worse than no change.
    Rule(
        "FLeRM: the rate of a block is shared by the blocks that it becomes: blocks at lr / depth",
        "arXiv 2502.17405",
        lambda change: _without_adapter(change) and change.depth != 1.0,
        lambda change: 1 / change.depth,
        lambda change, tensor: 1 / change.depth if tensor.in_block else 1.0,
    ),
    Rule(
        "Moonlight: Muon takes AdamW's learning rate if its steps are scaled by 0.2 sqrt(max(rows, columns))",
        "arXiv 2502.16982",
        lambda change: change.base_optimizer in _ADAM and _MUON in (change.target_optimizer or "").split(", "),
        lambda change: 1.0,
        lambda change, tensor: _of_muon(tensor) if tensor.algorithm == _MUON else 1.0,
    ),
    Rule(
        "Lion: 3 to 10 times smaller than AdamW's learning rate",
        "arXiv 2302.06675",
        lambda change: change.base_optimizer in _ADAM and change.target_optimizer in _LION,
        lambda change: 30**-0.5,
        lambda change, tensor: 30**-0.5,
    ),
    Rule(
        "AdamW: 3 to 10 times larger than Lion's learning rate",
        "arXiv 2302.06675",
        lambda change: change.base_optimizer in _LION and change.target_optimizer in _ADAM,
        lambda change: 30**0.5,
        lambda change, tensor: 30**0.5,
    ),
)


def _of_muon(tensor: TargetTensor) -> float:
    """The factor that turns Muon's own step size, sqrt(max(1, rows / columns)), into Moonlight's."""
    if len(tensor.shape) != 2:
        return 1.0
    rows, columns = tensor.shape
    return 0.2 * math.sqrt(max(rows, columns) / max(1.0, rows / columns))


def change_between(base: RateProfile, model: nn.Module, algorithms: Mapping[str, str] = MappingProxyType({})) -> Change:
    """Compare the base of a profile with a target. Ratios that the metadata do not determine are 1.

    Args:
        base: Profile of the base.
        model: The target.
        algorithms: `{canonical name: algorithm that steps it}` in the target; empty: optimizers are not compared.
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
        base_optimizer=base.about.optimizer_name if algorithms else None,
        target_optimizer=", ".join(sorted(set(algorithms.values()))) or None,
    )


def prior_scales(
    base: RateProfile, model: nn.Module, algorithms: Mapping[str, str] = MappingProxyType({})
) -> dict[str, float]:
    """Return the learning-rate scales that published rules give, the product of those that apply to the change.

    Args:
        base: Profile of the base, with the shapes of its tensors in the metadata.
        model: The target.
        algorithms: `{canonical name: algorithm that steps it}` in the target; empty: rules for optimizers are left out.

    Returns:
        `{canonical name: factor}` of every trained tensor; all 1 if no rule applies, and if the profile does not hold
        shapes: then it does not say either whether the base had an adapter.
    """
    if not base.about.shapes:
        return dict.fromkeys(trainable_parameters(model), 1.0)
    change = change_between(base, model, algorithms)
    factors = [rule.of_tensor for rule in RULES if rule.of_tensor is not None and rule.applies(change)]
    return {
        name: math.prod(factor(change, tensor) for factor in factors)
        for name, tensor in _target_tensors(base, model, algorithms).items()
    }


def asked_scales(change: Change, model: nn.Module, prior: Mapping[str, float]) -> dict[str, float]:
    """Return what rates ask for beyond the prior where nothing is wrong: `{canonical name: factor}`, 1 if not named.

    LoRA's A and B have more than one balance with the same product. A rule gives both one factor p; rates ask for
    another balance, which trains no better. With r, s and w the ratios of rank, scaling and width, and B as large as
    its steps have made it, one step moves the outputs by

        rate of B  ~ r s lr_B             rate of A  ~ r s w lr_A |B|  ~  r s w lr_A lr_B

    so at lr_A = lr_B = p, B asks for 1 / (r s) and A for 1 / (r s w p): B for w p times as much as A.
    """
    if not _both_lora(change):
        return {}
    names = (name for name in trainable_parameters(model) if "lora_B" in name.split("."))
    return {name: change.width * prior.get(name, 1.0) for name in names}


def is_ruled(change: Change) -> bool:
    """Whether a rule that matched runs start from says what to do between these optimizers."""
    between = Change(base_optimizer=change.base_optimizer, target_optimizer=change.target_optimizer)
    return any(rule.of_tensor is not None and rule.applies(between) for rule in RULES)


def _target_tensors(
    base: RateProfile, model: nn.Module, algorithms: Mapping[str, str] = MappingProxyType({})
) -> dict[str, TargetTensor]:
    """Describe the trained tensors of a target by canonical name."""
    parameters, kinds, engine = trainable_parameters(model), tensor_kinds(model), engine_of(model)
    before = _by_kind(base.about.shapes, base.about.kinds)
    described = {}
    for (name, path), parameter in zip(resolve_names(model, parameters).items(), parameters.values(), strict=True):
        kind = without_prefix(kinds[name])
        shape = tuple(engine.shape(parameter))
        old = next((found for found in before.get(kind, []) if len(found) == len(shape)), shape)
        ratios = [new / before_ for before_, new in zip(old, shape, strict=True)]
        is_hidden = len(shape) == 2 and ("*" in kind or min(ratios) > 1)
        # Conv1D of GPT-2 keeps its weight as [in, out], everything else as [out, in].
        fan_in = 0 if isinstance(model.get_submodule(path.rpartition(".")[0]), Conv1D) else 1
        width = ratios[fan_in] if is_hidden else 1.0
        described[name] = TargetTensor(shape, "*" in kind, width, is_hidden, algorithms.get(name))
    return described


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
    parameters, kinds = trainable_parameters(model), tensor_kinds(model)
    before = _by_kind(base.about.shapes, base.about.kinds)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, tensor in _target_tensors(base, model).items():
        kind = without_prefix(kinds[name])
        if kind not in before or len(before[kind][0]) != len(tensor.shape):
            raise RateProfileError(
                f"the profile does not hold the shape that {name!r} (here {tensor.shape}) had in the base. "
                "Record a base of the same architecture."
            )
        groups.setdefault(1 / tensor.fan_in, []).append(parameters[name])
    return [{"params": tensors, "lr": learning_rate * factor, **options} for factor, tensors in groups.items()]


def _by_kind(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str]) -> dict[str, list[tuple[int, ...]]]:
    """Return `{kind without PEFT's prefix: shapes}`. If a kind is unknown, every index in a name becomes `*`."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        kind = kinds.get(name) or re.sub(r"\.\d+(?=\.)", ".*", name)
        found.setdefault(without_prefix(kind), []).append(shape)
    return found
