"""The table of optimizers against what the optimizers do: linear in the learning rate, weight decay apart or not."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_flerm.engines.engine import MasterWeights
from hf_flerm.engines.zero_groups import group_per_tensor
from hf_flerm.optimizer.behavior import TABLE, check_optimizer, weight_decays
from hf_flerm.optimizer.step import Snapshot
from hf_flerm.optimizer.step_scales import StepScales

LR = 1e-3
DECAY = 0.3
SCALES = {"a": 36.0, "b": 0.05}
SHAPES = {"a": (80, 64), "b": (64, 80)}  # large enough for bitsandbytes to keep its state in 8 bits
WARM = 6  # past the steps that RAdam makes without its second moment

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

Parameters = dict[str, nn.Parameter]


def case(package: str, name: str, module: str = "", **options: Any) -> Any:
    words = [package, name, *(f"{key}={value}" for key, value in options.items())]
    return pytest.param(module or package, name, options, id="-".join(words))


LINEAR = [
    case("torch", "AdamW", "torch.optim"),
    case("torch", "AdamW", "torch.optim", fused=True),
    case("torch", "AdamW", "torch.optim", amsgrad=True),
    case("torch", "Adam", "torch.optim"),
    case("torch", "Adam", "torch.optim", decoupled_weight_decay=True),
    case("torch", "NAdam", "torch.optim"),
    case("torch", "NAdam", "torch.optim", decoupled_weight_decay=True),
    case("torch", "RAdam", "torch.optim"),
    case("torch", "RAdam", "torch.optim", decoupled_weight_decay=True),
    case("torch", "SGD", "torch.optim", momentum=0.9),
    case("torch", "SGD", "torch.optim", momentum=0.9, nesterov=True),
    case("torch", "Adadelta", "torch.optim"),
    case("torch", "Adagrad", "torch.optim", lr_decay=0.1),
    case("torch", "Adamax", "torch.optim"),
    case("torch", "RMSprop", "torch.optim", momentum=0.9),
    case("torch", "Muon", "torch.optim"),
    case("torch", "Muon", "torch.optim", adjust_lr_fn="match_rms_adamw"),
    case("transformers", "Adafactor", "transformers.optimization", relative_step=False, scale_parameter=False),
    case("transformers", "Adafactor", "transformers.optimization", relative_step=False, scale_parameter=True),
    *(
        case("bitsandbytes", name, "bitsandbytes.optim")
        for family in ("Adam", "AdamW", "AdEMAMix", "Lion", "PagedAdamW", "PagedLion", "RMSprop", "Adagrad", "LAMB")
        for name in (family, f"{family}8bit", f"{family}32bit")
        if name != "AdEMAMix32bit"  # bitsandbytes 0.50 cannot step it on a CPU
    ),
    case("bitsandbytes", "SGD", "bitsandbytes.optim", momentum=0.9),
    case("bitsandbytes", "SGD8bit", "bitsandbytes.optim", momentum=0.9),
    case("bitsandbytes", "LARS", "bitsandbytes.optim", momentum=0.9, max_unorm=1.0),
    case("bitsandbytes", "LARS8bit", "bitsandbytes.optim", momentum=0.9),
    case("bitsandbytes", "PytorchLARS", "bitsandbytes.optim", momentum=0.9, max_unorm=1.0),
    case("lion_pytorch", "Lion"),
    case("lion_pytorch", "Lion", decoupled_weight_decay=True),
]
NONLINEAR = [
    case("torch", "ASGD", "torch.optim"),
    case("torch", "Rprop", "torch.optim"),
    case("torch", "Adafactor", "torch.optim"),
    case("transformers", "Adafactor", "transformers.optimization", relative_step=False, beta1=0.9),
    case("schedulefree", "AdamWScheduleFree"),
    case("schedulefree", "RAdamScheduleFree"),
    case("schedulefree", "SGDScheduleFree"),
]
WITHOUT_A_RATE = ("ASGD", "LBFGS", "Rprop")


class Twins:
    """The same parameters under the same gradients, in optimizers that differ in one thing."""

    def __init__(
        self, module: str, name: str, options: Mapping[str, Any], decay: float = DECAY, lr: float = LR
    ) -> None:
        self.arguments = (module, name, options, decay, lr)
        library = importlib.import_module(module)
        # bitsandbytes steps in single precision, whatever the weights are.
        dtype = torch.float32 if module == "bitsandbytes.optim" else torch.float64
        generator = torch.Generator().manual_seed(0)
        self.parameters: Parameters = {
            key: nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for key, shape in SHAPES.items()
        }
        keywords = {"lr": lr, **options}
        if "weight_decay" in inspect.signature(getattr(library, name)).parameters:
            keywords["weight_decay"] = decay
        self.optimizer: Optimizer = getattr(library, name)(list(self.parameters.values()), **keywords)
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.tolerance = 2e-3 if dtype is torch.float32 else 1e-9
        for step in range(WARM):
            self.step(step)

    def step(self, seed: int = WARM) -> dict[str, Tensor]:
        """One step; returns how far the weights went."""
        before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        self.optimizer.step()
        return {name: parameter.detach() - before[name] for name, parameter in self.parameters.items()}

    def twin(self, **options: Any) -> Twins:
        """Another run up to here, whose next step has other options."""
        other = Twins(*self.arguments)
        for group in other.optimizer.param_groups:
            group.update(options)
        return other

    def close(self, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        for name in expected:
            error = (actual[name] - expected[name]).norm() / expected[name].norm()
            assert error < self.tolerance, f"{name}: relative error {error:.2g}"


def values(parameters: Parameters) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def state_of(twins: Twins) -> dict[str, Tensor]:
    """What the optimizer remembers of gradients; Adafactor's size of the weights is not of them."""
    return {
        f"{name} {key}": value.double()
        for name, parameter in twins.parameters.items()
        for key, value in twins.optimizer.state[parameter].items()
        if isinstance(value, Tensor) and key != "RMS"
    }


@pytest.mark.parametrize(("module", "name", "options"), LINEAR)
def test_updates_are_linear_in_the_learning_rate(module: str, name: str, options: dict[str, Any]) -> None:
    run = Twins(module, name, options)
    check_optimizer(run.optimizer, "match")
    once, twice = run.twin().step(), run.twin(lr=2 * LR).step()
    run.close(twice, {key: 2 * moved for key, moved in once.items()})


@pytest.mark.parametrize(("module", "name", "options"), LINEAR)
def test_the_table_says_where_weight_decay_enters(module: str, name: str, options: dict[str, Any]) -> None:
    """Decay that is apart leaves the state alone, and takes exactly its fraction of the weights."""
    run = Twins(module, name, options)
    before = values(run.parameters)
    decaying, still = run.twin(), run.twin(weight_decay=0.0)
    moved, update = decaying.step(), still.step()
    decays = weight_decays(decaying.optimizer, decaying.parameters)
    assert set(weight_decays(still.optimizer, still.parameters).values()) == {0.0}
    states = state_of(decaying), state_of(still)
    assert states[0], "an optimizer without a state does not tell"
    in_state = any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert in_state == (decays == dict.fromkeys(SHAPES, 0.0))
    if not in_state:
        run.close({k: moved[k] - update[k] for k in moved}, {k: -LR * decays[k] * before[k] for k in moved})


@pytest.mark.parametrize(("module", "name", "options"), LINEAR)
def test_unit_updates_leave_decay_out(module: str, name: str, options: dict[str, Any]) -> None:
    run = Twins(module, name, options)
    decaying = run.twin()
    before = Snapshot(MasterWeights(decaying.parameters))
    moved = decaying.step()
    decays = {key: LR * decay for key, decay in weight_decays(decaying.optimizer, decaying.parameters).items()}
    apart = any(decays.values())
    update = run.twin(weight_decay=0.0).step() if apart else moved
    with before.put_back(dict.fromkeys(SHAPES, LR), decays) as units:
        run.close(units, {key: value / LR for key, value in update.items()})


@pytest.mark.parametrize("own_groups", [False, True], ids=["one group", "a group for each"])
@pytest.mark.parametrize(("module", "name", "options"), LINEAR)
def test_scaled_and_redone_steps_decay_as_at_the_nominal_rate(
    module: str, name: str, options: dict[str, Any], own_groups: bool
) -> None:
    """W - lr decay W + s update, however the step came to its scale, and the groups never know."""
    run = Twins(module, name, options)
    start = values(run.parameters)
    probe = run.twin()
    probe.step()
    decays = {key: LR * decay for key, decay in weight_decays(probe.optimizer, probe.parameters).items()}
    update = (run.twin(weight_decay=0.0) if any(decays.values()) else run.twin()).step()
    expected = {key: SCALES[key] * update[key] - decays[key] * start[key] for key in SHAPES}

    scaled = run.twin()
    if own_groups:
        group_per_tensor(scaled.optimizer)
    StepScales(scaled.optimizer, scaled.parameters).scales = SCALES
    run.close(scaled.step(), expected)
    assert {group["weight_decay"] for group in scaled.optimizer.param_groups} == {DECAY}

    old = {"a": 3.0, "b": 0.5}
    redone = run.twin()
    StepScales(redone.optimizer, redone.parameters).scales = old
    before = Snapshot(MasterWeights(redone.parameters))
    redone.step()
    before.rescale({key: SCALES[key] / old[key] for key in SHAPES}, decays)
    run.close({key: redone.parameters[key].detach() - start[key] for key in SHAPES}, expected)


@pytest.mark.parametrize(("module", "name", "options"), LINEAR)
def test_scales_of_one_change_no_bit(module: str, name: str, options: dict[str, Any]) -> None:
    run = Twins(module, name, options)
    plain, scaled = run.twin(), run.twin()
    StepScales(scaled.optimizer, scaled.parameters).scales = dict.fromkeys(SHAPES, 1.0)
    for seed in range(2):
        before = Snapshot(MasterWeights(scaled.parameters))
        plain.step(seed)
        scaled.step(seed)
        decays = {key: LR * decay for key, decay in weight_decays(scaled.optimizer, scaled.parameters).items()}
        before.rescale(dict.fromkeys(SHAPES, 1.0), decays)
    for key in SHAPES:
        assert torch.equal(scaled.parameters[key], plain.parameters[key])


@pytest.mark.parametrize(("module", "name", "options"), NONLINEAR)
def test_updates_that_are_not_linear_are_refused(module: str, name: str, options: dict[str, Any]) -> None:
    lr = 1.0 if name == "Adafactor" else LR
    run = Twins(module, name, options, decay=0.0, lr=lr)
    once, twice = run.twin().step(), run.twin(lr=2 * lr).step()
    assert all((twice[key] - 2 * once[key]).norm() > 0.01 * once[key].norm() for key in SHAPES)
    message = rf"^the update of {name} is not linear in its learning rate: .* (Match|Train) with "
    with pytest.raises(ValueError, match=message):
        check_optimizer(run.optimizer, "match")
    if name in WITHOUT_A_RATE:
        with pytest.raises(ValueError, match="rate per unit learning rate is not defined"):
            check_optimizer(run.optimizer, "record")
    else:
        check_optimizer(run.optimizer, "record")


def test_an_option_decides_on_adafactor() -> None:
    from transformers.optimization import Adafactor

    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "beta1": 0.9}]
    with pytest.raises(ValueError, match="Match with Adafactor with beta1=None"):
        check_optimizer(Adafactor(groups, lr=LR, relative_step=False), "match")
    check_optimizer(Adafactor(parameters, lr=LR, relative_step=False), "match")


@pytest.mark.parametrize("mode", ["record", "match"])
def test_lbfgs_is_refused(mode: str) -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="the update of LBFGS is not linear"):
        check_optimizer(torch.optim.LBFGS([parameter]), mode)


def test_prodigy_takes_no_learning_rates_for_single_tensors() -> None:
    prodigy = importlib.import_module("prodigyopt").Prodigy
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = prodigy([{"params": [parameters[0]]}, {"params": [parameters[1]], "lr": 0.5}])
    check_optimizer(optimizer, "record")
    with pytest.raises(
        ValueError, match=r"Prodigy cannot use a different learning rate for each tensor: .* one step size"
    ):
        check_optimizer(optimizer, "match")
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="different lr values"):
        optimizer.step()


class Unheard(Optimizer):
    """A class that nobody knows, and that is not linear either."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": LR, "weight_decay": DECAY})


class MyAdamW(torch.optim.AdamW):
    """A class that is known by its base."""


class MyRprop(torch.optim.Rprop):
    """A class that is known by its base."""


def test_classes_that_are_not_in_the_table() -> None:
    parameters = {"w": nn.Parameter(torch.ones(2))}
    parameters["w"].grad = torch.ones(2)
    unheard = Unheard(parameters.values())
    check_optimizer(unheard, "match")
    assert weight_decays(unheard, parameters) == {"w": 0.0}
    assert weight_decays(MyAdamW(parameters.values(), weight_decay=DECAY), parameters) == {"w": DECAY}
    with pytest.raises(ValueError, match="the update of MyRprop is not linear"):
        check_optimizer(MyRprop(parameters.values()), "record")


def test_a_tensor_without_a_gradient_does_not_decay() -> None:
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("used", "unused")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=DECAY)
    parameters["used"].grad = torch.ones(2)
    weights = MasterWeights(parameters)
    before = Snapshot(weights)
    optimizer.step()
    decays = weight_decays(optimizer, weights.stepped())
    assert decays == {"used": DECAY}
    with before.put_back(dict.fromkeys(parameters, LR), {name: LR * decay for name, decay in decays.items()}) as units:
        assert units["unused"].tolist() == [0.0, 0.0]
        torch.testing.assert_close(units["used"], torch.full((2,), -1.0), rtol=1e-3, atol=0.0)


def optimizers_in(module: Any) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }


def test_the_table_holds_every_optimizer_of_torch() -> None:
    listed = {name for package, name in TABLE if package == "torch"} - {"ZeroRedundancyOptimizer"}
    found = optimizers_in(torch.optim)
    assert found - listed == set()
    assert listed - found <= {"Muon"}, "only Muon is newer than the oldest torch that is supported"


def test_every_entry_of_the_table_is_tried() -> None:
    tried = {(p.values[0].partition(".")[0], _family(p.values[1])) for p in [*LINEAR, *NONLINEAR]}
    apart = {
        ("torch", "LBFGS"),
        ("torch", "SparseAdam"),
        ("torch", "ZeroRedundancyOptimizer"),
        ("prodigyopt", "Prodigy"),
        ("peft", "LoraFAOptimizer"),  # in test_per_tensor_lists.py
        ("", "MuonWithAuxAdam"),  # in test_muon_and_adamw.py, as the next one
        ("", "SingleDeviceMuonWithAuxAdam"),
        ("", "Lookahead"),  # in test_inner_optimizers.py
    }
    assert tried | apart == set(TABLE)


def _family(name: str) -> str:
    return name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")


def test_sparse_adam_is_linear() -> None:
    moved = []
    for lr in (LR, 2 * LR):
        parameter = nn.Parameter(torch.ones(4, 2, dtype=torch.float64))
        optimizer = torch.optim.SparseAdam([parameter], lr=lr)
        parameter.grad = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 2, dtype=torch.float64), (4, 2))
        check_optimizer(optimizer, "match")
        optimizer.step()
        moved.append(parameter.detach() - 1)
    torch.testing.assert_close(moved[1], 2 * moved[0])


@pytest.mark.parametrize("name", sorted({n for p, n in TABLE if p == "bitsandbytes"}))
def test_the_table_names_classes_of_bitsandbytes(name: str) -> None:
    assert name in optimizers_in(importlib.import_module("bitsandbytes.optim"))
