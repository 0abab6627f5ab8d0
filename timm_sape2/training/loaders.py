"""The two data loaders of a run, with timm's augmentation or from memory; nothing random outlives an epoch."""

import signal
from collections.abc import Generator, Sequence, Sized
from typing import Any, TypeGuard, cast

import torch
from timm.data import FastCollateMixup, Mixup, create_loader, resolve_model_data_config
from timm.data.loader import adapt_to_chs
from timm.data.random_erasing import RandomErasing
from timm.data.scheduled_sampler import ScheduledBatchSampler
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.datasets import class_names
from ..data.memory import ImagesInMemory, create_memory_loader, read_images
from ..trained.checkpoint import ResumePoint
from .processes import seed_epoch, set_random_state


def resolve_data(
    model: nn.Module,
    *,
    img_size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    crop_pct: float | None,
    interpolation: str | None,
) -> dict[str, Any]:
    """Return input size, normalization, cropping and interpolation, from the model where they are None."""
    channels, *size = get_model_input_config(model)['input_size']
    for name, values in (('mean', mean), ('std', std)):
        if values is not None and len(values) not in (1, channels):
            raise ValueError(f'--{name} takes 1 number or {channels}, one for each channel')
    flags = dict(mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation)
    config = resolve_model_data_config(model, dict(flags, input_size=(channels, *(img_size or size))))
    config['mean'], config['std'] = (adapt_to_chs(config[name], channels) for name in ('mean', 'std'))
    return config


def create_mixup(
    num_classes: int,
    device: torch.device,
    *,
    mixup: float,
    cutmix: float,
    mixup_prob: float,
    mixup_switch_prob: float,
    smoothing: float,
    loader: str,
    batch_size: int,
    train_batch_sizes: Sequence[int] | None,
) -> Mixup | None:
    """Create what mixes the images of a batch, or None if no flag asks for it.

    On a GPU, images that are not in memory are mixed while they are collated, in the loader processes.
    """
    if not mixup and not cutmix:
        return None
    odd = [str(size) for size in train_batch_sizes or [batch_size] if size % 2]
    if odd:
        flag = '--train-batch-sizes' if train_batch_sizes else '--batch-size'
        raise ValueError(f'--mixup and --cutmix pair images: {flag} {" ".join(odd)} must be even')
    on_collating = device.type == 'cuda' and loader == 'workers'
    return (FastCollateMixup if on_collating else Mixup)(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        prob=mixup_prob,
        switch_prob=mixup_switch_prob,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )


def create_train_loader(
    dataset: Any,
    data_config: dict[str, Any],
    device: torch.device,
    mixing: Mixup | None,
    *,
    loader: str,
    batch_size: int,
    workers: int,
    distributed: bool,
    world_size: int,
    no_aug: bool,
    reprob: float,
    remode: str,
    train_crop_mode: str | None,
    scale: tuple[float, float] | None,
    ratio: tuple[float, float] | None,
    hflip: float,
    color_jitter: float,
    aa: str | None,
    aug_repeats: int,
    train_interpolation: str,
    train_img_sizes: Sequence[int] | None,
    train_batch_sizes: Sequence[int] | None,
    train_size_probs: Sequence[float] | None,
    train_size_schedule: str,
    train_size_schedule_spread: float,
    train_size_random_mix: float,
    train_batches_per_epoch: int | None,
    epochs: int,
    seed: int,
) -> DataLoader:
    """Create the loader of augmented, shuffled batches, all of the same size unless there are `train_img_sizes`.

    Raises:
        ValueError: If an augmentation is malformed, or the images do not fill one batch.
    """
    if loader == 'memory':
        height, width = data_config['input_size'][1:]
        augmentation: dict[str, Any] = {}
        if not no_aug:
            augmentation = dict(hflip=hflip)
            if train_crop_mode == 'rrc':
                augmentation['crops'] = scale or (0.08, 1.0), ratio or (3 / 4, 4 / 3)
            else:
                augmentation['shift'] = height // 8, width // 8
            if reprob:
                augmentation['erasing'] = RandomErasing(reprob, mode=remode, device=device)
        images = _hold_in_memory(dataset, {**data_config, 'crop_pct': 1.0}, device, workers, **augmentation)
        created = create_memory_loader(images, batch_size, is_training=True, distributed=distributed)
    else:
        if aug_repeats and not distributed:
            raise ValueError('--aug-repeats spreads the copies of an image over processes: start several with torchrun')
        try:
            created = create_loader(
                dataset,
                input_size=data_config['input_size'],
                batch_size=batch_size,
                is_training=True,
                no_aug=no_aug,
                re_prob=reprob,
                re_mode=remode,
                train_crop_mode=train_crop_mode,
                scale=scale,
                ratio=ratio,
                hflip=hflip,
                color_jitter=color_jitter,
                auto_augment=aa,
                num_aug_repeats=aug_repeats,
                interpolation=data_config['interpolation'] if no_aug else train_interpolation,
                collate_fn=None if _mixes_late(mixing) else mixing,
                input_size_choices=train_img_sizes,
                batch_size_choices=train_batch_sizes,
                batch_choice_weights=train_size_probs,
                batch_choice_seed=seed,
                batch_choice_schedule=train_size_schedule,
                batch_schedule_epochs=epochs,
                batch_schedule_spread=train_size_schedule_spread,
                batch_schedule_random_mix=train_size_random_mix,
                num_batches=train_batches_per_epoch,
                **_common(data_config, device, workers, distributed),
            )
        except (AssertionError, KeyError) as error:
            raise ValueError(f'the augmentation of the training images is malformed: {error!r}') from error
    if not len(created):
        raise ValueError(
            f'{len(cast(Sized, created.dataset))} training images do not fill one batch: '
            f'lower --batch-size {batch_size} (times {world_size} processes)'
        )
    return created


def create_validation_loader(
    dataset: Any,
    data_config: dict[str, Any],
    device: torch.device,
    *,
    loader: str,
    batch_size: int,
    validation_batch_size: int | None,
    workers: int,
    distributed: bool,
) -> DataLoader:
    """Create the loader that goes through the validation images in order."""
    if loader == 'memory':
        images = _hold_in_memory(dataset, data_config, device, workers)
        return create_memory_loader(images, validation_batch_size or batch_size, distributed=distributed)
    return create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=validation_batch_size or batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        **_common(data_config, device, workers, distributed),
    )


def _hold_in_memory(
    dataset: Any, data_config: dict[str, Any], device: torch.device, workers: int, **augmentation: Any
) -> ImagesInMemory:
    names = ('input_size', 'interpolation', 'crop_pct', 'crop_mode')
    images, targets = read_images(dataset, workers=workers, **{name: data_config[name] for name in names})
    return ImagesInMemory(
        images.to(device),
        targets.to(device),
        data_config['mean'],
        data_config['std'],
        classes=class_names(dataset),
        **augmentation,
    )


def batches(loader: DataLoader) -> Generator[tuple[Tensor, Tensor]]:
    """Yield the batches of a loader. Closing this ends the processes of the loader, also after an error."""
    yield from loader


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Let the samplers of a loader begin an epoch."""
    samplers: tuple[Any, Any] = loader.batch_sampler, loader.sampler
    for sampler in samplers:
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)


def images_of_epoch(loader: DataLoader, epoch: int) -> int:
    """Return how many images this process trains on in an epoch; batches may be of several sizes."""
    if isinstance(loader.batch_sampler, ScheduledBatchSampler):
        set_epoch(loader, epoch)
        return sum(batch_size for _, batch_size in loader.batch_sampler.schedule)
    return len(loader) * cast(int, cast(Any, loader.batch_sampler).batch_size)


def average_batch_size(loader: DataLoader) -> float:
    """Return how many images a batch of a loader has, on average if there are batches of several sizes."""
    sampler: Any = loader.batch_sampler
    return sampler.average_batch_size if isinstance(sampler, ScheduledBatchSampler) else sampler.batch_size


def epoch_batches(
    loader: DataLoader,
    mixing: Mixup | None,
    point: ResumePoint,
    device: torch.device,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    *,
    seed: int,
    rank: int,
    mixup_off_epoch: int,
) -> Generator[tuple[Tensor, Tensor]]:
    """Seed an epoch and yield its batches from the resume point on.

    Batches that were trained on already are drawn once more, to bring the loader and its processes to the same place.
    """
    seed_epoch(seed, point.epoch, rank)
    set_epoch(loader, point.epoch)
    if mixing is not None:
        mixing.mixup_enabled = not mixup_off_epoch or point.epoch < mixup_off_epoch
    drawn = batches(loader)
    for _ in range(point.num_batches):
        next(drawn)
    if point.random_states:
        set_random_state(point.random_states[rank])
    for images, targets in drawn:
        images = images.to(device, dtype, memory_format=memory_format)
        targets = targets.to(device)
        yield mixing(images, targets) if _mixes_late(mixing) else (images, targets)


def _mixes_late(mixup: Mixup | None) -> TypeGuard[Mixup]:
    return mixup is not None and not isinstance(mixup, FastCollateMixup)


def _common(data_config: dict[str, Any], device: torch.device, workers: int, distributed: bool) -> dict[str, Any]:
    return dict(
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=workers,
        distributed=distributed,
        device=device,
        pin_memory=device.type == 'cuda',
        # It draws random numbers for the next batch before this one is trained on, so resuming would not be exact.
        use_prefetcher=device.type == 'cuda',
        # Workers that live on would carry the state of their random numbers into the next epoch.
        persistent_workers=False,
        worker_seeding=_seed_of_worker,
    )


def _seed_of_worker(worker: Any) -> int:
    """Return the seed of a loader process, and let the process outlive a signal to the whole job.

    The main process needs it to come to a clean place. A second SIGTERM does end it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    return worker.seed
