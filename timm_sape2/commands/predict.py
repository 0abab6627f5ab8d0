"""The command `timm-sape2 predict`."""

import argparse
import logging
from pathlib import Path

from ..trained.prediction import check_contact_sheet, class_label, contact_sheet, find_images, predict
from ..training.arguments import positive_int
from ..training.hardware import device_name
from ..training.run_folder import atomic_write
from .model_arguments import add_model_arguments, open_named_model
from .parser import Commands
from .validate import write_json

_logger = logging.getLogger(__name__)


def add_predict(commands: Commands) -> None:
    """Add `predict`."""
    parser = commands.add_parser(
        'predict',
        help='classify images',
        description="""\
Classify images with a trained model. SOURCE is a checkpoint of train.py, the
folder of a run (its last checkpoint, not model_best.pth.tar), a folder with
config.json, or OWNER/NAME on the Hugging Face Hub.""",
        epilog="""\
examples:
  timm-sape2 predict OWNER/NAME cat.jpg dog.jpg
  timm-sape2 predict model_best.pth.tar photos --top-k 3 --json found.json
  timm-sape2 predict OWNER/NAME 'photos/**/*.png' --contact-sheet sheet.png""",
    )
    parser.add_argument('source', metavar='SOURCE', help='checkpoint, folder, or OWNER/NAME')
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='files, folders with all below them, patterns')
    parser.add_argument('-k', '--top-k', type=positive_int, default=5, metavar='N', help='classes to show (default: 5)')
    parser.add_argument('--contact-sheet', metavar='FILE', type=Path, help='draw images and classes as a PNG')
    parser.add_argument('--json', metavar='FILE', help='write all to FILE, - is the standard output')
    add_model_arguments(parser)
    parser.add_argument('-b', '--batch-size', type=positive_int, default=64, metavar='N', help='images at a time (64)')
    parser.add_argument('--device', metavar='DEVICE', help='cpu, cuda or cuda:N (default: cuda if there is one)')
    parser.set_defaults(command=run_predict, user_errors=(ValueError, OSError))


def run_predict(arguments: argparse.Namespace) -> None:
    """Predict and report."""
    device = device_name(arguments.device)
    paths = find_images(arguments.images)
    if arguments.contact_sheet:
        check_contact_sheet(len(paths))
    trained = open_named_model(arguments, arguments.source)
    if trained.class_names is None:
        _logger.warning(f'{arguments.source} has no names of its classes, so they are numbered')
    predictions = list(predict(trained, paths, arguments.top_k, arguments.batch_size, device))
    if arguments.json != '-':
        for prediction in predictions:
            classes = (f'{class_label(entry)} {entry["probability"]:.1%}' for entry in prediction['classes'])
            print(f'{prediction["image"]}: {", ".join(classes)}')
    if arguments.json:
        write_json(predictions, arguments.json)
    if arguments.contact_sheet:
        with atomic_write(arguments.contact_sheet) as path:
            contact_sheet(predictions).save(path, format='PNG')
