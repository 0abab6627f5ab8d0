"""The command `timm-sape2 validate`."""

import argparse
import json
from pathlib import Path
from typing import Any

from .. import _files
from .._arguments import FLAG, check_file, loader_processes, positive_int
from .._figure import check_matplotlib
from .._files import atomic_write
from ..data.datasets import class_names, open_split
from ..trained.accuracy import measure_accuracy
from ..trained.confusion import Confusion
from ..training.hardware import device_name
from .model_arguments import add_model_arguments, open_named_model
from .parser import Commands


def add_validate(commands: Commands) -> None:
    """Add `validate`."""
    parser = commands.add_parser(
        'validate',
        help='measure the accuracy of a trained model',
        description="""\
Measure the accuracy of a trained model on a data set. SOURCE is a name that has
weights (`timm-sape2 list --pretrained`), a checkpoint, the folder of a run (its
last checkpoint, not model_best.pth.tar), a folder with config.json, or
OWNER/NAME on the Hugging Face Hub. The numbers are those of timm's validate.py.""",
        epilog="""\
examples:
  timm-sape2 validate output/train/NAME/model_best.pth.tar --data-dir DIR
  timm-sape2 validate OWNER/NAME --data-dir DIR --split test
  timm-sape2 validate model_best.pth.tar --dataset digits --json metrics.json
  timm-sape2 validate OWNER/NAME --data-dir DIR --per-class \\
      --confusion-matrix confusion.png

DIR has the images in DIR/validation/CLASS/IMAGE. `timm-sape2 hub push` takes
metrics.json for the model card.""",
    )
    parser.add_argument('source', metavar='SOURCE', help='name, checkpoint, folder, or OWNER/NAME')
    data = parser.add_argument_group('the data')
    data.add_argument('--data-dir', metavar='DIR', help='folder of the images')
    data.add_argument('--dataset', default='', metavar='NAME', help="'digits', torch/cifar10, ... (default: folders)")
    data.add_argument('--dataset-download', action=FLAG, default=False, help='download a data set of torchvision')
    data.add_argument('--split', default='validation', metavar='NAME', help='split of it (default: %(default)s)')
    add_model_arguments(parser)
    parser.add_argument(
        '-b', '--batch-size', type=positive_int, default=256, metavar='N', help='images at a time (256)'
    )
    parser.add_argument(
        '-j', '--workers', type=loader_processes, default='4', metavar='N', help='processes that load them (4)'
    )
    parser.add_argument('--device', metavar='DEVICE', help='cpu, cuda or cuda:N (default: cuda if there is one)')
    parser.add_argument('--per-class', action='store_true', help='accuracy of each class too, the worst first')
    parser.add_argument(
        '--confusion-matrix', type=Path, metavar='PNG', help='draw what the images of each class are taken for'
    )
    parser.add_argument('--json', metavar='FILE', help='write the numbers to FILE, - is the standard output')
    parser.set_defaults(command=validate)


def validate(arguments: argparse.Namespace) -> None:
    """Measure and report."""
    device, picture = device_name(arguments.device), arguments.confusion_matrix
    if picture is not None:
        check_matplotlib()
        check_file('--confusion-matrix', picture, '.png')
    check_json(arguments.json)
    trained = open_named_model(arguments, arguments.source)
    in_chans = trained.data_config['input_size'][0]
    dataset = open_split(arguments.dataset, arguments.data_dir, arguments.split, in_chans, arguments.dataset_download)
    confusion = None
    if arguments.per_class or picture is not None:
        names = trained.class_names or class_names(dataset)
        confusion = Confusion(names or [f'class {index}' for index in range(trained.model.num_classes)])
    measured = measure_accuracy(trained, dataset, arguments.batch_size, arguments.workers, device, confusion)
    metrics = {
        'dataset': arguments.dataset or Path(arguments.data_dir).resolve().name,
        'split': arguments.split,
        'weights': trained.weights,
        'measured_by': 'timm-sape2 validate',
        **measured,
    }
    if confusion is not None and arguments.per_class:
        metrics['per_class'] = confusion.per_class()
    if arguments.json != '-':
        low, high = metrics['top1_interval']
        print(
            f'{arguments.source}, {trained.weights}: top-1 {metrics["top1"]:.2f} % (95 % interval {low:.2f} to '
            f'{high:.2f}), top-5 {metrics["top5"]:.2f} %, loss {metrics["loss"]:.4f} on {metrics["num_images"]} images'
        )
        if confusion is not None and arguments.per_class:
            print(f'\n{confusion.table()}')
    if confusion is not None and picture is not None:
        with atomic_write(picture) as temporary:
            confusion.figure().savefig(temporary, format='png', dpi=120)
    if arguments.json:
        write_json(metrics, arguments.json)


def check_json(target: str | None) -> None:
    """Raise an error if `write_json` could not write there."""
    if target not in (None, '-'):
        check_file('--json', Path(target))


def write_json(content: Any, target: str) -> None:
    """Write JSON to a file, or to the standard output if it is called '-'."""
    if target == '-':
        print(json.dumps(content, indent=1))
    else:
        _files.write_json(Path(target), content)
