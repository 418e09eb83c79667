"""Training engines: how a process holds weights and param groups (whole, in FSDP2's shards or in ZeRO's partitions).

No code outside this folder names an engine. `engine_of(model)` returns the engine of a model, and code that depends on
it calls its methods. `engine.py` defines the interface and the plain engine; `fsdp2.py`, `zero.py` and `zero3.py`
override the methods in which they differ. To add an engine, write a subclass of `Engine` (and of `MasterWeights`, if
the optimizer does not step the model's parameters) and put it into `_ENGINES`, before every engine whose `runs` is also
true for its models.
"""

from __future__ import annotations

from torch import nn

from .engine import Engine
from .fsdp2 import FSDP2
from .zero import DeepSpeed
from .zero3 import ZeRO3

_ENGINES: tuple[type[Engine], ...] = (ZeRO3, DeepSpeed, FSDP2, Engine)  # the first whose `runs` is true


def engine_of(model: nn.Module) -> Engine:
    """Choose the engine that holds the weights of a model.

    Args:
        model: The model as its own class, not wrapped by Accelerate, DDP or `torch.compile`.

    Returns:
        The engine. It stays valid until the model is moved to another engine.
    """
    return next(engine for engine in _ENGINES if engine.runs(model))(model)
