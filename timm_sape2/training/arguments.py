"""The flags of train.py: timm's names, ranges checked, a `--help` that teaches."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from timm.utils import ParseKwargs

from .recipe import recipe_arguments

DESCRIPTION = 'Train an image classifier with timm, on one process or under torchrun. Flags are named as in timm.'

EPILOG = """\
examples:
  python train.py
      without data of yours: the digits of scikit-learn, two minutes on a laptop, nothing to download
  python train.py --data-dir photos --model vit_small_sape2 --num-classes 5 --epochs 100 --amp --resume auto
      photos/train/CLASS/*.jpg and photos/validation/CLASS/*.jpg; run it again after a crash and it continues
  torchrun --nproc-per-node 4 train.py -c recipe.yaml --data-dir photos
      a recipe is a YAML file of flags, as `batch_size: 128`; the command line wins over it

stopping: SIGTERM and Ctrl-C save a recovery checkpoint at the next step; --resume auto continues exactly there.
exit codes: 0 trained, 1 the loss is no longer finite, 2 an error in the input, 130 or 143 stopped by a signal.
"""


def _number(kind: Callable[[str], float], holds: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f'must be {wanted}, not {text!r}')
        return value

    return convert


FLAG = argparse.BooleanOptionalAction
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
SCHEDULES = ('cosine', 'step', 'wsd', 'constant', 'none')

positive_int = _number(int, lambda value: value > 0, 'a whole number above 0')
whole_number = _number(int, lambda value: value >= 0, 'a whole number, 0 or more')
positive_float = _number(float, lambda value: value > 0, 'a number above 0')
non_negative_float = _number(float, lambda value: value >= 0, 'a number, 0 or more')
fraction = _number(float, lambda value: 0 <= value <= 1, 'a number from 0 to 1')


class KeyValues(ParseKwargs):
    """timm's KEY=VALUE pairs, with an error for what is no pair."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in filter(None, values):
            if '=' not in value:
                parser.error(f'argument {option_string}: must be KEY=VALUE, not {value!r}')
        super().__call__(parser, namespace, values, option_string)


class ArgumentParser(argparse.ArgumentParser):
    """A parser that raises its errors, for the caller to report like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_arguments(argv: Sequence[str], default_recipe: Path | None = None) -> argparse.Namespace:
    """Parse the command line on top of the recipe it names.

    Args:
        argv: Arguments after the program's name.
        default_recipe: The recipe of a command that names neither a recipe nor data, None for none.

    Raises:
        ValueError: If an argument, or a key or value of the recipe, is wrong.
    """
    parser = build_parser()
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument('-c', '--config')
    first.add_argument('--data-dir')
    first.add_argument('--dataset')
    named = first.parse_known_args(argv)[0]
    config = named.config or (None if named.data_dir or named.dataset else default_recipe)
    recipe = recipe_arguments(Path(config), parser) if config else []
    args = parser.parse_args([*recipe, *argv])
    if args.img_size is not None:
        args.img_size = _height_and_width(args.img_size)
    return args


def build_parser() -> ArgumentParser:
    """Build the parser of the whole command line."""
    parser = ArgumentParser(
        prog='train.py',
        usage='train.py [-h] [-c FILE] [--data-dir DIR] [--model NAME] [FLAG ...]',
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('-c', '--config', metavar='FILE', help='recipe: YAML file with defaults for the flags below')
    for add_group in (_data, _model, _optimizer, _schedule, _augmentation, _regularization, _ema, _device, _output):
        add_group(parser)
    return parser


def _data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('data').add_argument
    add('--data-dir', metavar='DIR', help='folder of the images: DIR/train/CLASS/IMAGE, DIR/validation/CLASS/IMAGE')
    add(
        '--dataset',
        default='',
        metavar='NAME',
        help="'digits' of scikit-learn, torch/cifar10 and others of torchvision, hfds/NAME of Hugging Face "
        '(default: images in folders)',
    )
    add('--dataset-download', action=FLAG, default=False, help='download a data set of torchvision into DIR')
    add('--train-split', default='train', metavar='NAME', help='split to train on (default: %(default)s)')
    add('--val-split', default='validation', metavar='NAME', help='split to validate on (default: %(default)s)')
    add('--train-num-samples', type=positive_int, metavar='N', help='train on N images, evenly spaced (default: all)')
    add('--val-num-samples', type=positive_int, metavar='N', help='validate on N images, evenly spaced (default: all)')
    add('-b', '--batch-size', type=positive_int, default=128, metavar='N', help='images a process takes (default: 128)')
    add('-vb', '--validation-batch-size', type=positive_int, metavar='N', help='same in validation (default: as -b)')
    add('-j', '--workers', type=whole_number, default=4, metavar='N', help='processes that load images (default: 4)')
    add('--crop-pct', type=fraction, metavar='X', help='side that validation keeps, 0 to 1 (default: of the model)')
    add('--mean', type=float, nargs='+', metavar='X', help='mean of the pixels, 0 to 1 (default: of the model)')
    add('--std', type=positive_float, nargs='+', metavar='X', help='their standard deviation (default: of the model)')
    add('--interpolation', choices=INTERPOLATIONS, help='resizing in validation (default: of the model)')


def _model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('model').add_argument
    add('--model', default='vit_small_sape2', metavar='NAME', help='any model of this package or of timm')
    add(
        '--model-kwargs',
        nargs='*',
        default={},
        action=KeyValues,
        metavar='KEY=VALUE',
        help='options of the model, as position=sape2 depth=6',
    )
    add('--img-size', type=positive_int, nargs='+', metavar='N', help='side, or height and width, of model and data')
    add('--in-chans', type=int, choices=(1, 3), help='1 for gray images, 3 for color (default: of the model)')
    add('--num-classes', type=positive_int, metavar='N', help='classes of the data (default: of the model)')
    add('--pretrained', action=FLAG, default=False, help='start from the published weights of the model')
    add(
        '--pretrained-path',
        default='',
        metavar='SOURCE',
        help='start from these weights, adapted to size and classes; a file, the folder of a run or with config.json, '
        'or OWNER/NAME on the Hub',
    )
    add('--initial-checkpoint', default='', metavar='FILE', help='start from these weights, which must fit exactly')
    add('--grad-checkpointing', action=FLAG, default=False, help='recompute activations: less memory, more time')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile (backend: inductor)')


def _optimizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('optimizer').add_argument
    add('--opt', default='adamw', metavar='NAME', help="timm's name of the optimizer (default: %(default)s)")
    add('--opt-eps', type=positive_float, metavar='X', help='its epsilon (default: its own)')
    add('--opt-betas', type=float, nargs='+', metavar='X', help='its betas (default: its own)')
    add('--momentum', type=float, default=0.9, metavar='X', help='its momentum, if it has one (default: 0.9)')
    add('--weight-decay', type=float, default=0.05, metavar='X', help='weight decay (default: %(default)s)')
    add('--layer-decay', type=positive_float, metavar='X', help='factor on the rate from a block to the one below it')
    add('--clip-grad', type=positive_float, metavar='X', help='largest norm of the gradient (default: no limit)')
    add('--grad-accum-steps', type=positive_int, default=1, metavar='N', help='batches for one update (default: 1)')


def _schedule(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('schedule of the learning rate').add_argument
    add('--epochs', type=positive_int, default=100, metavar='N', help='passes over the data (default: %(default)s)')
    add('--sched', choices=SCHEDULES, default='cosine', help='shape after the warm-up (default: %(default)s)')
    add('--lr', type=positive_float, default=5e-4, metavar='X', help='rate after the warm-up (default: %(default)s)')
    add('--min-lr', type=float, default=1e-5, metavar='X', help='rate at the end (default: %(default)s)')
    add('--warmup-lr', type=float, default=1e-6, metavar='X', help='rate at the start (default: %(default)s)')
    add('--warmup-epochs', type=whole_number, default=5, metavar='N', help='epochs in which it rises (default: 5)')
    add(
        '--decay-epochs',
        type=positive_float,
        metavar='N',
        help='with wsd the epochs in which it falls at the end (default: a fifth), with step those until it is '
        'a tenth (default: 90)',
    )


def _augmentation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('augmentation of training images').add_argument
    add('--no-aug', action='store_true', help='none at all, whatever the other flags say')
    add(
        '--train-crop-mode',
        choices=('rrc', 'rkrc', 'rkrr'),
        help='random resized crop, or resize and keep the ratio, then crop the center or at random (default: rrc)',
    )
    add('--scale', type=positive_float, nargs=2, metavar='X', help='smallest and largest area (default: 0.08 1)')
    add('--ratio', type=positive_float, nargs=2, metavar='X', help='narrowest and widest shape (default: 0.75 1.33)')
    add('--hflip', type=fraction, default=0.5, metavar='P', help='probability to mirror the image (default: 0.5)')
    add('--color-jitter', type=float, default=0.4, metavar='X', help='strength; none with --aa (default: 0.4)')
    add('--aa', metavar='POLICY', help='AutoAugment or RandAugment, as rand-m9-mstd0.5-inc1 (default: none)')
    add('--aug-repeats', type=whole_number, default=0, metavar='N', help='copies of an image, over the processes')
    add('--reprob', type=fraction, default=0.0, metavar='P', help='probability to erase a part (default: 0)')
    add('--remode', choices=('const', 'rand', 'pixel'), default='pixel', help='what fills it (default: %(default)s)')
    add(
        '--train-interpolation',
        choices=('random', *INTERPOLATIONS),
        default='random',
        help='resizing in training (default: bilinear or bicubic at random)',
    )


def _regularization(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('loss and regularization').add_argument
    add('--smoothing', type=fraction, default=0.1, metavar='X', help='label smoothing (default: %(default)s)')
    add('--bce-loss', action=FLAG, default=False, help='binary cross-entropy instead of softmax cross-entropy')
    add('--mixup', type=non_negative_float, default=0.0, metavar='ALPHA', help='mix two images (default: 0, never)')
    add('--cutmix', type=non_negative_float, default=0.0, metavar='ALPHA', help='paste one into the other (default: 0)')
    add('--mixup-prob', type=fraction, default=1.0, metavar='P', help='share of batches mixed or cut (default: 1)')
    add('--mixup-switch-prob', type=fraction, default=0.5, metavar='P', help='share of cutmix in them (default: 0.5)')
    add('--mixup-off-epoch', type=whole_number, default=0, metavar='N', help='end both at epoch N (default: 0, never)')
    add('--drop', type=fraction, default=0.0, metavar='P', help='dropout before the classifier (default: 0)')
    add('--drop-path', type=fraction, metavar='P', help='stochastic depth (default: of the model)')


def _ema(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('moving average of the weights').add_argument
    add('--model-ema', action=FLAG, default=False, help='keep one, and validate it instead of the weights')
    add('--model-ema-decay', type=fraction, default=0.9998, metavar='X', help='share kept at an update (0.9998)')
    add('--model-ema-warmup', action=FLAG, default=False, help='keep less over the first updates')


def _device(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('device and precision').add_argument
    add('--device', metavar='DEVICE', help='cpu, cuda or cuda:N (default: cuda if there is one, else cpu)')
    add('--amp', action=FLAG, default=False, help='automatic mixed precision')
    add('--amp-dtype', choices=('bfloat16', 'float16'), default='bfloat16', help='its type (default: %(default)s)')
    add('--seed', type=whole_number, default=42, metavar='N', help='seed of everything random (default: 42)')


def _output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('checkpoints and output').add_argument
    add('--output', default='output/train', metavar='DIR', help='folder of all runs (default: %(default)s)')
    add('--experiment', default='', metavar='NAME', help='folder of this run in it (default: name of the model)')
    add(
        '--resume',
        default='',
        metavar='auto|FILE',
        help='auto: go on from the newest checkpoint in the folder of the run, or start if there is none',
    )
    add(
        '--recovery-interval',
        type=whole_number,
        default=0,
        metavar='N',
        help='updates between checkpoints in the middle of an epoch (default: 0, only when stopped)',
    )
    add('--checkpoint-hist', type=positive_int, default=10, metavar='N', help='best checkpoints to keep (default: 10)')
    add('--eval-metric', choices=('top1', 'top5', 'loss'), default='top1', help='what is best (default: %(default)s)')
    add('--val-interval', type=positive_int, default=1, metavar='N', help='epochs from validation to validation')
    add('--log-interval', type=positive_int, default=50, metavar='N', help='batches from line to line, off a terminal')


def _height_and_width(size: Sequence[int]) -> tuple[int, int]:
    if len(size) > 2:
        raise ValueError(f'argument --img-size: takes a side, or a height and a width, not {len(size)} numbers')
    return size[0], size[-1]
