"""Skipping the vocabulary: the same rates without the logits, where the output really is the head's, and only there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_flerm import Measurement, measure_rates
from hf_flerm.rates.outputs import OutputValues
from hf_flerm.rates.per_example.linear_head import LinearHead
from hf_flerm.rates.probe import RateProbe
from tests.shared.reference import Batch, OutputFunction, finite_difference

VOCABULARY, WIDTH = 60, 6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        positions = torch.arange(1, ids.shape[1] + 1, dtype=h.dtype).unsqueeze(1)
        return torch.tanh(self.mix(h).cumsum(1) / positions)


class LanguageModel(nn.Module):
    """A body, a head, and what is done to the logits."""

    def __init__(
        self,
        finish: Callable[[Tensor], Tensor | dict[str, Tensor]] | None = None,
        *,
        bias: bool = False,
        tied: bool = False,
        head: type[nn.Linear] = nn.Linear,
        width: int = VOCABULARY,
    ) -> None:
        super().__init__()
        self.body = Body()
        self.head = head(WIDTH, width, bias=bias)
        self.finish = finish
        if tied:
            self.head.weight = self.body.embedding.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        logits = self.head(self.body(input_ids))
        return logits if self.finish is None else self.finish(logits)


def made(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=seeded(parameter.numel())) * 0.5
    return model


def text(seed: int = 0, masked: bool = True) -> Batch:
    ids = torch.randint(VOCABULARY, (3, 5), generator=seeded(seed))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    return {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}


def updates_of(model: nn.Module, *parts: str) -> dict[str, Tensor]:
    return {
        name: torch.randn(parameter.shape, generator=seeded(7 + i))
        for i, (name, parameter) in enumerate(model.named_parameters())
        if not parts or any(part in name for part in parts)
    }


@contextmanager
def counted(head: nn.Linear) -> Iterator[list[int]]:
    """Count how often the head's own weight meets an input."""
    calls = [0]
    original = F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls[0] += weight is head.weight
        return original(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", linear)
        yield calls


def evaluations_per_batch(
    model: nn.Module, updates: dict[str, Tensor], head: nn.Linear, output: OutputFunction | None = None
) -> float:
    """How often the head is evaluated for a batch, the first one's preparations aside."""
    calls = []
    for batches in (1, 4):
        with counted(head) as count:
            measure_rates(model, updates, [text()] * batches, output=output)
        calls.append(count[0])
    return (calls[1] - calls[0]) / 3


def never_pays(module: nn.Linear, attributes: int) -> bool:
    return False


SKIPPED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "frozen head": (lambda: LanguageModel(bias=True), ("body",)),
    "trained head": (LanguageModel, ()),
    "trained head with bias": (lambda: LanguageModel(bias=True), ()),
    "bias alone": (lambda: LanguageModel(bias=True), ("head.bias",)),
    "tied head": (lambda: LanguageModel(tied=True), ()),
    "tied head with bias": (lambda: LanguageModel(tied=True, bias=True), ()),
    "head whose logits are cast": (lambda: LanguageModel(lambda logits: logits.double(), bias=True), ()),
}


# The same expectation
# --------------------


@pytest.mark.parametrize("skip", [True, False], ids=["skipped", "plain"])
@pytest.mark.parametrize("masked", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("name", SKIPPED)
def test_rates_with_and_without_the_vocabulary(
    name: str, masked: bool, skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, parts = SKIPPED[name]
    model = made(make())
    updates = updates_of(model, *parts)
    if not skip:
        monkeypatch.setattr(LinearHead, "saves_work", staticmethod(never_pays))
    probes, repetitions, batches = 25, 16, [text(0, masked), text(1, masked)]
    probe = RateProbe(model, probes_per_batch=probes)
    results = [probe.measure(updates, batches, seeded(seed)) for seed in range(repetitions)]
    for tensor, update in updates.items():
        change = finite_difference(model, {tensor: update}, batches)
        mean = torch.tensor([result.rates[tensor] ** 2 for result in results]).mean().sqrt().item()
        # Counting padding, or the d inputs of the head for its K outputs, changes rates by 20 % and more.
        assert abs(mean - change.rate) < 4 * change.error("per_example", probes * repetitions), tensor
        assert change.error("per_example", probes * repetitions) < 0.04 * change.rate
    joint = finite_difference(model, updates, batches)
    totals = torch.tensor([result.total**2 for result in results])
    assert abs(totals.mean() - joint.rate**2) < 4 * totals.std() / repetitions**0.5
    changes = torch.stack([finite_difference(model, {name: u}, batches).values for name, u in updates.items()])
    inner = torch.stack([result.interactions()[1] for result in results])
    expected = changes @ changes.T / changes.shape[1]
    assert ((inner.mean(0) - expected).abs() < 5 * inner.std(0) / repetitions**0.5).all()


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_draws_have_the_covariance_of_omega(scale: float) -> None:
    # At one position, omega reaches the input as omega V, the weight's update as omega (U h), the bias's as omega u.
    examples = 20_000
    head = made(nn.Linear(3, 12)).double()
    updates = {
        "weight": ("w", scale * torch.randn(12, 3, generator=seeded(0), dtype=torch.float64)),
        "bias": ("b", torch.randn(12, generator=seeded(1), dtype=torch.float64) / scale),
    }
    h = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    hidden = OutputValues(h.expand(examples, 1, 3), torch.ones(examples, 1, 1, dtype=torch.float64))
    gradient, derivatives = LinearHead(head, updates).draw(hidden, seeded(2))
    assert gradient.shape == (examples, 1, 3)
    assert {name: value.shape for name, value in derivatives.items()} == {"w": (examples,), "b": (examples,)}
    drawn = torch.cat([gradient[:, 0], derivatives["w"].unsqueeze(1), derivatives["b"].unsqueeze(1)], 1)
    columns = torch.cat([head.weight, (updates["weight"][1] @ h).unsqueeze(1), updates["bias"][1].unsqueeze(1)], 1)
    expected = (columns.T @ columns).detach()
    size = expected.diagonal()
    error = ((torch.outer(size, size) + expected.square()) / examples).sqrt()
    assert ((drawn.T @ drawn / examples - expected).abs() < 4 * error).all()
    assert (drawn.mean(0).abs() < 4 * (size / examples).sqrt()).all()


def test_draws_are_independent_over_positions_and_zero_at_padding() -> None:
    examples = 20_000
    head = made(nn.Linear(2, 12, bias=False))
    weight = torch.ones(examples, 3, 1)
    weight[:, 1] = 0
    hidden = OutputValues(torch.ones(examples, 3, 2), weight)
    gradient, derivatives = LinearHead(head, {"weight": ("w", torch.ones(12, 2))}).draw(hidden, seeded(0))
    assert not gradient[:, 1].any()
    across = gradient[:, 0].T @ gradient[:, 2] / examples
    size = head.weight.detach().square().sum(0)
    assert (across.abs() < 4 * (torch.outer(size, size) / examples).sqrt()).all()
    # U h = 2 in every one of the 12 outputs at both unpadded positions: variance 2 * 12 * 4.
    variance = derivatives["w"].var().item()
    assert abs(variance - 96) < 4 * 96 * (2 / examples) ** 0.5


def test_draws_of_a_singular_covariance() -> None:
    # The update is a multiple of the weight: three columns repeat the first three.
    head = made(nn.Linear(3, 12, bias=False))
    update = -2.0 * head.weight.detach()
    h = torch.randn(50, 4, 3, generator=seeded(0))
    hidden = OutputValues(h, torch.ones(50, 4, 1))
    gradient, derivatives = LinearHead(head, {"weight": ("w", update)}).draw(hidden, seeded(1))
    expected = -2.0 * (gradient * h).sum((1, 2))
    assert (derivatives["w"] - expected).norm() < 1e-2 * expected.norm()


def test_an_update_of_zero_draws_zero() -> None:
    head = made(nn.Linear(3, 12))
    updates = {"weight": ("w", torch.zeros(12, 3)), "bias": ("b", torch.ones(12))}
    hidden = OutputValues(torch.ones(5, 4, 3), torch.ones(5, 4, 1))
    gradient, derivatives = LinearHead(head, updates).draw(hidden, seeded(0))
    assert derivatives["w"].abs().max() == 0
    assert derivatives["b"].abs().min() > 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_draws_have_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    head = made(nn.Linear(3, 12, bias=False)).to(dtype)
    hidden = OutputValues(torch.ones(5, 4, 3, dtype=dtype), torch.ones(5, 4, 1, dtype=dtype))
    gradient, derivatives = LinearHead(head, {"weight": ("w", torch.ones(12, 3, dtype=dtype))}).draw(hidden, seeded(0))
    assert gradient.dtype == dtype
    assert derivatives["w"].dtype == torch.promote_types(dtype, torch.float32)


# Taken
# -----


@pytest.mark.parametrize("name", SKIPPED)
def test_the_head_is_not_evaluated_on_a_probe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, parts = SKIPPED[name]
    model = made(make())
    updates = updates_of(model, *parts)
    assert evaluations_per_batch(model, updates, model.head) == 0
    monkeypatch.setattr(LinearHead, "saves_work", staticmethod(never_pays))
    assert evaluations_per_batch(model, updates, model.head) == 1


def test_no_omega_is_drawn_over_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(LanguageModel(bias=True))
    updates = updates_of(model)
    probe = RateProbe(model)
    probe.measure(updates, [text()])
    widths = []
    original = torch.randn

    def randn(*shape: object, **settings: object) -> Tensor:
        drawn: Tensor = original(*shape, **settings)  # type: ignore[call-overload]
        widths.append(drawn.shape[-1])
        return drawn

    monkeypatch.setattr(torch, "randn", randn)
    probe.measure(updates, [text()])
    # V and U_V have d columns each, the bias has one.
    assert widths == [2 * WIDTH + 1]


@pytest.mark.parametrize(
    ("output", "evaluations"),
    [
        (lambda model, batch: model(**batch), 0),
        (lambda model, batch: model(**batch).tanh(), 1),
        (lambda model, batch: model(**batch)[:, -1], 1),
    ],
    ids=["logits", "soft-cap", "last position"],
)
def test_an_output_function_is_looked_through(output: OutputFunction, evaluations: int) -> None:
    model = made(LanguageModel())
    updates = updates_of(model)
    assert evaluations_per_batch(model, updates, model.head, output) == evaluations
    assert_rates(model, updates, output)


@pytest.mark.parametrize(
    ("outputs", "inputs", "attributes", "pays"),
    [(9, 8, 0, True), (8, 8, 0, False), (25, 8, 2, True), (24, 8, 2, False), (17, 8, 1, True), (16, 8, 1, False)],
)
def test_the_head_is_skipped_where_that_is_less_to_draw(outputs: int, inputs: int, attributes: int, pays: bool) -> None:
    assert LinearHead.saves_work(nn.Linear(inputs, outputs), attributes) is pays


def test_a_head_too_narrow_is_evaluated() -> None:
    model = made(LanguageModel(width=WIDTH))
    assert evaluations_per_batch(model, updates_of(model), model.head) == 1
    assert_rates(model, updates_of(model))


def test_other_estimators_see_the_logits() -> None:
    model = made(LanguageModel())
    for estimator in ("kronecker", "full", "iid"):
        calls = []
        for batches in (1, 4):
            with counted(model.head) as count:
                measure_rates(model, updates_of(model), [text()] * batches, estimator=estimator)
            calls.append(count[0])
        assert calls[1] - calls[0] == 3


def test_the_head_is_found_inside_an_adapter() -> None:
    model = get_peft_model(
        made(LanguageModel()),
        LoraConfig(r=2, target_modules=["mix"], modules_to_save=["head"], init_lora_weights=False),
    )
    head = model.base_model.model.head.modules_to_save["default"]
    updates = {n: torch.randn(p.shape, generator=seeded(0)) for n, p in model.named_parameters() if p.requires_grad}
    assert {name for name in updates if "head" in name} == {"base_model.model.head.modules_to_save.default.weight"}
    assert evaluations_per_batch(model, updates, head) == 0
    assert_rates(model, updates)


# Not taken
# ---------


def assert_rates(model: nn.Module, updates: dict[str, Tensor], output: OutputFunction | None = None) -> Measurement:
    probes = 200
    result = measure_rates(model, updates, [text()], probes_per_batch=probes, output=output, generator=seeded(0))
    for (tensor, update), rate in zip(updates.items(), result.rates.values(), strict=True):
        change = finite_difference(model, {tensor: update}, [text()], output)
        assert abs(rate - change.rate) < 4 * change.error("per_example", probes), (tensor, rate, change.rate)
    return result


def shift_in_place(logits: Tensor) -> Tensor:
    logits += 1.0
    logits *= 3.0
    return logits


def mask_in_place(logits: Tensor) -> Tensor:
    logits[..., :20] = -1.0
    return logits


def capped(head: nn.Linear, x: Tensor) -> Tensor:
    return 2 * torch.tanh(F.linear(x, head.weight) / 2)


class CappedLinear(nn.Linear):
    forward = capped


def cap_by_hook() -> nn.Module:
    model = LanguageModel()
    model.head.register_forward_hook(lambda module, args, output: 2 * torch.tanh(output / 2))
    return model


def cap_by_hook_in_place() -> nn.Module:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.tanh_()

    model = LanguageModel()
    model.head.register_forward_hook(hook)
    return model


def cap_by_own_forward() -> nn.Module:
    model = LanguageModel()
    model.head.forward = MethodType(capped, model.head)
    return model


def head_bias_by_hook() -> nn.Module:
    model = LanguageModel()
    model.head.register_forward_hook(lambda module, args, output: output + torch.linspace(-1, 1, VOCABULARY))
    return model


class EmbedsByHead(LanguageModel):
    """Looks its embeddings up in the head's weight: the head acts at two places, but owns its weight at one."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(F.embedding(input_ids, self.head.weight)))


class TwoRounds(LanguageModel):
    """Feeds a first round of logits back in."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.body(input_ids)
        return self.head(h + self.head(h).softmax(-1) @ self.body.embedding.weight)


FINISHED: dict[str, Callable[[], nn.Module]] = {
    "soft-cap": lambda: LanguageModel(lambda logits: 2 * torch.tanh(logits / 2)),
    "log-softmax": lambda: LanguageModel(lambda logits: logits.log_softmax(-1), bias=True),
    "temperature": lambda: LanguageModel(lambda logits: logits / 0.7),
    "cast and soft-cap": lambda: LanguageModel(lambda logits: logits.double().tanh()),
    "soft-cap in place": lambda: LanguageModel(lambda logits: logits.tanh_()),
    "temperature in place": lambda: LanguageModel(shift_in_place),
    "mask in place": lambda: LanguageModel(mask_in_place),
    "class of its own": lambda: LanguageModel(head=CappedLinear),
    "soft-cap by hook": cap_by_hook,
    "soft-cap by hook, in place": cap_by_hook_in_place,
    "bias by hook": head_bias_by_hook,
    "soft-cap by own forward": cap_by_own_forward,
    "two rounds": TwoRounds,
}


@pytest.mark.parametrize("name", FINISHED)
def test_a_head_that_does_not_have_the_last_word_is_evaluated(name: str) -> None:
    model = made(FINISHED[name]())
    updates = updates_of(model)
    assert_rates(model, updates)
    assert evaluations_per_batch(model, updates, model.head) >= 1


def test_a_weight_that_acts_outside_the_head_too() -> None:
    model = made(EmbedsByHead())
    updates = updates_of(model, "head")
    assert_rates(model, updates)


@pytest.mark.parametrize("parts", [("body",), ()], ids=["frozen", "trained"])
def test_logits_that_are_also_used_otherwise(parts: tuple[str, ...]) -> None:
    # The second entry is no output, but cannot be computed without the vocabulary.
    model = made(LanguageModel(lambda logits: {"logits": logits, "chance": logits.view(3, 5, VOCABULARY).softmax(-1)}))
    assert_rates(model, updates_of(model, *parts))


def test_an_adapter_on_the_head_is_no_linear_head() -> None:
    model = get_peft_model(made(LanguageModel()), LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
    head = model.base_model.model.head.base_layer
    updates = {n: torch.randn(p.shape, generator=seeded(0)) for n, p in model.named_parameters() if p.requires_grad}
    assert len(updates) == 2
    assert_rates(model, updates)
    assert evaluations_per_batch(model, updates, head) == 1


def test_a_head_called_with_a_keyword() -> None:
    class Keyword(LanguageModel):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.head(input=self.body(input_ids))

    model = made(Keyword())
    assert_rates(model, updates_of(model))


def test_the_head_is_left_as_it_was() -> None:
    model = made(LanguageModel())
    attributes = dict(model.head.__dict__)
    measure_rates(model, updates_of(model), [text()])
    assert model.head.__dict__ == attributes
    assert "forward" not in model.head.__dict__

    own = made(cap_by_own_forward())
    forward = own.head.forward
    measure_rates(own, updates_of(own), [text()])
    assert own.head.forward is forward


def test_a_frozen_head_that_is_measured_later_is_measured() -> None:
    model = made(LanguageModel(bias=True))
    updates = updates_of(model)
    probe = RateProbe(model, probes_per_batch=100)
    body = {name: update for name, update in updates.items() if "head" not in name}
    probe.measure(body, [text()], seeded(0))
    head = {name: update for name, update in updates.items() if "head" in name}
    found = probe.measure(head, [text()], seeded(0))
    exact = measure_rates(model, head, [text()], estimator="exact")
    for name, rate in exact.rates.items():
        assert found.rates[name] == pytest.approx(rate, rel=0.25), name


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=lambda wrap: wrap.__name__)
def test_a_head_whose_weight_is_computed_is_evaluated(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = made(LanguageModel())
    wrap(model.head)
    updates = {name: update for name, update in updates_of(model).items() if "head" in name}
    found = measure_rates(model, updates, [text()], probes_per_batch=100, generator=seeded(0))
    exact = measure_rates(model, updates, [text()], estimator="exact")
    for name, rate in exact.rates.items():
        assert found.rates[name] == pytest.approx(rate, rel=0.25), name
