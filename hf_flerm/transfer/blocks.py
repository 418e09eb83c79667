"""Blocks of repeated stacks: their indices in names, and which blocks of one stack stand where those of another do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

_INDEX = r"(0|[1-9][0-9]{0,17})"


def overlapping(
    base: Iterable[tuple[int, ...]], target: Iterable[tuple[int, ...]], same_blocks: bool = False
) -> dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[Fraction, Fraction]]:
    """How blocks of two stacks overlap when both are stretched to one length, stack within stack.

    Args:
        base: The indices of blocks, outermost stack first.
        target: The same, as deep.
        same_blocks: Whether both outermost stacks have the same blocks: then each stands for itself, and what one side
            does not have has no counterpart.

    Returns:
        `{(base block, target block): (part of the target block, part of the base block)}`.
    """
    base, target = sorted(base), sorted(target)
    if not base or not target:
        return {}
    if base[0] == ():
        return {((), ()): (Fraction(1), Fraction(1))}
    found = {}
    origins, copies = sorted({b[0] for b in base}), sorted({t[0] for t in target})
    for i, origin in enumerate(origins):
        for j, copy in enumerate(copies):
            common = min(Fraction(i + 1, len(origins)), Fraction(j + 1, len(copies)))
            common -= max(Fraction(i, len(origins)), Fraction(j, len(copies)))
            of_copy, of_origin = common * len(copies), common * len(origins)
            if same_blocks:
                of_copy = of_origin = Fraction(origin == copy)
            if of_copy <= 0:
                continue
            inner = overlapping([b[1:] for b in base if b[0] == origin], [t[1:] for t in target if t[0] == copy])
            for (b, t), (of_target, of_base) in inner.items():
                found[(origin, *b), (copy, *t)] = (of_copy * of_target, of_origin * of_base)
    return found


def names_of_kind(names: Iterable[str], kind: str) -> dict[tuple[int, ...], str]:
    """Find the names of a kind.

    Args:
        names: Names of tensors, modules or blocks.
        kind: A name with `*` in place of the indices of blocks.

    Returns:
        `{indices: name}`.
    """
    pattern = re.compile(r"\.".join(_INDEX if part == "*" else re.escape(part) for part in kind.split(".")))
    matches = ((pattern.fullmatch(name), name) for name in names)
    return {tuple(map(int, match.groups())): name for match, name in matches if match}


def stack_blocks(names: Iterable[str], kind: str) -> set[str]:
    """Find the blocks of a kind's outermost stack.

    Args:
        names: Names of all tensors, modules or blocks.
        kind: A name with `*` in place of the indices of blocks.

    Returns:
        Their indices, as names have them; empty if the kind lies in no stack.
    """
    container, is_stack, _ = kind.partition("*")
    return {name.removeprefix(container).partition(".")[0] for name in names if is_stack and name.startswith(container)}


def block_indices(name: str, kind: str) -> tuple[int, ...]:
    """Read the indices of blocks off a name.

    Args:
        name: A name.
        kind: Its kind.

    Returns:
        The indices, outermost stack first.
    """
    return tuple(int(part) for part, of_kind in zip(name.split("."), kind.split("."), strict=True) if of_kind == "*")


def with_indices(kind: str, indices: tuple[int, ...]) -> str:
    """Write indices of blocks into a kind.

    Args:
        kind: A name with `*` in place of the indices of blocks.
        indices: What to put there.

    Returns:
        The name.
    """
    left = iter(indices)
    return ".".join(str(next(left)) if part == "*" else part for part in kind.split("."))
