"""`create_model`: timm's, with errors that name the way out."""

import difflib
import errno
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from timm.models import is_model, list_models, parse_model_name, split_model_name_tag

from .trained.config import load_config
from .trained.errors import explained


def create_model(model_name: str, pretrained: bool = False, *args: Any, **kwargs: Any) -> Any:
    """Create a model as `timm.create_model` does.

    The config.json of a model of this package, from the Hub or a folder, is checked before anything is built from it.

    Args:
        model_name: Name of a model, 'hf-hub:OWNER/NAME', 'hf-hub:OWNER/NAME@REVISION' or 'local-dir:FOLDER'.
        pretrained: Load the weights.
        *args: The other arguments of `timm.create_model`.
        **kwargs: The same, and arguments of the model.

    Returns:
        The model.

    Raises:
        ValueError: If there is no such model, folder, repository, revision or file, the Hub refuses the token or cannot
            be reached, config.json has a wrong key, or the weights are damaged or do not fit. It says what to do.
        TypeError: For an argument that the model does not have.
    """
    with explained(model_name):
        _check_source(model_name, kwargs.get('cache_dir'))
        try:
            return timm.create_model(model_name, pretrained, *args, **kwargs)
        except (RuntimeError, ValueError, EOFError, OSError) as error:
            reason = _explain(error)
            if reason is None:
                raise
            raise ValueError(f'{model_name}: {reason}') from error


def _check_source(model_name: str, cache_dir: str | Path | None) -> None:
    """Check what can be checked before timm takes over."""
    source, name = parse_model_name(model_name)
    if source is None:
        architecture, _ = split_model_name_tag(name)
        if not is_model(architecture):
            close = difflib.get_close_matches(architecture, list_models(), n=3, cutoff=0.5)
            hint = f'; close names: {", ".join(close)}' if close else ''
            raise ValueError(f'{name}: no such model, or a package that registers it is still to be imported{hint}')
        return
    if source == 'local-dir':
        path = Path(name, 'config.json')
        if not path.is_file():
            raise ValueError(
                f'{model_name}: {"no config.json in the folder" if path.parent.is_dir() else "no such folder"}'
            )
    else:
        repo_id, _, revision = name.partition('@')
        path = Path(hf_hub_download(repo_id, 'config.json', revision=revision or None, cache_dir=cache_dir))
    config = load_config(path, model_name)
    if not is_model(config['architecture']):
        plugin = str(config.get('plugin', ''))
        package = f'`import {plugin}`' if plugin.isidentifier() else 'import the package that registers it'
        raise ValueError(f'{model_name}: unknown architecture {config["architecture"]!r}: {package} before creating it')


def _explain(error: Exception) -> str | None:
    """Return what an error of timm or torch means and what to do, None if it says so itself."""
    message = str(error)
    if message.startswith('The checkpoint does not fit'):
        return message
    if message.startswith('No pretrained weights exist'):
        return 'no weights are published under this name; hf-hub:OWNER/NAME and local-dir:FOLDER name some'
    if message.startswith('No suitable checkpoints'):
        return 'no weights in the folder, model.safetensors is missing'
    if message.startswith('Error(s) in loading state_dict'):
        return f'the weights do not fit: {" ".join(message.split())}'
    if 'Unsupported globals' in message:
        return 'its weights are pickled Python objects, which may run code; ask the owner for model.safetensors'
    # What torch makes of bytes that make no sense depends on the bytes.
    damaged = 'PytorchStreamReader' in message or message.startswith('weights_only=True blocked')
    if damaged or isinstance(error, EOFError) or getattr(error, 'errno', None) == errno.EINVAL:
        return 'the file of weights is truncated or no weights'
    return None
