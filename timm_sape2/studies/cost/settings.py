"""Sizes at which costs are measured: image and patch, batch, and what is too large for a device."""

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..._arguments import positive_int
from ..study import Unit

SETTINGS = ('32/4', '224/16', '384/16', '512/16')
TOKENS = {'cpu': 1024, 'cuda': 16384}
"""Patch tokens that a batch has at most, unless `--batch-size` says else."""


def image_and_patch(setting: str) -> tuple[int, int]:
    """Read a value of `--settings`."""
    image, _, patch = setting.partition('/')
    if not (image.isdecimal() and patch.isdecimal() and int(image) and int(patch)):
        raise ValueError(f'--settings takes IMAGE/PATCH in pixels such as 224/16, not {setting!r}')
    if int(image) % int(patch):
        raise ValueError(f'--settings {setting}: patches of {patch} do not divide images of {image}')
    return int(image), int(patch)


def default_batch_size(setting: str, device: str) -> int:
    """Return the largest power of two of images whose patches the device may be given in a batch."""
    image, patch = image_and_patch(setting)
    return 2 ** max(0, int(math.log2(TOKENS[device.partition(':')[0]] / (image // patch) ** 2)))


def units_at(settings: Sequence[str], batch_sizes: Sequence[int] | None, device: str) -> list[Unit]:
    """Return a unit for each setting, with one batch size for all, one for each, or that for the device."""
    for setting in settings:
        image_and_patch(setting)
    sizes = list(batch_sizes or [0])
    if len(sizes) not in (1, len(settings)):
        raise ValueError(f'--batch-size takes 1 number or {len(settings)}, one for each of --settings')
    return [
        {'setting': setting, 'batch_size': size or default_batch_size(setting, device)}
        for setting, size in zip(settings, sizes * (len(settings) // len(sizes)), strict=True)
    ]


def add_measuring_arguments(parser: argparse.ArgumentParser, settings: Sequence[str], amp: str) -> None:
    """Add the flags of all studies of cost.

    Args:
        parser: The parser of a study.
        settings: What `--settings` is by default.
        amp: What `--amp` means.
    """
    add = parser.add_argument
    add(
        '--settings',
        nargs='+',
        default=settings,
        metavar='IMG/PATCH',
        help=f'sides of image and patch in pixels (default: {" ".join(settings)})',
    )
    add(
        '--batch-size',
        nargs='+',
        type=positive_int,
        metavar='N',
        help='images of a batch, for all settings or for each '
        f'(default: at most {TOKENS["cpu"]} patches, on a GPU {TOKENS["cuda"]})',
    )
    add(
        '--rounds',
        type=positive_int,
        default=7,
        metavar='N',
        help='turns of all that is measured (default: %(default)s)',
    )
    add('--device', metavar='NAME', help='cpu, cuda or cuda:N (default: a GPU if there is one)')
    add('--amp', action='store_true', help=amp)


def chip_name(device: str) -> str:
    """Return the name of a GPU, or 'cpu'."""
    return torch.cuda.get_device_name(device) if device.startswith('cuda') else device


@contextmanager
def refuse_too_large(unit: Unit, device: torch.device) -> Iterator[None]:
    """Turn a lack of memory into a ValueError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise too_large(unit, device) from error


def too_large(unit: Unit, device: torch.device) -> ValueError:
    """Return the error of a unit that needs more memory than there is."""
    size = f'{unit["setting"]} with batches of {unit["batch_size"]}'
    return ValueError(f'{size} is too large for {device}: lower --batch-size, or leave it out of --settings')


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether memory was lacking; on a CPU only the message says so."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
