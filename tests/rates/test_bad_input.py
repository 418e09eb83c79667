"""Bad input to a measurement is named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hf_flerm import measure_rates
from hf_flerm.choices import Estimator, values
from tests.shared.cases import case, features, mlp
from tests.shared.reference import Batch, OutputFunction


def plain() -> tuple[nn.Module, dict[str, Tensor], list[dict[str, Tensor]]]:
    return mlp(nn.Tanh()), {"0.weight": torch.ones(4, 4)}, [{"input": torch.ones(2, 4)}]


@pytest.mark.parametrize("estimator", ["hutchinson", "", "Full"])
def test_unknown_estimator(estimator: str) -> None:
    with pytest.raises(ValueError, match=rf"estimator is '{estimator}'.*{', '.join(values(Estimator))}"):
        measure_rates(*plain(), estimator=estimator)


@pytest.mark.parametrize("probes", [0, -2])
def test_too_few_probes(probes: int) -> None:
    with pytest.raises(ValueError, match=rf"probes_per_batch is {probes}; it must be at least 1"):
        measure_rates(*plain(), probes_per_batch=probes)


def test_unknown_names() -> None:
    model, updates, batches = plain()
    with pytest.raises(ValueError, match=r"Sequential has no parameters \[0\.wait, 7\.bias\]"):
        measure_rates(model, updates | {"0.wait": torch.ones(1), "7.bias": torch.ones(1)}, batches)


def test_wrong_shape() -> None:
    model, updates, batches = plain()
    with pytest.raises(ValueError, match=r"update of '2\.bias' has shape \(4,\), the parameter \(3,\)"):
        measure_rates(model, updates | {"2.bias": torch.ones(4)}, batches)


@pytest.mark.parametrize("estimator", values(Estimator))
def test_no_batches(estimator: str) -> None:
    model, updates, _ = plain()
    with pytest.raises(ValueError, match="batches is empty"):
        measure_rates(model, updates, [], estimator=estimator)


@pytest.mark.parametrize("estimator", values(Estimator))
def test_no_updates(estimator: str) -> None:
    model, _, batches = plain()
    with pytest.raises(ValueError, match="updates is empty"):
        measure_rates(model, {}, batches, estimator=estimator)


@pytest.mark.parametrize("estimator", values(Estimator))
def test_a_batch_without_examples(estimator: str) -> None:
    model, updates, _ = plain()
    with pytest.raises(ValueError, match=r"holds no examples: \['input'\]"):
        measure_rates(model, updates, [{"input": torch.ones(0, 4)}], estimator=estimator)


@pytest.mark.parametrize("estimator", ["per_example", "kronecker", "exact"])
def test_a_batch_of_padding(estimator: str) -> None:
    made = case("llama lora")
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4, dtype=torch.long)}
    with pytest.raises(ValueError, match="every position of a probe batch is padding"):
        measure_rates(made.model, made.updates, [batch], estimator=estimator)


@pytest.mark.parametrize("estimator", ["per_example", "kronecker", "exact"])
def test_a_model_without_logits(estimator: str) -> None:
    class Loss(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"loss": super().forward(x).sum()}

    with pytest.raises(ValueError, match=r"Loss returned dict without logits.*output="):
        measure_rates(Loss(4, 3), {"weight": torch.ones(3, 4)}, [features(2, 4)], estimator=estimator)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda model, batch: {"a": 1}, "it returned dict"),
        (lambda model, batch: model(**batch).sum(), r"shape \(\) of torch.float32"),
        (lambda model, batch: model(**batch).argmax(-1), r"shape \(2,\) of torch.int64"),
    ],
)
def test_an_output_function_that_returns_no_outputs(output: OutputFunction, message: str) -> None:
    model, updates, batches = plain()
    with pytest.raises(ValueError, match=message):
        measure_rates(model, updates, batches, output=output)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("estimator", values(Estimator))
def test_an_update_that_is_not_finite_has_no_finite_rate(estimator: str, value: float) -> None:
    model, updates, batches = plain()
    updates["0.weight"][0, 0] = value
    updates["2.weight"] = torch.ones(3, 4)
    result = measure_rates(model, updates, batches, estimator=estimator)
    assert not math.isfinite(result.rates["0.weight"])
    assert result.rates["2.weight"] > 0


@pytest.mark.parametrize("estimator", ["per_example", "kronecker"])
def test_an_output_that_no_parameter_moves_is_refused(estimator: str) -> None:
    model = nn.Linear(4, 3)

    def detached(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            return model(**batch)  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"the output of Linear depends on no parameter.*Pass output="):
        measure_rates(
            model, {"weight": torch.ones(3, 4)}, [{"input": torch.ones(2, 4)}], estimator=estimator, output=detached
        )


def test_one_batch_is_no_list_of_batches() -> None:
    with pytest.raises(ValueError, match=r"pass a list of them, \[batch\]"):
        measure_rates(nn.Linear(4, 3), {"weight": torch.ones(3, 4)}, {"input": torch.ones(2, 4)})


def test_a_model_without_numbers_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'weight' is on the meta device, without numbers: load the model's weights"):
        measure_rates(model, {"weight": torch.ones(2, 2)}, [{"input": torch.ones(1, 2)}])
