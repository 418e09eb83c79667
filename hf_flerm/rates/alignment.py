"""Alignment of updates with the activations of linear layers, layer by layer.

For a linear layer with fan-in n, update U and input x: log_n(RMS(U x) / (RMS(U) RMS(x))), RMS over entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..engines import engine_of
from ..engines.engine import Engine
from ..model.isolation import undisturbed
from ..model.names import resolve_names
from .model_call import Batch
from .outputs import MeasuredOutput, OutputFunction
from .per_example.layers import LayerMap, layer_tangent
from .per_example.sites import owners


def log_alignments(
    model: nn.Module,
    updates: Mapping[str, Tensor],
    batches: Iterable[Batch],
    *,
    output: str | OutputFunction | None = None,
) -> dict[str, float]:
    """Measure the log-alignment of update and activations in every linear layer, using forward passes only.

    For a layer with fan-in n, update U and input x it is log_n(RMS(U x) / (RMS(U) RMS(x))): 1/2 if U and x are
    independent, 1 if they are aligned. muP assumes 1 for updates. Source: Everett et al., "Scaling Exponents Across
    Parameterizations and Optimizers" (arXiv 2407.05872).

    Args:
        model: Any `nn.Module`. It runs in eval mode and is left exactly as it was.
        updates: `{parameter name: update}`, names as for `measure_rates`; their size does not matter.
        batches: Dicts of model inputs, as for `measure_rates`. Padding is left out if the input of a layer has the
            shape of `attention_mask`.
        output: How the model is run; see `measure_rates`.

    Returns:
        `{canonical name: log-alignment}` of linear-layer weights with a fan-in above 1; nan for a layer that was not
        called, or whose update or input is 0.

    Raises:
        ValueError: If a name is unknown or there is no batch.
    """
    measured, engine = MeasuredOutput(output), engine_of(model)
    engine.release()
    paths = resolve_names(model, updates)
    by_name = dict(zip(paths, updates.values(), strict=True))
    layers = _linear_layers(model, paths, engine)
    # for each tensor: sum over rows of mean (U x)^2, the same of mean x^2, number of rows
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in layers}
    mask: Any = None

    def add(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
            (x,) = [value.detach() for value in (*args, *kwargs.values())]
            if isinstance(mask, Tensor) and mask.shape == x.shape[:-1]:
                x = x[mask.bool()]
            x = x.reshape(-1, x.shape[-1])
            _, tangent = layers[name]
            change = tangent(module, by_name[name].to(x), x)
            sizes = [value.float().square().mean(-1).sum().item() for value in (change, x)]
            sums[name] += torch.tensor([*sizes, float(len(x))], dtype=torch.float64)

        return hook

    device = next(model.parameters()).device
    empty = True
    with undisturbed(model, device), engine.released_after(), torch.no_grad():
        for batch in batches:
            empty = False
            sent = send_to_device(dict(batch), device)
            mask = sent.get("attention_mask")
            if not engine.sharded:
                measured.prepare(model, sent)
            with ExitStack() as hooks:
                for name, (modules, _) in layers.items():
                    for module in modules:
                        hooks.enter_context(module.register_forward_hook(add(name), with_kwargs=True))
                measured(model, sent)
    if empty:
        raise ValueError("there was no probe batch: batches is empty.")
    fan_in = {name: _fan_in(modules[0]) for name, (modules, _) in layers.items()}
    return {name: _log_alignment(sums[name], by_name[name], fan_in[name]) for name in layers if fan_in[name] > 1}


def _linear_layers(
    model: nn.Module, paths: Mapping[str, str], engine: Engine
) -> dict[str, tuple[list[nn.Module], LayerMap]]:
    """Return `{canonical name: (the linear layers that hold this weight, their (layer, U, x) -> U x)}`."""
    layers = {}
    for name, path in paths.items():
        holders = [
            model.get_submodule(site.module)
            for site in owners(model, model.get_parameter(path))
            if site.attribute == "weight"
        ]
        layer = layer_tangent(engine.own_type(holders[0]), "weight") if holders else None
        if layer is not None and all(isinstance(module, (nn.Linear, Conv1D)) for module in holders):
            layers[name] = holders, layer.tangent
    return layers


def _fan_in(module: Any) -> int:
    return int(module.in_features if isinstance(module, nn.Linear) else module.nx)


def _log_alignment(sums: Tensor, update: Tensor, fan_in: int) -> float:
    change, x, rows = sums.tolist()
    size = update.double().square().mean().item()
    if not change or not x or not size:
        return math.nan
    return 0.5 * math.log((change / rows) / (size * x / rows)) / math.log(fan_in)
