"""The notebook docs/tour.ipynb runs from its first cell to its last, and shows what its words promise."""

import ast
import io
import json
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image

DOCS = Path(__file__).parents[1] / 'docs'
CELLS = json.loads((DOCS / 'tour.ipynb').read_text())['cells']


def run_cell(source, names):
    """Run a cell as Jupyter does, and return the value of the expression that it ends with, None if there is none."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, 'tour.ipynb', 'exec'), names)
    return eval(compile(ast.Expression(last.value), 'tour.ipynb', 'eval'), names) if last else None


@pytest.fixture(scope='module')
def shown():
    """What the cells end with, and the names that they leave behind."""
    matplotlib.use('Agg')
    torch.set_num_threads(1)
    names = {}
    sources = [''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'code']
    return [run_cell(source, names) for source in sources], names


def test_it_shows_what_it_says(shown):
    values, names = shown
    (name, parameters), table, shapes, sheet, *figures = [value for value in values if value is not None]
    assert name == 'learned+sape2' and parameters < 200_000
    assert str(table).splitlines()[-1].startswith('learned+sape2 ')
    assert shapes == ((1442, 1, 16, 16), (355, 1, 16, 16))
    assert isinstance(sheet, Image.Image) and sheet.width > sheet.height
    assert [len([axes for axes in figure.axes if axes.images]) for figure in figures] == [3, 5]
    for figure in figures:
        assert Image.open(io.BytesIO(figure._repr_png_())).format == 'PNG'
    (axes,) = names['plt'].gcf().axes
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [12, 12]
    names['plt'].close('all')


def test_the_digits_are_learned(shown):
    """0.95 with positions where this was written, and 0.83 without."""
    _, names = shown
    assert names['with_sape2'][-1] > 0.85 and names['without'][-1] > 0.5


def test_it_is_kept_without_outputs():
    code = [cell for cell in CELLS if cell['cell_type'] == 'code']
    assert code and all(not cell['outputs'] and cell['execution_count'] is None for cell in code)


def test_its_links_lead_somewhere():
    text = ''.join(''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'markdown')
    links = re.findall(r'\]\(([^)]+)\)', text)
    assert links and all((DOCS / link).exists() for link in links)
