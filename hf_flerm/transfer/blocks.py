"""Repeated blocks: their indices in names, and how the blocks of two stacks correspond.

A *kind* is a name with `*` in place of the indices of blocks: `h.*.attn.weight` is the kind of `h.3.attn.weight`. The
indices of a name are a tuple, outermost stack first: (3,) here. A name in nested stacks has more indices, and a name
outside any stack has ().
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

Indices = tuple[int, ...]
# {(base indices, target indices): (overlap as a fraction of the target block, as a fraction of the base block)}
Overlaps = dict[tuple[Indices, Indices], tuple[Fraction, Fraction]]

# Names come from files, so only plain decimal digits are an index (no "00", no other scripts), within 64 bits.
_INDEX = r"(0|[1-9][0-9]{0,17})"


def overlapping(base: Iterable[Indices], target: Iterable[Indices], same_blocks: bool = False) -> Overlaps:
    """Find how the blocks of two stacks overlap when both stacks are stretched to the same length.

    With n base blocks and m target blocks, base block i covers the interval [i/n, (i+1)/n] and target block j covers
    [j/m, (j+1)/m]. From 2 blocks to 3, for instance:

        base      |     0     |     1     |
        target    |   0   |   1   |   2   |

    Base block 0 and target block 1 have [1/3, 1/2] in common, a length of 1/6: half of the target block, a third of the
    base block. Fractions keep this exact: blocks that only touch overlap by 0, and the overlaps of a block add up to 1.
    The rule is applied to the outermost stack first, then to the stacks within each pair of blocks, and the fractions
    are multiplied.

    Args:
        base: Indices of the base's blocks that have a tensor of this kind.
        target: Indices of the target's blocks; every tuple has the same length as in the base.
        same_blocks: Whether both outermost stacks have the same blocks. Then a block corresponds to the block with the
            same index only, and a block without the tensor on the other side has no match.

    Returns:
        `{(base indices, target indices): (fraction of the target block, fraction of the base block)}` of the pairs
        that overlap.
    """
    base, target = sorted(base), sorted(target)
    if not base or not target:
        return {}
    if base[0] == ():
        return {((), ()): (Fraction(1), Fraction(1))}
    overlaps = {}
    base_blocks, target_blocks = sorted({b[0] for b in base}), sorted({t[0] for t in target})
    n, m = len(base_blocks), len(target_blocks)
    for i, base_block in enumerate(base_blocks):
        for j, target_block in enumerate(target_blocks):
            length = min(Fraction(i + 1, n), Fraction(j + 1, m)) - max(Fraction(i, n), Fraction(j, m))
            of_target, of_base = length * m, length * n
            if same_blocks:
                of_target = of_base = Fraction(base_block == target_block)
            if of_target <= 0:
                continue
            inner = overlapping(
                [b[1:] for b in base if b[0] == base_block], [t[1:] for t in target if t[0] == target_block]
            )
            for (b, t), (inner_of_target, inner_of_base) in inner.items():
                pair = (base_block, *b), (target_block, *t)
                overlaps[pair] = (of_target * inner_of_target, of_base * inner_of_base)
    return overlaps


def names_of_kind(names: Iterable[str], kind: str) -> dict[Indices, str]:
    """Return `{indices: name}` of the names (of tensors, modules or blocks) that belong to a kind."""
    pattern = re.compile(r"\.".join(_INDEX if part == "*" else re.escape(part) for part in kind.split(".")))
    matches = ((pattern.fullmatch(name), name) for name in names)
    return {tuple(map(int, match.groups())): name for match, name in matches if match}


def stack_blocks(names: Iterable[str], kind: str) -> set[str]:
    """Return the indices (as strings) of all blocks in the outermost stack of a kind; empty if it is outside any stack.

    Args:
        names: All names of the model, also of other kinds.
        kind: The kind.
    """
    container, is_stack, _ = kind.partition("*")
    return {name.removeprefix(container).partition(".")[0] for name in names if is_stack and name.startswith(container)}


def block_indices(name: str, kind: str) -> Indices:
    """Return the indices of a name of a kind."""
    return tuple(int(part) for part, of_kind in zip(name.split("."), kind.split("."), strict=True) if of_kind == "*")


def with_indices(kind: str, indices: Indices) -> str:
    """Return the name of a kind with these indices; the inverse of `block_indices`."""
    left = iter(indices)
    return ".".join(str(next(left)) if part == "*" else part for part in kind.split("."))
