"""Whether a model has the position encoding that weights were trained with: one rule for all who open weights.

Encodings may have no parameters (`rope`, `sincos`), or the same ones whatever their options are, so that loading does
not notice.
"""

import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias

import timm
from timm.layers import RotaryEmbeddingCat
from timm.models import is_model_in_modules
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..models.vit import PositionVisionTransformer
from ..positions import ENCODINGS, valid_options
from .config import MODULE

Encodings: TypeAlias = dict[str, dict[str, Any]]
"""Options by name, without those that may differ after training; {} is no encoding."""

MODULES = [MODULE, 'vision_transformer', 'eva']  # models whose encodings are known


def encodings_of(model: nn.Module) -> Encodings | None:
    """Return the position encodings of a model, None if it is not one whose encodings are known here.

    timm's vision transformers have 'learned' embeddings or none, its rotary ones 'rope' or 'rope_mixed'.
    """
    if isinstance(model, PositionVisionTransformer):
        options: Any = model.position_options
        return {name: _in_full(name, given) for name, given in options.items() if name != 'nope'}
    learned: Encodings = {} if getattr(model, 'pos_embed', None) is None else {'learned': {}}
    if type(model) is VisionTransformer:
        return learned
    if type(model) is Eva and isinstance(model.rope, RotaryEmbeddingCat):
        return {**learned, 'rope': {}}
    if type(model) is Eva and model.rope_mixed:
        return {**learned, 'rope_mixed': {}}
    return None


def encodings_by_name(model_name: str | None, model_kwargs: Mapping[str, Any]) -> Encodings | None:
    """Return the position encodings of a model that is not built yet.

    Raises:
        ValueError: The model cannot be built with these arguments.
    """
    if model_name is None or not is_model_in_modules(model_name.partition('.')[0], MODULES):
        return None
    try:
        return encodings_of(timm.create_model(model_name, **{**model_kwargs, 'device': 'meta'}))
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(str(error)) from error


def check_encodings(trained: Encodings | None, asked: Encodings | None, may_add: bool = False) -> list[str]:
    """Compare the position encodings of weights and of a model. The order of the names does not matter.

    Args:
        trained: Those that the weights were trained with; None, if it is not known, passes.
        asked: Those of the model; None passes.
        may_add: The model is going to be trained, and may have encodings that are new to the weights.

    Returns:
        Names of the encodings that are new.

    Raises:
        ValueError: If the model computes something else than what was trained; the message names the way out.
    """
    if trained is None or asked is None:
        return []
    added = [name for name in asked if name not in trained]
    if trained.keys() - asked.keys() or (added and not may_add):
        keeps = f"; position='{'+'.join([*trained, *added])}' keeps what was trained" if may_add else ''
        raise ValueError(f"it was trained with position='{_joined(trained)}', not '{_joined(asked)}'{keeps}")
    changed = [
        f'{name} {option}={trained[name][option]!r}, not {value!r}'
        for name in trained
        for option, value in asked[name].items()
        if option in trained[name] and trained[name][option] != value
    ]
    if changed:
        raise ValueError(f'it was trained with {", ".join(changed)}')
    return added


def _in_full(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an encoding with its defaults, without those that may differ after training."""
    parameters = inspect.signature(ENCODINGS[name].__init__).parameters
    compared = set(valid_options(name)) - set(ENCODINGS[name].options_after_training)
    return {option: given.get(option, parameters[option].default) for option in sorted(compared)}


def _joined(encodings: Encodings) -> str:
    return '+'.join(encodings) or 'nope'
