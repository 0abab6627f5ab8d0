"""Every private name of timm and torch that this package needs, in one place."""

from contextlib import AbstractContextManager

import torch
from timm.layers import is_exporting
from timm.layers.pos_embed_sincos import init_random_2d_freqs as init_random_2d_freqs
from timm.models._features import feature_take_indices as feature_take_indices
from timm.models._hub import save_config_for_hf as save_config_for_hf
from timm.models._input import update_model_args as update_model_args


def is_being_exported() -> bool:
    """Tell whether a model is traced or exported, as opposed to compiled."""
    # torch <= 2.11: is_exporting() is also true under torch.compile; this flag is not
    return torch.jit.is_tracing() or (is_exporting() and torch.compiler._is_exporting_flag)


def is_in_torch_func() -> bool:
    """Tell whether a transform of torch.func (grad, vmap, ...) is running."""
    return torch._C._are_functorch_transforms_active()


def compiled_at_most(times: int) -> AbstractContextManager[None]:
    """Let torch.compile compile one piece of code for so many different models, in place of 8."""
    return torch._dynamo.config.patch(recompile_limit=times)
