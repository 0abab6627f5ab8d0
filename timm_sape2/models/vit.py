"""One vision transformer with swappable position encodings: model, block, attention."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    Attention,
    is_exporting,
    maybe_add_mask,
    register_notrace_function,
    resolve_self_attn_mask,
    to_2tuple,
)
from timm.models import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.jit import Final

from .._compat import feature_take_indices
from ..positions import ENCODINGS, Host, PositionEncoding, build_encodings, parse_position
from .convert import checkpoint_filter_fn

__all__ = ['PositionAttention', 'PositionBlock', 'PositionVisionTransformer', 'checkpoint_filter_fn']

TOKEN_HOOKS = ('add_to_tokens', 'mix_tokens')
ATTENTION_HOOKS = ('rotate', 'attention_bias')
GRID_HOOKS = ('mix_tokens', 'rotate', 'attention_bias')
POSITION_TABLE = re.compile(r'(^|\.)position\.\w+\.\w+$')


class PositionAttention(Attention):
    """timm's multi-head self-attention with the attention hooks of position encodings."""

    __constants__ = ('has_bias', 'num_prefix_tokens', 'rotates')  # TorchScript drops the branches not taken

    def set_position(self, position: nn.ModuleDict, num_prefix_tokens: int) -> None:
        """Install encodings, called once by the block after construction."""
        self.position = position
        self.num_prefix_tokens = num_prefix_tokens
        self.rotates = any(encoding.overrides('rotate') for encoding in position.values())
        biased = [name for name, encoding in position.items() if encoding.overrides('attention_bias')]
        self.has_bias = len(biased) > 0
        can_fuse = len(biased) == 1 and not self.rotates and position[biased[0]].overrides('fused_attention')
        self.fused_encoding = biased[0] if can_fuse else ''

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend over prefix and patch tokens.

        Args:
            x: Tokens, (B, P + N, C).
            grid: Rows and columns of patches, their product is N.
            attn_mask: Mask as in timm, boolean (True attends) or additive, broadcastable to (B, h, P + N, P + N).
                Masked tokens still take part in content-based positions such as those of SaPE2.
            is_causal: Mask later tokens; as in timm it takes precedence over `attn_mask`.

        Returns:
            Tokens, (B, P + N, C).
        """
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)

        if not torch.jit.is_scripting():
            fused = None if attn_mask is not None or is_causal else self.fused_attention(query, key, value, grid)
            if fused is not None:
                return self.project(fused)
        if self.has_bias:
            bias = self.position_bias(query, key, value, grid)
            attn_mask = maybe_add_mask(bias, resolve_self_attn_mask(length, bias, attn_mask, is_causal))
            is_causal = False
        if self.rotates:
            query, key = self.rotate(query, key, grid)

        if self.fused_attn:
            x = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=self.attn_drop.p if self.training else 0.0,
                is_causal=bool(is_causal) if torch.jit.is_tracing() else is_causal,  # the old ONNX exporter: a tensor
            )
        else:
            attn = (query * self.scale) @ key.transpose(-2, -1)
            attn = maybe_add_mask(attn, resolve_self_attn_mask(length, attn, attn_mask, is_causal))
            attn = self.attn_drop(attn.softmax(dim=-1))
            x = attn @ value
        return self.project(x)

    def project(self, x: Tensor) -> Tensor:
        """Join the heads of the attention output (B, h, P + N, d) and project them."""
        x = x.transpose(1, 2)
        if self.has_bias and is_exporting():
            # the strides that fused attention has at export time are not those of its decomposition
            x = x.clone(memory_format=torch.contiguous_format)
        x = self.norm(x.flatten(2))
        x = self.proj(x)
        return self.proj_drop(x)

    def fused_attention(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Attention without a stored bias, (B, h, P + N, d), where an encoding offers it."""
        if not (self.fused_encoding and self.fused_attn) or (self.training and self.attn_drop.p > 0):
            return None
        return self.position[self.fused_encoding].fused_attention(query, key, value, grid, self.num_prefix_tokens)

    def position_bias(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor:
        """Sum of all encodings' biases, 0 for prefix tokens, broadcastable to (B, h, P + N, P + N)."""
        prefix = self.num_prefix_tokens
        query, key, value = query[:, :, prefix:], key[:, :, prefix:], value[:, :, prefix:]
        total: Tensor | None = None
        for encoding in self.position.values():
            bias = encoding.attention_bias(query, key, value, grid)
            if bias is not None:
                if prefix > 0 and not encoding.bias_has_prefix_tokens:
                    bias = F.pad(bias, [prefix, 0, prefix, 0])
                total = bias if total is None else total + bias
        assert total is not None
        return total

    def rotate(self, query: Tensor, key: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Rotate the queries and keys of patches, (B, h, P + N, d) each."""
        prefix = self.num_prefix_tokens
        patch_query, patch_key = query[:, :, prefix:], key[:, :, prefix:]
        for encoding in self.position.values():
            patch_query, patch_key = encoding.rotate(patch_query, patch_key, grid)
        if prefix == 0:
            return patch_query, patch_key
        return torch.cat([query[:, :, :prefix], patch_query], dim=2), torch.cat([key[:, :, :prefix], patch_key], dim=2)


class PositionBlock(Block):
    """timm's pre-norm block, which passes the grid on to its attention.

    Args:
        position: Options of each encoding by name.
        host: The model that the block belongs to.
        **kwargs: Arguments of timm's `Block`.
    """

    def __init__(self, *, position: Mapping[str, Mapping[str, Any]], host: Host, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        dd = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        self.attn.set_position(build_encodings(position, ATTENTION_HOOKS, host, **dd), host.num_prefix_tokens)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Apply attention and MLP to tokens (B, P + N, C) of a grid with N patches."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid, attn_mask, is_causal)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class PositionVisionTransformer(VisionTransformer):
    """timm's vision transformer with the position encoding as an argument.

    Args:
        img_size: Image size, one number or (height, width).
        patch_size: Patch size, one number or (height, width).
        position: Names of encodings joined by '+': 'nope', 'learned', 'sape2', 'learned+sape2', ...
        position_args: Options by encoding, such as `{'sape2': {'target': 'q'}}`.
        embed_dim: Channels of a token.
        num_heads: Attention heads.
        class_token: Prepend a class token.
        reg_tokens: Number of register tokens after the class token.
        dynamic_img_size: Accept any image size that the patch size divides.
        dynamic_img_pad: With `dynamic_img_size`, pad other sizes instead of refusing them.
        patch_drop_rate: Patch dropout, refused for encodings that need the whole grid.
        **kwargs: The other arguments of timm's `VisionTransformer`.

    Raises:
        ValueError: Unknown encoding or option, image size that the patch size does not divide, or patch dropout
            with an encoding that needs the whole grid.
        TypeError: An argument that the encoding decides: `pos_embed`, `block_fn` or `attn_layer`.
    """

    dynamic_img_pad: Final[bool]
    mixes_tokens: Final[bool]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *,
        position: str = 'learned+sape2',
        position_args: Mapping[str, Any] | None = None,
        embed_dim: int = 768,
        num_heads: int = 12,
        class_token: bool = True,
        reg_tokens: int = 0,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        patch_drop_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        refused = sorted({'pos_embed', 'block_fn', 'attn_layer'} & set(kwargs))
        if refused:
            raise TypeError(f'{", ".join(refused)}: not an argument of this model, use position and position_args.')
        options = parse_position(position, position_args)
        encodings = {name: ENCODINGS[name] for name in options}
        if patch_drop_rate > 0:
            needs_grid = [name for name, encoding in encodings.items() if encoding.overrides(*GRID_HOOKS)]
            if needs_grid:
                raise ValueError(
                    f'patch_drop_rate={patch_drop_rate} removes patches, but position encoding '
                    f'{", ".join(map(repr, needs_grid))} needs the whole grid; use patch_drop_rate=0.'
                )
        (height, width), (patch_height, patch_width) = to_2tuple(img_size), to_2tuple(patch_size)
        dynamic_img_pad = dynamic_img_pad and dynamic_img_size
        check_divisible((height, width), (patch_height, patch_width), dynamic_img_pad)
        host = Host(
            embed_dim=embed_dim,
            num_heads=num_heads,
            grid=(height // patch_height, width // patch_width),
            num_prefix_tokens=int(class_token) + reg_tokens,
        )
        super().__init__(
            img_size=(height, width),
            patch_size=(patch_height, patch_width),
            embed_dim=embed_dim,
            num_heads=num_heads,
            class_token=class_token,
            reg_tokens=reg_tokens,
            pos_embed='learn' if any(e.has_learned_embedding for e in encodings.values()) else 'none',
            dynamic_img_size=dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            patch_drop_rate=patch_drop_rate,
            block_fn=partial(PositionBlock, position=options, host=host),
            attn_layer=PositionAttention,
            **kwargs,
        )
        self.blocks = nn.ModuleList(self.blocks)
        self.dynamic_img_pad = dynamic_img_pad
        self.position_name = position
        dd = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        self.position = build_encodings(options, TOKEN_HOOKS, host, **dd)
        self.mixes_tokens = any(type(encoding).overrides('mix_tokens') for encoding in self.position.values())

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
        check_divisible(image, patch, self.dynamic_img_pad)
        super().set_input_size(img_size=image, patch_size=None if patch_size is None else patch)
        for module in self.modules():
            if isinstance(module, PositionEncoding):
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
            x, self.in_chans, patch_embed.img_size, patch_embed.patch_size, self.dynamic_img_size, self.dynamic_img_pad
        )
        x = patch_embed(x)
        if self.dynamic_img_size:
            grid = (x.shape[1], x.shape[2])
            tokens = x.flatten(1, 2)
        else:
            grid = patch_embed.grid_size
            tokens = x
        for encoding in self.position.values():
            tokens = encoding.add_to_tokens(tokens, grid)
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
        for i, block in enumerate(self.blocks):
            if i < depth:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, grid, attn_mask, is_causal)
                else:
                    x = block(x, grid, attn_mask, is_causal)
                if self.mixes_tokens:
                    x = self.mix_tokens(x, grid, i)
                if i in keep:
                    kept.append(x)
        return x, kept

    def mix_tokens(self, x: Tensor, grid: tuple[int, int], block_index: int) -> Tensor:
        """Let the encodings mix patch tokens after a block."""
        prefix = self.num_prefix_tokens
        for encoding in self.position.values():
            mixed = encoding.mix_tokens(x[:, prefix:], grid, block_index)
            if mixed is not None:
                x = mixed if prefix == 0 else torch.cat([x[:, :prefix], mixed], dim=1)
        return x

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


def check_divisible(img_size: tuple[int, int], patch_size: tuple[int, int], dynamic_img_pad: bool) -> None:
    """Raise a ValueError if patches do not tile the native image size."""
    if not dynamic_img_pad and (img_size[0] % patch_size[0] or img_size[1] % patch_size[1]):
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
    dynamic_img_pad: bool,
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
    elif not dynamic_img_pad and (height % patch_size[0] != 0 or width % patch_size[1] != 0):
        raise ValueError(
            f'Images are {height}x{width}, not divisible by the patch size {patch_size[0]}x{patch_size[1]}; '
            'resize them, or create the model with dynamic_img_pad=True.'
        )
