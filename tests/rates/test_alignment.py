"""Log-alignment against the cases in which it is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_flerm import log_alignments
from tests.shared.cases import gpt2, perturb, seeded, text

FAN_IN, FAN_OUT = 64, 48


def layer(kind: str) -> nn.Module:
    return nn.Linear(FAN_IN, FAN_OUT) if kind == "linear" else Conv1D(FAN_OUT, FAN_IN)


def shaped(kind: str, update: Tensor) -> Tensor:
    return update if kind == "linear" else update.T


def align(kind: str, update: Tensor, x: Tensor) -> float:
    found = log_alignments(layer(kind), {"weight": shaped(kind, update)}, [{"input" if kind == "linear" else "x": x}])
    return found["weight"]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_an_update_along_the_input_is_fully_aligned(kind: str) -> None:
    x = torch.randn(FAN_IN, generator=seeded(0)).sign()
    update = torch.randn(FAN_OUT, generator=seeded(1)).outer(x)
    assert align(kind, update, x.expand(5, FAN_IN)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_an_update_that_knows_nothing_of_the_input_is_half_aligned(kind: str) -> None:
    # (U x)_i is Gaussian with variance FAN_IN: its mean square over FAN_OUT times the examples is known to 1 %.
    x = torch.randn(400, FAN_IN, generator=seeded(0))
    update = torch.randn(FAN_OUT, FAN_IN, generator=seeded(1))
    assert align(kind, update, x) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("size", [1e-12, 3.0, 1e9])
def test_sizes_do_not_matter(size: float) -> None:
    x, update = torch.randn(7, FAN_IN, generator=seeded(0)), torch.randn(FAN_OUT, FAN_IN, generator=seeded(1))
    expected = align("linear", update, x)
    assert align("linear", size * update, x) == pytest.approx(expected, abs=1e-5)


def test_the_definition_by_hand_and_padding_left_out() -> None:
    torch.manual_seed(0)
    model, batch = perturb(gpt2(2)), text("right")
    name = "transformer.h.1.mlp.c_fc.weight"
    update = torch.randn(model.get_parameter(name).shape, generator=seeded(2))
    seen: list[Tensor] = []
    module = model.get_submodule("transformer.h.1.mlp.c_fc")
    handle = module.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(**batch)
    handle.remove()
    x = seen[0][batch["attention_mask"].bool()].double()
    moved = x @ update.double()
    ratio = moved.square().mean().sqrt() / (update.double().square().mean().sqrt() * x.square().mean().sqrt())
    found = log_alignments(model, {name: update, "transformer.ln_f.weight": torch.ones(8)}, [batch])
    assert list(found) == ["transformer.h.1.mlp.c_fc.weight"]
    assert found[name] == pytest.approx(math.log(ratio) / math.log(8), abs=1e-5)


def test_what_has_no_alignment_is_nan() -> None:
    x = torch.randn(7, FAN_IN, generator=seeded(0))
    assert math.isnan(align("linear", torch.zeros(FAN_OUT, FAN_IN), x))
    assert math.isnan(align("linear", torch.ones(FAN_OUT, FAN_IN), 0 * x))


def test_a_fan_in_of_one_has_no_logarithm() -> None:
    assert log_alignments(nn.Linear(1, 3), {"weight": torch.ones(3, 1)}, [{"input": torch.ones(2, 1)}]) == {}


def test_batches_count_by_their_rows() -> None:
    x, update = torch.randn(9, FAN_IN, generator=seeded(0)), torch.randn(FAN_OUT, FAN_IN, generator=seeded(1))
    model = layer("linear")
    parts = log_alignments(model, {"weight": update}, [{"input": x[:2]}, {"input": x[2:]}])
    assert parts["weight"] == pytest.approx(align("linear", update, x), abs=1e-6)


def test_no_trace_is_left_and_no_batch_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    state = torch.random.get_rng_state()
    log_alignments(model, {"0.weight": torch.ones(4, 4)}, [{"input": torch.ones(2, 4)}])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert model[1].training
    assert not model[0]._forward_hooks
    with pytest.raises(ValueError, match="batches is empty"):
        log_alignments(model, {"0.weight": torch.ones(4, 4)}, [])
