"""Trained models at other image sizes."""

import csv
from types import SimpleNamespace

import pytest

from timm_sape2.__main__ import main
from timm_sape2.studies.report import COLORS
from timm_sape2.studies.transfer.resolution import Resolution, read_size
from timm_sape2.studies.transfer.runs import open_runs


def table(folder):
    with open(folder / 'results.csv', newline='') as file:
        return list(csv.DictReader(file))


def resolution(compared, sizes=('48', '32x48'), fine_tune=True):
    arguments = SimpleNamespace(runs=[str(compared)], sizes=sizes, fine_tune=fine_tune, fine_tune_lr=1e-4)
    return Resolution(arguments, [])


def test_sizes():
    assert (read_size('48'), read_size('32x48')) == ((48, 48), (32, 48))


@pytest.mark.parametrize('text', ['', '0', 'x', '32x', '32x48x3', '-32', '3.5', '²'])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match='a size is a side or HEIGHTxWIDTH in pixels'):
        read_size(text)


def test_units_are_runs_sizes_and_both_settings_of_sape2(compared):
    units = resolution(compared).units
    assert len(units) == (2 + 2) * 2 * 2
    settings = {(unit['encoding'], unit['distance_scale']) for unit in units}
    assert settings == {('nope', ''), ('learned', ''), ('learned+sape2', 'none'), ('learned+sape2', 'grid')}
    assert [unit['training'] for unit in units] == ['none'] * 8 + ['one epoch'] * 8


def test_sizes_by_default(compared):
    """1, 1.5, 2, 3 and 4.5 times 48x64, in patches of 16: 72 is 4.5 patches, 216 is 13.5."""
    units = resolution(compared, sizes=None, fine_tune=False).units
    sizes = list(dict.fromkeys(unit['size'] for unit in units))
    assert sizes == ['48x64', '64x96', '96x128', '144x192', '224x288']
    assert len(units) == len(sizes) * 4


def test_from_the_command_line(compared, study):
    flags = ['--sizes', '48x64', '32', '--train-num-samples', '16', '--val-num-samples', '10']
    folder = study('resolution', '--runs', str(compared), *flags)
    rows = table(folder)
    assert len(rows) == 4 * 2 * 2
    for run in open_runs([str(compared)], []):
        (trained,) = (
            row for row in table(compared) if row['encoding'] == run.factors['encoding'] and row['epoch'] == '1'
        )
        at_native_size = [
            row
            for row in rows
            if (row['encoding'], row['size'], row['training']) == (run.factors['encoding'], '48x64', 'none')
        ]
        assert {float(row['top1']) for row in at_native_size} == {float(trained['top1'])}
    parts = (folder / 'results.md').read_text().split('\n## ')[1:]
    assert [part.splitlines()[0] for part in parts] == [
        'As trained, no further training',
        'After one epoch at the size',
    ]
    assert [part.count('| learned+sape2 | off | grid |') for part in parts] == [1, 1]
    assert (folder / 'sizes.png').exists()


def test_report_never_mixes_the_two(compared):
    study = resolution(compared)
    rows = [
        {**unit, 'top1': 10.0 if unit['training'] == 'none' else 90.0, 'loss': 1.0}
        for unit in study.units
        if unit['encoding'] == 'nope'
    ]
    before, after = study.report(rows).split('\n## ')[1:]
    assert '90' not in before and '| nope | off |  | 10.00 | 10.00 |' in before
    assert '10' not in after and '| nope | off |  | 90.00 | 90.00 |' in after


def test_a_model_has_one_colour_in_both_panels(compared):
    study = resolution(compared)
    rows = [{**unit, 'top1': 10.0, 'loss': 1.0} for unit in study.units]
    rows = [row for row in rows if row['training'] == 'none' or row['encoding'] != 'nope']
    figure = study.plots(rows, study.configuration)['sizes']
    styles = [
        {line.get_label(): (line.get_color(), line.get_linestyle()) for line in axes.lines} for axes in figure.axes
    ]
    assert set(styles[0]) - set(styles[1]) == {'nope'}
    assert styles[1].items() < styles[0].items()
    assert len(set(styles[0].values())) == len(styles[0]) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(styles[0])
    assert {name: colour for name, (colour, _) in styles[0].items()} == {
        'nope': COLORS['nope'],
        'learned': COLORS['learned'],
        'learned+sape2': COLORS['learned+sape2'],
        'learned+sape2, distances scaled by the grid': COLORS['learned+sape2'],
    }


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--sizes', '50'], 'img_size (50, 50) is not divisible by patch_size (16, 16)'),
        (['--sizes', 'big'], "a size is a side or HEIGHTxWIDTH in pixels, not 'big'"),
        (['--fine-tune-lr', '0'], "must be a number above 0, not '0'"),
        (['--model-kwargs', 'position=cope'], "not 'cope'"),
    ],
)
def test_bad_input(compared, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        main(['study', 'resolution', '--runs', str(compared), '--output', str(tmp_path), *flags])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
