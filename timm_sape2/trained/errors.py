"""What goes wrong between here and the Hub, said so that one knows what to do. No token is ever part of a message."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

SIGN_IN = 'sign in with `hf auth login` or set HF_TOKEN'


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turn errors of the Hub's client and of files of weights into a ValueError that names the way out.

    Args:
        source: What the user asked for, such as 'hf-hub:OWNER/NAME'.
    """
    try:
        yield
    except Exception as error:
        reason = explain(error)
        if reason is None:
            raise
        raise ValueError(f'{source}: {reason}') from error


def explain(error: Exception) -> str | None:
    """Return what an error means and what to do, None for one that does not come from the Hub or its files."""
    if isinstance(error, SafetensorError):
        return 'model.safetensors is truncated or no weights; `timm-sape2 hub verify` names the bad files'
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return _unreachable()
    if isinstance(error, GatedRepoError):
        return 'access must be asked for on its page on the Hub'
    if isinstance(error, RepositoryNotFoundError):
        return _no_repository()
    if isinstance(error, RevisionNotFoundError):
        return 'no such revision (branch, tag or commit) in this repository'
    if isinstance(error, EntryNotFoundError):
        return f'the repository has no {_file_name(error)}'
    if isinstance(error, HFValidationError):
        return 'the name of a repository is OWNER/NAME'
    if isinstance(error, HfHubHTTPError):
        return _refused(error)
    if type(error).__module__.partition('.')[0] in ('httpx', 'httpx2', 'httpcore', 'httpcore2'):
        return f'the connection to {constants.ENDPOINT} broke off; try again, what has arrived is kept'
    if isinstance(error, OSError) and 'Consistency check failed' in str(error):
        return 'the Hub sent a file that is too short; try again'
    return None


def _unreachable() -> str:
    if constants.HF_HUB_OFFLINE:
        return 'not in the cache, and HF_HUB_OFFLINE is set; unset it to download'
    return f'not in the cache, and {constants.ENDPOINT} cannot be reached'


def _no_repository() -> str:
    if get_token() is None:
        return f'there is no such repository on {constants.ENDPOINT}, or it is private: {SIGN_IN}'
    return f'there is no such repository on {constants.ENDPOINT}, or your token gives no access to it'


def _file_name(error: Exception) -> str:
    found = re.search(r'/resolve/[^/]+/(\S+?)\.?$', str(error), re.MULTILINE)
    name = found[1] if found else 'such file'
    return 'model.safetensors' if name == 'pytorch_model.bin' else name


def _refused(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return f'the Hub does not know your token: {SIGN_IN}' if get_token() else f'a token is needed: {SIGN_IN}'
    if status == 403:
        return 'your token does not allow this: it needs write access to the repository'
    return f'{constants.ENDPOINT} answers {status} {error.response.reason_phrase}; try again later'
