"""A data set that fits in memory: one tensor of bytes on the device, augmented there a batch at a time."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn.functional import grid_sample
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from tqdm import tqdm

Batch = tuple[Tensor, Tensor]
PROC, CGROUP = Path('/proc'), Path('/sys/fs/cgroup')


class ImagesInMemory(Dataset):
    """Images that torch's DataLoader takes from memory by the batch, cropped or shifted, mirrored, normalized, erased.

    What is random comes from torch's global generator and, in erasing, from Python's: an epoch that is seeded alike
    gives the same batches.

    Args:
        images: Bytes of shape (N, C, H, W).
        targets: Their classes, shape (N,), on the same device.
        mean: Mean of each channel, of pixels from 0 to 1.
        std: Standard deviation of each channel.
        crops: Smallest and largest share of the area, and narrowest and widest shape, of the part of an image that is
            resized to the whole; None for all of it.
        shift: Most pixels that an image is shifted by, down or up and to either side; black comes in.
        hflip: Probability that an image is mirrored.
        erasing: What erases parts of the normalized images, in place.
        classes: Names of the classes.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        crops: tuple[tuple[float, float], tuple[float, float]] | None = None,
        shift: tuple[int, int] = (0, 0),
        hflip: float = 0.0,
        erasing: RandomErasing | None = None,
        classes: Sequence[str] | None = None,
    ):
        self.images = images
        self.targets = targets
        scale = 255 * torch.tensor([mean, std], device=images.device)
        self.mean, self.std = scale.view(2, 1, -1, 1, 1)
        self.crops = crops
        self.shift = shift
        self.hflip = hflip
        self.erasing = erasing
        self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        images, targets = self.__getitems__([index])
        return images[0], targets[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch: float images of shape (B, C, H, W), and classes of shape (B,)."""
        chosen = torch.tensor(indices, device=self.images.device)
        images = self.images[chosen]
        if self.crops is not None:
            images = resize_crops(images, draw_crops(len(images), images.shape[2:], *self.crops))
        if any(self.shift):
            images = shift_images(images, *(torch.randint(-most, most + 1, (len(images),)) for most in self.shift))
        if self.hflip:
            mirrored = torch.rand(len(images)) < self.hflip
            images = torch.where(mirrored.to(images.device).view(-1, 1, 1, 1), images.flip(-1), images)
        images = (images - self.mean) / self.std
        if self.erasing is not None:
            images = self.erasing(images)
        return images, self.targets[chosen]


def draw_crops(count: int, size: Sequence[int], scale: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """Draw parts of images as timm's and torchvision's random resized crops do.

    Of ten parts, each of its own area and shape, the first that fits into the image is taken, anywhere in it; else the
    largest one in the center whose shape is allowed.

    Args:
        count: Number of images.
        size: Height and width of the images.
        scale: Smallest and largest share of the area.
        ratio: Narrowest and widest shape, width by height.

    Returns:
        Top, left, height and width of each part in pixels, shape (4, count).
    """
    whole = torch.tensor(size).view(2, 1)
    area = whole.prod() * torch.empty(10, count).uniform_(*scale)
    shape = torch.empty(10, count).uniform_(*map(math.log, ratio)).exp()
    tries = torch.stack([(area / shape).sqrt(), (area * shape).sqrt()]).round().long()
    fits = ((tries > 0) & (tries <= whole.unsqueeze(1))).all(0)
    first = (fits * torch.arange(10, 0, -1).unsqueeze(1)).argmax(0)
    height, width = size
    most = [min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))]
    sides = torch.where(fits.any(0), tries[:, first, torch.arange(count)], torch.tensor(most).view(2, 1))
    room = whole - sides
    anywhere = (torch.rand(2, count) * (room + 1)).long().minimum(room)
    return torch.cat([torch.where(fits.any(0), anywhere, room // 2), sides])


def resize_crops(images: Tensor, crops: Tensor) -> Tensor:
    """Resize a part of every image of a batch to the whole, by linear interpolation within the part.

    Args:
        images: Shape (B, C, H, W).
        crops: Top, left, height and width of the parts in pixels, shape (4, B).

    Returns:
        Float images of the same shape.
    """
    coordinates = []
    for size, start, side in zip(images.shape[2:], *crops.to(images.device).unsqueeze(-1).split(2), strict=True):
        pixels = (torch.arange(size, device=images.device) + 0.5) * side / size - 0.5
        pixels = start + pixels.clamp(min=0).minimum(side - 1)
        coordinates.append(2 * pixels / max(size - 1, 1) - 1)
    down, right = coordinates
    grid = torch.stack(torch.broadcast_tensors(right.unsqueeze(1), down.unsqueeze(2)), dim=-1)
    return grid_sample(images.float(), grid, padding_mode='border', align_corners=True)


def shift_images(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shift every image of a batch by whole pixels of its own; zeros come in.

    Args:
        images: Shape (B, C, H, W).
        down: Pixels down, up if negative; shape (B,).
        right: Pixels to the right, to the left if negative; shape (B,).
    """
    for dim, shift in ((2, down), (3, right)):
        size = images.shape[dim]
        source = torch.arange(size, device=images.device) - shift.to(images.device).unsqueeze(1)
        source = source.unsqueeze(1).unsqueeze(5 - dim)
        inside = (source >= 0) & (source < size)
        images = images.gather(dim, source.clamp(0, size - 1).expand_as(images)) * inside
    return images


def create_memory_loader(
    dataset: ImagesInMemory, batch_size: int, is_training: bool = False, distributed: bool = False
) -> DataLoader:
    """Create the loader of a data set in memory.

    Args:
        dataset: The images.
        batch_size: Images of a batch in each process.
        is_training: Shuffle, and leave out what does not fill a batch; else go through all in order.
        distributed: Share the images out among the processes, as timm's loaders do.
    """
    sampler: Sampler | None = None
    if distributed:
        sampler = DistributedSampler(dataset) if is_training else OrderedDistributedSampler(dataset)
    shuffle = is_training and not distributed
    return DataLoader(dataset, batch_size, shuffle, sampler, drop_last=is_training, collate_fn=lambda batch: batch)


def read_images(
    dataset: Any,
    input_size: tuple[int, int, int],
    interpolation: str,
    crop_pct: float,
    crop_mode: str | None,
    workers: int = 0,
) -> Batch:
    """Read all images of a data set, resized and cropped as in validation.

    Args:
        dataset: Pairs of an image of PIL and its class; its `transform` is set.
        input_size: Channels, height and width.
        interpolation: How to resize.
        crop_pct: Share of the side of the resized image that is kept.
        crop_mode: 'center', 'squash' or 'border', as in timm; None is 'center'.
        workers: Processes that read.

    Returns:
        Bytes of shape (N, C, H, W), and classes of shape (N,).
    """
    dataset.transform = create_transform(
        input_size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, use_prefetcher=True
    )
    images = torch.empty(len(dataset), *input_size, dtype=torch.uint8)
    targets = torch.empty(len(dataset), dtype=torch.long)
    filled = 0
    with tqdm(total=len(dataset), desc='Reading', unit=' images', leave=False, dynamic_ncols=True, disable=None) as bar:
        for some_images, some_targets in DataLoader(dataset, 256, num_workers=workers):
            images[filled : filled + len(some_images)] = some_images
            targets[filled : filled + len(some_images)] = some_targets
            filled += len(some_images)
            bar.update(len(some_images))
    return images, targets


def check_memory(num_images: int, input_size: tuple[int, int, int], device: torch.device) -> None:
    """Raise a ValueError if so many images are larger than the free memory of a device."""
    channels, height, width = input_size
    needed, free = num_images * channels * height * width, free_memory(device)
    if needed > free:
        raise ValueError(
            f'{num_images} images of {height}x{width} need {needed / 2**30:.1f} GiB of memory in every process, '
            f'{free / 2**30:.1f} GiB are free on {device}: use --loader workers, or a smaller --img-size'
        )


def free_memory(device: torch.device) -> float:
    """Return the bytes that may still be allocated: on a GPU, on Linux, or in a container; infinity if nothing says."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    free = 1024 * _number_in(PROC / 'meminfo', 'MemAvailable:')
    limit = CGROUP / 'memory.max'
    if limit.exists() and limit.read_text().strip() != 'max':
        free = min(free, int(limit.read_text()) - _number_in(CGROUP / 'memory.stat', 'anon'))
    return free


def _number_in(file: Path, name: str) -> float:
    """Return the number after a name in a file of the system, infinity if there is no such file."""
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return next((float(number) for word, number, *_ in lines if word == name), math.inf)
