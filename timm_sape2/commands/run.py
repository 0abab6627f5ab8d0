"""The command `timm-sape2 run`."""

import argparse

from ..scripts import ScriptError, run_script
from .parser import Commands


def add_run(commands: Commands) -> None:
    """Add `run`."""
    parser = commands.add_parser(
        'run',
        help="run a script of timm's, unchanged, with these models",
        description="""\
Run any Python script as `python SCRIPT ...` does, but with the models of this
package registered. It is meant for timm's train.py, validate.py,
inference.py, benchmark.py and onnx_export.py, which are in timm's repository
and not in its package. Everything after SCRIPT goes to the script, --help too,
and the exit code is the script's.""",
        epilog="""\
examples:
  timm-sape2 run train.py --help
  timm-sape2 run train.py --data-dir DATA --model vit_small_sape2_patch4_32 \\
      --num-classes 10
  timm-sape2 run validate.py DATA --model vit_small_sape2_patch4_32 \\
      --checkpoint output/train/NAME/model_best.pth.tar
  torchrun --nproc_per_node=2 -m timm_sape2 run train.py ...
  timm-sape2 run bulk_runner.py --model-list '*sape2*' --no_python yes \\
      timm-sape2 run validate.py DATA

In a checkout of timm, write `--no-python timm-sape2 run` in place of
`-m timm_sape2 run`: with -m, Python takes the timm of the current folder
instead of the installed one. A program that a script starts begins without the
models; bulk_runner.py starts one for each model, so tell it to start
`timm-sape2 run`, as above.""",
    )
    parser.add_argument('script', metavar='SCRIPT', nargs=argparse.PARSER, help='path of the script, and its arguments')
    parser.set_defaults(command=run, user_errors=ScriptError)


def run(arguments: argparse.Namespace) -> None:
    """Run a script; what it raises is its own affair."""
    path, *rest = arguments.script
    run_script(path, rest)
