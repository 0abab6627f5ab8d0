"""The command `timm-sape2 study`."""

import argparse
from pathlib import Path

from .. import provenance
from ..studies import STUDIES, Study
from ..studies.runner import run_study
from ..training.console import set_up_logging
from .parser import Commands
from .visualize import add_visualize

FLAGS = """
All other flags are those of training, for data, model, recipe and device
(`timm-sape2 train --help`)."""
RESUME = """\
The results are results.md, results.csv, plots and run.json in the folder of
the study. Run the same command again to go on where it was stopped."""
SHARE = """
torchrun lets several processes share the work:
  torchrun --nproc_per_node=4 -m timm_sape2 study NAME ..."""


def add_study(commands: Commands) -> None:
    """Add `study`."""
    parser = commands.add_parser(
        'study',
        help='compare position encodings: accuracy, equivariance, resolution, cost',
        description='Compare position encodings in one and the same vision transformer.',
        epilog="""\
examples:
  timm-sape2 study compare              all encodings on the handwritten digits
  timm-sape2 study compare --help       all about one study""",
    )
    studies = parser.add_subparsers(title='studies', metavar='NAME', required=True)
    for study in STUDIES.values():
        add_one(studies, study)
    add_visualize(studies)


def add_one(studies: Commands, study: type[Study]) -> None:
    """Add the parser of a study."""
    parser = studies.add_parser(
        study.name,
        help=study.summary,
        description=study.description + (FLAGS if study.takes_flags else ''),
        epilog=f'examples:\n{study.examples}\n\n{RESUME}' + ('' if study.one_process else SHARE),
    )
    study.add_arguments(parser)
    add = parser.add_argument_group('folder').add_argument
    add('--output', default='output/studies', metavar='DIR', help='folder of all studies (default: %(default)s)')
    add('--experiment', default=study.name, metavar='NAME', help='folder of this one (default: %(default)s)')
    parser.set_defaults(command=run, study=study, takes_flags=study.takes_flags)


def run(arguments: argparse.Namespace) -> None:
    """Run a study."""
    set_up_logging()
    study = arguments.study(arguments, arguments.flags)
    run_study(study, Path(arguments.output, arguments.experiment), provenance.command())
