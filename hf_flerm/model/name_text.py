"""Canonical names as texts. This module needs no model and does not load torch."""

from __future__ import annotations

from collections.abc import Iterable

_PEFT_PREFIX = "base_model.model."


def without_prefix(name: str) -> str:
    """Remove PEFT's prefix `base_model.model.` from a canonical name or a kind."""
    return name.removeprefix(_PEFT_PREFIX)


def preview(names: Iterable[str], limit: int = 5) -> str:
    """Format names for a message: the first `limit` of them, sorted, and the number of the others."""
    names = sorted(names)
    more = f", … {len(names) - limit} more" if len(names) > limit else ""
    return f"[{', '.join(names[:limit])}{more}]"
