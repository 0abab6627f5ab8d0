"""Copying a model from the Hub to a folder."""

import filecmp
import shutil
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from .._files import atomic_write
from ..trained.config import PLUGIN, is_ours, load_config
from ..trained.errors import explained
from ..trained.opening import split_revision
from .files import FILES, NEEDED, compare_files, hub_api


def pull(source: str, folder: Path | None = None, overwrite: bool = False) -> Path:
    """Copy a model to a folder, after comparing its files with the Hub's record.

    Only the files of a model are taken, whatever else the repository has. They also stay in the cache that timm loads
    from, so that a second pull, or `create_model`, downloads nothing.

    Args:
        source: OWNER/NAME or OWNER/NAME@REVISION.
        folder: Where to, by default NAME in the current folder.
        overwrite: Replace files that differ.

    Returns:
        The folder.

    Raises:
        ValueError: If there is no such model, a file is missing or differs from the Hub's record, config.json is
            refused, or a file would be overwritten.
    """
    repo_id, revision = split_revision(source)
    folder = folder or Path(repo_id.partition('/')[2])
    with explained(source):
        cached = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES)))
        for name in NEEDED:
            if not (cached / name).is_file():
                raise ValueError(f'{source}: the repository has no {name}')
        if not is_ours(load_config(cached / 'config.json', source)['architecture']):
            raise ValueError(f'{source} is not a model of {PLUGIN}: timm.create_model loads it')
        if not constants.HF_HUB_OFFLINE:
            different = compare_files(cached, hub_api().list_repo_tree(repo_id, revision=cached.name))
            if different:
                raise ValueError(
                    f'{source}: {", ".join(different)} in {cached} is not what the Hub has; delete it and pull again'
                )
    files = [cached / name for name in FILES if (cached / name).is_file()]
    changed = [
        file.name
        for file in files
        if (folder / file.name).exists() and not filecmp.cmp(file, folder / file.name, shallow=False)
    ]
    if changed and not overwrite:
        raise ValueError(f'{folder} has another {", ".join(changed)}: choose another folder, or add --overwrite')
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        with atomic_write(folder / file.name) as path:
            shutil.copyfile(file, path)
    return folder
