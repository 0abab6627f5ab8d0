"""The numbers of each epoch for Weights & Biases and TensorBoard, by the names of timm's summary."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files import atomic_write

WANDB_ID = 'wandb_id.txt'


class Wandb:
    """A run of Weights & Biases, the same one for all starts of a run in a folder.

    Args:
        folder: The folder of the run, which keeps the id, and the files of `wandb`.
        is_resumed: The run goes on, so that its reports go on too.
        config: The arguments of the run.
        project: The project, None for that of the account.
        tags: Tags of the run.
        run_id: Id of the run to go on with, which must exist; empty for the one in the folder.
    """

    def __init__(
        self,
        folder: Path,
        is_resumed: bool,
        config: Mapping[str, Any],
        project: str | None,
        tags: Sequence[str],
        run_id: str,
    ):
        import wandb

        kept = folder / WANDB_ID
        known = run_id or (kept.read_text().strip() if is_resumed and kept.exists() else None)
        self.run = wandb.init(
            project=project,
            name=folder.name,
            config=dict(config),
            tags=tags,
            dir=str(folder),
            id=known,
            resume='must' if run_id else 'allow' if known else None,
        )
        with atomic_write(kept) as path:
            path.write_text(f'{self.run.id}\n')

    def log(self, row: Mapping[str, float]) -> None:
        """Report an epoch: 'epoch', 'train_loss', 'eval_top1', ..., 'lr'."""
        self.run.log(dict(row))

    def close(self) -> None:
        """End the run."""
        self.run.finish()


class TensorBoard:
    """Events of TensorBoard in the folder of a run.

    Args:
        folder: The folder of the run: `tensorboard --logdir FOLDER` shows it.
        epoch: The epoch that the run begins with. Events from there on are hidden: they are about to come again.
    """

    def __init__(self, folder: Path, epoch: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=epoch)

    def log(self, row: Mapping[str, float]) -> None:
        """Report an epoch, now and not when the buffer is full."""
        for name, value in row.items():
            if name != 'epoch':
                self.writer.add_scalar(name, value, int(row['epoch']))
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


def check_trackers(log_wandb: bool, log_tensorboard: bool) -> None:
    """Raise a ValueError if a package is missing that the run is to be reported with."""
    for wanted, package in ((log_wandb, 'wandb'), (log_tensorboard, 'tensorboard')):
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"--log-{package} needs {package}: pip install 'timm_sape2[{package}]'")
