"""Links between the pages lead somewhere, and what they show runs."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from timm_sape2.__main__ import main

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for page in [*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), *ROOT.glob('timm_sape2/**/*.md')]
    if page.is_file()
)


def anchors(page):
    """Names that headings of a page have as targets of links."""
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    headings = re.findall(r'^#+ (.*)$', text, flags=re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def links(page):
    text = re.sub(r'```.*?```|`[^`\n]*`', '', page.read_text(), flags=re.DOTALL)
    return re.findall(r'\]\(([^()\s]+)\)', text)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    lost = []
    for link in links(page):
        if link.startswith('https://'):
            continue
        path, _, anchor = link.partition('#')
        target = page.parent / path if path else page
        if not target.exists() or (anchor and target.suffix == '.md' and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_headings_become_anchors(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('# One `two`, three\n```\n# no heading\n```\n## From `model(x)` to the bias\n')
    assert anchors(page) == {'one-two-three', 'from-modelx-to-the-bias'}


def test_use_it_in(tmp_path, monkeypatch):
    """All of the page, in the order in which it stands there."""
    pytest.importorskip('transformers')
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (48, 40), 'olive').save('photo.png')
    page = (ROOT / 'docs' / 'use-it-in.md').read_text()
    names = {}
    for language, code in re.findall(r'```(python|bash)\n(.*?)```', page, flags=re.DOTALL):
        if language == 'python':
            exec(code, names)
        else:
            program, *arguments = shlex.split(code)
            assert program == 'timm-sape2'
            main(arguments)
    assert names['logits'].shape == (2, 10)
    assert [tuple(features.shape) for features in names['maps']] == [(1, 384, 6, 10)] * 3
    assert [tuple(weights.shape) for weights in names['attention'].values()] == [(1, 4, 65, 65)] * 6
    assert names['module'].num_classes == 10
