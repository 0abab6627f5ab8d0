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
        ValueError: It cannot be created, or is not one of this package.
    """
    problem = f'cannot create {model_name} with {variant.name}'
    model = create_at_setting(model_name, setting, device, problem, position=variant.position)
    if not isinstance(model, PositionVisionTransformer):
        raise ValueError(f"--model {model_name} has no exchangeable position encoding; 'timm-sape2 list' shows those")
    if variant.implementation == 'reference':
        use_reference(model)
    return model


def create_at_setting(name: str, setting: str, device: torch.device, problem: str, **kwargs: Any) -> Any:
    """Create any model of timm with another image and patch size.

    Raises:
        ValueError: There is no such model, or it does not take the arguments; the message begins with the `problem`.
    """
    image, patch = image_and_patch(setting)
    try:
        return timm.create_model(name, img_size=image, patch_size=patch, device=device, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f'{problem} at {setting}: {error}') from error


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
