"""A snapshot over weights that are only copies of what the optimizer steps, spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from hf_flerm.engines.engine import MasterWeights, exchange_by_copy
from hf_flerm.optimizer.step import Snapshot

RATES = {"a": 0.5, "b": 0.0}


class Masters(MasterWeights):
    """Float32 masters of bf16 weights; the first half of each is stepped here, the rest by another process."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], together: bool) -> None:
        super().__init__(parameters)
        self.gather_is_collective = together
        self.masters = {name: parameter.detach().float().flatten() for name, parameter in parameters.items()}
        self.in_optimizer = self.masters
        self.others: list[bool] = []
        self.gathered: list[str] = []
        self.fails_at = ""

    def local(self, name: str) -> Tensor:
        master = self.masters[name]
        return master[: len(master) // 2]

    def gather(self, name: str, part: Tensor) -> Tensor:
        self.gathered.append(name)
        return torch.cat([part, torch.full_like(part, 7.0)]).view(self.shape(name))

    def exchange(self, name: str, part: Tensor) -> Tensor:
        if name == self.fails_at:
            self.fails_at = ""
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return exchange_by_copy(self.local(name), part)

    @contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(self.masters[name].view(parameter.shape))

    def agree(self, flags: Sequence[bool]) -> list[bool]:
        return [flag or other for flag, other in zip(flags, self.others or [False] * len(flags), strict=True)]


Stepped = Callable[..., tuple[Masters, Snapshot, dict[str, Tensor], dict[str, Tensor]]]


@pytest.fixture(params=[False, True], ids=["one at a time", "together"])
def stepped(request: pytest.FixtureRequest) -> Stepped:
    """Masters after a step that is too small for bf16, and what their weights were before and after it."""

    def make(device: str | None = None) -> tuple[Masters, Snapshot, dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        parameters = {
            "a": nn.Parameter(torch.randn(2, 3, dtype=torch.bfloat16)),
            "b": nn.Parameter(torch.randn(4, dtype=torch.bfloat16)),
        }
        masters = Masters(parameters, request.param)
        snapshot = Snapshot(masters, device)
        assert not snapshot.moved()
        before = {name: master.clone() for name, master in masters.masters.items()}
        masters.masters["a"].add_(torch.linspace(1e-5, 1.0, 6))
        with masters.writing():
            pass
        assert snapshot.moved()
        return masters, snapshot, before, {name: master.clone() for name, master in masters.masters.items()}

    return make


def assert_are(masters: Masters, expected: Mapping[str, Tensor]) -> None:
    """The masters, bit for bit, and the model's weights as copies of these."""
    for name, parameter in masters.parameters.items():
        assert torch.equal(masters.masters[name], expected[name])
        assert torch.equal(parameter.detach(), expected[name].to(torch.bfloat16).view(parameter.shape))


def halves(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process has put back, beside what the other one has not."""
    return {name: torch.cat([first[name].chunk(2)[0], second[name].chunk(2)[1]]) for name in first}


@pytest.mark.parametrize("device", [None, "cpu"])
def test_weights_follow_what_is_stepped(stepped: Stepped, device: str | None) -> None:
    masters, snapshot, before, after = stepped(device)
    with snapshot.put_back(RATES) as updates:
        assert_are(masters, halves(before, after))
        assert masters.gathered == (["a"] if masters.gather_is_collective else [])
        assert list(updates) == ["a", "b"]
        expected = (after["a"][:3] - before["a"][:3]) / RATES["a"]
        assert torch.equal(updates["a"], torch.cat([expected, torch.full((3,), 7.0)]).view(2, 3))
        assert updates["b"].shape == (4,)
        assert not updates["b"].any()
    assert masters.gathered == ["a"], "at a learning rate of 0 nothing is gathered"
    assert_are(masters, after)


def test_updates_are_computed_when_they_are_looked_up(stepped: Stepped) -> None:
    """But for those that take all processes: then they are there before the first probe."""
    masters, snapshot, _, _ = stepped()
    with snapshot.put_back(RATES) as updates:
        same = updates["a"] is updates["a"]
    assert same == masters.gather_is_collective


def test_a_redone_step_is_what_is_stepped(stepped: Stepped) -> None:
    masters, snapshot, before, after = stepped()
    snapshot.rescale({"a": 3.0, "b": 1.0}, {"a": 0.25})
    start = before["a"] * 0.75
    assert_are(masters, halves({"a": start + (after["a"] - start) * 3.0, "b": after["b"]}, after))


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_process_that_cannot_exchange_all_puts_everything_back(stepped: Stepped, name: str) -> None:
    masters, snapshot, _, after = stepped()
    masters.fails_at = name
    with pytest.raises(torch.OutOfMemoryError), snapshot.put_back(RATES):
        raise AssertionError("the block must not run")
    assert_are(masters, after)
    with snapshot.put_back(RATES):
        pass
    assert_are(masters, after)


def test_what_fails_on_another_process_fails_here(stepped: Stepped) -> None:
    masters, snapshot, _, after = stepped()
    masters.others = [True]
    with pytest.raises(RuntimeError, match="another process could not put the weights"), snapshot.put_back(RATES):
        raise AssertionError("the block must not run")
    assert_are(masters, after)
    assert masters.gathered == [], "the other process would not take part"


def test_the_models_own_parameters_change_places_with_the_copy() -> None:
    """The plain engine copies no number, whether the snapshot was asked for on this device or not."""
    for device in (None, "cpu"):
        parameters = {"a": nn.Parameter(torch.randn(3))}
        place = parameters["a"].data_ptr()
        snapshot = Snapshot(MasterWeights(parameters), device)
        with torch.no_grad():
            parameters["a"].add_(1.0)
        with snapshot.put_back({"a": 1.0}):
            kept = parameters["a"].data_ptr()
            assert kept != place
        assert parameters["a"].data_ptr() == place
        with snapshot.put_back({"a": 1.0}):
            assert parameters["a"].data_ptr() == kept
