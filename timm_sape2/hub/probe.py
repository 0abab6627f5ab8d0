"""The probe: an image that is stored with a model, and the logits that the model must give for it."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from ..trained.opening import TrainedModel
from ..trained.prediction import image_mode

PROBE = 'probe.png'
TOLERANCE = 1e-3  # of the largest logit: other machines and versions of torch round in another way
NUM_LOGITS = 10


def make_probe(trained: TrainedModel) -> Image.Image:
    """Make an image of smooth random colors, the same for each model of an input size."""
    channels, height, width = trained.data_config['input_size']
    if channels not in (1, 3):
        raise ValueError(f'the model takes {channels} channels, but images have 1 or 3')
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return image.convert('L' if channels == 1 else 'RGB')


@torch.inference_mode()
def probe_logits(trained: TrainedModel, image: Image.Image) -> torch.Tensor:
    """Return the logits (K,) of an image, on the CPU in float32."""
    transform = create_transform(**trained.data_config, is_training=False)
    model = trained.model.to('cpu', torch.float32).eval()
    return model(transform(image.convert(image_mode(trained)))[None])[0]


def highest_logits(logits: torch.Tensor) -> dict[int, float]:
    """Return the highest logits by the number of their class, as a model card shows them."""
    values, indices = logits.topk(min(NUM_LOGITS, len(logits)))
    return {index: round(value, 6) for index, value in zip(indices.tolist(), values.tolist(), strict=True)}


def largest_difference(logits: torch.Tensor, expected: dict[int, Any]) -> float:
    """Return the largest difference from the logits of a model card, as a share of the largest of those.

    Raises:
        ValueError: If the card has no logits, or some for classes that the model does not have.
    """
    try:
        wanted = torch.tensor([float(value) for value in expected.values()])
        found = logits[[int(index) for index in expected]]
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise ValueError('the model card has no logits of the probe image that the model could have') from error
    if not len(wanted):
        raise ValueError('the model card has no logits of the probe image')
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
