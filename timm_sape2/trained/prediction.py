"""The most likely classes of images, and a contact sheet to look at them."""

import glob
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from timm.data import create_transform
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from .opening import TrainedModel

TILE = 160  # pixels, side of an image on the contact sheet
LINE = 15  # pixels, height of a line of text
MOST_IMAGES = 1000


def find_images(sources: Iterable[str]) -> list[Path]:
    """Return the images that files, folders (with all below them) and glob patterns name, each once.

    Raises:
        ValueError: If one of them names no image.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source)
        if path.is_file():
            matches = [path]
        else:
            inside = path.rglob('*') if path.is_dir() else map(Path, glob.glob(source, recursive=True))
            matches = sorted(file for file in inside if file.is_file() and file.suffix.lower() in IMG_EXTENSIONS)
        if not matches:
            raise ValueError(f'no image: {source}')
        found.update(dict.fromkeys(matches))
    return list(found)


@torch.inference_mode()
def predict(
    trained: TrainedModel,
    paths: Sequence[Path],
    top_k: int = 5,
    batch_size: int = 64,
    device: str = 'cpu',
) -> Iterator[dict[str, Any]]:
    """Yield the most likely classes of each image.

    Args:
        trained: The model; it is moved to the device.
        paths: The images.
        top_k: How many classes, at most those that there are.
        batch_size: Images in a batch.
        device: Where to compute.

    Yields:
        'image' (the path) and 'classes': 'index', 'name' (None without names) and 'probability', likeliest first.

    Raises:
        ValueError: If an image cannot be read.
    """
    model, transform = trained.model.to(device), create_transform(**trained.data_config, is_training=False)
    mode = {1: 'L', 3: 'RGB'}[trained.data_config['input_size'][0]]
    names = trained.class_names
    with tqdm(total=len(paths), desc='Predicting', unit=' images', leave=False, dynamic_ncols=True) as bar:
        for start in range(0, len(paths), batch_size):
            chosen = paths[start : start + batch_size]
            batch = torch.stack([transform(read_image(path, mode)) for path in chosen])
            top = model(batch.to(device)).softmax(-1).topk(min(top_k, model.num_classes))
            for path, indices, values in zip(chosen, top.indices.tolist(), top.values.tolist(), strict=True):
                yield {
                    'image': str(path),
                    'classes': [
                        {'index': index, 'name': names and names[index], 'probability': value}
                        for index, value in zip(indices, values, strict=True)
                    ],
                }
            bar.update(len(chosen))


def read_image(path: Path, mode: str) -> Image.Image:
    """Read an image whole, in a mode of PIL.

    Raises:
        ValueError: If it is none, or truncated.
    """
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f'{path} cannot be read as an image: {error}') from error


def contact_sheet(predictions: Sequence[dict[str, Any]], columns: int = 5, classes: int = 3) -> Image.Image:
    """Draw images with their likeliest classes below them.

    Args:
        predictions: What `predict` yields.
        columns: Images beside each other.
        classes: Classes to write below an image.

    Raises:
        ValueError: If there are too many images to look at.
    """
    check_contact_sheet(len(predictions))
    classes = min(classes, len(predictions[0]['classes']))
    columns = min(columns, len(predictions))
    height = TILE + (classes + 1) * LINE + 10
    sheet = Image.new('RGB', (columns * (TILE + 10) + 10, math.ceil(len(predictions) / columns) * height + 10), 'white')
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for index, prediction in enumerate(predictions):
        x, y = 10 + index % columns * (TILE + 10), 10 + index // columns * height
        with Image.open(prediction['image']) as image:
            resampling = Image.Resampling.LANCZOS if max(image.size) > TILE else Image.Resampling.NEAREST
            tile = ImageOps.pad(image.convert('RGB'), (TILE, TILE), resampling, color='whitesmoke')
        sheet.paste(tile, (x, y))
        lines = [Path(prediction['image']).name]
        lines += [f'{c["probability"]:6.1%} {class_label(c)}' for c in prediction['classes'][:classes]]
        for row, line in enumerate(lines):
            text = textwrap.shorten(line, 26, placeholder='...') if ' ' in line.strip() else line[:26]
            draw.text((x, y + TILE + 2 + row * LINE), text, 'gray' if row == 0 else 'black', font)
    return sheet


def check_contact_sheet(num_images: int) -> None:
    """Raise a ValueError if a contact sheet would have too many images."""
    if num_images > MOST_IMAGES:
        raise ValueError(f'a contact sheet has room for {MOST_IMAGES} images, not for {num_images}')


def class_label(entry: dict[str, Any]) -> str:
    """Return the name of a predicted class, or its number if it has none."""
    return entry['name'] if entry['name'] is not None else f'class {entry["index"]}'
