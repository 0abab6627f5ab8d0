"""The command `timm-sape2 export`."""

import argparse
import logging
from pathlib import Path

from timm.models import is_model

from .._arguments import check_file
from ..trained.export import check_packages, export_onnx
from ..trained.opening import TrainedModel, shipped_folder
from ..training.console import set_up_logging
from .model_arguments import add_model_arguments, create_named_model, open_named_model
from .parser import Commands

_logger = logging.getLogger(__name__)


def add_export(commands: Commands) -> None:
    """Add `export`."""
    parser = commands.add_parser(
        'export',
        help='write a model as ONNX',
        description="""\
Write a model as a file of ONNX, for onnxruntime and what else reads it. SOURCE
is a name that has weights (`timm-sape2 list --pretrained`), a checkpoint, the
folder of a run (its last checkpoint, not model_best.pth.tar), a folder with
config.json, or OWNER/NAME on the Hugging Face Hub; or the name of another
model, which is then untrained. The batch may be of any size. The file is there
once onnxruntime has computed the same from it as torch from the model, for
several batches and sizes.""",
        epilog="""\
examples:
  timm-sape2 export output/train/mine --output mine.onnx
  timm-sape2 export vit_compact_sape2_patch4_32.cifar10 --dynamic-size
  timm-sape2 export vit_small_sape2 --img-size 160 224  to measure its speed

The input 'images' has the type float32 and the shape (batch, channels, height,
width): pixels from 0 to 1, minus the mean, divided by the standard deviation.
Both are in the metadata of the file, with sizes, cropping and class names.""",
    )
    parser.add_argument('source', metavar='SOURCE', help='checkpoint, folder, OWNER/NAME, or the name of a model')
    add_model_arguments(parser)
    parser.add_argument(
        '--dynamic-size',
        action='store_true',
        help='images of every size that the patches divide, as --model-kwargs dynamic_img_size=True; with '
        'dynamic_img_pad=True too, of any size',
    )
    parser.add_argument(
        '--output', type=Path, default=Path('model.onnx'), metavar='FILE', help='the file (default: %(default)s)'
    )
    parser.set_defaults(command=export)


def export(arguments: argparse.Namespace) -> None:
    """Export and say what the file takes and gives."""
    set_up_logging()
    check_packages()
    output: Path = arguments.output
    check_file('--output', output, '.onnx')
    if arguments.dynamic_size:
        arguments.model_kwargs = {'dynamic_img_size': True, **arguments.model_kwargs}
    trained = model_to_export(arguments)
    _logger.info(f'Exporting {arguments.source}, which takes from seconds to minutes')
    exported = export_onnx(trained, output)
    shape, sizes = ', '.join(map(str, exported.inputs)), ', '.join(f'{h}x{w}' for h, w in exported.sizes)
    _logger.info(f'{output}: {output.stat().st_size / 1e6:.1f} MB, opset {exported.opset}, images of ({shape})')
    agreement = f'{exported.difference:.1e} of the largest output'
    _logger.info(f'On images of {sizes}, onnxruntime agrees with torch to {agreement}')


def model_to_export(arguments: argparse.Namespace) -> TrainedModel:
    """Open what the arguments name, or create it if it is the name of a model."""
    source = arguments.source
    has_weights = '.' in source or Path(source).exists() or shipped_folder(source) is not None
    if has_weights or not is_model(source):
        return open_named_model(arguments, source)
    if arguments.model not in (None, source):
        raise ValueError(f'{source} and --model {arguments.model} are two models: give one of them')
    _logger.warning(f'{source} is the name of a model without weights, so what is exported is untrained')
    arguments.model = source
    return create_named_model(arguments)
