"""Canonical parameter names, and the kinds of tensors.

The package uses canonical names: the name in `named_parameters()` without the components that a wrapper (`module`,
`_orig_mod`, `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`) or PEFT (the name of the adapter) added. Adapters of
PEFT need no entry in a table. Tensors of one kind have the same name except for block indices: `h.*.attn.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .name_text import preview

_WRAPPER_COMPONENTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Map every name in `model.named_parameters()` to its canonical name.

    Args:
        model: Any module, wrapped or not, with or without PEFT adapters.

    Returns:
        `{name: canonical name}` in the order of `named_parameters()`. Two adapters of a model share canonical names.
    """
    return {name: ".".join(part.text for part in parts) for name, parts in _components(model).items()}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Map canonical names to the parameters that require a gradient; a tied parameter appears once.

    Raises:
        ValueError: If no parameter is trainable, or two trainable parameters share a canonical name.
    """
    canonical = canonical_names(model)
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if canonical[name] in parameters:
            raise ValueError(
                f"two trainable parameters share the canonical name {canonical[name]!r} (one is {name!r}). "
                "Leave only one adapter trainable."
            )
        parameters[canonical[name]] = parameter
    if not parameters:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameters: every requires_grad is False. "
            "Unfreeze some, or add an adapter."
        )
    return parameters


def resolve_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Find the parameters that names refer to.

    Args:
        model: The model.
        names: Names from `named_parameters()`, or canonical names. A canonical name that several adapters share refers
            to the trainable one.

    Returns:
        `{canonical name: name in named_parameters()}` in the order of `names`.

    Raises:
        ValueError: If a name is unknown or refers to several parameters, or two names refer to one parameter.
    """
    canonical = canonical_names(model)
    candidates: dict[str, list[str]] = {}
    for raw, short in canonical.items():
        candidates.setdefault(short, []).append(raw)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    resolved: dict[str, str] = {}
    unknown = []
    for name in names:
        found = [name] if name in canonical else candidates.get(name, [])
        if len(found) > 1:
            found = [raw for raw in found if raw in trainable] or found
        if not found:
            unknown.append(name)
            continue
        if len(found) > 1:
            raise ValueError(f"{name!r} may be any of {found}. Give the full name.")
        if canonical[found[0]] in resolved:
            raise ValueError(
                f"{name!r} refers to the parameter {canonical[found[0]]!r}, which another name refers to as well. "
                "Leave one of them out."
            )
        resolved[canonical[found[0]]] = found[0]
    if unknown:
        raise ValueError(
            f"{type(model).__name__} has no parameters {preview(unknown)}. Use names from model.named_parameters()."
        )
    return resolved


@dataclass(frozen=True)
class Place:
    """The place of a tensor in its model; all names are canonical.

    Attributes:
        module: Name of the module that owns the tensor; for a tensor of an adapter, of the adapted layer.
        block: Name of the outermost repeated block that contains the tensor; `module` if there is none.
        kind: Name of the tensor, with the index of every repeated block replaced by `*`.
        module_kind: `module`, with the same replacements.
        block_kind: `block`, with the same replacements.
    """

    module: str
    block: str
    kind: str
    module_kind: str
    block_kind: str


def tensor_places(model: nn.Module) -> dict[str, Place]:
    """Map canonical names to places; the kind of `h.3.attn.lora_B.weight` is `h.*.attn.lora_B.weight`.

    A component of a name is the index of a repeated block if its container is an `nn.ModuleList`, or an `nn.Sequential`
    of at least two modules of one class that have submodules.
    """
    places = {}
    modules = dict(model.named_modules())
    for parts in _components(model).values():
        names = [part.text for part in parts]
        kinds = ["*" if part.is_block else part.text for part in parts]
        owner = len(parts) - 1
        module = next((i + 1 for i, part in enumerate(parts) if _is_adapted(modules.get(part.path))), owner)
        block = next((i + 1 for i, part in enumerate(parts) if part.is_block), module)
        places[".".join(names)] = Place(
            module=".".join(names[:module]),
            block=".".join(names[:block]),
            kind=".".join(kinds),
            module_kind=".".join(kinds[:module]),
            block_kind=".".join(kinds[:block]),
        )
    return places


def _is_adapted(module: nn.Module | None) -> bool:
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def tensor_kinds(model: nn.Module) -> dict[str, str]:
    """Map canonical names to kinds; see `tensor_places`."""
    return {name: place.kind for name, place in tensor_places(model).items()}


class _Component(NamedTuple):
    """A component of a canonical name; whether it is the index of a repeated block; and the path of its module."""

    text: str
    is_block: bool
    path: str


def _components(model: nn.Module) -> dict[str, list[_Component]]:
    """The components of the canonical name of every parameter, by the name in `named_parameters()`."""
    modules = dict(model.named_modules())
    adapters = _adapter_names(modules.values())
    components = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        kept: list[_Component] = []
        for i, part in enumerate(parts):
            container = modules.get(".".join(parts[:i]))
            path = ".".join(parts[: i + 1])
            if part in _WRAPPER_COMPONENTS:  # the previous component now refers to the module inside the wrapper
                kept[-1:] = [last._replace(path=path) for last in kept[-1:]]
            elif not (part in adapters and isinstance(container, (nn.ModuleDict, nn.ParameterDict))):
                kept.append(_Component(part, part.isdigit() and _holds_blocks(container), path))
        while len(kept) > 1 and kept[0].text == "module":  # DDP's; deeper in, a module may really have this name
            kept = kept[1:]
        components[name] = kept
    return components


def _adapter_names(modules: Iterable[nn.Module]) -> set[str]:
    configs = (getattr(module, "peft_config", None) for module in modules)
    return next((set(config) for config in configs if isinstance(config, Mapping)), set())


def _holds_blocks(module: nn.Module | None) -> bool:
    """Whether the indices of a container are those of repeated blocks, not of layers in a small network (projector)."""
    if isinstance(module, nn.ModuleList):
        return True
    if not isinstance(module, nn.Sequential):
        return False
    children = list(module)
    return len({type(child) for child in children}) == 1 and len(children) > 1 and any(children[0].children())
