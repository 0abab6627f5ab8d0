"""Accuracy of a trained model on a data set, computed as timm's validate.py does."""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from statistics import NormalDist
from typing import Any

import timm
import torch
from timm.data import create_loader
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .. import version
from ..data.datasets import class_names, count_classes
from .confusion import Confusion
from .opening import TrainedModel, fingerprint

_logger = logging.getLogger(__name__)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device | str = 'cpu',
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    distributed: bool = False,
    after_batch: Callable[[ClassificationEvaluator, Tensor, Tensor], object] = lambda totals, output, targets: None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> dict[str, float] | None:
    """Return top-1 and top-5 accuracy in percent, and the mean cross-entropy, computed as timm does.

    Args:
        model: The model, on the device and in evaluation mode.
        loader: Batches of images with the indices of their classes; padding of a distributed sampler does not count.
        device: Where to compute.
        autocast: Context of the forward pass.
        distributed: Add up what all processes counted.
        after_batch: Called after each batch with the running totals, and with the logits and classes of those of its
            images that count. If it returns a true value, evaluation stops and the result is None.
        dtype: Type of the images, None for that of the loader.
        memory_format: Their memory format.
    """
    totals = ClassificationEvaluator(device, max_samples=evaluation_sample_limit(loader))
    with closing(batch for batch in loader) as batches:  # closing it ends the processes of the loader, come what may
        for images, targets in batches:
            with autocast():
                output = model(images.to(device, dtype, memory_format=memory_format))
            targets, before = targets.to(device), totals.num_samples
            totals.update(output, targets)
            counted = totals.num_samples - before
            if after_batch(totals, output[:counted], targets[:counted]):
                return None
    return totals.compute(distributed=distributed)


def measure_accuracy(
    trained: TrainedModel,
    dataset: Any,
    batch_size: int = 256,
    workers: int = 4,
    device: str = 'cpu',
    confusion: Confusion | None = None,
) -> dict[str, Any]:
    """Measure top-1 and top-5 accuracy in percent, and the mean cross-entropy.

    Args:
        trained: The model; it is moved to the device.
        dataset: Images with targets, as timm's loader takes them.
        batch_size: Images in a batch.
        workers: Processes that load images.
        device: Where to compute.
        confusion: Counts what the images are taken for.

    Returns:
        'top1', 'top5', 'loss', 'num_images', 'input_size', 'top1_interval' (95 %, see `binomial_interval`), and what
        they belong to: the 'fingerprint' of the weights and 'versions'.

    Raises:
        ValueError: If the classes of the data are not those of the model, or there are no images.
    """
    check_classes(trained, dataset)
    model, data_config = trained.model.to(device), trained.data_config
    loader = create_loader(
        dataset,
        batch_size=batch_size,
        use_prefetcher=False,
        num_workers=workers,
        device=torch.device(device),
        **data_config,
    )
    bar = tqdm(total=len(dataset), desc='Validating', unit=' images', leave=False, dynamic_ncols=True, disable=None)
    with bar:

        def count(totals: ClassificationEvaluator, output: Tensor, targets: Tensor) -> None:
            if confusion is not None:
                confusion.add(output, targets)
            bar.set_postfix_str(f'top-1 {totals.summary()["top1"]:.2f} %', refresh=False)
            bar.update(totals.num_samples - bar.n)

        measured = evaluate(model, loader, device, after_batch=count)
    assert measured is not None
    return {
        'top1': round(measured['top1'], 4),
        'top5': round(measured['top5'], 4),
        'loss': round(measured['loss'], 6),
        'num_images': len(dataset),
        'input_size': list(data_config['input_size']),
        'top1_interval': binomial_interval(measured['top1'], len(dataset)),
        'fingerprint': fingerprint(model),
        'versions': {'timm_sape2': version.__version__, 'timm': timm.__version__, 'torch': torch.__version__},
    }


def binomial_interval(percent: float, num_images: int) -> list[float]:
    """Return the 95 % interval of an accuracy that was measured on some images, by the score method of Wilson.

    Args:
        percent: The measured accuracy.
        num_images: Number of images.
    """
    share, squared = percent / 100, NormalDist().inv_cdf(0.975) ** 2
    center = share + squared / (2 * num_images)
    half = math.sqrt(squared * (share * (1 - share) + squared / (4 * num_images)) / num_images)
    ends = (100 * (center + side) / (1 + squared / num_images) for side in (-half, half))
    return [max(0.0, round(end, 4)) for end in ends]


def check_classes(trained: TrainedModel, dataset: Any) -> None:
    """Raise a ValueError if data and model do not have the same classes in the same order."""
    if not len(dataset):
        raise ValueError('the data set has no images')
    count = count_classes(dataset)
    if count is not None and count != trained.model.num_classes:
        raise ValueError(f'the data has {count} classes, the model {trained.model.num_classes}')
    of_data, of_model = class_names(dataset), trained.class_names
    if of_model is None and of_data is not None:
        _logger.warning('The model has no names of its classes: those of the data must be in the order of training')
    if of_data is None or of_model is None or of_data == of_model:
        return
    if sorted(of_data) == sorted(of_model):
        raise ValueError('the data has the classes of the model in another order')
    odd = [name for name in of_data if name not in of_model]
    _logger.warning(
        f'The data names {len(odd)} classes as the model does not, such as {odd[0]!r}; only their order counts'
    )
