"""One engine is chosen for a model; where every process has the whole model it changes nothing."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_flerm import measure_rates
from hf_flerm.engines import engine_of
from hf_flerm.engines.engine import Engine, MasterWeights
from hf_flerm.engines.fsdp2 import FSDP2
from hf_flerm.engines.zero import DeepSpeed
from hf_flerm.engines.zero3 import ZeRO3
from tests.shared.processes import launch


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


# --- every process has the whole model ----------------------------------------------------------------------------


def test_the_plain_engine_changes_nothing() -> None:
    model = layers()
    engine = engine_of(model)
    assert type(engine) is Engine
    assert not engine.sharded
    assert engine.forward_mode
    engine.check("exact")
    engine.check_loop(model)
    before = {name: id(value) for name, value in vars(model).items()}
    with engine.released_after(), engine.gathered([model]), engine.repeatable_backward():
        with engine.gathered_leaves() as leaves:
            model(torch.ones(1, 3)).sum().backward()
        assert leaves == {}
        assert {name: id(value) for name, value in vars(model).items()} == before
    for parameter in model.parameters():
        assert engine.shape(parameter) == parameter.shape
        assert engine.device(parameter) == parameter.device
    assert [engine.own_type(module) for module in model] == [nn.Linear, nn.Tanh, nn.Linear]
    assert engine.agree([True, False]) == [True, False]


def test_plain_master_weights_are_the_parameters() -> None:
    parameters = dict(layers().named_parameters())
    parameters["0.weight"].grad = torch.ones(4, 3)
    weights = Engine(nn.Module()).master_weights(torch.optim.SGD(parameters.values(), 0.1), parameters)
    assert type(weights) is MasterWeights
    assert weights.in_optimizer == weights.parameters == parameters
    assert list(weights.stepped()) == ["0.weight"]
    assert weights.agree([True, False]) == [True, False]
    weights.check_own_learning_rates()
    with weights.writing(), weights.in_param_groups():
        for name, parameter in parameters.items():
            assert weights.shape(name) == parameter.shape
            assert weights.local(name).data_ptr() == parameter.data_ptr()
            part = torch.ones(parameter.shape)
            assert weights.gather(name, part) is part
            place = parameter.data_ptr()
            previous = weights.exchange(name, part)
            assert (previous.data_ptr(), parameter.data_ptr()) == (place, part.data_ptr())


# --- shards -------------------------------------------------------------------------------------------------------


def in_shards() -> dict[str, Any]:
    PartialState(cpu=True)
    model, whole = layers(), layers()
    for module in (model[0], model):
        fully_shard(module)
    engine: Any = engine_of(model)
    found = {"chosen": type(engine), "types": [engine.own_type(module) for module in (model, *model)]}
    found["local"] = [parameter._local_tensor.numel() for parameter in model.parameters()]
    assert [engine.shape(p) for p in model.parameters()] == [p.shape for p in whole.parameters()]
    assert [engine.device(p) for p in model.parameters()] == [torch.device("cpu")] * 4
    assert engine.agree([dist.get_rank() == 1, False]) == [True, False]

    # A forward pass without a backward pass leaves the root gathered: here the last layer.
    sharded = list(model.parameters())
    with engine.released_after(), engine.gathered_leaves() as leaves:
        output = model(torch.ones(1, 3))
        gathered = [parameter for parameter in model[2].parameters() if not isinstance(parameter, DTensor)]
        found["still gathered"] = len(gathered)
        with torch.no_grad():
            model(torch.ones(1, 3))
        assert set(map(id, leaves)) == set(map(id, sharded))
        gradients = torch.autograd.grad(output.sum(), [leaves[parameter] for parameter in sharded])
    assert all(one is other for one, other in zip(model.parameters(), sharded, strict=True))
    expected = torch.autograd.grad(whole(torch.ones(1, 3)).sum(), list(whole.parameters()))
    for own, gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, gradient)

    weights = engine.master_weights(None, dict(model.named_parameters()))
    for name, parameter in whole.named_parameters():
        part = weights.local(name)
        assert torch.equal(weights.gather(name, 2.0 * part), 2.0 * parameter.detach())
        assert weights.shape(name) == parameter.shape
        previous = weights.exchange(name, torch.zeros_like(part))
        assert not weights.gather(name, weights.local(name)).any()
        weights.exchange(name, previous)
        assert torch.equal(weights.gather(name, weights.local(name)), parameter.detach())
        place = weights.local(name).data_ptr()
        assert place == weights.local(name).data_ptr() != previous.data_ptr()
    with pytest.raises(ValueError, match=r"'exact' needs whole weights.*Use 'per_example'"):
        engine.check("exact")
    return found


def test_shards_are_gathered_and_written_as_whole_weights(tmp_path: Path) -> None:
    first, second = launch(in_shards, 2, tmp_path)
    for found in (first, second):
        assert found["chosen"] is FSDP2
        assert found["types"] == [nn.Sequential, nn.Linear, nn.Tanh, nn.Linear]
        assert found["still gathered"] == 2
    assert [sum(sizes) for sizes in zip(first["local"], second["local"], strict=True)] == [12, 4, 8, 2]


def gathered_at_the_moment() -> tuple[type, type]:
    """A model that is one unit has no sharded parameter after a forward pass."""
    model = fully_shard(layers())
    with torch.no_grad():
        model(torch.ones(1, 3))
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    engine = engine_of(model)
    engine.release()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return type(engine), type(engine_of(layers()))


def test_gathered_weights_are_still_shards(tmp_path: Path) -> None:
    assert launch(gathered_at_the_moment, 1, tmp_path) == [(FSDP2, Engine)]


# --- DeepSpeed, as far as it can be seen without it ---------------------------------------------------------------


def partitioned(model: nn.Module) -> nn.Module:
    """As ZeRO-3 leaves parameters between uses."""
    for parameter in model.parameters():
        vars(parameter).update(ds_tensor=torch.zeros(1), ds_shape=parameter.shape)
        parameter.data = torch.empty(0)
    return model


def test_partitioned_weights_have_the_shape_that_they_will_have() -> None:
    shapes = [parameter.shape for parameter in layers().parameters()]
    model = partitioned(layers())
    engine = engine_of(model)
    assert type(engine) is ZeRO3
    assert engine.sharded
    assert not engine.forward_mode
    assert [engine.shape(parameter) for parameter in model.parameters()] == shapes
    with pytest.raises(ValueError, match=r"'exact' needs whole weights.*Use 'per_example'"):
        engine.check("exact")
    with engine.gathered([nn.Tanh()]):  # nothing of it is partitioned, and DeepSpeed is not asked
        pass


def test_deepspeed_steps_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    Accelerator(cpu=True)
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 1}})
    state = {"distributed_type": DistributedType.DEEPSPEED, "deepspeed_plugins": plugin}
    for key, value in state.items():
        for shared in (AcceleratorState._shared_state, PartialState._shared_state):
            monkeypatch.setitem(shared, key, value)
    model = layers()
    engine = engine_of(model)
    assert type(engine) is DeepSpeed
    engine.check("exact")
    with pytest.raises(ValueError, match=r"DeepSpeed steps in accelerator.backward\(\).*use FLeRMTrainer"):
        engine.check_loop(model)
    # Without ZeRO the optimizer is one of torch, over the parameters, of which DeepSpeed lets every one step.
    parameters = dict(model.named_parameters())
    weights = engine.master_weights(torch.optim.SGD(parameters.values(), 0.1), parameters)
    assert list(weights.stepped()) == list(parameters)
    assert not weights.hooks_enclose_update


class Partitioned:
    """What DeepSpeed's ZeRO-1 optimizer shows of partitions: one flat tensor for each param group."""

    def __init__(self, *groups: list[Tensor]) -> None:
        self.bit16_groups = groups
        self.single_partition_of_fp32_groups = [torch.cat([t.detach().flatten() for t in group]) for group in groups]
        for group, partition in zip(groups, self.single_partition_of_fp32_groups, strict=True):
            start = 0
            for tensor in group:
                address = SimpleNamespace(start=0, numel=tensor.numel())
                fragment = partition.narrow(0, start, tensor.numel())
                tensor._hp_mapping = SimpleNamespace(lp_fragment_address=address, hp_fragment=fragment)  # type: ignore[attr-defined]
                start += tensor.numel()


def test_tensors_of_one_partition_have_one_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    model = layers()
    parameters = dict(model.named_parameters())
    first, second, *others = parameters.values()
    weights = engine_of(model).master_weights(Partitioned([first, second], *([other] for other in others)), parameters)
    assert weights.gather_is_collective
    assert weights.in_optimizer["0.weight"] is weights.in_optimizer["0.bias"]
    with pytest.raises(ValueError, match=r"ZeRO steps \[0.bias, 0.weight\] with one learning rate.*its own group"):
        weights.check_own_learning_rates()
    apart = engine_of(model).master_weights(Partitioned(*([tensor] for tensor in parameters.values())), parameters)
    apart.check_own_learning_rates()
    for name, parameter in parameters.items():
        assert torch.equal(apart.local(name), parameter.detach().flatten())
    with pytest.raises(ValueError, match=r"no float32 partition of the trainable parameters \[2.bias\]"):
        engine_of(model).master_weights(Partitioned([first, second, others[0]]), parameters)
    zero = Partitioned(*([tensor] for tensor in parameters.values()))
    first.data.add_(1.0)
    with pytest.raises(ValueError, match=r"do not hold the weights of \[0.weight\].*round_robin_gradients to false"):
        engine_of(model).master_weights(zero, parameters)


class Gathering(OrderedDict[str, Any]):
    """What ZeRO-3 makes of a module's parameters: one that is looked up while the model runs is gathered."""

    running = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module._parameters)
        self.inside = False
        forward = module.forward

        def own_forward(*args: Any) -> Any:
            self.inside = True
            try:
                return forward(*args)
            finally:
                self.inside = False

        module.forward = own_forward  # type: ignore[method-assign]
        module._parameters = self

    def __getitem__(self, key: str) -> Any:
        assert self.inside or not Gathering.running, f"{key} would be gathered after its module has run"
        return super().__getitem__(key)


@pytest.mark.parametrize("estimator", ["per_example", "full"])
def test_hooks_look_up_no_parameter_while_the_model_runs(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = layers(), layers()
    for module in model:
        Gathering(module)

    def output(model: nn.Module, batch: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(Gathering, "running", True)
            return model(batch["x"])  # type: ignore[no-any-return]

    updates = {name: torch.ones_like(parameter) for name, parameter in plain.named_parameters()}
    batches = [{"x": torch.linspace(-1, 1, 12).view(4, 3)}]
    found, expected = (
        measure_rates(each, updates, batches, output=output, estimator=estimator, generator=torch.Generator()).rates
        for each in (model, plain)
    )
    assert found == expected
    assert all(rate > 0 for rate in found.values())
