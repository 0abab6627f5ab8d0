"""timm's classification task, whose checkpoints also say where in the run they were taken."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from timm.task import ClassificationTask
from timm.utils import unwrap_model


@dataclasses.dataclass
class ResumePoint:
    """Where a run goes on.

    Args:
        epoch: The epoch to train.
        num_batches: Batches of it that were trained on already.
        loss_sum: Sum of the losses of their images.
        loss_count: Number of their images.
        random_states: The generators of each process after them.
        seconds: Time that they took.
    """

    epoch: int = 0
    num_batches: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    random_states: Sequence[dict[str, Any]] = ()
    seconds: float = 0.0

    @property
    def mean_loss(self) -> float:
        """Mean loss of the images of the epoch up to here."""
        return self.loss_sum / max(self.loss_count, 1)

    def add_batch(self, loss: float, num_images: int) -> None:
        """Count a batch."""
        self.num_batches += 1
        self.loss_sum += loss * num_images
        self.loss_count += num_images

    def is_after(self, other: 'ResumePoint') -> bool:
        """Return whether this is further in training."""
        return (self.epoch, self.num_batches) > (other.epoch, other.num_batches)

    @classmethod
    def of_checkpoint(cls, checkpoint: Mapping[str, Any]) -> 'ResumePoint':
        """Read it from a training checkpoint, ours or one that timm wrote at the end of an epoch."""
        if 'resume_point' in checkpoint:
            return cls(**checkpoint['resume_point'])
        if 'epoch' not in checkpoint or 'optimizer' not in checkpoint:
            raise ValueError('it has weights but no state of a training run')
        return cls(epoch=checkpoint['epoch'] + 1)


class ResumableTask(ClassificationTask):
    """`ClassificationTask` that adds `resume_point` and `class_names` to the checkpoints of timm's saver."""

    resume_point: ResumePoint | None = None
    class_names: Sequence[str] | None = None

    def evaluated_module(self, ema: bool = False) -> Any:
        """Return the model, or the moving average of its weights, ready for validation."""
        model: Any = self.get_eval_model(ema=ema)
        return model.eval()

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn=unwrap_model) -> dict[str, Any]:
        """Return the entries of a checkpoint that the task owns."""
        state = super().get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        if self.resume_point is not None and not ema:
            state['resume_point'] = vars(self.resume_point)
        if self.class_names is not None and not ema:
            state['class_names'] = list(self.class_names)
        return state
