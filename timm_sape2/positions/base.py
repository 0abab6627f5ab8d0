"""The seam between the vision transformer and a position encoding."""

from typing import NamedTuple

from torch import Tensor, nn


class Host(NamedTuple):
    """What an encoding may know of the model that it is built into."""

    embed_dim: int
    num_heads: int
    grid: tuple[int, int]  # rows and columns of patches at the native image size
    num_prefix_tokens: int  # class and register tokens before the patches

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.embed_dim // self.num_heads


class PositionEncoding(nn.Module):
    """A position encoding overrides the hooks that it needs, and the model calls only those.

    An encoding that overrides `add_to_tokens` or `mix_tokens` is built once, into the model (`position.<name>`). One
    that overrides `rotate` or `attention_bias` is built into every attention (`blocks.<i>.attn.position.<name>`).

    All hooks see patch tokens only, in raster order, and the grid as (height, width). The model takes prefix tokens off
    before a hook and puts them back after it, untouched and with a bias of 0.

    Its constructor takes the `Host` first. Its keyword-only arguments, apart from `device` and `dtype`, are the options
    that users set through `position_args`. Direct parameters are position tables, which get no weight decay; those of
    submodules are decayed as usual. Parameters are initialised in `reset_parameters()`, called by the constructor.
    """

    __constants__ = ('bias_has_prefix_tokens',)  # class attributes that TorchScript may read

    has_learned_embedding = False
    """The model keeps timm's own learned `pos_embed`, and adds, resamples and stores it as timm does."""

    options_after_training: tuple[str, ...] = ()
    """Options that trained weights may be used with whatever they were in training: on the grid of training they change
    no result."""

    bias_has_prefix_tokens = False
    """`attention_bias` covers the prefix tokens too, (..., P + N, P + N) instead of (..., N, N)."""

    def add_to_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the patch embeddings with positions added, (B, N, C), before the first block."""
        return tokens

    def mix_tokens(self, tokens: Tensor, grid: tuple[int, int], block_index: int) -> Tensor | None:
        """Return the patch tokens after block `block_index` changed, (B, N, C), or None to leave them alone."""
        return None

    def rotate(self, query: Tensor, key: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return queries and keys for the dot product, (B, h, N, d) each."""
        return query, key

    def attention_bias(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Return what is added to the scaled dot products, broadcastable to (B, h, N, N), or None for nothing.

        Queries and keys come normalised and before any rotation, so that encodings do not see one another.
        """
        return None

    def fused_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: tuple[int, int],
        num_prefix_tokens: int,
    ) -> Tensor | None:
        """Return attention with this encoding's bias without storing that, (B, h, P + N, d), or None if not possible.

        Unlike the other hooks it gets all tokens. It is asked in eager and compiled PyTorch, not by exporters and
        TorchScript, and only where no mask, dropout, rotation or other bias takes part. `attention_bias` remains the
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
