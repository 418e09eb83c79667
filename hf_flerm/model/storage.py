"""Parameters that share memory without being one `Parameter`: views of each other, weights tied by `.data`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def shared_memory(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Find the parameters that share all of their memory with another one (views, also transposed).

    `rates/tensors.py` handles parameters that share only a part of their memory.

    Args:
        parameters: `{canonical name: parameter}`. Shards (DTensor) and meta tensors are taken to share nothing.

    Returns:
        `{canonical name: first name with the same memory}` of each name but the first.

    Raises:
        ValueError: If the memory of two parameters overlaps only in part.
    """
    by_storage: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        if parameter.data_ptr():
            by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
    first: dict[str, str] = {}
    for names in by_storage.values():
        if len(names) > 1:
            first |= _shared({name: parameters[name] for name in names})
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
