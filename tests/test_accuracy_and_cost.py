"""docs/accuracy_and_cost.py: what two studies measured, in one picture."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('accuracy_and_cost', ROOT / 'docs' / 'accuracy_and_cost.py')
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

ACCURACY = """encoding,layer_scale,seed,epoch,top1
nope,off,0,0,20
nope,off,0,1,30
nope,off,1,1,34
nope,0.0001,0,1,50
rope,off,0,1,40
cope,off,0,1,35
"""
COST = """encoding,training_time_ratio
nope,1.0
rope,1.1
sape2,1.2
"""


@pytest.fixture
def folders(tmp_path):
    for name, text in {'accuracy': ACCURACY, 'cost': COST}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'results.csv').write_text(text)
    return [str(tmp_path / 'accuracy'), str(tmp_path / 'cost')]


def test_accuracy_is_that_of_the_last_epoch_without_layer_scale(folders):
    assert script.accuracy_by_encoding(Path(folders[0])) == {'nope': [30, 34], 'rope': [40], 'cope': [35]}


def test_picture_names_what_it_leaves_out(folders, capsys):
    picture = Path(folders[0], 'picture.png')
    script.main([*folders, str(picture)])
    assert picture.read_bytes().startswith(b'\x89PNG')
    assert capsys.readouterr().out == f'{picture}\nleft out: cope sape2\n'
