"""What to do after a run, as commands that can be pasted."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from timm.models import get_model_args
from timm.utils import unwrap_model
from torch import nn


def next_steps(args: argparse.Namespace, model: nn.Module, folder: Path) -> str:
    """Return the commands that load, validate, continue and vary the model of a run."""
    best = folder / 'model_best.pth.tar'
    height, width = args.input_size[1:]
    arguments = _arguments(args, model)
    load = ', '.join(f'{name}={value!r}' for name, value in arguments.items())
    again = _command('python train.py -c', folder / 'args.yaml')
    learned = _command(*(f'{name}={value}' for name, value in {**args.model_kwargs, 'position': 'learned'}.items()))
    return f"""\
Trained. The weights are in {best}, curves and numbers beside them.
Load them:
  import timm, timm_sape2
  model = timm.create_model({args.model!r}, checkpoint_path={str(best)!r}, {load})
Validate them on your images, in DIR/validation/CLASS/:
  {_command('timm-sape2 validate', best)} --data-dir DIR
Train longer:
  {again} --resume auto --epochs {2 * args.epochs}
Compare with another position encoding:
  {again} --model-kwargs {learned} --experiment learned
Go on at another resolution, from these weights:
  {again} {_command('--pretrained-path', best, '--img-size', 2 * height, 2 * width)} --experiment larger
Train on your images, in DIR/train/CLASS/ and DIR/validation/CLASS/:
  python train.py --data-dir DIR --model {args.model} --num-classes N"""


def _arguments(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Return what timm has to be told to create the model again."""
    names = {'in_chans', 'num_classes', 'img_size', *args.model_kwargs}
    return {name: value for name, value in get_model_args(unwrap_model(model)).items() if name in names}


def _command(start: object, *words: object) -> str:
    return ' '.join([str(start), *(shlex.quote(str(word)) for word in words)])
