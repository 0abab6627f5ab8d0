"""Progress of an epoch: a bar on a terminal, elsewhere a line now and then."""

import logging
import sys
import time
from datetime import timedelta
from typing import TextIO

from tqdm import tqdm

from ..trained.checkpoint import ResumePoint

_logger = logging.getLogger(__name__)


class EpochProgress:
    """Shows images a second, loss and time to go. A context manager.

    Args:
        point: Where the epoch begins.
        num_epochs: Number of epochs of the run.
        num_batches: Number of batches of an epoch.
        images_per_batch: Images of a batch, over all processes.
        log_interval: Batches from one line to the next, where there is no terminal.
        enabled: Show anything at all, which one process of several does.
        stream: Where the bar goes if it is a terminal.
    """

    def __init__(
        self,
        point: ResumePoint,
        num_epochs: int,
        num_batches: int,
        images_per_batch: int,
        log_interval: int,
        enabled: bool = True,
        stream: TextIO | None = None,
    ):
        stream = stream or sys.stderr
        self.batches_to_go = (num_epochs - point.epoch) * num_batches
        self.num_batches = num_batches
        self.images_per_batch = images_per_batch
        self.log_interval = log_interval
        self.in_lines = enabled and not stream.isatty()
        self.bar = tqdm(
            desc=f'Epoch {point.epoch}',
            total=num_batches * images_per_batch,
            initial=point.num_batches * images_per_batch,
            unit=' images',
            leave=False,
            dynamic_ncols=True,
            file=stream,
            disable=self.in_lines or not enabled,
        )
        self.clock: tuple[float, int] | None = None

    def __enter__(self) -> 'EpochProgress':
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def update(self, point: ResumePoint) -> None:
        """Count a batch.

        Args:
            point: Where the epoch has come to.
        """
        text = f'loss {point.mean_loss:.4f}'
        speed = ''
        if self.clock is None:
            # The first batch takes longer: loader processes start, batches of a resumed epoch are drawn again.
            self.clock = time.perf_counter(), point.num_batches
        else:
            start, first_batch = self.clock
            seconds = (time.perf_counter() - start) / (point.num_batches - first_batch)
            speed = f'{self.images_per_batch / seconds:.0f} images/s'
            text += f', run ends in {timedelta(seconds=round(seconds * (self.batches_to_go - point.num_batches)))}'
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(self.images_per_batch)
        if self.in_lines and point.num_batches % self.log_interval == 0:
            _logger.info(f'Epoch {point.epoch}, batch {point.num_batches}/{self.num_batches}, {speed}, {text}')
