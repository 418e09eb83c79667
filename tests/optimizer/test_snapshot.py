"""A snapshot gives back every bit of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_flerm.engines.engine import MasterWeights
from hf_flerm.optimizer.step import Snapshot


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_snapshot_gives_back_every_bit(device: str | None) -> None:
    parameters = {"w": nn.Parameter(torch.tensor([0.1, -0.0, 1e-40, 3.0])), "frozen": nn.Parameter(torch.ones(2))}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    snapshot = Snapshot(MasterWeights(parameters), device)
    assert not snapshot.moved()
    with torch.no_grad():
        parameters["w"].sub_(torch.tensor([0.3, 0.0, 1e-40, 7.0]))
    after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert snapshot.moved()
    with snapshot.put_back({"w": 0.5, "frozen": 0.0}) as updates:
        assert all(bits(parameters[name]) == bits(before[name]) for name in parameters)
        torch.testing.assert_close(updates["w"], (after["w"] - before["w"]) / 0.5, rtol=0, atol=0)
        assert updates["frozen"].tolist() == [0.0, 0.0]
    assert all(bits(parameters[name]) == bits(after[name]) for name in parameters)
    with pytest.raises(ZeroDivisionError), snapshot.put_back({"w": 0.5, "frozen": 0.0}):
        raise ZeroDivisionError
    assert all(bits(parameters[name]) == bits(after[name]) for name in parameters)
    assert places == {name: parameter.data_ptr() for name, parameter in parameters.items()}
    snapshot.rescale({"w": 2.0, "frozen": 1.0})
    torch.testing.assert_close(parameters["w"].detach(), before["w"] + 2 * (after["w"] - before["w"]))


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().view(torch.int32).tolist()  # type: ignore[no-any-return]
