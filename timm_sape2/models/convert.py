"""Carrying a checkpoint into a model: from the authors' code or a timm ViT, to another grid or patch size."""

import logging
import math
import re
from typing import Any

from timm.layers import HybridEmbed, resample_abs_pos_embed, resample_patch_embed, to_2tuple
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as convert_to_timm
from torch import Tensor

from ..positions import PositionEncoding

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
Grid = tuple[int, int]

AUTHORS_TABLE = re.compile(r'^(blocks\.\d+\.attn)\.cope\.cope_([xy])\.pos_emb$')
AUTHORS_UNUSED = re.compile(r'^blocks\.\d+\.(gamma_[12]|attn\.cope\.(cope_[xy]\.)?w_k(\..+)?|attn\.cope\.norm\..+)$')
TIMM_LAYER_SCALE = re.compile(r'^(blocks\.\d+)\.gamma_([12])$')


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VisionTransformer) -> StateDict:
    """Convert a checkpoint so that it loads strictly into `model`, timm's `pretrained_filter_fn`.

    Channels and classes are adapted by timm afterwards, as for any of its models.

    Args:
        state_dict: The checkpoint, which is left unchanged.
        model: The model that it is for.

    Returns:
        A complete state dict for the model.

    Raises:
        ValueError: The checkpoint does not fit; the message names the keys. The model is unchanged.
    """
    for wrapper in ('model', 'state_dict'):
        state_dict = state_dict.get(wrapper, state_dict)
    state_dict = rename_from_timm_rope(rename_from_authors(convert_layout(state_dict, model)))
    patch_weight = state_dict.get('patch_embed.proj.weight')
    if patch_weight is None or patch_weight.ndim != 4:
        raise ValueError('The checkpoint does not fit, it has no convolution patch_embed.proj.weight.')

    source_grid = declared_grid(model, (patch_weight.shape[-2], patch_weight.shape[-1]))
    check_prefix_tokens(state_dict, model, source_grid)
    if model.pos_embed is not None and 'pos_embed' in state_dict:
        num_prefix_tokens = 0 if model.no_embed_class else model.num_prefix_tokens
        source_grid = position_embedding_grid(
            state_dict['pos_embed'].shape[1] - num_prefix_tokens, source_grid, model.patch_embed.grid_size
        )
        if source_grid != model.patch_embed.grid_size:
            _logger.info(f'Resampling pos_embed from grid {source_grid} to {model.patch_embed.grid_size}.')
            state_dict['pos_embed'] = resample_abs_pos_embed(
                state_dict['pos_embed'],
                new_size=list(model.patch_embed.grid_size),
                old_size=list(source_grid),
                num_prefix_tokens=num_prefix_tokens,
            )
    if tuple(patch_weight.shape[-2:]) != tuple(model.patch_embed.patch_size):
        _logger.info(
            f'Resampling patch_embed.proj.weight from patch size {tuple(patch_weight.shape[-2:])} '
            f'to {tuple(model.patch_embed.patch_size)}.'
        )
        state_dict['patch_embed.proj.weight'] = resample_patch_embed(patch_weight, list(model.patch_embed.patch_size))
    adapt_encodings(state_dict, model, source_grid)
    check_fit(state_dict, model)
    return state_dict


class _WithoutResampling:
    """A model as timm's checkpoint filter sees it when it is to leave position embeddings alone."""

    pos_embed = None

    def __init__(self, model: VisionTransformer) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def convert_layout(state_dict: StateDict, model: VisionTransformer) -> StateDict:
    """Return a checkpoint in timm's layout, by timm's own filter, if it comes in that of DINOv2, CLIP, OpenCLIP, ..."""
    patch_weight = state_dict.get('patch_embed.proj.weight')
    if patch_weight is not None and patch_weight.ndim == 4 and 'mask_token' not in state_dict:
        return state_dict
    without_resampling: Any = _WithoutResampling(model)
    return convert_to_timm(state_dict, without_resampling)


def rename_from_authors(state_dict: StateDict) -> StateDict:
    """Return a copy with the names and shapes of this package for a checkpoint of the SaPE2 authors' code.

    Their tables are (1, head_dim, num_positions). LayerScale (`gamma_1`, `gamma_2`), `w_k` and `norm` of their position
    modules are stored but never used by their SaPE2 blocks.
    """
    if not any(AUTHORS_TABLE.match(key) for key in state_dict):
        return dict(state_dict)
    renamed, unused = {}, []
    for key, value in state_dict.items():
        table = AUTHORS_TABLE.match(key)
        if table:
            name = {'x': 'row_table', 'y': 'column_table'}[table[2]]
            renamed[f'{table[1]}.position.sape2.{name}'] = value[0].t().contiguous()
        elif AUTHORS_UNUSED.match(key):
            unused.append(key)
        else:
            renamed[key] = value
    _logger.info(
        "Checkpoint of the SaPE2 authors' code, whose last revision uses position_args={'sape2': {'target': 'q'}}. "
        f'Dropped {len(unused)} keys that it does not use: {", ".join(unused) or "none"}.'
    )
    return renamed


def rename_from_timm_rope(state_dict: StateDict) -> StateDict:
    """Return a copy with the names of this package for a checkpoint of timm's rotary ViTs, `vit_*_patch16_rope_*`.

    They call LayerScale `gamma_1` and `gamma_2`, and keep the learned frequencies of all blocks together in
    `rope.freqs`, (2, depth, h, d / 2). Fixed frequencies are not stored.
    """
    renamed = {TIMM_LAYER_SCALE.sub(r'\1.ls\2.gamma', key): value for key, value in state_dict.items()}
    if 'rope.freqs' in renamed and renamed['rope.freqs'].ndim == 4:
        for block, block_freqs in enumerate(renamed.pop('rope.freqs').unbind(1)):
            renamed[f'blocks.{block}.attn.position.rope_mixed.freqs'] = block_freqs.contiguous()
    if renamed.keys() != state_dict.keys():
        _logger.info("Renamed LayerScale and frequencies of a checkpoint of timm's rotary vision transformers.")
    return renamed


def declared_grid(model: VisionTransformer, patch_size: Grid) -> Grid | None:
    """Native grid of the checkpoint, from the configuration that came with it.

    Args:
        model: Model with the source's `pretrained_model_args` and `pretrained_cfg`, as timm sets them.
        patch_size: Patch size of the checkpoint, in pixels of a hybrid's feature map.

    Returns:
        Rows and columns, or None if there is no configuration.
    """
    size = getattr(model, 'pretrained_model_args', {}).get('img_size')
    if size is None:
        size = getattr(model, 'pretrained_cfg', {}).get('input_size', (None,))[1:] or None
    if size is None:
        return None
    height, width = to_2tuple(size)
    if isinstance(model.patch_embed, HybridEmbed):
        height, width = height // model.patch_embed.feature_ratio[0], width // model.patch_embed.feature_ratio[1]
    return height // patch_size[0], width // patch_size[1]


def check_prefix_tokens(state_dict: StateDict, model: VisionTransformer, declared: Grid | None) -> None:
    """Raise a ValueError that names the arguments if a checkpoint has other class or register tokens than the model.

    A `pos_embed` of H * W entries has none for these tokens, one of H * W + 1 + R entries has one for each. Counted
    with the wrong tokens, it would seem to be of another image size.

    Args:
        state_dict: The checkpoint.
        model: The model that it is for.
        declared: Grid that the configuration of the checkpoint declares.
    """
    if 'dist_token' in state_dict:
        raise ValueError(
            'The checkpoint does not fit, it is of a distilled model, with a second class token (dist_token).'
        )
    has_class_token = 'cls_token' in state_dict
    num_registers = state_dict['reg_token'].shape[1] if 'reg_token' in state_dict else 0
    num_prefix_tokens = has_class_token + num_registers
    wanted: dict[str, object] = {}
    if has_class_token != (model.cls_token is not None):
        wanted['class_token'] = has_class_token
    if num_registers != model.num_reg_tokens:
        wanted['reg_tokens'] = num_registers
    embedded = True
    if num_prefix_tokens > 0 and model.pos_embed is not None and 'pos_embed' in state_dict:
        num_entries = state_dict['pos_embed'].shape[1]
        numbers_of_patches = {num_entries: False, num_entries - num_prefix_tokens: True}
        told = [
            *(number for number in numbers_of_patches if declared is not None and math.prod(declared) == number),
            *(number for number in numbers_of_patches if math.isqrt(max(number, 0)) ** 2 == number),
        ]
        embedded = numbers_of_patches[told[0]] if told else not model.no_embed_class
        if embedded == model.no_embed_class:
            wanted['no_embed_class'] = not embedded
    if not wanted:
        return
    if not has_class_token and model.global_pool == 'token':
        wanted['global_pool'] = 'map' if any(key.startswith('attn_pool.') for key in state_dict) else 'avg'
    raise ValueError(
        f'The checkpoint does not fit, nothing was loaded; it has {"a" if has_class_token else "no"} class token, '
        f'{num_registers or "no"} register tokens{"" if embedded else " and no entries of pos_embed for them"}. '
        f'Create the model with {", ".join(f"{name}={value!r}" for name, value in wanted.items())}.'
    )


def position_embedding_grid(num_tokens: int, declared: Grid | None, target: Grid) -> Grid:
    """Decide on which grid the `pos_embed` of a checkpoint was learned.

    The declared grid counts if it accounts for every token. Otherwise the configuration is stale, as for a bare file of
    a model that was trained at another size. A square is then assumed, as timm does, but never where the tokens could
    as well be on the model's own non-square grid.

    Args:
        num_tokens: Patch entries in `pos_embed`.
        declared: Grid that the configuration of the checkpoint declares.
        target: Grid of the model.

    Returns:
        Rows and columns.

    Raises:
        ValueError: The grid cannot be told; the message says how to declare it.
    """
    if declared is not None and math.prod(declared) == num_tokens:
        return declared
    side = math.isqrt(num_tokens)
    ambiguous = num_tokens == math.prod(target) and target[0] != target[1]
    if side * side != num_tokens or ambiguous:
        raise ValueError(
            f'pos_embed of the checkpoint has {num_tokens} patch entries, its configuration declares grid {declared}. '
            'Declare its image size: pretrained_cfg_overlay=dict(file=..., input_size=(3, H, W)).'
        )
    _logger.warning(f'Assuming a square grid ({side}, {side}) for pos_embed, the declared one is {declared}.')
    return side, side


def adapt_encodings(state_dict: StateDict, model: VisionTransformer, source_grid: Grid | None) -> None:
    """Let every encoding convert its entries, and give encodings that the checkpoint lacks their initial values."""
    initial, given = model.state_dict(), list(state_dict)
    added = []
    for name, module in model.named_modules():
        if not isinstance(module, PositionEncoding):
            continue
        prefix = f'{name}.'
        module.adapt_state_dict(state_dict, prefix, source_grid)
        if not any(key.startswith(prefix) for key in state_dict):
            added += [key for key in initial if key.startswith(prefix)]
    state_dict.update({key: initial[key] for key in added})
    dropped = [key for key in given if key not in state_dict]
    for keys, what in ((added, 'Not in the checkpoint, kept at their initial values'), (dropped, 'Dropped')):
        names = dict.fromkeys(re.sub(r'\bblocks\.\d+\.', 'blocks.*.', key) for key in keys)
        if names:
            _logger.warning(f'{what}: {", ".join(names)}.')


def check_fit(state_dict: StateDict, model: VisionTransformer) -> None:
    """Raise a ValueError that names all keys of a checkpoint that do not fit the model.

    timm turns strict loading off when it replaces the classifier, which would hide any other missing key.
    """
    cfg = getattr(model, 'pretrained_cfg', {})
    expected = model.state_dict()
    replaced = set()
    if cfg.get('num_classes', model.num_classes) != model.num_classes:
        replaced = {f'{cfg.get("classifier")}.weight', f'{cfg.get("classifier")}.bias'}
    source_chans = cfg.get('input_size', (model.in_chans,))[0]

    def fits(key: str) -> bool:
        shape, wanted = tuple(state_dict[key].shape), tuple(expected[key].shape)
        if key == f'{cfg.get("first_conv")}.weight' and source_chans != model.in_chans:
            return shape in (wanted, (wanted[0], source_chans, *wanted[2:]))
        return shape == wanted

    missing = sorted(set(expected) - set(state_dict) - replaced)
    unexpected = sorted(set(state_dict) - set(expected) - replaced)
    mismatched = [
        f'{key} {tuple(state_dict[key].shape)} instead of {tuple(expected[key].shape)}'
        for key in sorted(set(expected) & set(state_dict) - replaced)
        if not fits(key)
    ]
    problems = [
        f'{title}: {", ".join(keys)}'
        for title, keys in (('missing keys', missing), ('unexpected keys', unexpected), ('wrong shapes', mismatched))
        if keys
    ]
    if problems:
        raise ValueError(f'The checkpoint does not fit, nothing was loaded; {"; ".join(problems)}.')
