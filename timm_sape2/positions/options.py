"""Checks of the options that users give to encodings."""

import math
from typing import Any


def check_choice(option: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a ValueError if an option is not one of the choices."""
    if value not in choices:
        raise ValueError(f'{option} must be one of {", ".join(map(repr, choices))}, got {value!r}.')


def check_whole_number(option: str, value: Any, least: int) -> None:
    """Raise a ValueError if an option is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f'{option} must be a whole number of at least {least}, got {value!r}.')


def check_flag(option: str, value: Any) -> None:
    """Raise a ValueError if an option is neither true nor false."""
    if not isinstance(value, bool):
        raise ValueError(f'{option} must be true or false, got {value!r}.')


def check_number(option: str, value: Any, least: float) -> None:
    """Raise a ValueError if an option is not a finite number of at least `least`."""
    if not _is_finite(value) or value < least:
        raise ValueError(f'{option} must be a number of at least {least}, got {value!r}.')


def check_positive(option: str, value: Any) -> None:
    """Raise a ValueError if an option is not a positive, finite number."""
    if not _is_finite(value) or value <= 0:
        raise ValueError(f'{option} must be a positive number, got {value!r}.')


def check_head_dim(position: str, head_dim: int) -> None:
    """Raise a ValueError if an encoding that turns channels by fours does not fit the heads."""
    if head_dim % 4:
        raise ValueError(
            f'position={position!r} needs a head dimension (embed_dim / num_heads) divisible by 4, got {head_dim}.'
        )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
