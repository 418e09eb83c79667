"""Canonical names and kinds: exact sets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_flerm import measure_rates
from hf_flerm.model.name_text import preview
from hf_flerm.model.names import canonical_names, resolve_names, tensor_kinds, trainable_parameters


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=12, n_embd=4, n_head=2, n_layer=2, n_positions=4, n_inner=8, bos_token_id=0, eos_token_id=0
        )
    )


GPT2_BLOCK = {
    *(f"ln_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    *(f"attn.{part}.{kind}" for part in ("c_attn", "c_proj") for kind in ("weight", "bias")),
    *(f"mlp.{part}.{kind}" for part in ("c_fc", "c_proj") for kind in ("weight", "bias")),
}
# lm_head.weight is wte.weight.
GPT2_REST = {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
GPT2_NAMES = GPT2_REST | {f"transformer.h.{i}.{name}" for i in (0, 1) for name in GPT2_BLOCK}

LORA = {f"base_model.model.transformer.h.{i}.attn.c_attn.lora_{side}.weight" for i in (0, 1) for side in ("A", "B")}


def adapted(adapter: str = "default", **settings: object) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **settings)
    return get_peft_model(gpt2(), config, adapter_name=adapter)


class Distributed(nn.Module):
    """Names its parameters as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


class Compiled(nn.Module):
    """Names its parameters as torch.compile does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


class Sharded(nn.Module):
    """Names its parameters as FSDP does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


def checkpointed(model: nn.Module) -> nn.Module:
    """Names the parameters of its blocks as activation checkpointing does."""

    class Checkpointed(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._checkpoint_wrapped_module = module

    blocks = model.get_submodule("base_model.model.transformer.h" if isinstance(model, PeftModel) else "transformer.h")
    for i, block in enumerate(list(blocks)):
        blocks[i] = Checkpointed(block)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bare": lambda model: model,
    "module": Distributed,
    "_orig_mod": Compiled,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "module._orig_mod": lambda model: Distributed(Compiled(model)),
    "_orig_mod.module": lambda model: Compiled(Distributed(model)),
    "module.module": lambda model: Distributed(Distributed(model)),
    "_fsdp_wrapped_module": Sharded,
    "_checkpoint_wrapped_module": checkpointed,
    "all": lambda model: Distributed(Compiled(Sharded(checkpointed(model)))),
}


# Canonical names
# ---------------


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_leave_no_mark(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(gpt2())
    names = canonical_names(model)
    assert list(names) == [name for name, _ in model.named_parameters()]
    assert set(names.values()) == GPT2_NAMES
    assert set(trainable_parameters(model)) == GPT2_NAMES


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_neither_does_the_name_of_an_adapter(wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert set(trainable_parameters(wrap(adapted("mine")))) == LORA


@pytest.mark.parametrize("adapter", ["default", "weight", "h", "0", "lora_A"])
def test_an_adapter_may_be_called_like_a_part_of_the_model(adapter: str) -> None:
    assert set(trainable_parameters(adapted(adapter))) == LORA


def test_every_part_of_an_adapter() -> None:
    model = adapted("mine", use_dora=True, modules_to_save=["ln_f"])
    magnitudes = {f"base_model.model.transformer.h.{i}.attn.c_attn.lora_magnitude_vector.weight" for i in (0, 1)}
    saved = {f"base_model.model.transformer.ln_f.modules_to_save.{kind}" for kind in ("weight", "bias")}
    assert set(trainable_parameters(model)) == LORA | magnitudes | saved


def test_an_adapter_on_an_embedding() -> None:
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["wpe"]), adapter_name="mine")
    prefix = "base_model.model.transformer.wpe.lora_embedding_"
    assert set(trainable_parameters(model)) == {f"{prefix}A", f"{prefix}B"}


@pytest.mark.parametrize("wrap", [WRAPPERS["bare"], Distributed], ids=["bare", "module"])
def test_an_injected_adapter(wrap: Callable[[nn.Module], nn.Module]) -> None:
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = inject_adapter_in_model(config, gpt2(), adapter_name="mine")
    assert set(trainable_parameters(wrap(model))) == {name.removeprefix("base_model.model.") for name in LORA}


def test_a_part_called_like_a_wrapper_keeps_its_name_inside() -> None:
    model = nn.ModuleDict({"encoder": Distributed(nn.Linear(2, 2)), "default": nn.Linear(2, 2)})
    assert set(canonical_names(model).values()) == {
        "encoder.module.weight",
        "encoder.module.bias",
        "default.weight",
        "default.bias",
    }


def test_names_do_not_collide() -> None:
    model = Distributed(nn.Linear(2, 2))
    model.weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="share the canonical name 'weight'"):
        trainable_parameters(model)


# Trainable parameters
# --------------------


def test_only_what_is_trainable_and_tied_once() -> None:
    model = gpt2().requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    found = trainable_parameters(model)
    assert set(found) == {"transformer.wte.weight"}
    assert found["transformer.wte.weight"] is model.lm_head.weight


def test_nothing_trainable() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no trainable parameters"):
        trainable_parameters(gpt2().requires_grad_(False))


def test_two_trainable_adapters() -> None:
    model = adapted("one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    assert set(trainable_parameters(model)) == LORA  # the second one is not active
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"share the canonical name .*lora_A\.weight'"):
        trainable_parameters(model)


# Names of a measurement
# ----------------------

FIRST = "base_model.model.transformer.h.0.attn.c_attn.lora_B"


@pytest.mark.parametrize("wrap", [WRAPPERS["bare"], Distributed], ids=["bare", "module"])
@pytest.mark.parametrize("given", ["raw", "canonical"])
def test_a_measurement_takes_both_names_and_gives_the_canonical_one(
    wrap: Callable[[nn.Module], nn.Module], given: str
) -> None:
    torch.manual_seed(0)
    model = wrap(adapted("mine"))
    raw = next(name for name, _ in model.named_parameters() if name.endswith(f"{FIRST}.mine.weight"))
    batch = {"input_ids": torch.randint(12, (2, 4))}
    update: dict[str, Tensor] = {raw if given == "raw" else f"{FIRST}.weight": torch.ones(12, 2)}
    result = measure_rates(model, update, [batch], estimator="exact")
    assert set(result.rates) == {f"{FIRST}.weight"}
    assert result.rates[f"{FIRST}.weight"] > 0


def test_names_are_resolved_in_the_order_given() -> None:
    model = Distributed(nn.Linear(2, 2))
    assert list(resolve_names(model, ["bias", "module.weight"]).items()) == [
        ("bias", "module.bias"),
        ("weight", "module.weight"),
    ]


def test_one_parameter_given_twice() -> None:
    with pytest.raises(ValueError, match=r"'module\.weight' refers to the parameter 'weight', which another name"):
        resolve_names(Distributed(nn.Linear(2, 2)), ["weight", "module.weight"])


def test_unknown_names_are_listed() -> None:
    with pytest.raises(ValueError, match=r"Linear has no parameters \[a, c, d, e, f, … 1 more\]"):
        resolve_names(nn.Linear(2, 2), ["g", "f", "e", "d", "c", "weight", "a"])


def test_a_canonical_name_means_the_trainable_adapter() -> None:
    model = adapted("one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    model.set_adapter("two")
    assert resolve_names(model, [f"{FIRST}.weight"]) == {f"{FIRST}.weight": f"{FIRST}.two.weight"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=rf"{FIRST}\.weight' may be any of .*one\.weight.*two\.weight"):
        resolve_names(model, [f"{FIRST}.weight"])


@pytest.mark.parametrize(
    ("names", "expected"),
    [([], "[]"), (["b", "a"], "[a, b]"), (list("fedcba"), "[a, b, c, d, e, … 1 more]")],
)
def test_preview(names: list[str], expected: str) -> None:
    assert preview(names) == expected


# Kinds
# -----


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_kinds_of_an_adapted_gpt2(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(adapted("mine"))
    kinds = tensor_kinds(model)
    assert set(kinds) == set(canonical_names(model).values())
    prefix = "base_model.model.transformer"
    block = {name.replace("attn.c_attn.", "attn.c_attn.base_layer.") for name in GPT2_BLOCK}
    block |= {f"attn.c_attn.lora_{side}.weight" for side in ("A", "B")}
    assert set(kinds.values()) == {f"base_model.model.{name}" for name in GPT2_REST} | {
        f"{prefix}.h.*.{name}" for name in block
    }
    assert {name: kind for name, kind in kinds.items() if "lora_B" in name} == {
        f"{prefix}.h.{i}.attn.c_attn.lora_B.weight": f"{prefix}.h.*.attn.c_attn.lora_B.weight" for i in (0, 1)
    }


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh())


class Held(nn.Module):
    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held


def test_a_sequence_of_blocks_is_one_kind_and_an_mlp_is_not() -> None:
    assert tensor_kinds(Held(nn.Sequential(block(), block()))) == {
        "held.0.0.weight": "held.*.0.weight",
        "held.1.0.weight": "held.*.0.weight",
    }
    mlp = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    expected = {f"held.{i}.{kind}": f"held.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert tensor_kinds(Held(mlp)) == expected
    deep_linear = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    assert tensor_kinds(Held(deep_linear)) == {"held.0.weight": "held.0.weight", "held.1.weight": "held.1.weight"}
    assert tensor_kinds(Held(nn.Sequential(block()))) == {"held.0.0.weight": "held.0.0.weight"}


def test_the_model_itself_may_be_the_sequence_of_blocks() -> None:
    expected = {"0.0.weight": "*.0.weight", "1.0.weight": "*.0.weight"}
    assert tensor_kinds(nn.Sequential(block(), block())) == expected
    assert tensor_kinds(Distributed(nn.Sequential(block(), block()))) == expected
    assert tensor_kinds(nn.ModuleList([block(), block()])) == expected


def test_blocks_inside_blocks() -> None:
    experts = [nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2, bias=False)] * 1)}) for _ in range(2)]
    model = Held(nn.ModuleList(experts))
    assert tensor_kinds(model) == {f"held.{i}.experts.0.weight": "held.*.experts.*.weight" for i in (0, 1)}


def test_a_number_before_the_blocks_stays() -> None:
    # Part 1 of the model holds the blocks; the index of block 1 is another 1.
    model = nn.Sequential(nn.Embedding(2, 2), Held(nn.ModuleList([block(), block()])))
    assert tensor_kinds(model) == {
        "0.weight": "0.weight",
        "1.held.0.0.weight": "1.held.*.0.weight",
        "1.held.1.0.weight": "1.held.*.0.weight",
    }
