"""How a probe calls the model: as training does, but without labels where the model can do without them."""

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
# What an encoder-decoder reads in place of decoder inputs made of the labels.
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_input_values")


_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# Methods of Transformers' models that make decoder inputs of labels.
_SHIFTS = ("prepare_decoder_input_ids_from_labels", "_shift_right")
_TOKENS = ("decoder_start_token_id", "pad_token_id")
# Models that make a mask of the decoder's inputs, too, when they make them of labels.
_MASKS_TOO = ("EncoderDecoderModel", "Pix2StructForConditionalGeneration")


class OutputError(ValueError):
    """The outputs that are asked for cannot be taken from the model."""


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
        named: Arguments with a name.
        required: Named arguments without a default.
        takes_any: Whether any other keyword is accepted, too.
    """

    named: frozenset[str]
    required: frozenset[str]
    takes_any: bool

    @classmethod
    def of(cls, model: nn.Module) -> Signature:
        """Read the signature from the class: a forward that others put on the instance may not show it."""
        named: set[str] = set()
        required: set[str] = set()
        takes_any = True
        for module in dict.fromkeys((model, base_model(model))):
            try:
                parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
                own = inspect.signature(module.forward).parameters.values()
            except (TypeError, ValueError):  # a ScriptModule
                return cls(frozenset(), frozenset(), takes_any=True)
            named |= {p.name for p in (*parameters, *own) if p.kind in _BY_KEYWORD}
            required = {p.name for p in parameters if p.kind in _BY_KEYWORD and p.default is p.empty}
            takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return cls(frozenset(named), frozenset(required), takes_any)

    def accepts(self, name: str) -> bool:
        """Return whether forward takes a keyword."""
        return self.takes_any or name in self.named


def ways_to_call(model: nn.Module, batch: Batch) -> list[frozenset[str]]:
    """Return the ways in which a model may be called on a batch, the preferred one first.

    A way is the set of columns that are left out of the call. Columns that forward does not take are always left out:
    the Trainer drops them, or the user's `compute_loss` takes them out. Labels are left out unless forward needs them.

    Args:
        model: The model.
        batch: Its inputs, with whatever else is in a training batch.

    Returns:
        Sets of names, each another one.
    """
    signature = Signature.of(model)
    refused = frozenset(name for name in batch if not signature.accepts(name))
    unnamed = frozenset(name for name in batch if name not in signature.named)
    labels = LABELS & batch.keys()
    ways = [refused | labels, unnamed | labels, refused, unnamed]
    if labels & signature.required or _shifts_labels_itself(model, batch, signature):
        ways = [refused, unnamed]
    return [way for way in dict.fromkeys(ways) if not batch.keys() <= way] or [labels]


def call_inputs(model: nn.Module, batch: Batch, left_out: frozenset[str]) -> dict[str, Any]:
    """Return the keywords that a model is called with.

    Args:
        model: The model.
        batch: A training batch.
        left_out: Names of the columns that are left out of the call.

    Returns:
        The other columns; the decoder's inputs, if labels that make them are left out; and `use_cache=False`, if the
        model may cache.

    Raises:
        OutputError: If the decoder's inputs cannot be made of the labels.
    """
    inputs = {name: value for name, value in batch.items() if name not in left_out}
    signature = Signature.of(model)
    if "labels" in left_out and makes_decoder_inputs(model, batch) and signature.accepts("decoder_input_ids"):
        inputs["decoder_input_ids"] = _decoder_inputs(base_model(model), batch)
    if hasattr(getattr(model, "config", None), "use_cache") and signature.accepts("use_cache"):
        inputs["use_cache"] = False
    return inputs


def generates(model: nn.Module) -> bool:
    """Return whether a model predicts tokens one after the other, as far as it tells; a wrapper may not."""
    can_generate = getattr(base_model(model), "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else False


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether outputs lie along the decoder's positions: an encoder-decoder that is no classifier."""
    config = getattr(model, "config", None)
    predicts = generates(model) or not hasattr(base_model(model), "can_generate")
    return bool(getattr(config, "is_encoder_decoder", False)) and predicts


def makes_decoder_inputs(model: nn.Module, batch: Batch) -> bool:
    """Return whether training makes the decoder's inputs of the labels.

    It does so in an encoder-decoder with one label for each position of its decoder, unless the batch brings decoder
    inputs.
    """
    labels = batch.get("labels")
    return (
        is_encoder_decoder(model)
        and isinstance(labels, Tensor)
        and labels.ndim > 1
        and not any(name in batch for name in _DECODER_INPUTS)
    )


def missing_tokens(model: nn.Module, batch: Batch) -> str:
    """Return what to set in the config, if decoder inputs are made of labels and a token for it is None; else ""."""
    config = base_model(model).config if makes_decoder_inputs(model, batch) else None
    missing = [name for name in _TOKENS if hasattr(config, name) and getattr(config, name) is None]
    if not missing:
        return ""
    return (
        f"{type(base_model(model)).__name__} makes its decoder's inputs of the labels, by tokens that its config does "
        f"not set: {' and '.join(missing)} is None. Set model.config.{missing[0]} (often the tokenizer's pad or bos "
        "token), or give the batches decoder_input_ids."
    )


def _shifts_labels_itself(model: nn.Module, batch: Batch, signature: Signature) -> bool:
    """Whether only a call with labels makes the decoder's inputs as training does: nothing tells the model's rule."""
    if not makes_decoder_inputs(model, batch) or not signature.accepts("labels"):
        return False
    base, labels = base_model(model), batch["labels"]
    if type(base).__name__ in _MASKS_TOO or not generates(model) or not signature.accepts("decoder_input_ids"):
        return True
    told = any(callable(getattr(base, name, None)) for name in _SHIFTS)
    return not told and (labels.ndim != 2 or labels.is_floating_point() or base.config.decoder_start_token_id is None)


def _decoder_inputs(model: Any, batch: Batch) -> Tensor:
    """Shift the labels by the model's own rule; without one, by the rule of most models: start token, then labels."""
    labels = batch["labels"].clone()  # a rule may write into them
    try:
        for name in _SHIFTS:
            if callable(getattr(model, name, None)):
                shifted: Tensor = getattr(model, name)(labels)
                return shifted
        shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=model.config.decoder_start_token_id)
        return shifted.masked_fill(shifted == -100, model.config.pad_token_id)
    except (RuntimeError, TypeError, ValueError) as error:
        raise OutputError(missing_tokens(model, batch) or f"no decoder inputs can be made: {error!r}") from error
