"""Encodings of other packages, found by the entry points that they declare."""

import logging
from importlib.metadata import EntryPoint, entry_points

from .base import PositionEncoding

_logger = logging.getLogger(__name__)

GROUP = 'timm_sape2.encodings'


def load_encoding(name: str) -> type[PositionEncoding] | None:
    """Load the encoding that an installed package offers under this name, None if there is no such package.

    Raises:
        ValueError: It cannot be loaded, or is not a `PositionEncoding`.
    """
    for point in entry_points(group=GROUP, name=name):
        return _load(point)
    return None


def load_encodings() -> dict[str, type[PositionEncoding]]:
    """Load all that installed packages offer, by name. What cannot be loaded is left out with a warning."""
    found: dict[str, type[PositionEncoding]] = {}
    for point in entry_points(group=GROUP):
        try:
            found.setdefault(point.name, _load(point))
        except ValueError as error:
            _logger.warning(str(error))
    return found


def _load(point: EntryPoint) -> type[PositionEncoding]:
    origin = f'position encoding {point.name!r}, which the entry point {point.value} names,'
    try:
        encoding = point.load()
    except Exception as error:  # whatever a package raises when it is imported
        raise ValueError(f'The {origin} cannot be loaded: {error!r}.') from error
    if not (isinstance(encoding, type) and issubclass(encoding, PositionEncoding)):
        raise ValueError(f'The {origin} is {encoding!r}, not a class derived from PositionEncoding.')
    return encoding
