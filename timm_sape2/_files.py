"""Files that are never left half written, in folders that are checked before the work."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(folder: Path) -> None:
    """Raise an OSError if the folder could not be made or written to; leave nothing behind."""
    try:
        with tempfile.TemporaryFile(dir=existing_parent(folder)) as file:
            file.write(b'probe')
    except OSError as error:
        raise OSError(f'cannot write to the output folder {folder}: {error.strerror}') from error


def existing_parent(folder: Path) -> Path:
    """Return the folder, or the one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a copy of a file, or a new one, that takes its place all at once when the block is through.

    The folder is made if there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'tmp-{path.name}')
    if path.exists():
        shutil.copyfile(path, temporary)
    try:
        yield temporary
        if temporary.exists():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write a file of JSON, all at once."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + '\n')
