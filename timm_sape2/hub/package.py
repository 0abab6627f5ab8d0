"""From a checkpoint to the folder that the Hub gets: weights without training state, and all that is known of them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from .._compat import save_config_for_hf
from ..models.vit import PositionVisionTransformer
from ..trained.config import PLUGIN, read_config
from ..trained.opening import TrainedModel, fingerprint, open_model
from ..training.arguments import build_parser
from ..training.recipe import recipe_arguments
from ..training.run_folder import training_history
from .card import METRICS, read_metrics, write_card
from .files import FILES
from .probe import PROBE, highest_logits, make_probe, probe_logits

# Where and on which machine a run was, and from which files it started, is no part of its recipe.
PRIVATE = {
    *('config', 'data_dir', 'output', 'experiment', 'resume', 'device', 'workers', 'initial_checkpoint'),
    *('pretrained_path', 'log_interval', 'recovery_interval', 'checkpoint_hist'),
    *('log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id', 'log_tensorboard'),
}
ADDED_BY_TRAINING = {'distributed', 'world_size', 'rank', 'local_rank', 'input_size'}


def write_package(
    folder: Path,
    trained: TrainedModel,
    repo_id: str,
    license: str | None = None,
    metrics: Path | None = None,
    recipe: Path | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write the folder of a model, and check that what it loads as gives the same logits.

    Args:
        folder: Where to; files of the same names are replaced.
        trained: The model.
        repo_id: Where it is going to be published, OWNER/NAME or OWNER/NAME.TAG.
        license: Its license as the Hub writes it, by default that of its configuration.
        metrics: What `timm-sape2 validate --json` wrote for it, by default what its checkpoint or folder says.
        recipe: Its recipe, by default what its checkpoint or folder says. A pretrain.yaml beside it is the recipe of
            the run before, whose weights it starts from.
        class_names: Names of its classes, by default what its checkpoint or configuration says.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If the model is not one of this package, its weights are not finite, one of the files does not
            belong to it, the folder has another README.md, or it does not come back the same.
    """
    _check_model(trained)
    if trained.folder is not None and trained.folder.resolve() == folder.resolve():
        raise ValueError(f'{folder} is where the model comes from: choose another folder')
    if (folder / 'README.md').exists() and not (folder / 'config.json').exists():
        raise ValueError(f'{folder / "README.md"} is not the card of a model: choose another folder')
    measured = _find_metrics(trained, metrics)
    recipes = _find_recipes(trained, recipe)
    names = class_names or trained.class_names
    if names and len(names) != trained.model.num_classes:
        raise ValueError(f'{len(names)} names for the {trained.model.num_classes} classes of the model')
    probe = make_probe(trained)
    history = _find_history(trained)
    if history:
        measured['training'] = history
    measured['probe'] = highest_logits(probe_logits(trained, probe))

    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    try:
        save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
    except SafetensorError as error:  # of the disk, such as one that is full
        raise OSError(f'cannot write {folder / "model.safetensors"}: {error}') from error
    tag = repo_id.partition('/')[2].partition('.')[2]
    write_config(folder / 'config.json', trained.model, tag, license, names)
    (folder / 'metrics.json').write_text(json.dumps(measured, indent=2) + '\n', encoding='utf-8')
    for name, text in recipes.items():
        (folder / name).write_text(text, encoding='utf-8')
    probe.save(folder / PROBE)
    write_card(folder, repo_id)
    _check_package(folder, trained)


def write_config(
    path: Path,
    model: Any,
    tag: str = '',
    license: str | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write config.json of a model: how timm creates it again, and the package that must be imported before.

    Args:
        path: The file.
        model: A model of this package.
        tag: What its weights are called, such as 'cifar10'.
        license: Its license, by default that of its configuration.
        class_names: Names of its classes in their order.
    """
    about: dict[str, Any] = {'tag': tag or None}
    if license is not None:
        about['license'] = license
    config = {'pretrained_cfg': about, 'label_names': list(class_names or []) or None, 'plugin': PLUGIN}
    save_config_for_hf(model, str(path), model_config=config)
    written = read_config(path)
    written['pretrained_cfg'].pop('label_names', None)  # of weights that were opened with theirs; they stand above it
    written['model_args'].pop('num_classes', None)  # transformers gives the model the one beside model_args
    path.write_text(json.dumps(written, indent=2) + '\n', encoding='utf-8')


def _check_model(trained: TrainedModel) -> None:
    model = trained.model
    if not isinstance(model, PositionVisionTransformer):
        raise ValueError(f'{type(model).__name__} is not a model of {PLUGIN}; timm.models.push_to_hf_hub pushes it')
    bad = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f'weights that are not finite: {", ".join(bad[:3])}{", ..." if len(bad) > 3 else ""}')


def _find_metrics(trained: TrainedModel, path: Path | None) -> dict[str, Any]:
    """Return metrics that were measured on these weights, {} if there are none."""
    if path is not None and not path.exists():
        raise FileNotFoundError(f'no file {path}')
    if path is None and trained.folder is not None:
        path = trained.folder / 'metrics.json'
    if path is not None:
        metrics = read_metrics(path)
        if metrics and metrics.get('fingerprint') != fingerprint(trained.model):
            raise ValueError(f'{path} was measured on other weights: run `timm-sape2 validate --json` on these')
        return metrics
    args, epoch, metric = (trained.training.get(key) for key in ('args', 'epoch', 'metric'))
    name = (args or {}).get('eval_metric', 'top1')
    if not args or name not in METRICS or not isinstance(metric, (int, float)) or not math.isfinite(metric):
        return {}
    return {
        name: metric,
        'dataset': args.get('dataset') or Path(args.get('data_dir') or 'images').name,
        'split': args.get('val_split', 'validation'),
        'measured_by': f'training, after epoch {epoch}',
        'weights': trained.weights,
        'fingerprint': fingerprint(trained.model),
    }


def _find_history(trained: TrainedModel) -> list[dict[str, Any]]:
    """Return what the runs took that made the weights, nothing if it is not known."""
    if trained.folder is not None:
        return read_metrics(trained.folder / 'metrics.json').get('training', [])
    return training_history(trained.run)


def _find_recipes(trained: TrainedModel, path: Path | None) -> dict[str, str]:
    """Return the recipes that the weights were trained with by the names of their files, none if they are not known."""
    if path is None and trained.folder is not None and (trained.folder / 'train.yaml').exists():
        path = trained.folder / 'train.yaml'
    parser = build_parser()
    if path is not None:
        before = path.with_name('pretrain.yaml')
        two_runs = before.exists() and not before.samefile(path)
        files = {'train.yaml': path} | ({'pretrain.yaml': before} if two_runs else {})
        for file in files.values():
            recipe_arguments(file, parser)
        return {name: file.read_text(encoding='utf-8') for name, file in files.items()}
    args: Mapping[str, Any] = trained.training.get('args', {})
    defaults = vars(parser.parse_args([]))
    if not args or set(args) - set(defaults) - ADDED_BY_TRAINING:
        return {}  # of another script, some of whose flags train.py does not have
    changed = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in args.items()
        if key in defaults and key not in PRIVATE and value != defaults[key] and not _is_local_teacher(key, value)
    }
    return {'train.yaml': yaml.safe_dump(changed, sort_keys=False)}


def _is_local_teacher(key: str, value: Any) -> bool:
    return key == 'kd_model_name' and Path(value).exists()


def _check_package(folder: Path, trained: TrainedModel) -> None:
    """Load the folder as a user will, and compare."""
    reloaded = open_model(f'local-dir:{folder}')
    with Image.open(folder / PROBE) as image:
        same = torch.equal(probe_logits(reloaded, image), probe_logits(trained, image))
    if not same or fingerprint(reloaded.model) != fingerprint(trained.model):
        raise ValueError(f'{folder} does not load as the model that it was written from; nothing was sent')
