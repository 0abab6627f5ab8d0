"""What a batch is trained for: its classes, or what a teacher makes of it too."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data.loader import adapt_to_chs
from timm.models import create_model, is_model_pretrained, resolve_model_input_args
from timm.task import (
    ClassificationTask,
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..trained.checkpoint import ResumePoint
from ..trained.opening import check_model_name, checkpoint_file, open_model


class Resumable(TrainingTask):
    """Mixin for a task of timm, which adds `resume_point` and `class_names` to the checkpoints of timm's saver."""

    trainable_module: Any
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


class ResumableTask(Resumable, ClassificationTask):
    """Classification."""


class LogitDistillation(Resumable, LogitDistillationTask):
    """Classification, and logits like those of a teacher."""


class FeatureDistillation(Resumable, FeatureDistillationTask):
    """Classification, and features before the classifier like those of a teacher, through a linear map if need be."""


class TokenDistillation(Resumable, TokenDistillationTask):
    """Classification, and a token and classifier of its own for what a teacher says."""


DISTILLATION: dict[str, Any] = {'logit': LogitDistillation, 'feature': FeatureDistillation, 'token': TokenDistillation}


def create_distillation(
    kind: str,
    student: nn.Module,
    teacher: Any,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """Create the task of learning from a teacher.

    The teacher sees the images of the student as it was trained to see them: normalized by its own mean and standard
    deviation.

    Args:
        kind: 'logit', 'feature' or 'token'.
        student: The model to train.
        teacher: The model to learn from. It is moved to device and type, and stays as it is.
        mean: What the images of the student are normalized by.
        std: Likewise.
        device: Where to compute.
        dtype: Type of the weights, float32 if None.
        **options: Other arguments of timm's task.

    Raises:
        ValueError: If the student has no token for distillation and the kind needs one, or the width of features is
            not known.
    """
    teacher.requires_grad_(False).to(device=device, dtype=dtype)
    wrapped = DistillationTeacher(teacher, device=device, dtype=dtype)
    channels = len(mean)

    def buffer(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1)

    cfg = teacher.pretrained_cfg
    wrapped.mean_kd, wrapped.std_kd = (buffer(adapt_to_chs(cfg[name], channels)) for name in ('mean', 'std'))
    task = DISTILLATION[kind](student, wrapped, device=device, dtype=dtype, verbose=False, **options)
    task.student_mean, task.student_std = buffer(mean), buffer(std)
    return task


def open_teacher(source: str, input_size: tuple[int, int, int], num_classes: int | None) -> Any:
    """Open the teacher of a run, at the image size of the student.

    Args:
        source: A model with published weights, by its name in timm, or what `open_model` opens: a checkpoint, the
            folder of a run or with config.json, OWNER/NAME on the Hub.
        input_size: Channels, height and width of the images.
        num_classes: Classes of the data, None if the teacher may have others.

    Raises:
        OSError: If a file is missing.
        ValueError: If there is no such model, it has no weights, or it does not take the images or know the classes.
    """
    channels, *size = input_size
    is_name = not {'/', ':'} & set(source) and not Path(source).exists() and checkpoint_file(source) is None
    if not is_name:
        teacher = open_model(source, img_size=(size[0], size[1])).model
        if teacher.in_chans != channels:
            raise ValueError(f'--kd-model-name {source} takes {teacher.in_chans} channels, the model {channels}')
    else:
        check_model_name(source, '--kd-model-name')
        if not is_model_pretrained(source):
            raise ValueError(
                f'--kd-model-name {source} has no published weights: name a checkpoint or the folder of a run'
            )
        arguments = resolve_model_input_args(source, dict(img_size=tuple(size), in_chans=channels))
        teacher = create_model(**arguments, pretrained=True)
    if num_classes is not None and teacher.num_classes != num_classes:
        raise ValueError(
            f'--kd-model-name {source} knows {teacher.num_classes} classes, the data has {num_classes}: '
            'train it on the data first, or learn from its features with --kd-distill-type feature'
        )
    return teacher.eval()


@torch.no_grad()
def check_sizes(model: nn.Module, channels: int, sizes: Iterable[tuple[int, int]], what: str) -> None:
    """Raise a ValueError if a model does not take images of some heights and widths; `what` is what to call it."""
    was_training, like = model.training, next(model.parameters())
    model.eval()
    try:
        for height, width in dict.fromkeys(sizes):
            try:
                model(like.new_zeros(1, channels, height, width))
            except (AssertionError, RuntimeError, ValueError) as error:
                raise ValueError(f'{what} does not take images of {height}x{width}: {error}') from error
    finally:
        model.train(was_training)
