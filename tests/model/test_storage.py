"""Parameters over the same memory are found, whatever their shape; those that share a part of it are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_flerm.model.storage import shared_memory
from tests.shared.wrapped_tensor import WrappedTensor

BUFFER = torch.zeros(24)


def view(*shape: int, at: int = 0) -> nn.Parameter:
    size = torch.Size(shape).numel()
    return nn.Parameter(BUFFER[at : at + size].view(shape))


def test_transposed_and_reshaped_views_are_one() -> None:
    parameters = {
        "a": view(4, 6),
        "b": nn.Parameter(view(4, 6).data.t()),
        "c": view(24),
        "d": nn.Parameter(torch.ones(2)),
    }
    assert shared_memory(parameters) == {"b": "a", "c": "a"}


def test_parts_of_one_buffer_are_apart() -> None:
    """As of a flat buffer of an LSTM, or as columns of a fused projection."""
    assert shared_memory({"a": view(2, 6), "b": view(2, 6, at=12)}) == {}
    columns = BUFFER.view(4, 6)
    assert shared_memory({"a": nn.Parameter(columns[:, :3]), "b": nn.Parameter(columns[:, 3:])}) == {}
    assert shared_memory({"a": nn.Parameter(columns[:, ::2]), "b": nn.Parameter(columns[:, 1::2])}) == {}


@pytest.mark.parametrize(
    ("a", "b"),
    [(view(4, 6), view(2, 6)), (view(2, 6), view(4, 6)), (view(2, 6), view(2, 6, at=6))],
    ids=["inside", "around", "beside"],
)
def test_a_part_in_common_is_refused(a: Tensor, b: Tensor) -> None:
    with pytest.raises(ValueError, match=r"the parameters second and first share a part of their memory"):
        shared_memory({"first": a, "second": b})


def test_what_has_no_memory_shares_none() -> None:
    parameters = {name: nn.Parameter(torch.empty(3, device="meta")) for name in ("a", "b")}
    parameters |= {name: nn.Parameter(WrappedTensor(torch.ones(3)), requires_grad=False) for name in ("d", "e")}
    assert shared_memory(parameters | {"c": nn.Parameter(torch.empty(0))}) == {}
