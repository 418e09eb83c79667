"""Parameters that share memory without being one `Parameter`: views of each other, weights tied by `.data`.

`shared_memory` finds the parameters with the same memory, which can have only one learning rate; memory that overlaps
in part is an error. `hf_flerm.rates.tensors.OverlappingMemory` finds how the update of one parameter changes the others
that overlap with it, in part or as a whole. Both start from `by_storage`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor)


def by_storage(parameters: Iterable[tuple[str, T]]) -> list[dict[str, T]]:
    """Group parameters by the storage that they lie in.

    Args:
        parameters: Pairs (name, parameter). Those without memory are left out: empty and meta tensors, shards
            and other tensors that wrap tensors (quantized weights).
    """
    groups: dict[tuple[torch.device, int], dict[str, T]] = {}
    for name, parameter in parameters:
        if parameter.data_ptr():
            key = parameter.device, parameter.untyped_storage().data_ptr()
            groups.setdefault(key, {})[name] = parameter
    return list(groups.values())


def shared_memory(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Find the parameters that have the same memory as another one, transposed or reshaped included.

    Args:
        parameters: `{canonical name: parameter}`.

    Returns:
        `{canonical name: first name with the same memory}` of each name but the first.

    Raises:
        ValueError: If the memory of two parameters overlaps only in part.
    """
    first: dict[str, str] = {}
    for views in by_storage(parameters.items()):
        if len(views) > 1:
            first |= _shared(views)
    return first


def _shared(views: Mapping[str, Tensor]) -> dict[str, str]:
    """Same as `shared_memory` for views of one storage; records for each element the first view that has it."""
    first, names = {}, list(views)
    view = views[names[0]]
    numbers = torch.arange(view.untyped_storage().nbytes() // view.element_size())
    seen_in = torch.full_like(numbers, -1)
    for index, (name, view) in enumerate(views.items()):
        own = numbers.as_strided(view.shape, view.stride(), view.storage_offset())
        earlier = seen_in[own].unique().tolist()
        if earlier == [-1]:
            seen_in[own] = index
        elif len(earlier) == 1 and views[names[earlier[0]]].numel() == view.numel():
            first[name] = names[earlier[0]]
        else:
            others = [names[other] for other in earlier if other >= 0]
            raise ValueError(
                f"the parameters {name} and {', '.join(others)} share a part of their memory, so scaling the "
                "learning rate of one would scale a part of the other. Make them separate tensors, or one parameter."
            )
    return first
