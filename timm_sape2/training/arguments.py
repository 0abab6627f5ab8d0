"""The flags of training: timm's names, ranges checked, a `--help` that teaches."""

import argparse
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import provenance
from .._arguments import (
    FLAG,
    ArgumentParser,
    KeyValues,
    fraction,
    loader_processes,
    non_negative_float,
    positive_float,
    positive_int,
    whole_number,
)
from .recipe import find_recipe, recipe_arguments

DESCRIPTION = """\
Train an image classifier with timm, on one process or under torchrun. Flags are
named as in timm."""

EPILOG = """\
examples:
  {train}
      without data of yours: the digits of scikit-learn, two minutes on a
      laptop, nothing to download
  {train} --data-dir photos --model vit_small_sape2 \\
      --num-classes 5 --epochs 100 --amp --resume auto
      photos/train/CLASS/*.jpg and photos/validation/CLASS/*.jpg; run it again
      after a crash and it continues
  {train_on_four} -c recipe.yaml --data-dir DIR
      a recipe is a YAML file of flags, as `batch_size: 128`; the command line
      wins over it
  {train} -c vit_small_sape2_patch4_32.cifar10
      recipes of models come with the package

stopping: SIGTERM and Ctrl-C save a recovery checkpoint at the next step;
--resume auto continues exactly there.
exit codes: 0 trained, 1 the loss is no longer finite, 2 an error in the input,
130 or 143 stopped by a signal.
"""

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
SCHEDULES = ('cosine', 'step', 'wsd', 'constant', 'none')
NOT_FROM_MEMORY = ('aa', 'aug_repeats', 'train_interpolation', 'train_img_sizes')
SEVERAL_SIZES = (
    *('train_batch_sizes', 'train_size_probs', 'train_size_schedule', 'train_size_schedule_spread'),
    *('train_size_random_mix', 'train_batches_per_epoch', 'variable_batch_loss_scale'),
)
KD = (
    *('kd_distill_type', 'distill_loss_weight', 'task_loss_weight', 'kd_temperature'),
    *('kd_student_feature_dim', 'kd_teacher_feature_dim', 'kd_token_distill_type'),
)


def parse_arguments(argv: Sequence[str], default_recipe: Path | None = None) -> argparse.Namespace:
    """Parse the command line on top of the recipe it names.

    Args:
        argv: Arguments after the program's name.
        default_recipe: The recipe of a command that names neither a recipe nor data, None for none.

    Raises:
        ValueError: If an argument, or a key or value of the recipe, is wrong.
    """
    parser = build_parser()
    named = recipe_and_data(argv)
    config = named.config or (None if named.data_dir or named.dataset else default_recipe)
    recipe = recipe_arguments(find_recipe(config), parser) if config else []
    args = parser.parse_args([*recipe, *argv])
    if args.img_size is not None:
        args.img_size = _height_and_width(args.img_size)
    _settle_augmentation(args, parser)
    _check_sizes(args, parser)
    if not args.log_wandb and (args.wandb_project or args.wandb_tags or args.wandb_resume_id):
        raise ValueError('--wandb-project, --wandb-tags and --wandb-resume-id need --log-wandb')
    if args.wandb_resume_id and not args.resume:
        raise ValueError('--wandb-resume-id goes on with a run: add --resume')
    without_teacher = [name for name in KD if args.kd_model_name is None and _is_given(name, args, parser)]
    if without_teacher:
        raise ValueError(f'{_flags(without_teacher)} needs a teacher: add --kd-model-name')
    return args


def recipe_and_data(argv: Sequence[str]) -> argparse.Namespace:
    """Return the recipe ('config') and the data ('data_dir', 'dataset') that a command line names, None for none."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('-c', '--config')
    parser.add_argument('--data-dir')
    parser.add_argument('--dataset')
    return parser.parse_known_args(argv)[0]


def flags_of(function: Callable, args: argparse.Namespace) -> dict[str, Any]:
    """Return what a function takes of the arguments of a run.

    Args:
        function: What it takes by name alone has the names of flags, or of what `set_up` finds out.
        args: The arguments of the run.
    """
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: getattr(args, parameter.name)
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def build_parser() -> ArgumentParser:
    """Build the parser of the whole command line."""
    train = provenance.training_command()
    program = train.removeprefix('python ')
    parser = ArgumentParser(
        prog=program,
        usage=f'{program} [-h] [-c FILE] [--data-dir DIR] [--model NAME] ...',
        description=DESCRIPTION,
        epilog=EPILOG.format(train=train, train_on_four=provenance.training_command(processes=4)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        '-c',
        '--config',
        metavar='FILE',
        help='recipe: YAML file with defaults for the flags below, or the name of a model whose recipe comes with the '
        'package',
    )
    for add_group in (
        _data,
        _sizes,
        _model,
        _optimizer,
        _schedule,
        _augmentation,
        _regularization,
        _distillation,
        _ema,
        _device,
        _output,
        _tracking,
    ):
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
    add(
        '-j',
        '--workers',
        type=loader_processes,
        default='4',
        metavar='N',
        help='processes that load images, at most one a core (default: 4)',
    )
    add(
        '--loader',
        choices=('workers', 'memory'),
        default='workers',
        help='memory: keep all images on the device and augment them there in batches, by shifts or crops, mirroring, '
        'erasing, mixup, cutmix; for small images (default: workers, processes that decode and augment one by one)',
    )
    add('--crop-pct', type=fraction, metavar='X', help='side that validation keeps, 0 to 1 (default: of the model)')
    add('--mean', type=float, nargs='+', metavar='X', help='mean of the pixels, 0 to 1 (default: of the model)')
    add('--std', type=positive_float, nargs='+', metavar='X', help='their standard deviation (default: of the model)')
    add('--interpolation', choices=INTERPOLATIONS, help='resizing in validation (default: of the model)')


def _sizes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('training at several image sizes, a batch at each').add_argument
    add(
        '--train-img-sizes',
        type=positive_int,
        nargs='+',
        metavar='N',
        help='sides of square training images, one drawn for each batch; validation is at --img-size. The model must '
        'take them all: --model-kwargs dynamic_img_size=True (default: that of the model)',
    )
    add('--train-batch-sizes', type=positive_int, nargs='+', metavar='N', help='batch size for each (default: as -b)')
    add('--train-size-probs', type=non_negative_float, nargs='+', metavar='P', help='how often (default: all alike)')
    add(
        '--train-size-schedule',
        choices=('constant', 'progressive'),
        default='constant',
        help='progressive: go from the first size to the last in the course of the epochs (default: %(default)s)',
    )
    add(
        '--train-size-schedule-spread',
        type=non_negative_float,
        default=0.65,
        metavar='X',
        help='with progressive, how far into the list the sizes of an epoch reach (default: %(default)s)',
    )
    add(
        '--train-size-random-mix',
        type=fraction,
        default=0.1,
        metavar='P',
        help='with progressive, share of batches of any size (default: %(default)s)',
    )
    add(
        '--train-batches-per-epoch',
        '--train-steps-per-epoch',
        type=positive_int,
        metavar='N',
        help='batches of an epoch (default: until the images are used up)',
    )
    add(
        '--variable-batch-loss-scale',
        choices=('none', 'sqrt', 'linear'),
        default='none',
        help='weight of a batch by its number of images, against the average batch (default: %(default)s)',
    )


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
    add('--channels-last', action=FLAG, default=False, help='channels last in memory: convolutions on GPUs are faster')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile (backend: inductor)')
    add(
        '--torchcompile-mode',
        choices=('default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs'),
        metavar='MODE',
        help='what inductor spends time on: reduce-overhead launches less, max-autotune and max-autotune-no-cudagraphs '
        'search for the fastest kernels (default: default)',
    )


def _optimizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('optimizer').add_argument
    add('--opt', default='adamw', metavar='NAME', help="timm's name of the optimizer (default: %(default)s)")
    add('--opt-eps', type=positive_float, metavar='X', help='its epsilon (default: its own)')
    add('--opt-betas', type=float, nargs='+', metavar='X', help='its betas (default: its own)')
    add('--momentum', type=float, default=0.9, metavar='X', help='its momentum, if it has one (default: 0.9)')
    add(
        '--opt-kwargs',
        nargs='*',
        default={},
        action=KeyValues,
        metavar='KEY=VALUE',
        help='its other options, by the names of its arguments in Python, as amsgrad=True; for muon '
        "ns_steps=5 fallback_lr_scale=0.5; muon's AdamW trains position tables, biases and norms",
    )
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
        choices=('rrc', 'rkrc', 'rkrr', 'shift'),
        help='random resized crop, or resize and keep the ratio, then crop the center or at random (default: rrc); '
        'shift by up to an eighth of the side (with --loader memory alone, and its default)',
    )
    add('--scale', type=positive_float, nargs=2, metavar='X', help='smallest and largest area (default: 0.08 1)')
    add('--ratio', type=positive_float, nargs=2, metavar='X', help='narrowest and widest shape (default: 0.75 1.33)')
    add('--hflip', type=fraction, default=0.5, metavar='P', help='probability to mirror the image (default: 0.5)')
    add('--color-jitter', type=float, metavar='X', help='strength; none with --aa (default: 0.4, from memory 0)')
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


def _distillation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('learning from another model, its teacher').add_argument
    add(
        '--kd-model-name',
        metavar='NAME|SOURCE',
        help='the teacher: a model with published weights, a checkpoint, the folder of a run or OWNER/NAME on the Hub; '
        'of the same classes, unless features are learned from (default: none)',
    )
    add(
        '--kd-distill-type',
        choices=('logit', 'feature', 'token'),
        default='logit',
        help='what to learn: its logits, its features before the classifier, or its logits by a token of their own '
        '(for distilled models of timm) (default: %(default)s)',
    )
    add('--kd-loss-type', choices=('kl',), default='kl', help='loss on logits (default: kl, Kullback-Leibler)')
    add(
        '--distill-loss-weight',
        type=non_negative_float,
        metavar='X',
        help='weight of that loss (default: 1; or 1 minus --task-loss-weight if that is given)',
    )
    add('--task-loss-weight', type=non_negative_float, metavar='X', help='weight of the loss on classes (default: 1)')
    add('--kd-temperature', type=positive_float, default=4.0, metavar='T', help='softens the logits (default: 4)')
    add('--kd-student-feature-dim', type=positive_int, metavar='N', help='width of features (default: of the model)')
    add('--kd-teacher-feature-dim', type=positive_int, metavar='N', help='same for the teacher (default: its own)')
    add(
        '--kd-token-distill-type',
        choices=('soft', 'hard'),
        default='soft',
        help='what the token learns: all logits, or the class that is highest (default: %(default)s)',
    )


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
    add(
        '--model-dtype',
        choices=('float32', 'bfloat16', 'float16'),
        help='type of the weights, the optimizer and all else, instead of --amp: bfloat16 takes half the memory, and '
        'small updates are lost in it; float16 overflows easily (default: float32)',
    )
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


def _tracking(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('watching from elsewhere').add_argument
    add('--log-wandb', action=FLAG, default=False, help='report epochs to Weights & Biases (its package: wandb)')
    add('--wandb-project', metavar='NAME', help='project there (default: that of your account)')
    add('--wandb-tags', nargs='*', default=[], metavar='TAG', help='tags of the run there')
    add(
        '--wandb-resume-id',
        default='',
        metavar='ID',
        help='run there that goes on, with --resume (default: the one that the folder of the run remembers)',
    )
    add(
        '--log-tensorboard',
        action=FLAG,
        default=False,
        help='write events to the folder of the run, for `tensorboard --logdir` (its package: tensorboard)',
    )


def _settle_augmentation(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fill in what the loader does by default, and refuse what it cannot do."""
    for name in ('scale', 'ratio'):
        least, most = getattr(args, name) or (0, 0)
        if least > most:
            raise ValueError(f'{_flags([name])} {least} {most}: the smallest comes first')
    if args.loader == 'memory':
        refused = [name for name in NOT_FROM_MEMORY if _is_given(name, args, parser)]
        if args.color_jitter:
            refused.append('color_jitter')
        if args.train_crop_mode not in (None, 'shift', 'rrc'):
            refused.append(f'train_crop_mode {args.train_crop_mode}')
        if refused:
            raise ValueError(f'--loader memory does not do {_flags(refused)}: leave it out, or use --loader workers')
        args.color_jitter, args.train_crop_mode = 0.0, args.train_crop_mode or 'shift'
        of_crops = [name for name in ('scale', 'ratio') if getattr(args, name) is not None]
        if args.train_crop_mode == 'shift' and of_crops:
            raise ValueError(f'--loader memory shifts whole images: {_flags(of_crops)} needs --train-crop-mode rrc')
    elif args.train_crop_mode == 'shift':
        raise ValueError('--train-crop-mode shift needs --loader memory')
    elif args.color_jitter is None:
        args.color_jitter = 0.4


def _check_sizes(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what does not fit the training sizes."""
    sizes = args.train_img_sizes
    if sizes is None:
        without_sizes = [name for name in SEVERAL_SIZES if _is_given(name, args, parser)]
        if without_sizes:
            raise ValueError(f'{_flags(without_sizes)} goes with several sizes: add --train-img-sizes')
        return
    for name in ('train_batch_sizes', 'train_size_probs'):
        numbers = getattr(args, name)
        if numbers is not None and len(numbers) != len(sizes):
            raise ValueError(f'{_flags([name])} takes a number for each of the {len(sizes)} --train-img-sizes')
    if args.train_size_probs is not None and not any(args.train_size_probs):
        raise ValueError('--train-size-probs are all 0')
    if args.train_size_schedule == 'progressive' and len(sizes) < 2:
        raise ValueError('--train-size-schedule progressive goes from one size to another: give two --train-img-sizes')


def _height_and_width(size: Sequence[int]) -> tuple[int, int]:
    if len(size) > 2:
        raise ValueError(f'argument --img-size: takes a side, or a height and a width, not {len(size)} numbers')
    return size[0], size[-1]


def _is_given(name: str, args: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    return getattr(args, name) != parser.get_default(name)


def _flags(names: Sequence[str]) -> str:
    return ', '.join('--' + name.replace('_', '-') for name in names)
