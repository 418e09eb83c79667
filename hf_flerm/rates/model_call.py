"""How a probe calls the model: as in training, but without labels unless the model needs them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

Batch = Mapping[str, Any]
LABELS = frozenset({"labels", "label", "label_ids", "num_items_in_batch"})
IGNORED_LABEL = -100  # of `cross_entropy`
# Columns from which an encoder-decoder reads its decoder inputs directly, without making them from the labels.
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_input_values")

_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# Methods of Transformers models that create decoder inputs from labels.
_SHIFTS = ("prepare_decoder_input_ids_from_labels", "_shift_right")
_TOKENS = ("decoder_start_token_id", "pad_token_id")
# Models that also create a mask of the decoder inputs from the labels.
_MASKS_TOO = ("EncoderDecoderModel", "Pix2StructForConditionalGeneration")


class OutputError(ValueError):
    """The requested output cannot be read from the model."""


class ModelCallError(ValueError):
    """The model cannot be run on a probe batch."""


def base_model(model: nn.Module) -> Any:
    """Return the model below a PEFT wrapper, or the model itself."""
    found: Any = model
    return found.get_base_model() if hasattr(found, "get_base_model") else found


@dataclass(frozen=True)
class Signature:
    """The arguments of a model's forward; for a PEFT model, together with those of the wrapped model.

    Attributes:
        named: Arguments that can be passed by keyword.
        required: Those of them without a default.
        takes_any: Whether forward accepts any other keyword.
    """

    named: frozenset[str]
    required: frozenset[str]
    takes_any: bool

    @classmethod
    def of(cls, model: nn.Module) -> Signature:
        """Read the signature from the class, because a `forward` that was patched on the instance may hide it."""
        named: set[str] = set()
        required: set[str] = set()
        takes_any = True
        for module in dict.fromkeys((model, base_model(model))):
            try:
                parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
                patched = inspect.signature(module.forward).parameters.values()
            except (TypeError, ValueError):  # a ScriptModule
                return cls(frozenset(), frozenset(), takes_any=True)
            named |= {p.name for p in (*parameters, *patched) if p.kind in _BY_KEYWORD}
            required = {p.name for p in parameters if p.kind in _BY_KEYWORD and p.default is p.empty}
            takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return cls(frozenset(named), frozenset(required), takes_any)

    def accepts(self, name: str) -> bool:
        """Whether forward accepts a keyword."""
        return self.takes_any or name in self.named


def candidate_exclusions(model: nn.Module, batch: Batch) -> list[frozenset[str]]:
    """Return candidate sets of columns to leave out of a call of the model, the preferred set first.

    Columns that forward does not accept are always left out: the Trainer drops them, or the user's `compute_loss`
    takes them out of the batch. Labels are left out unless forward needs them.

    Args:
        model: The model.
        batch: A training batch; it may have columns that are no inputs of the model.

    Returns:
        Distinct sets of names, at least one.
    """
    signature = Signature.of(model)
    refused = frozenset(name for name in batch if not signature.accepts(name))
    unnamed = frozenset(name for name in batch if name not in signature.named)
    labels = LABELS & batch.keys()
    candidates = [refused | labels, unnamed | labels, refused, unnamed]
    if labels & signature.required or _shifts_labels_itself(model, batch, signature):
        candidates = [refused, unnamed]
    return [names for names in dict.fromkeys(candidates) if not batch.keys() <= names] or [labels]


def call_inputs(model: nn.Module, batch: Batch, left_out: frozenset[str]) -> dict[str, Any]:
    """Return the keyword arguments of a call of the model.

    Args:
        model: The model.
        batch: A training batch.
        left_out: Names of the columns that are left out of the call.

    Returns:
        The remaining columns; the decoder inputs, if the labels that the model makes them from are left out; and
        `use_cache=False`, if the model can cache.

    Raises:
        OutputError: If the decoder inputs cannot be made from the labels.
    """
    inputs = {name: value for name, value in batch.items() if name not in left_out}
    signature = Signature.of(model)
    if "labels" in left_out and makes_decoder_inputs(model, batch) and signature.accepts("decoder_input_ids"):
        inputs["decoder_input_ids"] = _decoder_inputs(base_model(model), batch)
    if hasattr(getattr(model, "config", None), "use_cache") and signature.accepts("use_cache"):
        inputs["use_cache"] = False
    return inputs


def generates(model: nn.Module) -> bool:
    """Whether a model can generate, according to its `can_generate`; False for a model without that method."""
    can_generate = getattr(base_model(model), "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else False


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether outputs lie along the decoder's positions: the model is an encoder-decoder and not a classifier."""
    config = getattr(model, "config", None)
    predicts = generates(model) or not hasattr(base_model(model), "can_generate")
    return bool(getattr(config, "is_encoder_decoder", False)) and predicts


def makes_decoder_inputs(model: nn.Module, batch: Batch) -> bool:
    """Whether training makes the decoder inputs from the labels.

    An encoder-decoder does so if the labels have one entry per decoder position and the batch has no decoder inputs.
    """
    labels = batch.get("labels")
    return (
        is_encoder_decoder(model)
        and isinstance(labels, Tensor)
        and labels.ndim > 1
        and not any(name in batch for name in _DECODER_INPUTS)
    )


def missing_tokens(model: nn.Module, batch: Batch) -> str:
    """Return an error message if decoder inputs are made from labels and the config lacks a token for it; else ""."""
    config = base_model(model).config if makes_decoder_inputs(model, batch) else None
    missing = [name for name in _TOKENS if hasattr(config, name) and getattr(config, name) is None]
    if not missing:
        return ""
    return (
        f"{type(base_model(model)).__name__} makes its decoder inputs from the labels, with tokens that its config "
        f"does not set: {' and '.join(missing)} is None. Set model.config.{missing[0]} (often the tokenizer's pad or "
        "bos token), or give the batches decoder_input_ids."
    )


def _shifts_labels_itself(model: nn.Module, batch: Batch, signature: Signature) -> bool:
    """Whether only a call with labels makes the decoder inputs as in training, because the rule is not accessible."""
    if not makes_decoder_inputs(model, batch) or not signature.accepts("labels"):
        return False
    base, labels = base_model(model), batch["labels"]
    if type(base).__name__ in _MASKS_TOO or not generates(model) or not signature.accepts("decoder_input_ids"):
        return True
    if any(callable(getattr(base, name, None)) for name in _SHIFTS):
        return False
    return labels.ndim != 2 or labels.is_floating_point() or base.config.decoder_start_token_id is None


def _decoder_inputs(model: Any, batch: Batch) -> Tensor:
    """Shift the labels with the model's method; without one, as most models do: start token, then labels."""
    labels = batch["labels"].clone()  # the method may write into them
    try:
        for name in _SHIFTS:
            if callable(getattr(model, name, None)):
                shifted: Tensor = getattr(model, name)(labels)
                return shifted
        shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=model.config.decoder_start_token_id)
        return shifted.masked_fill(shifted == IGNORED_LABEL, model.config.pad_token_id)
    except (RuntimeError, TypeError, ValueError) as error:
        raise OutputError(missing_tokens(model, batch) or f"the decoder inputs cannot be made: {error!r}") from error
