"""One vision transformer with swappable position encodings: model, block, attention."""

import inspect
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import (
    Attention,
    HybridEmbed,
    is_exporting,
    register_notrace_function,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.jit import Final

from .._compat import feature_take_indices
from .._names import did_you_mean
from ..positions import ENCODINGS, HostShape, Positions, has_learned_embedding, parse_position
from ..positions.base import GRID_HOOKS

_logger = logging.getLogger(__name__)

POSITION_TABLE = re.compile(r'(^|\.)position\.[^.]+\.[^.]+$')


class PositionAttention(Attention):
    """timm's multi-head self-attention, which leaves the attending to `position`, the `Positions` of its block."""

    def project_in(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys after normalisation, and values, (B, h, P + N, d) each, of tokens (B, P + N, C)."""
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return self.q_norm(query), self.k_norm(key), value

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Attend over prefix and patch tokens.

        Args:
            x: Tokens, (B, P + N, C).
            grid: Rows and columns of patches, their product is N.
            attn_mask: Mask as in timm, boolean (True attends) or additive, broadcastable to (B, h, P + N, P + N).
                Masked tokens still take part in content-based positions such as those of SaPE2.
            is_causal: Mask later tokens; as in timm it takes precedence over `attn_mask`.
            shared: What the attentions of all blocks share, computed if it is not given.

        Returns:
            Tokens, (B, P + N, C).
        """
        query, key, value = self.project_in(x)
        shared = self.position.look(x, grid, shared)

        if self.fused_attn:
            dropout_p = self.attn_drop.p if self.training else 0.0
            mixed = self.position.attend(query, key, value, grid, shared, attn_mask, is_causal, dropout_p)
        else:
            attn = self.position.logits(query, key, value, grid, self.scale, shared, attn_mask, is_causal)
            attn = self.attn_drop(attn.softmax(dim=-1))
            mixed = self.position.weigh(attn, value, grid, shared)

        mixed = mixed.transpose(1, 2)
        if self.position.has_bias and is_exporting():
            # the strides that fused attention has at export time are not those of its decomposition, so that a view
            # of its output would not run
            mixed = mixed.clone(memory_format=torch.contiguous_format)
        mixed = self.norm(mixed.flatten(2))
        if self.gate is not None:
            mixed = mixed * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(mixed))


class PositionBlock(Block):
    """timm's pre-norm block, which passes the grid on to its attention."""

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Apply attention and MLP to tokens (B, P + N, C) of a grid with N patches."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid, attn_mask, is_causal, shared)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class PositionVisionTransformer(VisionTransformer):
    """timm's vision transformer with the position encoding as an argument.

    Args:
        img_size: Image size, one number or (height, width).
        patch_size: Patch size, one number or (height, width).
        position: Names of encodings joined by '+': 'nope', 'learned', 'sape2', 'learned+sape2', ...
        position_args: Options by encoding, such as `{'sape2': {'target': 'q'}}`.
        dynamic_img_pad: With `dynamic_img_size`, pad other sizes instead of refusing them.
        patch_drop_rate: Patch dropout, refused for encodings that need the whole grid.
        **kwargs: The other arguments of timm's `VisionTransformer`.

    Raises:
        ValueError: Unknown encoding or option, image size that the patch size does not divide, or patch dropout
            with an encoding that needs the whole grid.
        TypeError: An argument that the encoding decides: `pos_embed`, `block_fn` or `attn_layer`.
    """

    position_name: str
    any_size: Final[bool]
    mixes_tokens: Final[bool]
    shares_positions: Final[bool]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *,
        position: str = 'learned+sape2',
        position_args: Mapping[str, Any] | None = None,
        dynamic_img_pad: bool = False,
        patch_drop_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        refused = sorted({'pos_embed', 'block_fn', 'attn_layer'} & set(kwargs))
        if refused:
            raise TypeError(f'{", ".join(refused)}: not an argument of this model, use position and position_args.')
        known = inspect.signature(VisionTransformer).parameters
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            hints = (repr(name) + did_you_mean(name, (*known, 'position', 'position_args')) for name in unknown)
            raise TypeError(f'unexpected keyword argument {", ".join(hints)}')
        options = parse_position(position, position_args)
        check_patch_dropout(patch_drop_rate, options)
        image, patch = to_2tuple(img_size), to_2tuple(patch_size)
        dynamic_img_pad = dynamic_img_pad and kwargs.get('dynamic_img_size', False)
        check_divisible(image, patch, dynamic_img_pad)
        super().__init__(
            img_size=image,
            patch_size=patch,
            pos_embed='learn' if has_learned_embedding(options) else 'none',
            dynamic_img_pad=dynamic_img_pad,
            patch_drop_rate=patch_drop_rate,
            block_fn=PositionBlock,
            attn_layer=PositionAttention,
            **kwargs,
        )
        install(self, options)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: position tables, besides timm's own."""
        tables = {name for name, _ in self.named_parameters() if POSITION_TABLE.search(name)}
        return VisionTransformer.no_weight_decay(self) | tables

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions for parameter groups: timm's own, with the model's encodings in the stem."""
        matcher = VisionTransformer.group_matcher(self, coarse)
        return dict(matcher, stem=matcher['stem'] + r'|position\.')

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the native image and patch size, resampling what depends on the grid.

        Args:
            img_size: New image size, None keeps the current one.
            patch_size: New patch size, None keeps the current one.

        Raises:
            ValueError: The patch size does not divide the image size.
        """
        image = to_2tuple(img_size or self.patch_embed.img_size)
        patch = to_2tuple(patch_size or self.patch_embed.patch_size)
        check_divisible(image, patch, self.any_size)
        super().set_input_size(img_size=image, patch_size=None if patch_size is None else patch)
        for module in self.modules():
            if isinstance(module, Positions):
                module.set_grid(self.patch_embed.grid_size)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Turn images into tokens with positions.

        Args:
            x: Images, (B, C, height, width).

        Returns:
            Tokens (B, P + N, embed_dim), and the grid of the N patches as (rows, columns).

        Raises:
            ValueError: The images have the wrong channels or size.
        """
        patch_embed = self.patch_embed
        check_images(
            x, self.in_chans, patch_embed.img_size, patch_embed.patch_size, self.dynamic_img_size, self.any_size
        )
        x = patch_embed(x)
        if self.dynamic_img_size:
            grid = (x.shape[1], x.shape[2])
            tokens = x.flatten(1, 2)
        else:
            grid = patch_embed.grid_size
            tokens = x
        tokens = self.position.add(tokens, grid)
        x = self._pos_embed(tokens.reshape(x.shape))
        x = self.patch_drop(x)
        return self.norm_pre(x), grid

    def run_blocks(
        self,
        x: Tensor,
        grid: tuple[int, int],
        attn_mask: Tensor | None,
        is_causal: bool,
        depth: int,
        keep: list[int],
    ) -> tuple[Tensor, list[Tensor]]:
        """Apply the first `depth` blocks and return the tokens with the outputs of the blocks listed in `keep`."""
        kept: list[Tensor] = []
        shared: dict[str, Tensor] = {}
        if self.shares_positions:
            shared = self.blocks[0].attn.position.prepare(grid, x.device)
        for i, block in enumerate(self.blocks):
            if i < depth:  # TorchScript iterates over all modules of a list
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, grid, attn_mask, is_causal, shared)
                else:
                    x = block(x, grid, attn_mask, is_causal, shared)
                if self.mixes_tokens:
                    x = self.position.mix(x, grid, i)
                if i in keep:
                    kept.append(x)
        return x, kept

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Compute normalised tokens (B, P + N, embed_dim) from images (B, C, height, width)."""
        x, grid = self.embed(x)
        keep: list[int] = []
        x, _ = self.run_blocks(x, grid, attn_mask, is_causal, len(self.blocks), keep)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Any]:
        """Compute the outputs of intermediate blocks.

        Args:
            x: Images, (B, C, height, width).
            indices: The last n blocks if a number, all if None, else the blocks listed.
            return_prefix_tokens: Return prefix tokens beside the spatial ones.
            norm: Apply the final norm to all intermediates.
            stop_early: Leave out the blocks after the last one asked for.
            output_fmt: 'NCHW' maps or 'NLC' tokens.
            intermediates_only: Return the list of intermediates alone.
            output_dict: Return a dictionary with 'image_features', 'image_intermediates' and, if asked for,
                'image_intermediates_prefix'.
            attn_mask: Mask as in `forward`.
            is_causal: Mask later tokens.

        Returns:
            Final features and intermediates, or what `intermediates_only` and `output_dict` ask for.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}.")
        keep, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self.embed(x)
        x, kept = self.run_blocks(x, grid, attn_mask, is_causal, last + 1 if stop_early else len(self.blocks), keep)
        if norm:
            kept = [self.norm(y) for y in kept]
        prefix = [y[:, : self.num_prefix_tokens] for y in kept] if self.num_prefix_tokens else None
        intermediates = [y[:, self.num_prefix_tokens :] for y in kept]
        if output_fmt == 'NCHW':
            intermediates = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in intermediates]

        if output_dict:
            result: dict[str, Any] = {'image_intermediates': intermediates}
            if prefix is not None and return_prefix_tokens:
                result['image_intermediates_prefix'] = prefix
            if not intermediates_only:
                result['image_features'] = self.norm(x)
            return result
        if prefix is not None and return_prefix_tokens:
            pairs = list(zip(intermediates, prefix, strict=True))
            return pairs if intermediates_only else (self.norm(x), pairs)
        return intermediates if intermediates_only else (self.norm(x), intermediates)


def install(model: VisionTransformer, options: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a built vision transformer of `PositionBlock`s its position encodings.

    Weights that the model has stay as they are. Learned embeddings are dropped, with a warning, if `options` do not
    name them, and drawn anew if they do and the model has none.

    Args:
        model: The model, changed in place.
        options: Options of each encoding by name, as `parse_position` returns them.

    Raises:
        ValueError: An encoding does not fit the model, which is then unchanged.
    """
    patch_embed, depth = model.patch_embed, len(model.blocks)
    shape = HostShape(
        embed_dim=model.embed_dim,
        num_heads=model.blocks[0].attn.num_heads if depth else 1,
        grid=patch_embed.grid_size,
        num_prefix_tokens=model.num_prefix_tokens,
        depth=depth,
    )
    like = next(model.parameters())
    dd: dict[str, Any] = {'device': like.device, 'dtype': like.dtype}
    position = Positions(options, shape, **dd)
    positions = [Positions(options, shape._replace(block=i), **dd) for i in range(depth)]

    model.position = position.train(model.training)
    for block, block_position in zip(model.blocks, positions, strict=True):
        block.attn.position = block_position.train(model.training)
    model.blocks = nn.ModuleList(model.blocks)
    model.position_name = '+'.join(options)
    model.position_options = {name: dict(chosen) for name, chosen in options.items()}
    if not has_learned_embedding(options):
        if model.pos_embed is not None:
            _logger.warning(f"The model's learned position embeddings are dropped: {model.position_name} has none.")
        model.pos_embed = None
    elif model.pos_embed is None:
        length = patch_embed.num_patches + (0 if model.no_embed_class else model.num_prefix_tokens)
        model.pos_embed = nn.Parameter(torch.empty(1, length, model.embed_dim, **dd))
        trunc_normal_(model.pos_embed, std=0.02)
    model.mixes_tokens = position.mixes
    model.shares_positions = any(p.shares for p in positions)
    # the convolutions of a hybrid take any size
    model.any_size = patch_embed.dynamic_img_pad or isinstance(patch_embed, HybridEmbed)


def check_patch_dropout(rate: float, options: Mapping[str, Any]) -> None:
    """Raise a ValueError if patches are to be dropped and one of the named encodings needs the whole grid."""
    needs_grid = [name for name in options if ENCODINGS[name].overrides(*GRID_HOOKS)]
    if rate > 0 and needs_grid:
        raise ValueError(
            f'patch_drop_rate={rate} removes patches, but position encoding {", ".join(map(repr, needs_grid))} needs '
            'the whole grid; use patch_drop_rate=0.'
        )


def check_divisible(img_size: tuple[int, int], patch_size: tuple[int, int], any_size: bool) -> None:
    """Raise a ValueError if patches do not tile the native image size."""
    if not any_size and (img_size[0] % patch_size[0] or img_size[1] % patch_size[1]):
        raise ValueError(
            f'img_size {tuple(img_size)} is not divisible by patch_size {tuple(patch_size)}; '
            'use another size, or dynamic_img_size=True with dynamic_img_pad=True.'
        )


@torch.fx.wrap
@register_notrace_function
def check_images(
    x: Tensor,
    in_chans: int,
    img_size: tuple[int, int],
    patch_size: tuple[int, int],
    dynamic_img_size: bool,
    any_size: bool,
) -> None:
    """Raise a ValueError if images (B, C, height, width) do not fit the model."""
    if x.dim() != 4:
        raise ValueError(f'Expected images as (batch, channels, height, width), got {x.dim()} dimensions.')
    channels, height, width = x.shape[1], x.shape[2], x.shape[3]
    if channels != in_chans:
        raise ValueError(
            f'Images have {channels} channels, the model takes {in_chans}; create it with in_chans={channels}.'
        )
    if not dynamic_img_size:
        if height != img_size[0] or width != img_size[1]:
            raise ValueError(
                f'Images are {height}x{width}, the model takes {img_size[0]}x{img_size[1]}; create it with '
                f'img_size=({height}, {width}), or with dynamic_img_size=True for any size.'
            )
    elif not any_size and (height % patch_size[0] != 0 or width % patch_size[1] != 0):
        raise ValueError(
            f'Images are {height}x{width}, not divisible by the patch size {patch_size[0]}x{patch_size[1]}; '
            'resize them, or create the model with dynamic_img_pad=True.'
        )
