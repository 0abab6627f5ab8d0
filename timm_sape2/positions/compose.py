"""Position encodings by name, their options, and `Positions`, the only thing that a host talks to.

A new encoding is a file beside this one and a line in `ENCODINGS`. One of another package is an entry point of the
group `timm_sape2.encodings` there, `NAME = "PACKAGE.MODULE:CLASS"`; it is loaded, and added to `ENCODINGS`, when its
name is first asked for.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import maybe_add_mask, resolve_self_attn_mask
from torch import Tensor, nn

from .alibi import LinearBias
from .axial_cope import AxialContextualPosition
from .base import BIAS_HOOKS, HOOKS, HostShape, PositionEncoding
from .cope import ContextualPosition
from .cpe import ConditionalPosition
from .fire import FunctionalBias
from .learned import LearnedPosition
from .liere import LieRotaryPosition
from .lookhere import DirectedBias
from .nope import NoPosition
from .pape import ParabolicPosition
from .plugins import load_encoding, load_encodings
from .relbias import RelativePositionBias
from .rope import AxialRotaryPosition, MixedRotaryPosition
from .sape2 import SaPE2
from .shaw import RelativeEmbedding
from .sincos import SinCosPosition

for _function in ('maybe_add_mask', 'resolve_self_attn_mask'):  # FX wraps a function by module, timm did so for its own
    torch.fx.wrap(_function)

ENCODINGS: dict[str, type[PositionEncoding]] = {
    'nope': NoPosition,
    'learned': LearnedPosition,
    'sincos': SinCosPosition,
    'relbias': RelativePositionBias,
    'cpe': ConditionalPosition,
    'rope': AxialRotaryPosition,
    'rope_mixed': MixedRotaryPosition,
    'liere': LieRotaryPosition,
    'alibi': LinearBias,
    'lookhere': DirectedBias,
    'fire': FunctionalBias,
    'pape': ParabolicPosition,
    'shaw': RelativeEmbedding,
    'cope': ContextualPosition,
    'axial_cope': AxialContextualPosition,
    'sape2': SaPE2,
}


class Positions(nn.ModuleDict):
    """The encodings of one place, by name: those of a model, or those of one attention.

    They act in the order of `ENCODINGS`, in whatever order they are named. A host keeps one for itself, of which it
    calls `add` and `mix`, and one in every attention, of which it calls `look` and `attend` (or `logits` and `weigh`,
    for the naive path). `prepare` of the first attention is called once in a forward, and its result is handed down
    like the grid.

    Args:
        options: Options of each encoding by name, as `parse_position` returns them.
        shape: The host, with `block` set for an attention.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    # TorchScript drops the branches not taken
    __constants__ = ('has_bias', 'looks', 'mixes', 'num_prefix_tokens', 'rotates', 'shares', 'stores_bias', 'widens')

    def __init__(
        self,
        options: Mapping[str, Mapping[str, Any]],
        shape: HostShape,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        place = 'model' if shape.block is None else 'block'
        ordered = {name: options[name] for name in ENCODINGS if name in options}  # rotations may not commute
        super().__init__(
            {
                name: ENCODINGS[name](shape, **kwargs, device=device, dtype=dtype)
                for name, kwargs in ordered.items()
                if ENCODINGS[name].place == place and ENCODINGS[name].overrides(*HOOKS[place])
            }
        )
        self.num_prefix_tokens = shape.num_prefix_tokens
        self.mixes = bool(self.overriding('mix_tokens'))
        self.shares = bool(self.overriding('prepare'))
        self.looks = bool(self.overriding('look'))
        self.rotates = bool(self.overriding('rotate'))
        self.stores_bias = bool(self.overriding('attention_bias'))
        self.has_bias = bool(self.overriding(*BIAS_HOOKS))
        self.widens = bool(self.overriding('logit_channels', 'value_channels'))
        beyond_rotation = self.overriding(*BIAS_HOOKS, 'value_channels')
        self.fused_encoding = ''
        if len(beyond_rotation) == 1 and self[beyond_rotation[0]].overrides('fused_attention'):
            self.fused_encoding = beyond_rotation[0]

    @torch.jit.unused
    def overriding(self, *hooks: str) -> list[str]:
        """Names of the encodings that override any of these hooks."""
        return [name for name, encoding in self.items() if encoding.overrides(*hooks)]

    def add(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Add positions to patch embeddings (B, N, C), before the first block."""
        for encoding in self.values():
            tokens = encoding.add_to_tokens(tokens, grid)
        return tokens

    def mix(self, x: Tensor, grid: tuple[int, int], block_index: int) -> Tensor:
        """Mix patch tokens after a block, x is (B, P + N, C)."""
        prefix = self.num_prefix_tokens
        for encoding in self.values():
            mixed = encoding.mix_tokens(x[:, prefix:], grid, block_index)
            if mixed is not None:
                x = mixed if prefix == 0 else torch.cat([x[:, :prefix], mixed], dim=1)
        return x

    def prepare(self, grid: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
        """Compute what the attentions of all blocks share, by encoding."""
        shared: dict[str, Tensor] = {}
        for name, encoding in self.items():
            tensor = encoding.prepare(grid, device)
            if tensor is not None:
                shared[name] = tensor
        return shared

    def look(self, tokens: Tensor, grid: tuple[int, int], shared: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Compute what the hooks of this attention share, by encoding.

        Args:
            tokens: What the attention reads, (B, P + N, C).
            grid: Rows and columns of patches, their product is N.
            shared: What `prepare` returned, computed if it is not given.
        """
        if shared is None:
            shared = self.prepare(grid, tokens.device)
        if not self.looks:
            return shared
        seen: dict[str, Tensor] = {}
        for name, encoding in self.items():
            tensor = encoding.look(tokens[:, self.num_prefix_tokens :], grid, shared.get(name))
            if tensor is not None:
                seen[name] = tensor
        return seen

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: tuple[int, int],
        shared: dict[str, Tensor] | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Scaled dot-product attention with all encodings, fused where one of them offers it.

        Args:
            query: Queries after normalisation, (B, h, P + N, d).
            key: Keys after normalisation, (B, h, P + N, d).
            value: Values, (B, h, P + N, d).
            grid: Rows and columns of patches, their product is N.
            shared: What `look` returned, or `prepare` if no encoding looks at tokens; that is the default.
            attn_mask: Boolean (True attends) or additive mask, broadcastable to (B, h, P + N, P + N).
            is_causal: Mask later tokens; takes precedence over `attn_mask`.
            dropout_p: Probability of attention dropout.

        Returns:
            Attention output, (B, h, P + N, d).
        """
        if shared is None:
            shared = self.prepare(grid, query.device)
        rotated_query, rotated_key = self.rotate(query, key, grid, shared)
        is_plain = attn_mask is None and not is_causal and dropout_p == 0.0
        if not torch.jit.is_scripting() and self.fused_encoding and is_plain:
            rotated = (rotated_query, rotated_key) if self.rotates else None
            encoding = self[self.fused_encoding]
            fused = encoding.fused_attention(query, key, value, grid, self.num_prefix_tokens, rotated)
            if fused is not None:
                return fused
        bias = self.stored_bias(query, key, value, grid, shared)
        if bias is not None:
            attn_mask = maybe_add_mask(bias, resolve_self_attn_mask(query.shape[2], bias, attn_mask, is_causal))
            is_causal = False
        scale: float | None = None
        values = self.value_channels(value, grid, shared)
        wide_value = torch.cat([value] + list(values.values()), dim=3) if len(values) > 0 else value
        query_channels, key_channels = self.logit_channels(query, key, value, grid, shared)
        if len(query_channels) > 0:
            scale = 1.0
            rotated_query = torch.cat([rotated_query * query.shape[3] ** -0.5] + query_channels, dim=3)
            rotated_key = torch.cat([rotated_key] + key_channels, dim=3)
            wide_value = as_wide_as(rotated_query, wide_value)
        mixed = F.scaled_dot_product_attention(
            rotated_query,
            rotated_key,
            wide_value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            # the TorchScript ONNX exporter turns it into a tensor
            is_causal=bool(is_causal) if torch.jit.is_tracing() else is_causal,
            scale=scale,
        )
        return self.add_to_output(mixed, value, values, grid, shared)

    def logits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grid: tuple[int, int],
        scale: float,
        shared: dict[str, Tensor] | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention logits with all encodings and the mask, (B, h, P + N, P + N), for the naive path; see `attend`."""
        if shared is None:
            shared = self.prepare(grid, query.device)
        rotated_query, rotated_key = self.rotate(query, key, grid, shared)
        logits = (rotated_query * scale) @ rotated_key.transpose(-2, -1)
        if self.has_bias:
            logits = logits + self.bias(query, key, value, grid, shared)
        return maybe_add_mask(logits, resolve_self_attn_mask(query.shape[2], logits, attn_mask, is_causal))

    def weigh(
        self,
        weights: Tensor,
        value: Tensor,
        grid: tuple[int, int],
        shared: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Attention output (B, h, P + N, d) from weights (B, h, P + N, P + N) and values, for the naive path."""
        if shared is None:
            shared = self.prepare(grid, value.device)
        values = self.value_channels(value, grid, shared)
        wide_value = torch.cat([value] + list(values.values()), dim=3) if len(values) > 0 else value
        return self.add_to_output(weights @ wide_value, value, values, grid, shared)

    def rotate(
        self, query: Tensor, key: Tensor, grid: tuple[int, int], shared: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotate the queries and keys of patches, (B, h, P + N, d) each."""
        if not self.rotates:
            return query, key
        if shared is None:
            shared = self.prepare(grid, query.device)
        prefix = self.num_prefix_tokens
        patch_query, patch_key = query[:, :, prefix:], key[:, :, prefix:]
        for name, encoding in self.items():
            patch_query, patch_key = encoding.rotate(patch_query, patch_key, grid, shared.get(name))
        if prefix == 0:
            return patch_query, patch_key
        return torch.cat([query[:, :, :prefix], patch_query], dim=2), torch.cat([key[:, :, :prefix], patch_key], dim=2)

    def bias(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Sum of all encodings' biases, 0 for prefix tokens, broadcastable to (B, h, P + N, P + N)."""
        if shared is None:
            shared = self.prepare(grid, query.device)
        total = self.stored_bias(query, key, value, grid, shared)
        query_channels, key_channels = self.logit_channels(query, key, value, grid, shared)
        if len(query_channels) > 0:
            product = torch.cat(query_channels, dim=3) @ torch.cat(key_channels, dim=3).transpose(-2, -1)
            total = product if total is None else total + product
        return query.new_zeros(1, 1, 1, 1) if total is None else total

    def stored_bias(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: dict[str, Tensor]
    ) -> Tensor | None:
        """Sum of what `attention_bias` of all encodings returns, for all tokens."""
        total: Tensor | None = None
        if not self.stores_bias:
            return total
        prefix = self.num_prefix_tokens
        query, key, value = query[:, :, prefix:], key[:, :, prefix:], value[:, :, prefix:]
        for name, encoding in self.items():
            bias = encoding.attention_bias(query, key, value, grid, shared.get(name))
            if bias is not None:
                if prefix > 0 and not encoding.bias_has_prefix_tokens:
                    bias = F.pad(bias, [prefix, 0, prefix, 0])
                total = bias if total is None else total + bias
        return total

    def logit_channels(
        self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], shared: dict[str, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """More channels of queries and of keys for all tokens, (B, h, P + N, e) each, 0 for prefix tokens."""
        query_channels: list[Tensor] = []
        key_channels: list[Tensor] = []
        if self.widens:
            prefix = self.num_prefix_tokens
            patch_query, patch_key, patch_value = query[:, :, prefix:], key[:, :, prefix:], value[:, :, prefix:]
            for name, encoding in self.items():
                found = encoding.logit_channels(patch_query, patch_key, patch_value, grid, shared.get(name))
                if found is not None:
                    query_channels.append(self.for_all_tokens(found[0], query))
                    key_channels.append(self.for_all_tokens(found[1], key))
        return query_channels, key_channels

    def value_channels(self, value: Tensor, grid: tuple[int, int], shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """More channels of values for all tokens by encoding, (B, h, P + N, e) each, 0 for prefix tokens."""
        channels: dict[str, Tensor] = {}
        if self.widens:
            for name, encoding in self.items():
                found = encoding.value_channels(value[:, :, self.num_prefix_tokens :], grid, shared.get(name))
                if found is not None:
                    channels[name] = self.for_all_tokens(found, value)
        return channels

    def for_all_tokens(self, channels: Tensor, like: Tensor) -> Tensor:
        """Channels of patches as those of all tokens, with the batch, heads and dtype of `like`."""
        channels = F.pad(channels.to(like.dtype), [0, 0, self.num_prefix_tokens, 0])
        return channels.expand(like.shape[0], like.shape[1], -1, -1)

    def add_to_output(
        self,
        mixed: Tensor,
        value: Tensor,
        channels: dict[str, Tensor],
        grid: tuple[int, int],
        shared: dict[str, Tensor],
    ) -> Tensor:
        """Attention output (B, h, P + N, d) from that of values with more channels."""
        if not self.widens:
            return mixed
        prefix, end = self.num_prefix_tokens, value.shape[3]
        output = mixed[:, :, :, :end]
        if len(channels) == 0:
            return output
        patches = output[:, :, prefix:]
        for name, encoding in self.items():
            if name in channels:
                start, end = end, end + channels[name].shape[3]
                patches = encoding.add_to_output(patches, mixed[:, :, prefix:, start:end], grid, shared.get(name))
        return patches if prefix == 0 else torch.cat([output[:, :, :prefix], patches], dim=2)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Adapt size-dependent parameters to a new native grid."""
        for encoding in self.values():
            encoding.set_grid(grid)


@torch.fx.wrap
def as_wide_as(query: Tensor, value: Tensor) -> Tensor:
    """Values with channels of 0 so that they are no narrower than queries: fused kernels take one width only."""
    missing = query.shape[3] - value.shape[3]
    has_kernels = value.device.type != 'meta'  # where costs are counted
    return F.pad(value, [0, missing]) if has_kernels and missing > 0 else value


def parse_position(position: str, position_args: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Split a name such as 'learned+sape2' and check it and its options.

    Args:
        position: Names of encodings joined by '+'.
        position_args: Options by encoding, such as `{'sape2': {'target': 'q'}}`.

    Returns:
        Options of each encoding, in the order named.

    Raises:
        ValueError: A name or an option is unknown (the message lists the valid ones), a name is repeated, 'nope' is
            combined with another, options are given for an encoding that is not named, or another package's encoding
            cannot be loaded.
    """
    if not isinstance(position, str):
        raise ValueError(f'position must be a string such as "learned+sape2", got {position!r}.')
    names = position.split('+')
    for name in names:
        offered = None if name in ENCODINGS else load_encoding(name)
        if offered is not None:
            ENCODINGS[name] = offered
        if name not in ENCODINGS:
            raise ValueError(
                f'Unknown position encoding {name!r} in position={position!r}. '
                f'Valid names, to be joined by "+": {", ".join(all_encodings())}.'
            )
    if len(set(names)) < len(names):
        raise ValueError(f'position={position!r} names an encoding twice.')
    if 'nope' in names and len(names) > 1:
        raise ValueError(f'position={position!r} combines "nope", the absence of an encoding, with another.')

    position_args = {} if position_args is None else position_args
    if not isinstance(position_args, Mapping):
        raise ValueError(
            f"position_args must be a mapping such as {{'sape2': {{'target': 'q'}}}}, got {position_args!r}."
        )
    for name, options in position_args.items():
        if name not in names:
            raise ValueError(f'position_args has options for {name!r}, but position is {position!r}.')
        if not isinstance(options, Mapping):
            raise ValueError(f"position_args[{name!r}] must be a mapping such as {{'target': 'q'}}, got {options!r}.")
        unknown = sorted(set(options) - set(valid_options(name)))
        if unknown:
            raise ValueError(
                f'Unknown option {", ".join(map(repr, unknown))} of position encoding {name!r}. '
                f'Valid options: {", ".join(valid_options(name)) or "none"}.'
            )
    return {name: dict(position_args.get(name, {})) for name in names}


def all_encodings() -> list[str]:
    """Names of all encodings, those of other packages last."""
    for name, encoding in load_encodings().items():
        ENCODINGS.setdefault(name, encoding)
    return list(ENCODINGS)


def has_learned_embedding(options: Mapping[str, Any]) -> bool:
    """Tell whether any of the named encodings is timm's own `pos_embed`."""
    return any(ENCODINGS[name].has_learned_embedding for name in options)


def valid_options(name: str) -> list[str]:
    """Names of the options of an encoding: the keyword-only arguments of its constructor."""
    parameters = inspect.signature(ENCODINGS[name].__init__).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ('device', 'dtype')]


def facts(position: str) -> tuple[str, str, str]:
    """What encodings together are, as `PositionEncoding` describes it: kind, translation, and on other grids.

    Args:
        position: Names of encodings joined by '+'.

    Returns:
        `kind`, `translation` and `other_grids`, each the strongest of theirs.
    """
    encodings = [ENCODINGS[name] for name in parse_position(position)]

    def strongest(found: set[str], *order: str) -> str:
        return next(fact for fact in order if fact in found)

    return (
        strongest({e.kind for e in encodings}, 'learned', 'fixed', 'none'),
        strongest(
            {e.translation for e in encodings}, 'absolute', 'content-based', 'relative inside', 'relative', 'none'
        ),
        strongest({e.other_grids for e in encodings}, 'resampled', 'as it is'),
    )
