"""What is cited and listed as changed is the version that is installed."""

import re
from pathlib import Path

import yaml

from timm_sape2 import __version__

ROOT = Path(__file__).parents[1]


def test_citation_has_the_version():
    assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == __version__


def test_changes_of_the_version_come_first():
    assert re.findall(r'^## (.*)$', (ROOT / 'CHANGELOG.md').read_text(), flags=re.MULTILINE)[0] == __version__
