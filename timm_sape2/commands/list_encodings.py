"""The table of `timm-sape2 list --encodings`, computed from the encodings themselves."""

from typing import Any

import timm
import torch
from torch import Tensor

from ..models.flops import count_flops, count_parameters
from ..models.vit import PositionVisionTransformer
from ..positions import ENCODINGS
from .table import print_table

REFERENCE = 'vit_small_pos_nope'
CANVAS = (7, 9)
CONTENT = (3, 4)
TINY: dict[str, Any] = dict(
    patch_size=1, embed_dim=32, depth=2, num_heads=2, num_classes=0, class_token=False, global_pool='avg'
)


def show_encodings() -> None:
    """Print a table of all position encodings and of the models' default, two together."""
    rows = [('position', 'kind', 'translation', 'another grid', 'parameters', 'MFLOPs')]
    base_parameters, base_flops = measure_cost('nope')
    for position in [*ENCODINGS, 'learned+sape2']:
        parameters, flops = measure_cost(position)
        translation = describe_translation(position)
        fixed = 'none' if translation == 'none' else 'fixed'
        rows.append(
            (
                position,
                'learned' if parameters > base_parameters else fixed,
                translation,
                'as it is' if is_independent_of_grid(position) else 'resampled',
                f'{parameters - base_parameters:,}',
                f'{(flops - base_flops) / 1e6:.3g}',
            )
        )
    print_table(rows)


def measure_cost(position: str) -> tuple[int, int]:
    """Return the parameters of the reference model and its FLOPs for one image."""
    model = timm.create_model(REFERENCE, position=position, device='meta').eval()
    return count_parameters(model), count_flops(model)


def is_independent_of_grid(position: str) -> bool:
    """Tell whether a state dict has the same shapes for two image sizes."""
    models = [PositionVisionTransformer(grid, position=position, device='meta', **TINY) for grid in ((7, 9), (14, 14))]
    first, second = ({name: value.shape for name, value in model.state_dict().items()} for model in models)
    return first == second


@torch.no_grad()
def describe_translation(position: str) -> str:
    """Find out what moving content does to its features, with a random model in float64.

    There is no class token. Patches of content lie on an otherwise empty canvas that no token attends to, clear of its
    border. 'none': patches in another order keep their features. 'relative': they keep them when all are moved alike.
    'absolute': they do not, and the features of an image of one colour tell places apart. 'content-based': they do not,
    and those do not either, so positions come from what lies around. An encoding that is relative, yet tells places
    apart in an image of one colour, does so at the border and is 'relative inside'.

    Args:
        position: Names of encodings joined by '+'.

    Returns:
        One of the words above.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = random_model(position)
        content = torch.randn(1, 3, *CONTENT, dtype=torch.float64)
        order = torch.randperm(content[0, 0].numel())
    shuffled = content.flatten(2)[:, :, order].reshape(content.shape)
    features = features_at(model, content, (1, 1))
    if are_equal(features_at(model, shuffled, (1, 1)), features[:, order]):
        return 'none'
    is_relative = are_equal(features_at(model, content, (3, 4)), features)
    plain = model.forward_features(torch.ones(1, 3, *CANVAS, dtype=torch.float64))
    tells_places = not are_equal(plain, plain[:, :1].expand_as(plain))
    if is_relative:
        return 'relative inside' if tells_places else 'relative'
    return 'absolute' if tells_places else 'content-based'


def random_model(position: str) -> PositionVisionTransformer:
    """Create a small model of single pixels as patches, with large random weights so that positions matter."""
    model = PositionVisionTransformer(CANVAS, position=position, dtype=torch.float64, **TINY).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


def are_equal(first: Tensor, second: Tensor) -> bool:
    """Tell whether features are equal up to rounding (of positions in float32); they differ by 0.1 and more if not."""
    return torch.allclose(first, second, rtol=0, atol=1e-4)


def features_at(model: PositionVisionTransformer, content: Tensor, place: tuple[int, int]) -> Tensor:
    """Return the features (1, N, C) of content (1, 3, H, W) at a place on the canvas; the rest is not attended to."""
    rows, columns = (slice(start, start + size) for start, size in zip(place, content.shape[2:], strict=True))
    image = content.new_zeros(1, 3, *CANVAS)
    image[:, :, rows, columns] = content
    is_content = torch.zeros(CANVAS, dtype=torch.bool)
    is_content[rows, columns] = True
    is_content = is_content.flatten()
    return model.forward_features(image, attn_mask=is_content.expand(1, 1, len(is_content), -1))[:, is_content]
