"""What somebody may have meant who wrote a name that there is not."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], prefix: str = '') -> str:
    """Return " (did you mean 'NAME'?)" with the closest of the known names, '' if none is close.

    Args:
        name: What was written.
        known: The names that there are.
        prefix: What all names begin with beside that; it makes none of them closer.
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f' (did you mean {prefix + close[0]!r}?)' if close else ''


def close_names(name: str, known: Iterable[str]) -> str:
    """Return '; close names: ' and up to three of the known names, '' if none is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f'; close names: {", ".join(close)}' if close else ''
