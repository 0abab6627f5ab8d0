"""The two data loaders of a run: all of timm's augmentation, and nothing random that outlives an epoch."""

import argparse
import signal
from collections.abc import Generator
from typing import Any, TypeGuard

import torch
from timm.data import FastCollateMixup, Mixup, create_loader, resolve_model_data_config
from timm.data.loader import adapt_to_chs
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..trained.checkpoint import ResumePoint
from .randomness import seed_epoch, set_random_state


def resolve_data(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Return input size, normalization, cropping and interpolation, from the model unless a flag says else."""
    channels, *size = get_model_input_config(model)['input_size']
    flags = {name: getattr(args, name) for name in ('mean', 'std', 'crop_pct', 'interpolation')}
    for name in ('mean', 'std'):
        if flags[name] is not None and len(flags[name]) not in (1, channels):
            raise ValueError(f'--{name} takes 1 number or {channels}, one for each channel')
    config = resolve_model_data_config(model, dict(flags, input_size=(channels, *(args.img_size or size))))
    config['mean'], config['std'] = (adapt_to_chs(config[name], channels) for name in ('mean', 'std'))
    return config


def create_mixup(args: argparse.Namespace, num_classes: int, device: torch.device) -> Mixup | None:
    """Create what mixes the images of a batch, or None if no flag asks for it.

    Args:
        args: The arguments of the run.
        num_classes: Number of classes.
        device: On a GPU, images are mixed while they are collated, in the loader processes.
    """
    if not args.mixup and not args.cutmix:
        return None
    if args.batch_size % 2:
        raise ValueError(f'--mixup and --cutmix pair images: --batch-size {args.batch_size} must be even')
    return (FastCollateMixup if device.type == 'cuda' else Mixup)(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def create_train_loader(
    args: argparse.Namespace,
    dataset: Any,
    data_config: dict[str, Any],
    device: torch.device,
    mixup: Mixup | None,
) -> DataLoader:
    """Create the loader of augmented, shuffled batches, all of the same size.

    Raises:
        ValueError: If an augmentation is malformed, or the images do not fill one batch.
    """
    if args.aug_repeats and not args.distributed:
        raise ValueError('--aug-repeats spreads the copies of an image over processes: start several with torchrun')
    try:
        loader = create_loader(
            dataset,
            input_size=data_config['input_size'],
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            num_aug_repeats=args.aug_repeats,
            interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
            collate_fn=None if _mixes_late(mixup) else mixup,
            **_common(args, data_config, device),
        )
    except (AssertionError, KeyError) as error:
        raise ValueError(f'the augmentation of the training images is malformed: {error!r}') from error
    if not len(loader):
        raise ValueError(
            f'{len(dataset)} training images do not fill one batch: '
            f'lower --batch-size {args.batch_size} (times {args.world_size} processes)'
        )
    return loader


def create_validation_loader(
    args: argparse.Namespace,
    dataset: Any,
    data_config: dict[str, Any],
    device: torch.device,
) -> DataLoader:
    """Create the loader that goes through the validation images in order."""
    return create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        **_common(args, data_config, device),
    )


def batches(loader: DataLoader) -> Generator[tuple[Tensor, Tensor]]:
    """Yield the batches of a loader. Closing this ends the processes of the loader, also after an error."""
    yield from loader


def epoch_batches(
    args: argparse.Namespace,
    loader: DataLoader,
    mixup: Mixup | None,
    point: ResumePoint,
    device: torch.device,
) -> Generator[tuple[Tensor, Tensor]]:
    """Seed an epoch and yield its batches from the resume point on.

    Batches that were trained on already are drawn once more, to bring the loader and its processes to the same place.
    """
    seed_epoch(args.seed, point.epoch, args.rank)
    if hasattr(loader.sampler, 'set_epoch'):
        loader.sampler.set_epoch(point.epoch)
    if mixup is not None:
        mixup.mixup_enabled = not args.mixup_off_epoch or point.epoch < args.mixup_off_epoch
    drawn = batches(loader)
    for _ in range(point.num_batches):
        next(drawn)
    if point.random_states:
        set_random_state(point.random_states[args.rank])
    for images, targets in drawn:
        images, targets = images.to(device), targets.to(device)
        yield mixup(images, targets) if _mixes_late(mixup) else (images, targets)


def _mixes_late(mixup: Mixup | None) -> TypeGuard[Mixup]:
    return mixup is not None and not isinstance(mixup, FastCollateMixup)


def _common(args: argparse.Namespace, data_config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return dict(
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        distributed=args.distributed,
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
