"""docs/redraw.py: the plots of finished studies need nothing but the files that are kept."""

import importlib.util
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('redraw', ROOT / 'docs' / 'redraw.py')
redraw = importlib.util.module_from_spec(spec)
spec.loader.exec_module(redraw)


KEPT = sorted(path.parent for path in ROOT.glob('docs/*/*/results.csv'))


def test_all_studies_are_kept_with_their_tables():
    assert {'compare', 'equivariance', 'resolution', 'overhead', 'attention_cost'} <= {path.name for path in KEPT}


@pytest.mark.parametrize('kept', KEPT, ids=lambda path: f'{path.parent.name}/{path.name}')
def test_plots_of_the_documentation(tmp_path, capsys, kept):
    for file in ('run.json', 'results.csv'):
        shutil.copy(kept / file, tmp_path)
    redraw.main([str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob('*.png')}
    assert drawn == {path.name for path in kept.glob('*.png')}
    assert capsys.readouterr().out.split() == [str(tmp_path / plot) for plot in sorted(drawn)]
    for plot in drawn:
        assert f']({plot})' in (kept / 'results.md').read_text()


def test_cells_are_numbers_text_or_nothing():
    assert [redraw.plain_value(text) for text in ('3', '1e-4', 'off', '')] == [3, 1e-4, 'off', None]
