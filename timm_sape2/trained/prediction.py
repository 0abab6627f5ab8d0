"""The most likely classes of images, and a contact sheet to look at them."""

import glob
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.data import create_transform
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from .opening import TrainedModel, as_trained, evaluation_mode

TILE = 160  # pixels, side of an image on the contact sheet
LINE = 15  # pixels, height of a line of text
COLUMNS = 5  # of the contact sheet
MOST_IMAGES = 1000

AnImage = str | Path | Image.Image
"""A file, or an image of PIL."""


@dataclass(frozen=True)
class ClassProbability:
    """A class that an image may have: its number, its name (None if the classes have none), and how likely it is."""

    index: int
    name: str | None
    probability: float

    @property
    def label(self) -> str:
        """The name, or the number if there is none."""
        return self.name if self.name is not None else f'class {self.index}'


@dataclass(frozen=True)
class Prediction:
    """An image, by its path if it came from a file, and its likeliest classes, the likeliest first."""

    image: str | Image.Image
    classes: list[ClassProbability]

    @property
    def title(self) -> str:
        """The path of the image, or its size if it has none."""
        return self.image if isinstance(self.image, str) else f'image of {self.image.width}x{self.image.height}'

    def __str__(self) -> str:
        return f'{self.title}: {", ".join(f"{entry.label} {entry.probability:.1%}" for entry in self.classes)}'


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
    model: Any,
    images: AnImage | Iterable[AnImage],
    top_k: int = 5,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    unreadable: Callable[[ValueError], object] | None = None,
) -> list[Prediction]:
    """Find the most likely classes of images. This is what `timm-sape2 predict` does.

    Example:
        >>> model = timm.create_model('hf-hub:OWNER/NAME', pretrained=True)
        >>> for prediction in timm_sape2.predict(model, ['cat.jpg', 'dog.jpg'], top_k=2):
        ...     print(prediction)
        cat.jpg: cat 93.1%, fox 2.0%
        dog.jpg: dog 80.4%, cat 11.9%

    Args:
        model: A model of timm, which is left in the mode that it is in; or a checkpoint, the folder of a run (its last
            checkpoint), a folder with config.json, or 'OWNER/NAME' on the Hub.
        images: Files or images of PIL, one or several. The model says how they are resized, cropped and normalized.
        top_k: How many classes, at most those that there are.
        batch_size: Images in a batch.
        device: Where to compute, and where the model is afterwards; by default where it is.
        unreadable: Called with the error of an image that cannot be read, which is left out. Without it, the error is
            raised.

    Returns:
        A prediction for each image, in their order.

    Raises:
        OSError: If the checkpoint cannot be read.
        ValueError: If the model is none of timm, has no classes or does not open, or an image cannot be read and
            `unreadable` is not given.
    """
    trained = as_trained(model)
    if trained.model.num_classes < 1:
        raise ValueError('the model has no classes to predict: create it with num_classes=N')
    mode = image_mode(trained)
    model, transform = trained.model.to(device), create_transform(**trained.data_config, is_training=False)
    images = [images] if isinstance(images, AnImage) else list(images)
    names, weight = trained.class_names, next(model.parameters())
    found = []
    bar = tqdm(total=len(images), desc='Predicting', unit=' images', leave=False, dynamic_ncols=True, disable=None)
    with bar, evaluation_mode(model):
        for start in range(0, len(images), batch_size):
            chosen, inputs = [], []
            for image in images[start : start + batch_size]:
                bar.update()
                try:
                    inputs.append(transform(read_image(image, mode)))
                except ValueError as error:
                    if unreadable is None:
                        raise
                    unreadable(error)
                else:
                    chosen.append(image if isinstance(image, Image.Image) else str(image))
            if not inputs:
                continue
            logits = model(torch.stack(inputs).to(weight.device, weight.dtype))
            top = logits.float().softmax(-1).topk(min(top_k, model.num_classes))
            for image, indices, values in zip(chosen, top.indices.tolist(), top.values.tolist(), strict=True):
                classes = [
                    ClassProbability(index, names[index] if names else None, value)
                    for index, value in zip(indices, values, strict=True)
                ]
                found.append(Prediction(image, classes))
    return found


def image_mode(trained: TrainedModel) -> str:
    """Return the mode of PIL for the images of a model.

    Raises:
        ValueError: If its images have neither one channel nor three.
    """
    channels = trained.data_config['input_size'][0]
    if channels not in (1, 3):
        raise ValueError(f'the model takes images of {channels} channels, but files of images have 1 or 3')
    return 'L' if channels == 1 else 'RGB'


def read_image(image: AnImage, mode: str) -> Image.Image:
    """Return an image whole, in a mode of PIL.

    Raises:
        ValueError: If it is none, or truncated.
    """
    if not isinstance(image, AnImage):
        raise ValueError(f'an image is a file or an image of PIL, not {type(image).__name__}')
    try:
        if isinstance(image, Image.Image):
            return image.convert(mode)
        with Image.open(image) as opened:
            return opened.convert(mode)
    except Exception as error:  # what decoders raise for bytes that make no sense depends on the bytes
        reason = getattr(error, 'strerror', None) or error
        raise ValueError(f'{image} cannot be read as an image: {reason}') from error


def contact_sheet(predictions: Sequence[Prediction], classes: int = 3) -> Image.Image:
    """Draw images with their likeliest classes below them.

    Args:
        predictions: What `predict` returns.
        classes: Classes to write below an image.

    Raises:
        ValueError: If there are too many images to look at.
    """
    check_contact_sheet(len(predictions))
    classes = min(classes, len(predictions[0].classes))
    columns = min(COLUMNS, len(predictions))
    height = TILE + (classes + 1) * LINE + 10
    sheet = Image.new('RGB', (columns * (TILE + 10) + 10, math.ceil(len(predictions) / columns) * height + 10), 'white')
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for index, prediction in enumerate(predictions):
        x, y = 10 + index % columns * (TILE + 10), 10 + index // columns * height
        image = read_image(prediction.image, 'RGB')
        resampling = Image.Resampling.LANCZOS if max(image.size) > TILE else Image.Resampling.NEAREST
        sheet.paste(ImageOps.pad(image, (TILE, TILE), resampling, color='whitesmoke'), (x, y))
        lines = [Path(prediction.title).name]
        lines += [f'{entry.probability:6.1%} {entry.label}' for entry in prediction.classes[:classes]]
        for row, line in enumerate(lines):
            text = textwrap.shorten(line, 26, placeholder='...') if ' ' in line.strip() else line[:26]
            draw.text((x, y + TILE + 2 + row * LINE), text, 'gray' if row == 0 else 'black', font)
    return sheet


def check_contact_sheet(num_images: int) -> None:
    """Raise a ValueError if a contact sheet would have too many images."""
    if num_images > MOST_IMAGES:
        raise ValueError(f'a contact sheet has room for {MOST_IMAGES} images, not for {num_images}')
