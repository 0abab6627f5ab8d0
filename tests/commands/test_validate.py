"""The command `timm-sape2 validate`."""

import argparse
import json
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.utils import accuracy

from timm_sape2.__main__ import main


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """DATA/validation/CLASS/IMAGE: 21 images of noise in three classes."""
    folder = tmp_path_factory.mktemp('photos')
    random = np.random.default_rng(0)
    for name in ('cat', 'dog', 'eel'):
        (folder / 'validation' / name).mkdir(parents=True)
        for index in range(7):
            pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / 'validation' / name / f'{index}.png')
    return folder


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model('test_vit_sape2', num_classes=3)
    path = tmp_path_factory.mktemp('run') / 'last.pth.tar'
    args = argparse.Namespace(model='test_vit_sape2', num_classes=3)
    torch.save({'state_dict': model.state_dict(), 'args': args}, path)
    return path


def validate(*arguments):
    return main(['validate', *map(str, arguments), '--device', 'cpu', '-j', '0'])


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as leaving:
        validate(*arguments)
    assert leaving.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix('timm-sape2: error: ')


def test_the_numbers_are_those_of_timms_parts(photos, checkpoint, capsys, tmp_path):
    """The loader and the metrics of timm, put together as its validate.py does."""
    model = timm.create_model('test_vit_sape2', num_classes=3, checkpoint_path=str(checkpoint)).eval()
    config = resolve_model_data_config(model)
    config = {key: value for key, value in config.items() if key != 'crop_mode'}
    loader = create_loader(
        create_dataset('', str(photos), split='validation'),
        batch_size=21,
        use_prefetcher=False,
        num_workers=0,
        **config,
    )
    ((images, targets),) = loader
    with torch.no_grad():
        logits = model(images)
    assert validate(checkpoint, '--data-dir', photos, '-b', 4, '--json', tmp_path / 'metrics.json') is None
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['top1'] == pytest.approx(accuracy(logits, targets)[0].item(), abs=0.01)
    assert metrics['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), abs=1e-4)
    assert (metrics['top5'], metrics['num_images'], metrics['split']) == (100.0, 21, 'validation')
    low, high = metrics['top1_interval']
    assert capsys.readouterr().out == (
        f'{checkpoint}, weights: top-1 {metrics["top1"]:.2f} % (95 % interval {low:.2f} to {high:.2f}), '
        f'top-5 100.00 %, loss {metrics["loss"]:.4f} on 21 images\n'
    )


def test_json_on_the_standard_output_is_nothing_else(photos, checkpoint, capsys):
    validate(checkpoint, '--data-dir', photos, '--json', '-')
    metrics = json.loads(capsys.readouterr().out)
    assert metrics['measured_by'] == 'timm-sape2 validate' and metrics['dataset'] == photos.name


def test_the_metrics_go_into_the_card(photos, checkpoint, tmp_path):
    validate(checkpoint, '--data-dir', photos, '--per-class', '--json', tmp_path / 'metrics.json')
    push = ['hub', 'push', str(checkpoint), '--to', 'owner/vit', '--dry-run', '--folder', str(tmp_path / 'folder')]
    main([*push, '--metrics', str(tmp_path / 'metrics.json')])
    top1 = json.loads((tmp_path / 'metrics.json').read_text())['top1']
    assert f'| top-1 accuracy | {top1:.2f} % (95 % interval ' in (tmp_path / 'folder' / 'README.md').read_text()
    validate(tmp_path / 'folder', '--data-dir', photos, '--json', tmp_path / 'again.json')
    assert json.loads((tmp_path / 'again.json').read_text())['top1'] == top1


def test_classes(photos, checkpoint, capsys, tmp_path):
    """A table and a picture; the classes have the names of the data where the model has none."""
    picture, file = tmp_path / 'new' / 'confusion.png', tmp_path / 'metrics.json'
    validate(checkpoint, '--data-dir', photos, '--per-class', '--confusion-matrix', picture, '--json', file)
    summary, empty, header, *rows = capsys.readouterr().out.splitlines()
    assert summary.startswith(f'{checkpoint}, weights: top-1 ') and empty == ''
    assert header.split()[:4] == ['class', 'images', 'top-1', 'precision']
    assert sorted(row.split()[0] for row in rows) == ['cat', 'dog', 'eel']
    metrics = json.loads(file.read_text())
    assert [(row['index'], row['name'], row['images']) for row in metrics['per_class']] == [
        (0, 'cat', 7),
        (1, 'dog', 7),
        (2, 'eel', 7),
    ]
    assert sum(row['top1'] for row in metrics['per_class']) / 3 == pytest.approx(metrics['top1'], abs=1e-3)
    with Image.open(picture) as image:
        assert image.format == 'PNG' and min(image.size) > 300
    assert [path.name for path in picture.parent.iterdir()] == ['confusion.png']


def test_the_picture_alone_has_no_table(photos, checkpoint, capsys, tmp_path):
    validate(checkpoint, '--data-dir', photos, '--confusion-matrix', tmp_path / 'c.png', '--json', '-')
    assert (tmp_path / 'c.png').exists() and 'per_class' not in json.loads(capsys.readouterr().out)


def test_another_size(photos, checkpoint, capsys):
    validate(checkpoint, '--data-dir', photos, '--img-size', '32', '48', '--json', '-')
    assert json.loads(capsys.readouterr().out)['num_images'] == 21


def test_a_progress_bar_on_a_terminal_alone(photos, checkpoint, capsys, monkeypatch):
    validate(checkpoint, '--data-dir', photos)
    assert 'Validating' not in capsys.readouterr().err
    monkeypatch.setattr(type(sys.stderr), 'isatty', lambda stream: True, raising=False)
    validate(checkpoint, '--data-dir', photos)
    assert 'Validating' in capsys.readouterr().err


class TestErrors:
    def test_data(self, photos, checkpoint, capsys, tmp_path):
        assert refusal(capsys, checkpoint) == 'no data: give --data-dir DIR, or --dataset digits'
        assert refusal(capsys, checkpoint, '--data-dir', 'none') == '--data-dir none is not a folder'
        message = f"no folder 'test' in {photos}, which has: validation"
        assert refusal(capsys, checkpoint, '--data-dir', photos, '--split', 'test') == message
        assert refusal(capsys, checkpoint, '--dataset', 'digits') == 'the data has 10 classes, the model 3'

    def test_pictures(self, photos, checkpoint, capsys, tmp_path, monkeypatch):
        data = ['--data-dir', photos, '--confusion-matrix']
        message = '--confusion-matrix must end in .png, not c.pdf'
        assert refusal(capsys, checkpoint, *data, 'c.pdf') == message
        (tmp_path / 'file').write_text('')
        message = f'cannot write to the output folder {tmp_path}/file'
        assert refusal(capsys, checkpoint, *data, tmp_path / 'file' / 'c.png').startswith(message)
        assert refusal(capsys, checkpoint, '--data-dir', photos, '--json', tmp_path / 'file' / 'm').startswith(message)
        (tmp_path / 'c.png').mkdir()
        message = f'--confusion-matrix must be a file, but {tmp_path}/c.png is a folder'
        assert refusal(capsys, checkpoint, *data, tmp_path / 'c.png') == message
        monkeypatch.setitem(sys.modules, 'matplotlib', None)
        message = "plots need matplotlib: pip install 'timm_sape2[studies]'"
        assert refusal(capsys, checkpoint, *data, 'c.png') == message

    def test_sources(self, photos, capsys, tmp_path):
        assert refusal(capsys, 'last.pth', '--data-dir', photos) == 'no checkpoint last.pth'
        (tmp_path / 'bad.pth').write_bytes(b'garbage')
        message = f'{tmp_path}/bad.pth is truncated or no checkpoint'
        assert refusal(capsys, tmp_path / 'bad.pth', '--data-dir', photos) == message

    def test_arguments(self, photos, checkpoint, capsys):
        message = '--img-size takes a side, or a height and a width, not 3 numbers'
        assert refusal(capsys, checkpoint, '--data-dir', photos, '--img-size', 1, 2, 3) == message
        with pytest.raises(SystemExit):
            main(['validate', str(checkpoint), '--device', 'abacus'])
        assert '--device must be cpu, cuda or cuda:N, not abacus' in capsys.readouterr().err
