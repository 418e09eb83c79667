"""Where weights and param groups really lie: on one device, replicated (DDP), in FSDP2's shards, in ZeRO's partitions.

Nothing outside this folder knows an engine by name. `engine_of(model)` chooses one, and its methods answer what depends
on it; `engine.py` is the contract and the plain engine, `fsdp2.py` and `zero.py` override what differs there. To add an
engine, write a subclass of `Engine`, and of `MasterWeights` if its optimizer steps something other than the model's
parameters, and put it into `_ENGINES`.
"""

from __future__ import annotations

from torch import nn

from .engine import Engine
from .fsdp2 import FSDP2
from .zero import DeepSpeed
from .zero3 import ZeRO3

_ENGINES: tuple[type[Engine], ...] = (ZeRO3, DeepSpeed, FSDP2, Engine)  # the first that runs the model


def engine_of(model: nn.Module) -> Engine:
    """Choose the engine that holds the weights of a model.

    Args:
        model: The model as its own class, not wrapped by Accelerate, DDP or `torch.compile`.

    Returns:
        Its engine, to be asked for as long as the model is not moved to another one.
    """
    return next(engine for engine in _ENGINES if engine.runs(model))(model)
