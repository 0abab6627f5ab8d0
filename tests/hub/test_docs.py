"""What docs/hub.md says holds: its commands are ones, its files and flags are there."""

import re
import shlex
from pathlib import Path

import pytest

from timm_sape2.__main__ import build_parser
from timm_sape2.hub.files import FILES
from timm_sape2.training.arguments import build_parser as build_training_parser

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / 'docs' / 'hub.md').read_text()
COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize('command', COMMANDS)
def test_commands(command):
    program, *arguments = shlex.split(command, comments=True)
    if program == 'python':
        build_training_parser().parse_args(arguments[1:])
    else:
        build_parser().parse_args(arguments)


def test_publishing_takes_three_commands():
    first = re.search(r'three commands.*?```bash\n(.*?)```', TEXT, re.DOTALL)
    assert len(first[1].splitlines()) == 3


def test_files_and_flags():
    assert set(re.findall(r'^\| `(\S+)` \|', TEXT, re.MULTILINE)) == set(FILES)
    push = build_parser()._subparsers._group_actions[0].choices['hub']._subparsers._group_actions[0].choices['push']
    for flag in ('--private', '--revision', '--class-names', '--license', '--dry-run', '--no-ema', '--metrics'):
        assert flag in TEXT and flag in push.format_help()
