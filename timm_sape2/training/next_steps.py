"""What to do after a run, as commands that can be pasted."""

import argparse
import shlex
from pathlib import Path


def next_steps(args: argparse.Namespace, folder: Path) -> str:
    """Return the commands that use, continue and vary a run."""
    height, width = args.input_size[-2:]
    arguments = ', '.join(
        f'{name}={value!r}'
        for name, value in {
            **args.model_kwargs,
            'img_size': (height, width),
            'in_chans': args.input_size[0],
            'num_classes': args.num_classes,
        }.items()
    )
    best = folder / 'model_best.pth.tar'
    again = f'python train.py -c {shlex.quote(str(folder / "args.yaml"))}'
    kwargs = shlex.join(f'{name}={value}' for name, value in {**args.model_kwargs, 'position': 'learned'}.items())
    return f"""\
Trained. The weights are in {best}, curves and numbers beside them.
Load them:
  import timm, timm_sape2
  model = timm.create_model({args.model!r}, checkpoint_path={str(best)!r}, {arguments})
Train longer:
  {again} --resume auto --epochs {2 * args.epochs}
Compare with another position encoding:
  {again} --model-kwargs {kwargs} --experiment learned
Go on at another resolution, from these weights:
  {again} --pretrained-path {shlex.quote(str(best))} --img-size {2 * height} {2 * width} --experiment larger
Train on your own images, in DIR/train/CLASS/ and DIR/validation/CLASS/:
  python train.py --data-dir DIR --model {args.model} --num-classes N"""
