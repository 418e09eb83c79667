"""Layers whose output is linear in a parameter, with their tangent (the derivative along an update) in closed form.

Axes: n an example, t a position, i input features, o output features. The layer maps x [n, t, i] to y [n, t, o] with a
parameter W, and U is the update of W. T = d y / d W . U [n, t, o] is the tangent; g [n, t, o] is the output gradient
d phi / d y. Then D phi_n = sum_to g[n, t, o] T[n, t, o].

To add a layer type, add an entry to `LINEAR_LAYERS`: the layer's class and the name of its parameter, and the
function (layer, U, x) -> T. The layer must have one input and be linear in that parameter. The entry is a shortcut,
not a requirement: a layer without an entry is differentiated in forward mode (`tangents.py`), which is slower but
always correct.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LayerMap = Callable[[Any, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LayerTangent:
    """How the output of a layer type changes with one of its parameters.

    Attributes:
        tangent: (layer, U, x) -> T.
        adjoint: (layer, U, g) -> U^T g [n, t, i], with <U^T g, x> = <g, T>: cheaper than T if the input is no wider
            than the output.
    """

    tangent: LayerMap
    adjoint: LayerMap | None = None


# T = U for all examples and positions, so nothing is saved from the forward pass.
BIAS = LayerTangent(lambda layer, update, x: update)

LINEAR_LAYERS: dict[tuple[type[nn.Module], str], LayerTangent] = {
    (nn.Linear, "weight"): LayerTangent(
        lambda layer, update, x: F.linear(x, update.to(x.dtype)),
        lambda layer, update, grad: grad @ update.to(grad.dtype).conj(),
    ),
    (nn.Linear, "bias"): BIAS,
    (Conv1D, "weight"): LayerTangent(  # of Transformers: a linear layer with its weight as [i, o]
        lambda layer, update, x: x @ update.to(x.dtype),
        lambda layer, update, grad: grad @ update.to(grad.dtype).T.conj(),
    ),
    (Conv1D, "bias"): BIAS,
    (nn.Embedding, "weight"): LayerTangent(lambda layer, update, x: F.embedding(x, update)),
    (nn.LayerNorm, "weight"): LayerTangent(
        lambda layer, update, x: F.layer_norm(x, layer.normalized_shape, update.to(x.dtype), None, layer.eps)
    ),
    (nn.LayerNorm, "bias"): BIAS,
}


def layer_tangent(layer_type: type[nn.Module], attribute: str) -> LayerTangent | None:
    """Return the entry of `LINEAR_LAYERS` for exactly this type (not for its subclasses); None if it has none."""
    return LINEAR_LAYERS.get((layer_type, attribute))
