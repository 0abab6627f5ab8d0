"""The comparison of encodings, from the command line to the table."""

import argparse
import csv
import re
from types import SimpleNamespace

import pytest

from timm_sape2.__main__ import main
from timm_sape2.positions import ENCODINGS
from timm_sape2.studies.accuracy.compare import Compare
from timm_sape2.training import loop

from ..conftest import TRAINING

FLAGS = ['--encodings', 'nope', 'learned', '--layer-scale', 'off', '1e-4', '--seeds', '0', '1']


def table(folder):
    with open(folder / 'results.csv', newline='') as file:
        return list(csv.DictReader(file))


def row(encoding, seed, top1, layer_scale='off', epoch=1):
    return {
        'encoding': encoding,
        'layer_scale': layer_scale,
        'seed': seed,
        'epoch': epoch,
        'top1': top1,
        'train_loss': 1,
    }


@pytest.fixture
def compare():
    return Compare(SimpleNamespace(encodings=['nope'], layer_scale=['off'], seeds=[0]), TRAINING)


def test_report_of_made_up_results(compare):
    """Learned has 50 and 60, SaPE2 53 and 61 with the same seeds: 57 on average, 2 more, differing by 3 and 1."""
    rows = [row('learned', 0, 50.0), row('learned', 1, 60.0), row('sape2', 0, 53.0), row('sape2', 1, 61.0)]
    lines = compare.report([row('sape2', 0, 9.0, epoch=0), *rows]).splitlines()
    assert '| sape2 | 57.00 ± 5.66 | 2.00 ± 1.41 | 0, 1 |' in lines
    assert '| learned | 55.00 ± 7.07 | 0.00 ± 0.00 | 0, 1 |' in lines


def test_differences_are_within_a_layer_scale_and_a_seed(compare):
    rows = [row('learned', 0, 50.0), row('learned', 0, 10.0, '0.0001'), row('sape2', 0, 30.0, '0.0001')]
    lines = compare.report([*rows, row('rope', 1, 70.0)]).splitlines()
    assert '| sape2 |  |  | 30.00 | 20.00 | 0 |' in [re.sub('not run', '', line) for line in lines]
    assert '| rope | 70.00 |  | not run |  | 1 |' in lines


def test_from_the_command_line(study):
    folder = study('compare', *FLAGS, *TRAINING)
    rows = table(folder)
    assert len(rows) == 2 * 2 * 2 * 2
    assert {(row['encoding'], row['layer_scale'], row['seed']) for row in rows} == {
        (encoding, scale, seed) for encoding in ('nope', 'learned') for scale in ('off', '0.0001') for seed in '01'
    }
    assert {file.name for file in folder.glob('*.png')} == {'accuracy.png', 'curves.png'}
    assert '| learned | ' in (folder / 'results.md').read_text()


def test_killed_half_way_it_ends_with_the_same_table(study, tmp_path, monkeypatch):
    flags = ['--encodings', 'nope', 'sape2', '--layer-scale', 'off', '--seeds', '0', *TRAINING]
    undisturbed = table(study('compare', *flags))
    backward, calls = loop.backward, []

    def dying(*args):
        calls.append(args)
        if len(calls) == 7:  # in the second epoch of the second run
            raise KeyboardInterrupt
        backward(*args)

    monkeypatch.setattr(loop, 'backward', dying)
    with pytest.raises(SystemExit):
        study('compare', *flags, output=tmp_path)
    assert len(table(tmp_path / 'compare')) == 2
    assert table(study('compare', *flags, output=tmp_path)) == undisturbed
    assert len(calls) == 9


def test_default_is_every_encoding_and_the_best_of_the_paper():
    parser = argparse.ArgumentParser()
    Compare.add_arguments(parser)
    assert parser.parse_args([]).encodings == [*ENCODINGS, 'learned+sape2']


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--encodings', 'albi'], "Unknown position encoding 'albi' in position='albi'. Valid names"),
        (['--encodings', 'nope', 'nope'], 'listed twice: nope_0.0001_0, nope_off_0'),
        (['--layer-scale', '0'], "--layer-scale must be 'off' or a number above 0, not '0'"),
        (['--layer-scale', 'on'], "--layer-scale must be 'off' or a number above 0, not 'on'"),
        (['--model-kwargs', 'init_values=1'], '--model-kwargs init_values=... is what the study varies'),
        (['--seeds', '-1'], "argument --seeds: must be a whole number, 0 or more, not '-1'"),
        (['--dataset', 'none'], "unknown --dataset 'none'"),
        (['--data-dir', 'none', '--dataset', ''], '--data-dir none is not a folder'),
        (['--train-num-samples', '99999'], 'the data has 1442 images, not 99999'),
    ],
)
def test_bad_input(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as leaving:
        main(['study', 'compare', '--output', str(tmp_path), '--seeds', '0', *TRAINING, *flags])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folder_of_another_recipe(compared, capsys):
    with pytest.raises(SystemExit):
        main(['study', 'compare', '--output', str(compared.parent), *TRAINING, '--lr', '0.1', '--epochs', '3'])
    assert 'holds a study with epochs=2 instead of 3, lr=0.001 instead of 0.1' in capsys.readouterr().err
