"""Other outputs than logits, other positions, the Fisher metric: against finite differences and KL divergences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification, T5Config, T5ForConditionalGeneration

from hf_flerm import measure_rates
from hf_flerm.choices import Positions, values
from hf_flerm.rates.metrics import METRICS
from hf_flerm.rates.outputs import OUTPUTS, MeasuredOutput, OutputValues
from tests.shared.cases import gpt2, llama, perturb, seeded, text
from tests.shared.reference import Batch, Change, OutputFunction, finite_difference, float64_copy

PROBES = 200
LABELS = torch.tensor([[-100, -100, 3, 4, 5, 6], [-100, 2, 3, -100, 1, 1], [9, 8, 7, 6, 5, -100]])


def updates_of(model: nn.Module) -> dict[str, Tensor]:
    generator = seeded(99)
    return {name: 0.5 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def kept(model: nn.Module, batch: Batch, field: Callable[[Any], Tensor], mask: Tensor) -> Tensor:
    """Entries of an output where a mask is set, one row per example; 0 elsewhere."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return field(model(**inputs, output_hidden_states=True)) * mask.unsqueeze(-1)


def check(
    model: nn.Module,
    batch: Batch,
    reference: OutputFunction,
    share: float,
    **settings: Any,
) -> None:
    """Rates of all tensors against finite differences of a reference output of which only a share of entries counts."""
    updates = updates_of(model)
    changes = {
        name: finite_difference(model, {name: update}, [batch], reference, step=1e-5)
        for name, update in updates.items()
    }
    exact = measure_rates(model, updates, [batch], estimator="exact", **settings)
    random = measure_rates(model, updates, [batch], probes_per_batch=PROBES, generator=seeded(3), **settings)
    largest = max(change.rate for change in changes.values()) / math.sqrt(share)
    for name, change in changes.items():
        expected = change.rate / math.sqrt(share)
        assert exact.rates[name] == pytest.approx(expected, rel=2e-3, abs=1e-5 * largest), name
        bound = 4 * change.error("per_example", PROBES) / math.sqrt(share)
        assert abs(random.rates[name] - expected) < bound + 1e-5 * largest, name


MASK = text("right")["attention_mask"]


@pytest.mark.parametrize(
    ("output", "field"),
    [
        ("logits", lambda result: result.logits),
        ("log_probs", lambda result: result.logits.log_softmax(-1)),
        ("hidden", lambda result: result.hidden_states[-1]),
    ],
)
def test_outputs(output: str, field: Callable[[Any], Tensor]) -> None:
    model, batch = perturb(gpt2()), text("right")
    share = float(MASK.float().mean())
    check(model, batch, lambda model, batch: kept(model, batch, field, MASK), share, output=output)


def trained_mask(shift: bool) -> Tensor:
    mask = torch.zeros(3, 6)
    for example in range(3):
        for position in range(6):
            source = position + 1 if shift else position
            mask[example, position] = float(source < 6 and LABELS[example, source] != -100)
    return mask


def test_the_positions_of_a_causal_model_are_those_before_their_labels() -> None:
    model, batch = perturb(llama()), {**text("right"), "labels": LABELS}
    mask = trained_mask(shift=True)
    assert mask.sum() == 12
    check(
        model,
        batch,
        lambda model, batch: kept(model, batch, lambda result: result.logits, mask),
        float(mask.mean()),
        positions="labels",
    )


def test_the_positions_of_a_token_classifier_are_those_of_its_labels() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        max_position_embeddings=8,
    )
    mask = trained_mask(shift=False)
    assert mask.sum() == 13
    model, batch = perturb(BertForTokenClassification(config)), {**text("right"), "labels": LABELS.clamp(max=2)}
    check(
        model,
        batch,
        lambda model, batch: kept(model, batch, lambda result: result.logits, mask),
        float(mask.mean()),
        positions="labels",
    )


def test_the_positions_of_an_encoder_decoder_are_those_of_its_labels() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = perturb(T5ForConditionalGeneration(config))
    batch = {**text("right"), "labels": LABELS}
    model.eval()
    probe = MeasuredOutput(positions="labels")(model, batch)
    assert torch.equal(probe.weight[..., 0].bool(), LABELS != -100)
    with torch.no_grad():
        expected = model(**text("right"), labels=LABELS).logits
    torch.testing.assert_close(probe.values.detach(), expected)


# Fisher
# ------


def kl_rate(model: nn.Module, updates: dict[str, Tensor], batch: Batch, mask: Tensor, distance: float) -> float:
    """The rate whose square times distance^2 / 2 is the KL divergence between predictions, in float64."""
    model = float64_copy(model)
    with torch.no_grad():
        before = model(**batch).logits.log_softmax(-1)
        for name, update in updates.items():
            model.get_parameter(name).data += distance * update.double()
        after = model(**batch).logits.log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1)[mask.bool()].mean()
    return math.sqrt(2 * divergence.item()) / distance


def fisher_change(model: nn.Module, updates: dict[str, Tensor], batch: Batch, mask: Tensor) -> Change:
    """sqrt(p) (D f - <p, D f>) at the positions that count: the sum of its squares is D f^T F D f."""
    model64 = float64_copy(model)
    with torch.no_grad():
        p = model64(**batch).logits.softmax(-1)
    change = finite_difference(model, updates, [batch], lambda model, batch: model(**batch).logits, step=1e-5)
    d = change.values.reshape(p.shape)
    values = (p.sqrt() * (d - (p * d).sum(-1, keepdim=True)))[mask.bool()]
    examples = torch.arange(len(p)).unsqueeze(1).expand(mask.shape)[mask.bool()]
    return Change(
        values.flatten(), examples.repeat_interleave(p.shape[-1]), torch.zeros(values.numel(), dtype=torch.long)
    )


@pytest.mark.parametrize("output", ["logits", "log_probs"])
@pytest.mark.parametrize("estimator", ["per_example", "full", "exact"])
def test_the_fisher_rate_is_the_size_of_the_change_in_kl_divergence(output: str, estimator: str) -> None:
    model, batch = perturb(gpt2()), text("right")
    updates = {name: update for name, update in updates_of(model).items() if "wte" in name or "c_fc" in name}
    measured = measure_rates(
        model,
        updates,
        [batch],
        estimator=estimator,
        metric="fisher",
        output=output,
        probes_per_batch=PROBES,
        generator=seeded(5),
    )
    for name, update in updates.items():
        change = fisher_change(model, {name: update}, batch, MASK)
        expected = math.sqrt(change.values.square().sum().item() / int(MASK.sum()))
        assert kl_rate(model, {name: update}, batch, MASK, 1e-4) == pytest.approx(expected, rel=1e-3)
        scale = expected / change.rate
        tolerance = 1e-3 * expected if estimator == "exact" else 4 * scale * change.error(estimator, PROBES)
        assert abs(measured.rates[name] - expected) < tolerance, name


def test_fisher_draws_have_the_covariance_of_the_softmax() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0])
    draws = 200_000
    omega = OutputValues(logits.expand(draws, 4), torch.ones(draws, 1), METRICS["fisher"]).omega(seeded(0))
    p = logits.softmax(-1)
    expected = torch.diag(p) - p.outer(p)
    # An entry of the sample covariance of Gaussians has variance (C_ii C_jj + C_ij^2) / draws.
    variances = expected.diagonal()
    error = ((variances.outer(variances) + expected.square()) / draws).sqrt()
    assert ((omega.T @ omega / draws - expected).abs() < 4.5 * error + 1e-7).all()


def test_fisher_rates_do_not_see_a_shift_of_all_logits() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    batch = {"input": torch.randn(5, 4, generator=seeded(0))}
    shift = {"1.bias": torch.ones(3)}
    fisher = measure_rates(model, shift, [batch], estimator="exact", metric="fisher")
    assert fisher.rates["1.bias"] < 1e-6
    assert measure_rates(model, shift, [batch], estimator="exact").rates["1.bias"] == pytest.approx(1.0)


def test_a_regression_has_no_fisher_metric() -> None:
    model = nn.Linear(4, 1)
    batch = {"input": torch.randn(5, 4, generator=seeded(0))}
    with pytest.raises(ValueError, match=r"at least two classes.*\(5, 1\).*metric='euclidean'"):
        measure_rates(model, {"weight": torch.ones(1, 4)}, [batch], metric="fisher")


# Refused
# -------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "loss"}, f"output is 'loss'; it must be one of {', '.join(OUTPUTS)} or a callable"),
        ({"positions": "all"}, f"positions is 'all'; it must be one of {', '.join(values(Positions))}"),
        ({"metric": "kl"}, f"metric is 'kl'; it must be one of {', '.join(METRICS)}"),
        ({"output": "hidden", "metric": "fisher"}, "needs logits or log-probabilities"),
        ({"output": lambda model, batch: model(**batch), "positions": "labels"}, "by an output callable itself"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], message: str) -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=message):
        measure_rates(model, {"weight": torch.ones(3, 4)}, [{"input": torch.ones(2, 4)}], **settings)


@pytest.mark.parametrize(
    ("labels", "message"),
    [({}, "the batch has none"), ({"labels": torch.ones(3, dtype=torch.long)}, r"the batch has \(3,\)")],
)
def test_positions_by_labels_need_labels(labels: dict[str, Tensor], message: str) -> None:
    model = gpt2()
    with pytest.raises(ValueError, match=message):
        measure_rates(model, updates_of(model), [{**text("right"), **labels}], positions="labels")


def test_positions_without_any_label_are_refused() -> None:
    model = gpt2()
    batch = {**text("right"), "labels": torch.full((3, 6), -100)}
    with pytest.raises(ValueError, match="every position of a probe batch is padding, or labeled -100"):
        measure_rates(model, updates_of(model), [batch], positions="labels")


def test_a_model_without_hidden_states() -> None:
    class Plain(nn.Linear):
        pass

    with pytest.raises(ValueError, match="Plain has no backbone with a last_hidden_state"):
        measure_rates(Plain(4, 3), {"weight": torch.ones(3, 4)}, [{"input": torch.ones(2, 4)}], output="hidden")
