"""The config.json of a model: data that somebody else wrote, checked before anything is built from it."""

import dataclasses
import inspect
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, build_model_with_cfg, get_model_input_config, is_model, is_model_in_modules

from ..models.equip import SOURCES

PLUGIN = 'timm_sape2'
MODULE = 'vision_transformer_sape2'  # by which timm's registry knows the models of this package
REQUIRED = {'architecture': str, 'num_classes': int, 'num_features': int, 'model_args': dict, 'pretrained_cfg': dict}
OPTIONAL = {'global_pool': str, 'label_names': list, 'label_descriptions': dict, 'plugin': str}
PRETRAINED_CFG = {field.name for field in dataclasses.fields(PretrainedCfg)} - set(SOURCES) | {'custom_load'}
PREPROCESSING = ('input_size', 'mean', 'std', 'crop_pct', 'interpolation')
# Arguments of timm's factory, which say where weights come from and what is built around the model, and of the model
# those that are code or belong to the machine.
NOT_FROM_A_FILE = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *('features_only', 'out_indices', 'feature_cls', 'pruned', 'device', 'dtype'),
    *('pos_embed', 'embed_layer', 'block_fn', 'attn_layer', 'mlp_layer'),
} - {'kwargs'}

_logger = logging.getLogger(__name__)


def is_ours(architecture: str) -> bool:
    """Return whether this package registers an architecture."""
    return is_model(architecture) and is_model_in_modules(architecture, [MODULE])


def load_config(path: Path, source: str) -> dict[str, Any]:
    """Read config.json and check it, if it is of a model of this package.

    Args:
        path: The file.
        source: What the user asked for, with which errors begin.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is refused, see `read_config` and `check_config`.
    """
    try:
        config = read_config(path)
        if is_ours(config['architecture']):
            check_config(config)
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from error
    return config


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not a mapping in JSON that names an architecture.
    """
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'config.json is not JSON: {error}') from error
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise ValueError("config.json names no 'architecture'")
    return config


def model_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return what config.json gives the model: its model_args and, beside them, the number of classes.

    `write_config` leaves that out of model_args, as transformers wants it; timm and older files repeat it.
    """
    return {'num_classes': config['num_classes'], **config['model_args']}


def check_config(config: dict[str, Any]) -> None:
    """Refuse a config.json of a model of this package that says more, or other things, than how to build the model.

    Weights come from the file beside config.json alone, and the arguments must be those of the model and build one that
    agrees with the rest. Other keys that are not known are left out with a warning: a newer timm may write them.

    Args:
        config: The content of config.json.

    Raises:
        ValueError: For a key or a value that is wrong; it names it.
    """
    _check_keys('config.json', config, {*REQUIRED, *OPTIONAL}, REQUIRED)
    for key, kind in (REQUIRED | OPTIONAL).items():
        if key in config and (not isinstance(config[key], kind) or isinstance(config[key], bool)):
            raise ValueError(f'config.json: {key!r} must be {kind.__name__}, not {config[key]!r}')
    if not is_ours(config['architecture']):
        raise ValueError(f'config.json: {PLUGIN} has no architecture {config["architecture"]!r}')
    _check_pretrained_cfg(config['pretrained_cfg'])
    of_weights = config['pretrained_cfg'].get('num_classes', config['num_classes'])
    if of_weights != config['num_classes']:
        raise ValueError(f'config.json: num_classes is {config["num_classes"]}, but {of_weights} in pretrained_cfg')
    _check_model_args(config['model_args'])
    _check_labels(config)
    _check_built_model(config)


def _check_keys(where: str, mapping: dict[str, Any], known: Iterable[str], required: Iterable[str]) -> None:
    missing = [key for key in required if key not in mapping]
    if missing:
        raise ValueError(f'{where}: no {", ".join(map(repr, missing))}')
    unknown = sorted(set(mapping) - set(known))
    if unknown:
        _logger.warning(f'{where}: {", ".join(map(repr, unknown))} not known here, left out')


def _check_model_args(model_args: dict[str, Any]) -> None:
    refused = sorted(NOT_FROM_A_FILE & set(model_args))
    if refused:
        raise ValueError(f'config.json: model_args: unknown {", ".join(map(repr, refused))}')
    elsewhere = [key for key, value in model_args.items() if isinstance(value, str) and ':' in value]
    if elsewhere:
        raise ValueError(f'config.json: model_args: {", ".join(map(repr, elsewhere))} must be no source of models')


def _check_pretrained_cfg(cfg: dict[str, Any]) -> None:
    sources = [key for key in SOURCES if cfg.get(key)]
    if sources:
        raise ValueError(
            f'config.json: pretrained_cfg names another source of weights, {", ".join(map(repr, sources))}; '
            'only the weights beside it are loaded'
        )
    _check_keys('config.json: pretrained_cfg', cfg, PRETRAINED_CFG, PREPROCESSING)
    for name in ('mean', 'std'):
        if not _is_numbers(cfg[name]) or (name == 'std' and min(cfg[name]) <= 0):
            raise ValueError(f'config.json: {name} of pretrained_cfg must be a list of numbers, not {cfg[name]!r}')
    if not _is_numbers([cfg['crop_pct']]) or not 0 < cfg['crop_pct'] <= 2:
        raise ValueError(f'config.json: crop_pct of pretrained_cfg must be a number, not {cfg["crop_pct"]!r}')
    for name in ('interpolation', 'tag', 'license'):
        text = cfg.get(name) or ''
        if not isinstance(text, str) or not text.isprintable():
            raise ValueError(f'config.json: {name} of pretrained_cfg must be a line of text, not {text!r}')


def _is_numbers(values: Any) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )


def _is_input_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(side) is int and side > 0 for side in value)


def _check_labels(config: dict[str, Any]) -> None:
    names = config.get('label_names')
    if names is None:
        return
    printable = all(isinstance(name, str) and name.isprintable() for name in names)
    if not printable or len(names) != config['num_classes']:
        raise ValueError(f'config.json: label_names must be {config["num_classes"]} lines of text, one for each class')


def _check_built_model(config: dict[str, Any]) -> None:
    try:
        model: Any = timm.create_model(config['architecture'], device='meta', **model_arguments(config))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f'config.json: model_args do not build {config["architecture"]}: {error}') from error
    built = {key: getattr(model, key) for key in ('num_classes', 'num_features', 'global_pool')}
    said = dict(config, input_size=config['pretrained_cfg'].get('input_size'))
    takes = get_model_input_config(model)
    built['input_size'] = list(takes['input_size'])
    if not takes['fixed_input_size'] and _is_input_size(said['input_size']):
        built['input_size'][1:] = said['input_size'][1:]  # timm recommends a size, the model takes any
    for key, value in built.items():
        if said.get(key, value) != value:
            raise ValueError(f'config.json: {key} is {said[key]!r}, but model_args build a model with {value!r}')
