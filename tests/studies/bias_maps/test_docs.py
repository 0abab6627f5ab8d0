"""What docs/looking.md says holds: commands, and which encodings have a bias."""

import re
import shlex
from pathlib import Path

from timm_sape2.__main__ import build_parser
from timm_sape2.positions import ENCODINGS
from timm_sape2.positions.base import BIAS_HOOKS

DOCS = Path(__file__).resolve().parents[3] / 'docs'
TEXT = (DOCS / 'looking.md').read_text()


def test_commands_are_those_of_the_command_line():
    blocks = '\n'.join(re.findall(r'```bash\n(.*?)```', TEXT, flags=re.DOTALL)).replace('\\\n', '')
    commands = re.findall(r'^timm-sape2 ([^#\n]+)', blocks, flags=re.MULTILINE)
    assert sum('--html' in command for command in commands) == 2
    assert sum('--head all' in command for command in commands) == 2
    for command in commands:
        build_parser().parse_args(shlex.split(command))


def test_encodings():
    (listed,) = re.findall(r'any encoding with an attention bias \((.*?)\)', TEXT, flags=re.DOTALL)
    with_bias = {name for name, encoding in ENCODINGS.items() if encoding.overrides(*BIAS_HOOKS)}
    assert set(re.findall(r'`(\w+)`', listed)) == with_bias


def test_the_screenshot_is_small():
    assert (DOCS / 'looking.png').stat().st_size < 150_000
