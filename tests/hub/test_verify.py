"""Verifying: one byte that changed is found, wherever it changed."""

import json
import re
import shutil

import pytest

from timm_sape2.hub.pull import pull
from timm_sape2.hub.verify import check_logits, verify


@pytest.fixture
def published(hub, package):
    """The Hub, with the package as owner/vit."""
    hub.put('owner/vit', {path.name: path.read_bytes() for path in package.iterdir()})
    return hub


@pytest.fixture
def copy(package, tmp_path):
    """A copy of the package to damage."""
    return shutil.copytree(package, tmp_path / 'copy')


def flip(data, index):
    index %= len(data)
    return data[:index] + bytes([data[index] ^ 64]) + data[index + 1 :]


def error(*args):
    with pytest.raises(ValueError) as raised:
        verify(*args)
    return str(raised.value)


def test_a_good_model(published, tmp_path):
    folder, difference = verify('owner/vit')
    assert folder.parts[-3] == 'models--owner--vit' and difference < 1e-5
    pull('owner/vit', tmp_path / 'vit')
    assert verify('owner/vit', tmp_path / 'vit')[0] == tmp_path / 'vit'


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'README.md', 'metrics.json', 'probe.png'])
def test_one_flipped_byte_on_the_disk(published, tmp_path, name):
    folder = pull('owner/vit', tmp_path / 'vit')
    for index in (0, 40, -1):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(flip(data, index))
        message = f"{name} in {folder} differs from the Hub's record; delete what differs and download it again"
        assert error('owner/vit', folder) == f'owner/vit: {message}'
        (folder / name).write_bytes(data)
    verify('owner/vit', folder)


def test_one_flipped_byte_on_the_way(published):
    published.tamper = lambda path, data: flip(data, -1) if path == 'model.safetensors' else data
    assert error('owner/vit').startswith('owner/vit: model.safetensors in ')


def test_a_missing_and_an_added_file(published, tmp_path):
    folder = pull('owner/vit', tmp_path / 'vit')
    (folder / 'probe.png').unlink()
    assert error('owner/vit', folder).startswith('owner/vit: probe.png in ')
    del published.repos['owner/vit'].files()['probe.png'], published.repos['owner/vit'].files()['train.yaml']
    assert error('owner/vit', folder).startswith('owner/vit: train.yaml in ')


def test_weights_that_changed_before_they_were_published(published, package, tmp_path):
    """The record is that of the changed file: only the logits tell."""
    data = (package / 'model.safetensors').read_bytes()
    published.put('owner/vit', {'model.safetensors': flip(data, -1)})
    message = error('owner/vit')
    assert re.fullmatch(
        r'owner/vit: the logits of probe.png differ from those of the model card by \S+ of the largest; '
        'the weights are not those that the card describes',
        message,
    )


def test_a_card_without_logits(copy):
    (copy / 'README.md').write_text('---\nlicense: mit\n---\n')
    with pytest.raises(ValueError, match='the model card has no logits of the probe image'):
        check_logits(copy, 'vit')
    (copy / 'README.md').write_text('---\nprobe: {logits: {99: 1.0}}\n---\n')
    with pytest.raises(ValueError, match='has no logits of the probe image that the model could have'):
        check_logits(copy, 'vit')


@pytest.mark.parametrize('name', ['README.md', 'probe.png'])
def test_nothing_to_compare_with(copy, name):
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f'vit: nothing to compare the logits with, there is no {name}'):
        check_logits(copy, 'vit')


def test_the_card_has_the_logits_of_the_metrics_file(package):
    card, metrics = (package / 'README.md').read_text(), json.loads((package / 'metrics.json').read_text())
    for index, value in metrics['probe'].items():
        assert f'    {index}: {value}\n' in card
        assert f'| class {index} | {value:.4f} |\n' in card + '\n'


def test_a_folder_that_is_not_there(hub, tmp_path):
    message = f'{tmp_path}/vit is not a folder; `timm-sape2 hub pull owner/vit {tmp_path}/vit` makes it'
    assert error('owner/vit', tmp_path / 'vit') == message
    assert hub.log == []


def test_missing_repository(hub):
    assert error('owner/none').startswith(f'owner/none: there is no such repository on {hub.url}')
