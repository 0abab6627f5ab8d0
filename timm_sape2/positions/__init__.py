"""Position encodings by name. A new one is a file beside this and a line in `ENCODINGS`."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .base import Host as Host
from .base import PositionEncoding as PositionEncoding
from .cope import ContextualPosition
from .cpe import ConditionalPosition
from .learned import LearnedPosition
from .nope import NoPosition
from .relbias import RelativeBias
from .rope import AxialRotaryPosition, MixedRotaryPosition
from .sape2 import SaPE2
from .sincos import SinCosPosition

ENCODINGS: dict[str, type[PositionEncoding]] = {
    'nope': NoPosition,
    'learned': LearnedPosition,
    'sincos': SinCosPosition,
    'relbias': RelativeBias,
    'cpe': ConditionalPosition,
    'rope': AxialRotaryPosition,
    'rope_mixed': MixedRotaryPosition,
    'cope': ContextualPosition,
    'sape2': SaPE2,
}


def parse_position(position: str, position_args: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Split a name such as 'learned+sape2' and check it and its options.

    Args:
        position: Names of encodings joined by '+'.
        position_args: Options by encoding, such as `{'sape2': {'target': 'q'}}`.

    Returns:
        Options of each encoding, in the order named.

    Raises:
        ValueError: A name or an option is unknown (the message lists the valid ones), a name is repeated, 'nope' is
            combined with another, or options are given for an encoding that is not named.
    """
    if not isinstance(position, str):
        raise ValueError(f'position must be a string such as "learned+sape2", got {position!r}.')
    names = position.split('+')
    for name in names:
        if name not in ENCODINGS:
            raise ValueError(
                f'Unknown position encoding {name!r} in position={position!r}. '
                f'Valid names, to be joined by "+": {", ".join(ENCODINGS)}.'
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


def valid_options(name: str) -> list[str]:
    """Names of the options of an encoding: the keyword-only arguments of its constructor."""
    parameters = inspect.signature(ENCODINGS[name].__init__).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ('device', 'dtype')]


def build_encodings(
    options: Mapping[str, Mapping[str, Any]],
    hooks: tuple[str, ...],
    host: Host,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.ModuleDict:
    """Build those of the named encodings that override any of `hooks`.

    Args:
        options: Options by name, as `parse_position` returns them.
        hooks: Names of hooks of `PositionEncoding`.
        host: The model that the encodings are built into.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Returns:
        The encodings by name.
    """
    return nn.ModuleDict(
        {
            name: ENCODINGS[name](host, **kwargs, device=device, dtype=dtype)
            for name, kwargs in options.items()
            if ENCODINGS[name].overrides(*hooks)
        }
    )
