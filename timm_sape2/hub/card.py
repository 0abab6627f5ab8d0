"""The model card, README.md: written from config.json, recipes and metrics.json beside it, never by hand."""

import json
import math
import shlex
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData
from timm.models import get_pretrained_cfg

from .._files import atomic_write
from .._shipped import WEIGHTS, shipped
from .._table import markdown_table
from ..models.flops import count_parameters
from ..trained.config import PLUGIN, is_ours, load_config, model_arguments
from ..training.recipe import read_recipe
from .probe import PROBE

TAGS = ['image-classification', 'timm', 'timm_sape2', 'vision-transformer', 'position-encoding']
METRICS = {'top1': 'top-1 accuracy', 'top5': 'top-5 accuracy', 'loss': 'cross-entropy'}
# What metrics.json may have, and of which type.
MEASURED: dict[str, Any] = {
    **dict.fromkeys(METRICS, (int, float)),
    **dict.fromkeys(('dataset', 'split', 'measured_by', 'weights', 'fingerprint'), str),
    **dict.fromkeys(('input_size', 'top1_interval', 'per_class', 'training'), list),
    **dict.fromkeys(('versions', 'probe'), dict),
    'num_images': int,
}
RECIPES = ('pretrain.yaml', 'train.yaml')  # in the order in which they are run
# By the tag of a model: what its data set is called, and where the Hub has it.
DATASETS = {
    'cifar10': ('CIFAR-10', 'uoft-cs/cifar10'),
    'cifar100': ('CIFAR-100', 'uoft-cs/cifar100'),
    'in1k': ('ImageNet-1k', 'ILSVRC/imagenet-1k'),
    'digits': ('the handwritten digits of scikit-learn', None),
}


def write_card(folder: Path, repo_id: str | None = None) -> None:
    """Write README.md of a folder that has config.json, and recipes, metrics.json and model.safetensors or not.

    Args:
        folder: The folder.
        repo_id: Where it is published, OWNER/NAME.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If one of the files is malformed.
    """
    text = make_card(folder, repo_id)
    with atomic_write(folder / 'README.md') as path:
        path.write_text(text, encoding='utf-8')


def make_card(folder: Path, repo_id: str | None = None) -> str:
    """Return the text of the card, see `write_card`."""
    config = load_config(folder / 'config.json', str(folder))
    if not is_ours(config['architecture']):
        raise ValueError(f'{folder} is not a model of {PLUGIN}')
    metrics = read_metrics(folder / 'metrics.json')
    cfg, options = config['pretrained_cfg'], config['model_args'].get('position_args')
    model: Any = timm.create_model(config['architecture'], device='meta', **model_arguments(config))
    name = repo_id.partition('/')[2] if repo_id else folder.resolve().name
    has_weights = (folder / WEIGHTS).exists()
    is_shipped = repo_id is None and folder.resolve().parent == shipped().resolve()
    weights, create_model = _weights(config, folder, is_shipped, repo_id)
    channels, height, width = cfg['input_size']
    text = Template((files(__package__) / 'card.md').read_text(encoding='utf-8')).substitute(
        metadata=_metadata(name, config, metrics, has_weights),
        name=name,
        architecture=config['architecture'],
        position=model.position_name,
        weights=weights,
        create_model=create_model,
        parameters=f'{count_parameters(model) / 1e6:.2f}',
        options=f', options `{json.dumps(options)}`' if options else '',
        image_size=f'{height}x{width}, {channels} {"channel" if channels == 1 else "channels"}',
        patch_size='x'.join(map(str, model.patch_embed.patch_size)),
        classes=_classes(config),
        mean=_numbers(cfg['mean']),
        std=_numbers(cfg['std']),
        interpolation=cfg['interpolation'],
        crop=f'{cfg["crop_pct"]:g}',
        license=cfg.get('license') or 'not stated',
        results=_results(metrics, has_weights),
        training=_training(folder, is_shipped, metrics),
    )
    return text + (_check(config, metrics['probe'], repo_id) if metrics.get('probe') else '')


def read_metrics(path: Path) -> dict[str, Any]:
    """Read metrics.json, as `timm-sape2 validate --json` writes it, {} if there is none."""
    if not path.exists():
        return {}
    try:
        metrics = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(metrics, dict):
        raise ValueError(f'{path} must be a mapping, as `timm-sape2 validate --json` writes it')
    for key, value in metrics.items():
        if key not in MEASURED:
            raise ValueError(f'{path}: unknown {key!r}')
        if not isinstance(value, MEASURED[key]) or (key in METRICS and not _is_finite(value)):
            raise ValueError(f'{path}: {key} cannot be {value!r}')
    interval, training = metrics.get('top1_interval', [0, 0]), metrics.get('training', [])
    if len(interval) != 2 or not all(map(_is_finite, interval)):
        raise ValueError(f'{path}: top1_interval must be two numbers, not {interval!r}')
    if not all(isinstance(run, dict) for run in training):
        raise ValueError(f'{path}: training must be a list of mappings, not {training!r}')
    for index, logit in metrics.get('probe', {}).items():
        if not index.isdigit() or not _is_finite(logit):
            raise ValueError(f'{path}: probe cannot have {index!r}: {logit!r}')
    return metrics


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _metadata(name: str, config: dict[str, Any], metrics: dict[str, Any], has_weights: bool) -> str:
    """Return the YAML that the Hub reads: how it files the model, and the numbers that `verify` compares.

    Accuracy is what weights have: without weights there is none to compare with other models.
    """
    cfg = config['pretrained_cfg']
    hub_dataset = DATASETS.get(cfg.get('tag'), ('', None))[1]
    results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=hub_dataset or 'imagefolder',
            dataset_name=metrics['dataset'],
            dataset_split=metrics.get('split'),
            metric_type='accuracy',
            metric_name=METRICS[key],
            metric_value=metrics[key],
        )
        for key in ('top1', 'top5')
        if has_weights and key in metrics and 'dataset' in metrics
    ]
    probe = {int(index): float(value) for index, value in metrics.get('probe', {}).items()}
    extra: dict[str, Any] = {'probe': {'image': PROBE, 'logits': probe}} if probe else {}
    data = ModelCardData(
        license=cfg.get('license'),
        library_name='timm',
        pipeline_tag='image-classification',
        tags=TAGS,
        datasets=[hub_dataset] if hub_dataset else None,
        model_name=name if results else None,
        eval_results=results or None,
        **extra,
    )
    return data.to_yaml()


def _weights(config: dict[str, Any], folder: Path, is_shipped: bool, repo_id: str | None) -> tuple[str, str]:
    """Return what the introduction says of the weights, and the call that creates the model."""
    architecture, tag = config['architecture'], config['pretrained_cfg'].get('tag')
    data = DATASETS.get(tag, (None,))[0]
    if not (folder / WEIGHTS).exists():
        purpose = f' to train it on {data}' if data else ''
        text = f'\n\n**No weights are published.** These are the configuration and the recipe{purpose}.'
        return text, f"timm.create_model('{architecture}'{_changed_arguments(config)})  # random weights"
    if repo_id:
        source, where = f'hf-hub:{repo_id}', ''
    elif is_shipped:
        source = folder.resolve().name
        where = '\n\nThe weights come with the package, so that the name loads them, without a network.'
    else:
        source, name = f'local-dir:{folder.as_posix()}', f'{architecture}.{tag}' if tag else architecture
        where = (
            '\n\nThe weights are in this folder, from where they load. No repository of the Hub is known to have them, '
            f'so the name `{name}` alone does not load them.'
        )
    trained = f' It was trained on {data}.' if data else ''
    return f'{trained}{where}', f"timm.create_model('{source}', pretrained=True).eval()"


def _changed_arguments(config: dict[str, Any]) -> str:
    """Return the arguments that the architecture does not have by default."""
    cfg: Any = get_pretrained_cfg(config['architecture'])
    channels, *size = cfg.input_size
    default = {'in_chans': channels, 'img_size': size, 'num_classes': cfg.num_classes, 'global_pool': 'token'}
    changed = {key: value for key, value in model_arguments(config).items() if default.get(key) != value}
    return ''.join(f', {key}={tuple(value) if isinstance(value, list) else value!r}' for key, value in changed.items())


def _classes(config: dict[str, Any]) -> str:
    names = config.get('label_names')
    if not names:
        return str(config['num_classes'])
    shown = ', '.join(_plain(name) for name in names[:10])
    return f'{len(names)}: {shown}{", ..." if len(names) > 10 else ""}'


def _results(metrics: dict[str, Any], has_weights: bool) -> str:
    measured = {key: metrics[key] for key in METRICS if key in metrics}
    if not measured:
        return 'Not measured.'
    where = f'{_plain(metrics.get("dataset", "unknown data"))}, split {_plain(metrics.get("split", "unknown"))}'
    if 'num_images' in metrics:
        where += f', {metrics["num_images"]} images'
    if 'input_size' in metrics:
        where += f' at {"x".join(map(str, metrics["input_size"][1:]))}'
    rows = []
    for key, value in measured.items():
        interval = metrics.get(f'{key}_interval')
        within = f' (95 % interval {interval[0]:.2f} to {interval[1]:.2f})' if interval else ''
        rows.append({'metric': METRICS[key], where: f'{value:.4f}' if key == 'loss' else f'{value:.2f} %{within}'})
    origin = 'The weights here' if has_weights else 'A run with the recipe below, whose weights are not published'
    if 'average' in metrics.get('weights', ''):
        origin += ' (the moving average of the weights)'
    if 'measured_by' in metrics:
        origin += f', measured by {_plain(metrics["measured_by"])}'
    versions = ', '.join(f'{_plain(name)} {_plain(version)}' for name, version in metrics.get('versions', {}).items())
    return f'{markdown_table(rows)}\n\n{origin}{f" with {versions}" if versions else ""}.'


def _training(folder: Path, is_shipped: bool, metrics: dict[str, Any]) -> str:
    there = [name for name in RECIPES if (folder / name).exists()]
    recipes = {name: recipe for name in there if (recipe := read_recipe(folder / name))}
    if not recipes:
        parts = ['The recipe is not published.']
    else:
        paths = {name: f'{folder.resolve().name}/{name}' if is_shipped else name for name in recipes}
        commands = ', then '.join(_command(paths[name], recipe) for name, recipe in recipes.items())
        parts = [f'{commands} of `{PLUGIN}` trains it, with {" and ".join(recipes)}:']
    for name in recipes:
        text = (folder / name).read_text(encoding='utf-8').strip().replace('```', '')
        parts.append(f'```yaml\n{text}\n```')
    if metrics.get('training'):
        parts.append(_history(metrics['training']))
    return '\n\n'.join(parts)


def _command(path: str, recipe: dict[str, Any]) -> str:
    start = 'torchrun --nproc_per_node=N -m timm_sape2' if recipe.get('aug_repeats') else 'timm-sape2'
    data = '' if recipe.get('dataset') else ' --data-dir DIR'
    return f'`{start} train -c {path}{data}`'


def _history(runs: list[dict[str, Any]]) -> str:
    """Return a table of the runs that training took, from the summaries that `training_history` makes."""
    columns = ('epochs', 'images_per_second', 'hours', 'processes', 'hardware', 'torch', 'commit', 'date')
    rows = [
        {'run': i + 1}
        | {name.replace('_', ' '): _plain('' if run.get(name) is None else run[name]) for name in columns}
        for i, run in enumerate(runs)
    ]
    return f'What training took, one run after the other:\n\n{markdown_table(rows)}'


def _check(config: dict[str, Any], probe: dict[str, float], repo_id: str | None) -> str:
    """Return the last section, about the logits that the model must give."""
    names = config.get('label_names') or [f'class {index}' for index in range(config['num_classes'])]
    if any(int(index) >= len(names) for index in probe):
        raise ValueError(f'metrics.json: probe has classes that the model does not have, it has {len(names)}')
    rows = [{'class': _plain(names[int(index)]), 'logit': f'{value:.4f}'} for index, value in probe.items()]
    text = f'Compare the logits of `{PROBE}` with these:'
    if repo_id:
        command = f'timm-sape2 hub verify {shlex.quote(repo_id)}'
        text = f"`{command}` compares the files with the Hub's record, and the logits of `{PROBE}` with these:"
    return f'\n## Check\n\n{text}\n\n{markdown_table(rows)}\n'


def _numbers(values: list[float]) -> str:
    return ' '.join(f'{value:g}' for value in values)


def _plain(text: object) -> str:
    """Return text that cannot end a table cell or begin markup."""
    return ''.join(f'\\{char}' if char in '\\|`*_[]<>#' else char for char in ' '.join(str(text).split()))
