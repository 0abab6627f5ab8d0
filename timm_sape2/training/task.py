"""timm's classification task, whose checkpoints also say where in the run they were taken."""

from collections.abc import Sequence
from typing import Any

from timm.task import ClassificationTask
from timm.utils import unwrap_model

from ..trained.checkpoint import ResumePoint


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
