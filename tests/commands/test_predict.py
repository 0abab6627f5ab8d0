"""The command `timm-sape2 predict`."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

from timm_sape2.__main__ import main


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model with names of its classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('model')
    model = timm.create_model('test_vit_sape2', num_classes=3)
    timm.models.save_for_hf(model, path, {'label_names': ['ape', 'bee', 'cat']}, safe_serialization=True)
    return path


@pytest.fixture
def image(tmp_path):
    Image.radial_gradient('L').save(tmp_path / 'circle.png')
    return tmp_path / 'circle.png'


def predict(*arguments):
    return main(['predict', *map(str, arguments), '--device', 'cpu'])


def test_one_line_for_an_image(folder, image, capsys):
    assert predict(folder, image, '-k', 2) is None
    path, _, classes = capsys.readouterr().out.partition(': ')
    first, second = classes.split(', ')
    assert path == str(image) and first.split()[0] in ('ape', 'bee', 'cat') and second.strip().endswith('%')


def test_json(folder, image, tmp_path, capsys):
    predict(folder, image, '--json', tmp_path / 'found.json')
    capsys.readouterr()
    predict(folder, image, '--json', '-')
    (prediction,) = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / 'found.json').read_text()) == [prediction]
    assert sorted(entry['name'] for entry in prediction['classes']) == ['ape', 'bee', 'cat']
    assert sum(entry['probability'] for entry in prediction['classes']) == pytest.approx(1, abs=1e-5)


def test_classes_without_names(image, tmp_path, caplog, capsys):
    timm.models.save_for_hf(timm.create_model('test_vit_sape2', num_classes=3), tmp_path, safe_serialization=True)
    predict(tmp_path, image)
    assert 'class ' in capsys.readouterr().out
    assert f'{tmp_path} has no names of its classes, so they are numbered' in caplog.text


def test_contact_sheet(folder, image, tmp_path):
    drawn = tmp_path / 'new folder' / 'sheet.png'
    predict(folder, image.parent / '*.png', '--contact-sheet', drawn)
    with Image.open(drawn) as sheet:
        assert sheet.format == 'PNG' and sheet.width == 180


def test_images_that_cannot_be_read_are_reported_and_the_rest_goes_on(folder, image, tmp_path, capsys):
    (tmp_path / 'bad.png').write_text('no image')
    assert predict(folder, tmp_path, '--json', tmp_path / 'found.json', '-b', 1) == 1
    out, error = capsys.readouterr()
    assert out.startswith(f'{image}: ') and out.count('\n') == 1
    assert error.splitlines()[-1].startswith(f'timm-sape2: {tmp_path / "bad.png"} cannot be read as an image: ')
    assert [entry['image'] for entry in json.loads((tmp_path / 'found.json').read_text())] == [str(image)]


def test_nothing_but_unreadable_images(folder, tmp_path, capsys):
    (tmp_path / 'bad.png').write_text('no image')
    with pytest.raises(SystemExit) as leaving:
        predict(folder, tmp_path / 'bad.png', '--json', tmp_path / 'found.json')
    assert leaving.value.code == 2 and not (tmp_path / 'found.json').exists()
    assert capsys.readouterr().err.splitlines()[-1] == 'timm-sape2: error: none of the images can be read'


def test_a_bar_on_a_terminal_alone(folder, image, monkeypatch, capsys):
    predict(folder, image)
    assert 'Predicting' not in capsys.readouterr().err
    monkeypatch.setattr(type(sys.stderr), 'isatty', lambda stream: True, raising=False)
    predict(folder, image)
    assert 'Predicting' in capsys.readouterr().err


def test_a_reader_that_stops_early(folder, image):
    """As `| head -1` does: no error, no traceback."""
    arguments = ['predict', str(folder), str(image), '--device', 'cpu']
    script = f'import sys; from timm_sape2.__main__ import main; sys.exit(main({arguments!r}))'
    command, pipe = [sys.executable, '-c', script], subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    process.stdout.close()
    assert (process.wait(timeout=120), process.stderr.read()) == (141, '')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['none.png'], 'no image: none.png'),
        (['{image}', '--top-k', '0'], "argument -k/--top-k: must be a whole number above 0, not '0'"),
        (['{image}', '--contact-sheet', '{image}/sheet.png'], 'cannot write to the output folder {image}'),
        (['{image}', '--contact-sheet', 'sheet.jpg'], '--contact-sheet must end in .png, not sheet.jpg'),
        (['{image}', '--json', '{image}/found.json'], 'cannot write to the output folder {image}'),
        (['{image}', '--json', '{image.parent}'], '--json must be a file, but {image.parent} is a folder'),
    ],
)
def test_errors(folder, image, capsys, arguments, message):
    with pytest.raises(SystemExit) as leaving:
        predict(folder, *(argument.format(image=image) for argument in arguments))
    assert leaving.value.code == 2
    out, error = capsys.readouterr()
    assert error.splitlines()[-1].startswith(f'timm-sape2: error: {message.format(image=image)}')
    assert out == '', 'the error comes before the work'
