"""Sending the folder of a model to the Hub, in one commit."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from ..trained.errors import SIGN_IN, explained
from ..version import __version__
from .files import FILES, compare_files, hub_api

STALE = 'pytorch_model.bin'


def check_can_push(repo_id: str, private: bool) -> None:
    """Find out, before there is any work, whether a model can be sent.

    Args:
        repo_id: OWNER/NAME.
        private: Whether the repository is to be private.

    Raises:
        ValueError: If there is no token or the Hub does not know it, or a public repository of this name exists.
    """
    if get_token() is None:
        raise ValueError(f'{repo_id}: a token with write access is needed: {SIGN_IN}')
    with explained(repo_id):
        try:
            is_private = hub_api().model_info(repo_id).private
        except RepositoryNotFoundError:
            return
    if private and not is_private:
        raise ValueError(f'{repo_id} is public already, --private is for a new repository: change it on its page')


def push_folder(folder: Path, repo_id: str, private: bool = False, revision: str | None = None) -> str:
    """Send a folder that `write_package` wrote.

    The repository and the branch are made if they are not there. Files of an earlier push that the folder does not
    have are removed, and so is pytorch_model.bin, where older weights would stay beside the new ones.

    Args:
        folder: The folder.
        repo_id: OWNER/NAME.
        private: Whether a new repository is private.
        revision: The branch, by default main.

    Returns:
        Address of the commit.

    Raises:
        ValueError: If the Hub refuses it or cannot be reached, or what it has then differs from the folder.
    """
    api = hub_api()
    with explained(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = [name for name in FILES if (folder / name).exists()]
        there = {entry.path for entry in api.list_repo_tree(repo_id, revision=revision)}
        stale = [name for name in (*FILES, STALE) if name in there and name not in files]
        commit = api.create_commit(
            repo_id,
            operations=[
                *(CommitOperationAdd(name, folder / name) for name in files),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=f'Model of timm_sape2 {__version__}',
            revision=revision,
        )
        different = compare_files(folder, api.list_repo_tree(repo_id, revision=commit.oid))
    if different:
        raise ValueError(f'{repo_id}: the Hub has other content of {", ".join(different)}; push again')
    return commit.commit_url
