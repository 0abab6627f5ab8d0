"""`equip`: another position encoding for a vision transformer that timm has built."""

from collections.abc import Mapping
from typing import Any

from timm.layers import Attention, PatchDropout
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from .._compat import update_model_args
from ..positions import parse_position
from .vit import PositionAttention, PositionBlock, PositionVisionTransformer, check_patch_dropout, install

SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load')


def equip(
    model: nn.Module,
    position: str = 'learned+sape2',
    position_args: Mapping[str, Any] | None = None,
) -> PositionVisionTransformer:
    """Give a plain vision transformer of timm another position encoding, in place, and return it.

    All weights that the model has stay; only the tables of new encodings are new. With 'learned', or with 'nope' where
    the model has no learned embeddings, it computes the same bits as before. Learned embeddings that `position` does
    not name are dropped, with a warning. A model from `timm.create_model` can be saved afterwards and created again by
    name, as `vit_equipped`.

    Args:
        model: A `VisionTransformer` of timm with pre-norm blocks, such as those of DINOv2, CLIP, SigLIP or DeiT-III.
        position: Names of encodings joined by '+'.
        position_args: Options by encoding, such as `{'sape2': {'target': 'q'}}`.

    Returns:
        The same model, now a `PositionVisionTransformer`. One that has these encodings already comes back unchanged.

    Raises:
        ValueError: The model cannot be equipped (`why_not_equip` says why), or an encoding or option is unknown or does
            not fit it. The model is then unchanged.
    """
    options = parse_position(position, position_args)
    if isinstance(model, PositionVisionTransformer) and model.position_options == options:
        return model
    reason = why_not_equip(model)
    if reason is not None:
        raise ValueError(f'Cannot equip {type(model).__name__}: {reason}.')
    assert isinstance(model, VisionTransformer)
    if isinstance(model.patch_drop, PatchDropout):
        check_patch_dropout(model.patch_drop.prob, options)

    install(model, options)
    for block in model.blocks:
        block.__class__, block.attn.__class__ = PositionBlock, PositionAttention
    model.__class__ = PositionVisionTransformer
    assert isinstance(model, PositionVisionTransformer)
    _record(model, position, position_args)
    return model


def why_not_equip(model: nn.Module) -> str | None:
    """Tell why `equip` cannot change a model, None if it can.

    Args:
        model: Any model.

    Returns:
        The reason, such as 'its blocks are ParallelScalingBlock, not timm's Block', or None.
    """
    if isinstance(model, PositionVisionTransformer):
        return f"it has position='{model.position_name}' already; create it anew with the other encoding"
    if type(model) is not VisionTransformer:
        kin = ', a relative of it' if isinstance(model, VisionTransformer) else ''
        children = model.named_children() if isinstance(model, nn.Module) else ()
        inside = [name for name, child in children if type(child) is VisionTransformer]
        hint = f'; its .{inside[0]} is one' if inside else ''
        return f"it is {type(model).__module__}.{type(model).__name__}{kin}, not timm's VisionTransformer{hint}"
    for block in model.blocks:
        if type(block) is not Block:
            return f"its blocks are {type(block).__name__}, not timm's Block"
        if type(block.attn) is not Attention:
            return f"its attention is {type(block.attn).__name__}, not timm's Attention"
        if block.attn.attn_dim != model.embed_dim:
            return f'its heads have {block.attn.head_dim} channels, not embed_dim / num_heads'
    return None


def _record(model: Any, position: str, position_args: Mapping[str, Any] | None) -> None:
    """Describe an equipped model to timm as `vit_equipped`, so that it is saved and created again as such."""
    cfg = getattr(model, 'pretrained_cfg', None)
    if not cfg or not cfg.get('architecture'):  # it was not made by name
        return
    arguments: dict[str, Any] = {'base': cfg['architecture'], 'position': position}
    if position_args:
        arguments['position_args'] = {name: dict(options) for name, options in position_args.items()}
    update_model_args(model, **arguments)
    kept = {key: value for key, value in cfg.items() if key not in (*SOURCES, 'tag')}
    model.pretrained_cfg = model.default_cfg = dict(kept, architecture='vit_equipped')
