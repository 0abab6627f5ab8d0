"""The seam between a vision transformer and a position encoding."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

BIAS_HOOKS = ('attention_bias', 'logit_channels')
HOOKS = {
    'model': ('add_to_tokens', 'mix_tokens'),
    'block': ('prepare', 'look', 'rotate', *BIAS_HOOKS, 'value_channels', 'add_to_output', 'fused_attention'),
}
GRID_HOOKS = ('mix_tokens', 'rotate', *BIAS_HOOKS, 'value_channels')  # with these an encoding needs the whole grid


class HostShape(NamedTuple):
    """What an encoding may know of the model that it is built into."""

    embed_dim: int
    num_heads: int
    grid: tuple[int, int]  # rows and columns of patches at the native image size
    num_prefix_tokens: int  # class and register tokens before the patches
    depth: int = 1  # blocks of the model
    block: int | None = None  # the block that the encoding is built into, None for the model itself

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.embed_dim // self.num_heads


class PositionEncoding(nn.Module):
    """A position encoding declares its place, overrides the hooks that it needs, and the model calls only those.

    With `place = 'model'` it is built once, into the model (`position.<name>`), and may override `add_to_tokens` and
    `mix_tokens`. With `place = 'block'` it is built into every attention (`blocks.<i>.attn.position.<name>`), knows the
    block from the `HostShape`, and may override `rotate`, `attention_bias` or `logit_channels`, `value_channels` with
    `add_to_output`, and `fused_attention`; `prepare` and `look` give these what they compute beforehand.

    Hooks may draw random numbers in training (`self.training`), from torch's default generators: training seeds them
    for every epoch and process, so that a resumed run draws the same.

    All hooks see patch tokens only, in raster order, and the grid as (height, width). The model takes prefix tokens off
    before a hook and puts them back after it, untouched and with a bias of 0.

    Its constructor takes the `HostShape` first. Its keyword-only arguments, apart from `device` and `dtype`, are the
    options that users set through `position_args`. Direct parameters are position tables, which get no weight decay;
    those of submodules are decayed as usual. Parameters are initialised in `reset_parameters()`, called by the
    constructor.

    Raises:
        TypeError: When a class is made that overrides hooks of both places, or of the one that it does not declare.
    """

    __constants__ = ('bias_has_prefix_tokens',)  # class attributes that TorchScript may read

    place: ClassVar[str] = 'model'
    """Where it is built: 'model' or 'block'."""

    kind: ClassVar[str] = 'fixed'
    """'learned' if it has parameters, 'fixed' if not, 'none' for no encoding."""

    translation: ClassVar[str] = 'none'
    """What moving content does to its features, without class token: nothing, because they depend on no place ('none')
    or on distances alone ('relative', or 'relative inside' if not at the border of the image), or something that
    depends on the place ('absolute') or on what lies around ('content-based')."""

    other_grids: ClassVar[str] = 'as it is'
    """What becomes of its parameters on another grid: 'as it is' or 'resampled'."""

    has_learned_embedding: ClassVar[bool] = False
    """The model keeps timm's own learned `pos_embed`, and adds, resamples and stores it as timm does."""

    options_after_training: tuple[str, ...] = ()
    """Options that trained weights may be used with whatever they were in training: on the grid of training they change
    no result."""

    bias_has_prefix_tokens = False
    """`attention_bias` covers the prefix tokens too, (..., P + N, P + N) instead of (..., N, N)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.place not in HOOKS:
            raise TypeError(f"{cls.__name__}.place must be 'model' or 'block', got {cls.place!r}.")
        elsewhere = [hook for place, hooks in HOOKS.items() if place != cls.place for hook in hooks]
        misplaced = [hook for hook in elsewhere if cls.overrides(hook)]
        if misplaced:
            raise TypeError(
                f'{cls.__name__} has place = {cls.place!r}, where {", ".join(misplaced)} is never called; declare the '
                "other place, or make two encodings of it and join their names by '+'."
            )

    def add_to_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the patch embeddings with positions added, (B, N, C), before the first block."""
        return tokens

    def mix_tokens(self, tokens: Tensor, grid: tuple[int, int], block_index: int) -> Tensor | None:
        """Return the patch tokens after block `block_index` changed, (B, N, C), or None to leave them alone."""
        return None

    def prepare(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """Return what the attention hooks of all blocks share, or None for nothing.

        It is called once in a forward, on the encoding of the first block, so it must not depend on parameters.
        """
        return None

    def look(self, tokens: Tensor, grid: tuple[int, int], shared: Tensor | None = None) -> Tensor | None:
        """Return what the other attention hooks of this block get as `shared`, in place of what `prepare` returned.

        Args:
            tokens: Patch tokens that the attention reads, after the block's norm, (B, N, C).
            grid: Rows and columns of patches, their product is N.
            shared: What `prepare` returned.
        """
        return shared

    def rotate(
        self, query: Tensor, key: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return queries and keys for the dot product, (B, h, N, d) each; `shared` is from `prepare` or `look`."""
        return query, key

    def attention_bias(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> Tensor | None:
        """Return what is added to the scaled dot products, broadcastable to (B, h, N, N), or None for nothing.

        Queries and keys come normalised and before any rotation, so that encodings do not see one another. `shared` is
        what `prepare` or `look` returned.
        """
        return None

    def logit_channels(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Return more channels of queries and keys, (B, h, N, e) with or without B and h, or None for no bias.

        Their dot products are added to the scaled dot products: a bias of rank e that no backend of attention has to
        store. The arguments are those of `attention_bias`.
        """
        return None

    def value_channels(self, value: Tensor, grid: tuple[int, int], shared: Tensor | None = None) -> Tensor | None:
        """Return more channels of the values for `add_to_output`, (B, h, N, e) with or without B and h, or None."""
        return None

    def add_to_output(
        self, output: Tensor, attended: Tensor, grid: tuple[int, int], shared: Tensor | None = None
    ) -> Tensor:
        """Return the outputs of attention (B, h, N, d) changed by what it made of `value_channels`, (B, h, N, e)."""
        return output

    def fused_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        rotated: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        """Return attention with this encoding's bias without storing that, (B, h, P + N, d), or None if not possible.

        Unlike the other hooks it gets all tokens. It is asked in eager and compiled PyTorch, not by exporters and
        TorchScript, and only where no mask, dropout or other bias takes part. With another encoding that rotates,
        `rotated` has the queries and keys of the dot product, (B, h, P + N, d) each. `attention_bias` remains the
        definition of the same thing.
        """
        return None

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Adapt size-dependent parameters to a new native grid, called by the model's `set_input_size`."""

    def adapt_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        source_grid: tuple[int, int] | None,
    ) -> None:
        """Convert this encoding's entries of a checkpoint, in place, before they are checked and loaded.

        Args:
            state_dict: The whole checkpoint.
            prefix: Start of this encoding's keys, such as 'blocks.0.attn.position.sape2.'.
            source_grid: Native grid of the checkpoint, None if it is not known.
        """

    @classmethod
    def overrides(cls, *hooks: str) -> bool:
        """Tell whether any of the named hooks does something."""
        return any(getattr(cls, hook) is not getattr(PositionEncoding, hook) for hook in hooks)
