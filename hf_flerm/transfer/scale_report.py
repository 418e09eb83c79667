"""What a matched run tells about its scales while it runs: a warning of large ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

from transformers.utils import logging

logger = logging.get_logger(__name__)

LARGE = 10.0  # a scale above this, or below 1 / this, is reported


class LargeScales:
    """Warns of scales above 10 or below 1/10, once for each kind of tensor."""

    def __init__(self) -> None:
        self._reported: set[str] = set()

    def warn(self, scales: Mapping[str, float], wanted: Mapping[str, float], measured: Mapping[str, float]) -> None:
        """Warn of the kinds whose scale has become large, with the rates that it comes from.

        Args:
            scales: `{kind of tensor: factor on the learning rate}`.
            wanted: `{kind: rate}` of the base; a kind may be missing.
            measured: `{kind: rate}` of this run; a kind may be missing.
        """
        large = {kind: scale for kind, scale in scales.items() if not 1 / LARGE <= scale <= LARGE}
        new = {kind: scale for kind, scale in sorted(large.items()) if kind not in self._reported}
        if not new:
            return
        self._reported |= new.keys()
        reasons = [
            f"- {kind}: {scale:.3g} (rate in the base {wanted.get(kind, math.nan):.3g}, "
            f"in this run {measured.get(kind, math.nan):.3g})"
            for kind, scale in new.items()
        ]
        logger.warning(
            f"learning-rate scales are above {LARGE:g} or below 1/{LARGE:g}:\n"
            + "\n".join(reasons)
            + "\nThis is expected if the initialization sets how far a tensor moves the outputs: another rank with "
            "LoRA's 'gaussian' initialization needs 20 to 40, and so may another initialization scale or optimizer; or "
            "if a published rule says so (muP at more than 10 times the width). If nothing like this differs, base and "
            "target may not be comparable; max_scale limits the scales."
        )
