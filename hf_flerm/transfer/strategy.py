"""The strategy of a matched run: what to match, and whether to move at all, from what changed since the base.

Learning-rate scales start from a prior: what the field's rules say of the change (`rules.prior_scales`), or 1. What the
measurements may add depends on the change, because rates do not predict equally well everywhere. At their best learning
rates two runs agree in their rates only up to a factor, however precisely these are measured, and every scale that
moves without need costs something. `examples/studies/run.py` can run every policy on every axis.

    policy   scales
    hold     the prior
    level    the prior, and one factor for all tensors from the joint rate of the whole model, if it is clearly not 1;
             for a change of adapter, and of an optimizer that no rule is known for
    follow   what each kind of tensor needs by its own rates
    gate     the prior while the kinds of tensors are in balance, else as `follow`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..profile.rate_profile import RateProfile
from .evidence import Evidence, columns_of, random_effects_mean
from .mapping import ProfileMap
from .rules import Change, asked_scales, change_between, is_ruled, prior_scales

# Standard deviation of log(base's joint rate / target's joint rate) between runs that both have their best learning
# rate, over the axes of examples/studies.
_LEVEL_ERROR = 0.5
# Up to here joint rates mislead: between optima they differ by factors of 3 to 5 in the first 8 steps, by 1.3 later.
_FIRST_LEVEL_STEP = 16
# A measurement at step t has the weight (t + 1)^2 in the level, as if t were at most this.
_FULL_WEIGHT_STEP = 64
# Kinds of tensors are in balance if none needs more than this factor (or its inverse) beyond their geometric mean.
# Where PEFT's default LoRA needs no change, its B moves up to 2.6 times as far as its A, 1.6 on each side of the mean;
# with a Gaussian A at 4 times the rank it is 5 on each side.
_BALANCED = 2.2


@dataclass(frozen=True)
class Strategy:
    """What a matched run does.

    Attributes:
        policy: One of `hf_flerm.choices.Policy`.
        granularity: What gets its own scale; see `map_profile`.
        prior: `{canonical name: factor on the learning rate}` to start from.
        reason: Why, in words.
        asked: `{canonical name: factor beyond its prior}` that rates ask for where nothing is wrong; 1 if not named. See
            `rules.asked_scales`.
    """

    policy: str
    granularity: str
    prior: Mapping[str, float]
    reason: str
    asked: Mapping[str, float] = field(default_factory=dict)


def choose_strategy(
    base: RateProfile,
    model: nn.Module,
    algorithms: Mapping[str, str],
    *,
    policy: str | None = None,
    granularity: str | None = None,
    rules: str = "published",
) -> Strategy:
    """Choose policy, granularity and prior from what changed between base and target.

    Args:
        base: Profile of the base.
        model: The target.
        algorithms: `{canonical name: algorithm that steps it}`, such as "Muon" or "AdamW".
        policy: A policy to use in any case; None: the one for the change.
        granularity: What gets its own scale; None: what the policy needs. With a granularity and no policy, each unit
            follows its own rates.
        rules: Where the prior comes from: the "published" rules, or "none".
    """
    change = change_between(base, model, algorithms)
    chosen, reason = _policy(change, base, rules)
    if policy is None and granularity is not None:
        chosen, reason = "follow", f"granularity={granularity!r} was asked for"
    if policy is not None:
        chosen, reason = policy, f"policy={policy!r} was asked for"
    coarse = "global" if chosen == "level" else "tensor"
    prior = prior_scales(base, model, algorithms) if rules == "published" else {}
    return Strategy(chosen, granularity or coarse, prior, reason, asked_scales(change, model, prior))


def _policy(change: Change, base: RateProfile, rules: str) -> tuple[str, str]:
    """Return the policy for a change, and the reason in words."""
    if not (base.about.shapes and base.joint_rates.get("global")):
        return "follow", "the profile has no shapes or no joint rates, without which nothing else can be decided"
    if change.of_optimizer:
        optimizers = f"the optimizer changed ({change.base_optimizer} to {change.target_optimizer})"
        if rules == "published" and not change.of_adapter and is_ruled(change):
            return "hold", f"{optimizers}, where a rule predicts better than rates"
        return "level", f"{optimizers}, so the base says nothing of the balance between tensors"
    if change.of_adapter:
        adapters = f"{change.base_adapter or 'no adapter'} to {change.target_adapter or 'no adapter'}"
        return "level", f"the adapter changed ({adapters}), so the base says nothing of the balance between tensors"
    if change.target_adapter is not None and change.depth == 1.0:
        return "gate", "the adapter is of the same kind"
    if change.width != 1.0 and change.target_adapter is None:
        if rules == "published":
            return "hold", "the width changed, where muP's rule predicts better than rates"
        return "follow", "the width changed"
    if change.depth != 1.0:
        return "follow", "the depth changed, where rates predict better than rules"
    return "hold", "neither size, adapter nor optimizer changed"


def with_scales(
    evidence: Evidence,
    mapped: ProfileMap,
    strategy: Strategy,
    *,
    max_scale: float = math.inf,
    max_change: float = math.inf,
    pool: str = "kind",
    beta: float | None = None,
) -> Evidence:
    """Return the evidence with the scales that follow from it.

    Args:
        evidence: The measurements, and the scales so far.
        mapped: What is matched.
        strategy: Policy and prior.
        max_scale: Largest scale, and the inverse of the smallest.
        max_change: Largest factor by which a scale changes from one measurement to the next; see `Evidence.estimated`.
        pool: How quotients are averaged over units under the policy "follow"; see `Evidence.estimated`.
        beta: How they are averaged over measurements.
    """
    prior = log_prior(mapped, strategy.prior)
    follows = strategy.policy == "follow"
    if strategy.policy == "gate":
        # Once out of balance, a run follows the rates to its end.
        has_moved = bool(evidence.steps[1:]) and not torch.equal(evidence.log_scales, prior)
        follows = has_moved or not is_balanced(evidence, mapped, strategy)
    if follows:
        return evidence.estimated(mapped, prior=prior, pool=pool, beta=beta, max_scale=max_scale, max_change=max_change)
    level = log_level(evidence)[0] if strategy.policy == "level" else 0.0
    change, limit = math.log(max_change), math.log(max_scale)
    level = min(max(level, evidence.log_level - change), evidence.log_level + change)
    return replace(evidence, log_scales=(prior + level).clamp(-limit, limit), log_level=level)


def tensor_scales(evidence: Evidence, mapped: ProfileMap, strategy: Strategy) -> dict[str, float]:
    """Return the scale of every trained tensor.

    Under a level every tensor keeps its own prior; a unit of several tensors that follows its joint rate has one scale.
    """
    if strategy.policy in ("follow", "gate"):
        return mapped.tensor_scales(dict(zip(evidence.units, evidence.log_scales.tolist(), strict=True)))
    beyond = evidence.log_scales - log_prior(mapped, strategy.prior)
    scales = mapped.tensor_scales(dict(zip(evidence.units, beyond.tolist(), strict=True)))
    return {name: scale * strategy.prior.get(name, 1.0) for name, scale in scales.items()}


def log_prior(mapped: ProfileMap, prior: Mapping[str, float]) -> Tensor:
    """Return the logarithm of the prior of each unit, float64 [U]: the mean over its tensors, weighted by shares."""
    logs = []
    for unit in mapped.measured_units.values():
        total = sum(unit.shares.values())
        logs.append(sum(share * math.log(prior.get(name, 1.0)) for name, share in unit.shares.items()) / total)
    return torch.tensor(logs, dtype=torch.float64)


def log_level(evidence: Evidence) -> tuple[float, float]:
    """Estimate the level: the factor that all scales need beyond their prior, by the joint rate of the whole model.

    Returns:
        Its logarithm, `shrunk`, and the standard error before that, the method's error included; (0, inf) without a
        measurement.
    """
    steps = torch.tensor(evidence.steps)
    usable = (steps >= _FIRST_LEVEL_STEP) & evidence.levels.isfinite()
    if not usable.any():
        return 0.0, math.inf
    # The base's errors, which its profile does not hold, are taken to equal the target's.
    variances = 2 * evidence.level_errors[usable].square().nan_to_num()
    weights = (steps[usable].clamp(max=_FULL_WEIGHT_STEP) + 1.0).double().square()
    mean, variance = random_effects_mean(evidence.levels[usable].unsqueeze(1), variances.unsqueeze(1), weights)
    total = variance.item() + _LEVEL_ERROR**2
    return shrunk(mean.item(), total), math.sqrt(total)


def shrunk(estimate: float, variance: float) -> float:
    """Return 0 if an estimate does not exceed its standard error, and less and less reduced the clearer it does.

    estimate * max(0, 1 - (variance / estimate^2)^2). The positive-part James-Stein estimate has the power 1 in place of
    2, and would take off more where the evidence is clear.
    """
    return estimate * max(0.0, 1 - (variance / estimate**2) ** 2) if estimate else 0.0


def is_balanced(evidence: Evidence, mapped: ProfileMap, strategy: Strategy) -> bool:
    """Whether the kinds of tensors are in balance: none needs a factor of `_BALANCED` beyond what all have in common.

    Kinds without a matrix do not count (biases and norms): their rates are small and noisy. A kind that could not be
    compared yet, such as LoRA's A at the first step, is taken to need nothing beyond its prior: so a Gaussian A at a
    larger rank is noticed at the first step, by its B.

    Args:
        evidence: The measurements.
        mapped: What is matched.
        strategy: Its prior, and what rates ask for beyond it where nothing is wrong, are not counted as need.
    """
    units = list(mapped.measured_units.values())
    matrices = {name for name, shape in mapped.shapes.items() if len(shape) > 1} or set(mapped.shapes)
    counted = [
        index
        for index in columns_of(mapped, "kind").values()
        if any(not matrices.isdisjoint(units[column].shares) for column in index)
    ]
    means, variances = evidence.averaged(counted, torch.ones(len(evidence.steps), dtype=torch.float64))
    expected = log_prior(mapped, strategy.prior) + log_prior(mapped, strategy.asked)
    needed = (means - torch.stack([expected[index].mean() for index in counted])).nan_to_num(0.0)
    distances = (needed - needed.mean()).abs() - variances.sqrt().nan_to_num(posinf=0.0)
    return bool((distances <= math.log(_BALANCED)).all())
