"""Per-example derivatives: which tensors have them, which layouts are told apart, and what the others fall back to."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM

from hf_flerm import measure_rates
from hf_flerm.rates.outputs import MeasuredOutput, OutputValues
from hf_flerm.rates.per_example.linear_head import LinearHead
from hf_flerm.rates.probe import RateProbe
from tests.shared.cases import (
    OTHERS,
    VOCABULARY,
    Attention,
    Case,
    Fused,
    RMSNorm,
    Wrap,
    case,
    features,
    mlp,
    normalized_over_batch,
    perturb,
    seeded,
    text,
    time_major,
)
from tests.shared.reference import Batch, OutputFunction, finite_difference


@pytest.mark.parametrize("name", [name for name, make in OTHERS.items() if make().fallback])
def test_the_fallback_is_kronecker_on_the_same_probes(name: str) -> None:
    by_example, kronecker = (case(name).measure(estimator, probes=5) for estimator in ("per_example", "kronecker"))
    for tensor in case(name).fallback:
        assert by_example.estimators[tensor] == "kronecker"
        assert by_example.rates[tensor] == pytest.approx(kronecker.rates[tensor], rel=1e-5)
        assert by_example.standard_errors[tensor] == pytest.approx(kronecker.standard_errors[tensor], rel=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_module_without_forward_mode_falls_back(batch_first: bool) -> None:
    # Neither a bare autograd.Function nor a fused LSTM has a JVP: their own tensors fall back, the others do not.
    torch.manual_seed(0)
    middle = nn.LSTM(4, 4, batch_first=True) if batch_first else Fused()
    made = Case(Wrap(nn.ModuleList([nn.Linear(4, 4), middle, nn.Linear(4, 3)]), _chain), [features(3, 5, 4)])
    own = {f"inner.1.{name}" for name, _ in middle.named_parameters()}
    by_example, kronecker = (made.measure(estimator, probes=20) for estimator in ("per_example", "kronecker"))
    for tensor, estimator in by_example.estimators.items():
        if tensor not in own:
            assert estimator == "per_example"
        elif estimator == "kronecker":
            assert by_example.rates[tensor] == pytest.approx(kronecker.rates[tensor], rel=1e-5)
        else:
            change = finite_difference(made.model, {tensor: made.updates[tensor]}, made.batches)
            assert abs(by_example.rates[tensor] - change.rate) < 4 * change.error("per_example", 20)


def _chain(modules: nn.ModuleList, x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
        x = x[0] if isinstance(x, tuple) else x
    return x


def test_an_update_that_the_first_example_does_not_see() -> None:
    # The table is indexed by its parent, so gates at its owner never fire; only examples 1 and 2 show that.
    torch.manual_seed(0)
    model = Wrap(nn.ParameterDict({"table": torch.randn(6, 4)}), lambda m, x: F.embedding(x, m["table"]).tanh())
    batch = {"x": torch.tensor([[0, 1, 2], [3, 4, 5], [5, 2, 2]])}
    update = torch.zeros(6, 4)
    update[3:] = torch.randn(3, 4)
    change = finite_difference(model, {"inner.table": update}, [batch])
    result = measure_rates(model, {"inner.table": update}, [batch], probes_per_batch=100, generator=seeded(0))
    assert abs(result.rates["inner.table"] - change.rate) < 4 * change.error("per_example", 100)


@pytest.mark.parametrize("others", [(), ("inner.1.bias",)], ids=["alone", "with another"])
def test_an_update_that_the_first_batch_does_not_see(others: tuple[str, ...]) -> None:
    # Only the second batch shows that the table cannot be told apart by example.
    torch.manual_seed(0)
    model = Wrap(nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4)), lambda m, x: m(x))
    update = torch.zeros(6, 4)
    update[3:] = torch.randn(3, 4)
    updates = {"inner.0.weight": update} | {name: torch.randn(4) for name in others}
    batches = [{"x": torch.tensor([[0, 1, 2], [2, 1, 1]])}, {"x": torch.tensor([[3, 4, 5], [5, 2, 2]])}]
    by_example, kronecker = (
        measure_rates(
            model,
            updates,
            batches,
            estimator=estimator,
            probes_per_batch=5,
            output=normalized_over_batch,
            generator=seeded(0),
        )
        for estimator in ("per_example", "kronecker")
    )
    for name, rate in kronecker.rates.items():
        assert by_example.estimators[name] == "kronecker"
        assert by_example.rates[name] == pytest.approx(rate, rel=1e-5), name


@pytest.mark.parametrize("examples", [4, 32])
def test_layouts_are_told_apart_in_low_precision(examples: int) -> None:
    torch.manual_seed(0)
    model = Wrap(nn.Linear(4, 4), time_major).to(torch.bfloat16)
    probes, batch = 100, {"x": features(examples, examples, 4)["x"].to(torch.bfloat16)}
    updates = {name: torch.randn(p.shape, generator=seeded(1)) for name, p in model.named_parameters()}
    result = measure_rates(model, updates, [batch], probes_per_batch=probes, generator=seeded(0))
    for name, update in updates.items():
        change = finite_difference(model, {name: update.to(torch.bfloat16)}, [batch])
        # Time taken for the examples gives the bias 0.64 of its rate with 4 examples, 0.27 with 32.
        assert abs(result.rates[name] - change.rate) < 4 * change.error("per_example", probes) + 0.02 * change.rate


@pytest.mark.parametrize(
    "output",
    [
        lambda model, batch: model(**batch).flatten(0, 1)[::2],
        lambda model, batch: model(**batch).flatten(0, 1),
        lambda model, batch: model(**batch)[0::2] - model(**batch)[1::2],
        lambda model, batch: model(**batch).mean(0, keepdim=True),
    ],
    ids=["chosen positions", "all positions", "pairs of examples", "mean over examples"],
)
def test_outputs_whose_rows_are_not_the_examples(output: OutputFunction) -> None:
    torch.manual_seed(0)
    made = Case(Wrap(mlp(nn.Tanh()), lambda m, x: m(x).tanh()), [features(4, 6, 4)], output)
    by_example, kronecker = (made.measure(estimator, probes=50) for estimator in ("per_example", "kronecker"))
    for name, update in made.updates.items():
        if by_example.estimators[name] == "kronecker":
            assert by_example.rates[name] == pytest.approx(kronecker.rates[name], rel=1e-5)
        else:  # which varies no more than `full` whatever the examples are
            change = finite_difference(made.model, {name: update}, made.batches, output)
            assert abs(by_example.rates[name] - change.rate) < 4 * change.error("full", 50)


def test_an_effect_of_round_off_alone_needs_no_fallback() -> None:
    # Attention ignores a bias of its keys; a relative comparison of one round-off with another proves nothing.
    torch.manual_seed(0)
    made = Case(perturb(Attention()), [features(4, 6, 4)])
    result = made.measure("per_example")
    assert set(result.estimators.values()) == {"per_example"}
    assert result.rates["key.bias"] < 1e-6 * result.rates["key.weight"]


class TimeMajor(nn.Module):
    """Works on [T, N, d] inside; with as many positions as examples the two cannot be told apart by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm = RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.first(x.transpose(0, 1)))).cumsum(0)
        return self.last(h).transpose(0, 1)


@pytest.mark.parametrize("positions", [2, 3, 6, 7])
def test_examples_along_the_second_dimension(positions: int) -> None:
    torch.manual_seed(0)
    made = Case(perturb(TimeMajor()), [features(3, positions, 4)])
    result = made.measure("per_example", probes=200)
    assert set(result.estimators.values()) == {"per_example"}
    probe = RateProbe(made.model)
    probe.measure(made.updates, made.batches, seeded(0))
    assert {site.module for sites in probe._sites.sites.values() for site in sites} == {"first", "norm", "last"}
    for name, update in made.updates.items():
        change = finite_difference(made.model, {name: update}, made.batches)
        assert abs(result.rates[name] - change.rate) < 4 * change.error("per_example", 200), name


@pytest.mark.parametrize("name", ["every kind", "gpt2, tied, left padding", "llama dora"])
def test_later_draws_of_a_forward_use_what_the_first_has_kept(name: str) -> None:
    # D phi is linear in omega: with the same omega a second backward pass reads the same numbers.
    made = case(name)
    probe = RateProbe(made.model, probes_per_batch=3, output=MeasuredOutput(made.output))
    original = OutputValues.omega
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputValues, "omega", lambda self, generator: original(self, seeded(1)))
        patch.setattr(LinearHead, "saves_work", staticmethod(lambda *args: False))
        result = probe.measure(made.updates, made.batches[:1], seeded(0))
    assert result.draws is not None
    by_probe = result.draws.derivatives.reshape(len(result.rates), 3, -1)
    largest = by_probe.abs().max()
    torch.testing.assert_close(by_probe[:, 1], by_probe[:, 0], rtol=1e-4, atol=1e-6 * float(largest))
    torch.testing.assert_close(by_probe[:, 2], by_probe[:, 0], rtol=1e-4, atol=1e-6 * float(largest))


def test_a_model_that_reads_its_padding_index() -> None:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    made = Case(perturb(RobertaForMaskedLM(config)), [text("right")])
    assert set(made.measure("per_example").estimators.values()) == {"per_example"}
    assert made.model.roberta.embeddings.word_embeddings.padding_idx == config.pad_token_id


def test_what_gates_said_before_they_were_refuted_does_not_count() -> None:
    """One example alone refutes nothing; with several, these outputs turn out to mix them."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    updates = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}

    def output(model: nn.Module, batch: Batch) -> Tensor:
        h = torch.tanh(model(batch["x"]))
        return (h @ h.T).logsumexp(1)

    single = [features(1, 4, seed=seed) for seed in range(8)]
    together = features(4, 4, seed=9)
    mixed = measure_rates(model, updates, [*single, *[together] * 50], output=output, generator=seeded(0))
    alone = measure_rates(model, updates, [together] * 50, output=output, generator=seeded(1))
    assert mixed.estimators == alone.estimators == dict.fromkeys(updates, "kronecker")
    for name, rate in alone.rates.items():
        error = math.hypot(alone.standard_errors[name], mixed.standard_errors[name])
        assert abs(mixed.rates[name] - rate) < 4 * error, name
