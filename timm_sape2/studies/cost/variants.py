"""Models to compare: position encodings by name, and the way in which SaPE2 is computed."""

from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from ...models.vit import PositionVisionTransformer
from ...positions import Positions, parse_position
from .settings import image_and_patch

IMPLEMENTATIONS = {
    'reference': 'SaPE2 in plain PyTorch with a stored bias',
    'compiled': 'the model under torch.compile',
}


class Variant(NamedTuple):
    """A position encoding, and an implementation out of `IMPLEMENTATIONS` or ''."""

    name: str
    position: str
    implementation: str


def parse_variant(name: str) -> Variant:
    """Split a name such as 'learned+sape2:reference'.

    Raises:
        ValueError: An encoding or an implementation is unknown, or the implementation is not one of that encoding.
    """
    position, colon, implementation = name.partition(':')
    encodings = parse_position(position)
    there_are = [x for x in IMPLEMENTATIONS if 'sape2' in encodings or x == 'compiled']
    if colon and implementation not in there_are:
        raise ValueError(f'{name}: {position} has no implementation {implementation!r}, only {", ".join(there_are)}')
    return Variant(name, position, implementation)


def create_variant(model_name: str, variant: Variant, setting: str, device: torch.device) -> Any:
    """Create a model with another position encoding, image and patch size, not compiled yet.

    Raises:
        ValueError: The setting is not IMAGE/PATCH or cannot be, or the model is not one of this package.
    """
    try:
        model = create_timm_model(model_name, setting, device, position=variant.position)
    except ValueError as error:
        raise ValueError(f'cannot create {model_name} with {variant.name} at {setting}: {error}') from error
    if not isinstance(model, PositionVisionTransformer):
        raise ValueError(f"--model {model_name} has no exchangeable position encoding; 'timm-sape2 list' shows those")
    if variant.implementation == 'reference':
        use_reference(model)
    return model


def create_baseline(name: str, setting: str, device: torch.device) -> Any:
    """Create any model of timm with another image and patch size.

    Raises:
        ValueError: There is no such model, or it cannot take these sizes.
    """
    try:
        return create_timm_model(name, setting, device)
    except ValueError as error:
        raise ValueError(f'--baseline: cannot create {name} at {setting}: {error}') from error


def create_timm_model(name: str, setting: str, device: torch.device, **kwargs: Any) -> Any:
    """Create a model of timm at a setting; all that can be wrong becomes a ValueError."""
    image, patch = image_and_patch(setting)
    try:
        return timm.create_model(name, img_size=image, patch_size=patch, device=device, **kwargs)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(str(error)) from error


def use_reference(model: nn.Module) -> None:
    """Let attention store the biases of position encodings, in place of implementations that need not."""
    for module in model.modules():
        if isinstance(module, Positions):
            module.fused_encoding = ''


def draw_tables(model: nn.Module, std: float) -> None:
    """Draw SaPE2's tables anew from a normal distribution."""
    for name, parameter in model.named_parameters():
        if '.sape2.' in name and name.endswith('_table'):
            nn.init.normal_(parameter, std=std)
