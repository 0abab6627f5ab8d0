"""Runs of train.py whose models a study takes up again."""

import argparse
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ...data import datasets
from ...trained.checkpoint import Checkpoint
from ...trained.config import load_config
from ...trained.encodings import check_encodings, encodings_of
from ...trained.opening import FILES_OF_WEIGHTS, LAST, open_model
from ...training import hardware, loaders
from ...training.arguments import flags_of, parse_arguments
from ...training.model import build_model
from ..accuracy.training_grid import check_model, encoding_with_options, share_initial_weights
from ..report import by_encoding
from ..study import Unit


@dataclasses.dataclass
class TrainedRun:
    """A run of train.py.

    Args:
        args: What it was trained with, and flags of now on top.
        checkpoint: The weights, or the folder with them that a run was packed into.
        img_size: Height and width in training.
        encoding: The position encoding.
    """

    args: argparse.Namespace
    checkpoint: Path
    img_size: tuple[int, int]
    encoding: str

    @property
    def factors(self) -> Unit:
        """What tells it from other runs."""
        layer_scale = self.args.model_kwargs.get('init_values')
        return {
            'encoding': self.encoding,
            'layer_scale': 'off' if layer_scale is None else f'{layer_scale:g}',
            'seed': self.args.seed,
        }

    def arguments_at(self, img_size: tuple[int, int], model_kwargs: Mapping[str, Any] | None = None) -> Any:
        """Return arguments of train.py that start from its weights, at a size and with other options of the model."""
        args = copy.deepcopy(self.args)
        args.pretrained_path, args.img_size = str(self.checkpoint), img_size
        args.model_kwargs.update(model_kwargs or {})
        return args

    def model_at(self, img_size: tuple[int, int], model_kwargs: Mapping[str, Any] | None = None) -> nn.Module:
        """Return its model at a size, in evaluation mode."""
        arguments = {**self.args.model_kwargs, **(model_kwargs or {})}
        return open_model(str(self.checkpoint), self.args.model, arguments, img_size).model

    def initial_model(self) -> nn.Module:
        """Return its model as it was before training."""
        args = copy.deepcopy(self.args)
        args.img_size = self.img_size
        model = build_model(with_weights=False, **flags_of(build_model, args))
        share_initial_weights(model, args)
        return model.eval()

    def validation_loader(self, model: nn.Module, img_size: tuple[int, int], device: torch.device) -> DataLoader:
        """Return the loader of the validation images, prepared as for its model, at a size."""
        args = copy.copy(self.args)
        args.img_size = img_size
        data_config = loaders.resolve_data(model, **flags_of(loaders.resolve_data, args))
        open_both = datasets.open_train_and_validation
        validation = open_both(data_config['input_size'][0], **flags_of(open_both, args))[1]
        datasets.check_class_count(validation, args.num_classes)
        flags = flags_of(loaders.create_validation_loader, args)
        return loaders.create_validation_loader(validation, data_config, device, **flags)

    def set_up_device(self) -> tuple[torch.device, Callable[[], AbstractContextManager]]:
        """Return the device to compute on and the context of mixed precision."""
        device, processes = hardware.set_up_device(self.args.device)
        vars(self.args).update(processes, device=str(device))
        return device, hardware.mixed_precision(device, self.args.amp, self.args.amp_dtype)[0]


def add_runs_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--runs`, the paths that `open_runs` takes."""
    parser.add_argument(
        '--runs',
        nargs='+',
        required=True,
        metavar='DIR',
        help='runs of train.py, folders that `hub push` packs of them, or studies that trained some',
    )


def run_of(unit: Unit, runs: Sequence[TrainedRun]) -> TrainedRun:
    """Return the run that a unit is about."""
    return next(run for run in runs if run.factors.items() <= unit.items())


def open_runs(paths: Sequence[str], flags: Sequence[str]) -> list[TrainedRun]:
    """Open runs of train.py.

    Args:
        paths: Folders of runs, checkpoints in them, folders that runs were packed into, or studies that trained some.
        flags: Flags of train.py that replace what the runs were trained with, such as `--data-dir`.

    Raises:
        ValueError: There is no such run, a flag is wrong, or flags ask for another model or position encoding.
    """
    found = []
    for path in map(Path, paths):
        if (path / 'runs').is_dir():
            found += [folder for folder in (path / 'runs').iterdir() if (folder / LAST).exists()]
        else:
            found.append(path)
    if not found:
        raise ValueError(f'no finished runs in {", ".join(paths)}')
    return sorted((_open(path, flags) for path in found), key=lambda run: by_encoding(run.factors))


def _open(path: Path, flags: Sequence[str]) -> TrainedRun:
    is_package = (path / 'config.json').is_file()
    checkpoint = path / LAST if path.is_dir() and not is_package else path
    recipe = path / 'train.yaml' if is_package else checkpoint.with_name('args.yaml')
    needed = (path / FILES_OF_WEIGHTS[0] if is_package else checkpoint, recipe)
    missing = [str(file) for file in needed if not file.is_file()]
    if missing:
        raise ValueError(f'{path} is no run of train.py: there is no {" and no ".join(missing)}')
    if is_package:
        config = load_config(path / 'config.json', str(path))
        trained = Checkpoint.of_config(path, {}, config)
        said: Mapping[str, Any] = {**trained.pretrained_cfg, 'num_classes': config['num_classes']}
    else:
        trained = Checkpoint.read(checkpoint, mmap=True)
        if not trained.args:
            raise ValueError(f'{checkpoint} does not say what it was trained with; a checkpoint of train.py does')
        said = trained.args
    args = parse_arguments(['-c', str(recipe), *flags])
    name = args.model.partition('.')[0] if is_package else args.model  # config.json has the tag elsewhere
    if name != trained.model_name:
        raise ValueError(f'{checkpoint} was trained with model {trained.model_name!r}, not {args.model!r}')
    model = check_model(args, {})
    try:
        check_encodings(trained.encodings(), encodings_of(model))
    except ValueError as error:
        raise ValueError(f'{checkpoint}: {error}') from error
    args.num_classes, img_size = said['num_classes'], tuple(said['input_size'][1:])
    encoding = encoding_with_options(model.position_name, args.model_kwargs.get('position_args') or {})
    return TrainedRun(args, checkpoint, img_size, encoding)
