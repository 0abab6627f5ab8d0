"""The command `timm-sape2 predict`."""

import argparse
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from .._arguments import check_file, positive_int
from .._files import atomic_write
from ..trained.prediction import check_contact_sheet, contact_sheet, find_images, predict
from ..training.hardware import device_name
from .model_arguments import add_model_arguments, open_named_model
from .parser import Commands
from .validate import check_json, write_json

_logger = logging.getLogger(__name__)


def add_predict(commands: Commands) -> None:
    """Add `predict`."""
    parser = commands.add_parser(
        'predict',
        help='classify images',
        description="""\
Classify images with a trained model. SOURCE is a name that has weights
(`timm-sape2 list --pretrained`), a checkpoint, the folder of a run (its last
checkpoint, not model_best.pth.tar), a folder with config.json, or OWNER/NAME on
the Hugging Face Hub. Images that cannot be read are reported and left out; the
exit code is 1 then.""",
        epilog="""\
examples:
  timm-sape2 predict vit_compact_sape2_patch4_32.cifar10 cat.jpg
  timm-sape2 predict OWNER/NAME cat.jpg dog.jpg
  timm-sape2 predict model_best.pth.tar photos --top-k 3 --json found.json
  timm-sape2 predict OWNER/NAME 'photos/**/*.png' --contact-sheet sheet.png""",
    )
    parser.add_argument('source', metavar='SOURCE', help='name, checkpoint, folder, or OWNER/NAME')
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='files, folders with all below them, patterns')
    parser.add_argument('-k', '--top-k', type=positive_int, default=5, metavar='N', help='classes to show (default: 5)')
    parser.add_argument('--contact-sheet', metavar='FILE', type=Path, help='draw images and classes as a PNG')
    parser.add_argument('--json', metavar='FILE', help='write all to FILE, - is the standard output')
    add_model_arguments(parser)
    parser.add_argument('-b', '--batch-size', type=positive_int, default=64, metavar='N', help='images at a time (64)')
    parser.add_argument('--device', metavar='DEVICE', help='cpu, cuda or cuda:N (default: cuda if there is one)')
    parser.set_defaults(command=run_predict)


def run_predict(arguments: argparse.Namespace) -> int | None:
    """Predict and report; return 1 if an image could not be read."""
    device = device_name(arguments.device)
    paths = find_images(arguments.images)
    if arguments.contact_sheet:
        check_contact_sheet(len(paths))
        check_file('--contact-sheet', arguments.contact_sheet, '.png')
    check_json(arguments.json)
    trained = open_named_model(arguments, arguments.source)
    if trained.class_names is None:
        _logger.warning(f'{arguments.source} has no names of its classes, so they are numbered')
    errors: list[ValueError] = []
    predictions = predict(trained, paths, arguments.top_k, arguments.batch_size, device, errors.append)
    for error in errors:
        print(f'timm-sape2: {error}', file=sys.stderr)
    if not predictions:
        raise ValueError('none of the images can be read')
    if arguments.json != '-':
        print(*predictions, sep='\n')
    if arguments.json:
        write_json([asdict(prediction) for prediction in predictions], arguments.json)
    if arguments.contact_sheet:
        with atomic_write(arguments.contact_sheet) as path:
            contact_sheet(predictions).save(path, format='PNG')
    return 1 if errors else None
