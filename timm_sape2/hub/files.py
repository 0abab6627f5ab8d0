"""The files of a model on the Hub, and whether those on the disk are the same."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from ..version import __version__
from .probe import PROBE

FILES = ('config.json', 'model.safetensors', 'README.md', 'train.yaml', 'pretrain.yaml', 'metrics.json', PROBE)
NEEDED = FILES[:2]


def hub_api() -> HfApi:
    """Return the client, which takes the token from HF_TOKEN or from `hf auth login`."""
    return HfApi(library_name='timm_sape2', library_version=__version__)


def compare_files(folder: Path, record: Iterable[Any]) -> list[str]:
    """Return the names of the files that differ from the Hub's record, or are missing on one side.

    The record has the SHA-256 of a large file, and of a small one the SHA-1 of git, which is taken over its length and
    content.

    Args:
        folder: Where the files are.
        record: What `HfApi.list_repo_tree` lists.
    """
    recorded = {entry.path: entry for entry in record if isinstance(entry, RepoFile)}
    return [
        name
        for name in FILES
        if (name in recorded or (folder / name).exists())
        and not (name in recorded and (folder / name).is_file() and _same(folder / name, recorded[name]))
    ]


def _same(path: Path, entry: RepoFile) -> bool:
    if entry.lfs is not None:
        with path.open('rb') as file:
            return sha_fileobj(file).hex() == entry.lfs.sha256
    return git_hash(path.read_bytes()) == entry.blob_id
