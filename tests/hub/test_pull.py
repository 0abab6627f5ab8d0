"""Pulling a model to a folder: bit for bit, or not at all."""

import pytest

from timm_sape2.hub.files import FILES
from timm_sape2.hub.pull import pull


@pytest.fixture
def published(hub, package):
    """The Hub, with the package as owner/vit, tagged v1."""
    sha = hub.put('owner/vit', {path.name: path.read_bytes() for path in package.iterdir()})
    hub.repos['owner/vit'].refs['v1'] = sha
    return hub


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error(source, folder, **kwargs):
    with pytest.raises(ValueError) as raised:
        pull(source, folder, **kwargs)
    return str(raised.value)


def test_bit_identical_in_a_fresh_process(published, package, fresh_process, tmp_path):
    out = fresh_process(f"""
        import timm, torch
        from timm_sape2.__main__ import main
        main(['hub', 'pull', 'owner/vit', {str(tmp_path / 'vit')!r}])
        main(['hub', 'verify', 'owner/vit', '--folder', {str(tmp_path / 'vit')!r}])
    """)
    assert contents(tmp_path / 'vit') == contents(package)
    first, second = out.splitlines()[:2]
    assert first == f"Pulled owner/vit. timm.create_model('local-dir:{tmp_path}/vit', pretrained=True) loads it."
    assert second.startswith(f"owner/vit is as published: files in {tmp_path}/vit as in the Hub's record, logits of")


def test_to_a_folder_of_the_same_name(published, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pull('owner/vit')
    assert contents(tmp_path / 'vit') == contents(package)


def test_revisions(published, package, tmp_path):
    published.put('owner/vit', {'README.md': b'newer'})
    pull('owner/vit@v1', tmp_path / 'old')
    pull('owner/vit', tmp_path / 'new')
    assert contents(tmp_path / 'old') == contents(package)
    assert (tmp_path / 'new' / 'README.md').read_bytes() == b'newer'


def test_private_with_and_without_token(published, tmp_path, monkeypatch):
    published.repos['owner/vit'].private = True
    pull('owner/vit', tmp_path / 'mine')
    monkeypatch.delenv('HF_TOKEN')
    message = f'there is no such repository on {published.url}, or it is private'
    assert error('owner/vit', tmp_path / 'theirs').startswith(f'owner/vit: {message}')
    assert not (tmp_path / 'theirs').exists()


def test_only_the_files_of_a_model_are_taken(published, tmp_path):
    published.put('owner/vit', {'setup.py': b'import os', 'pytorch_model.bin': b'pickle', 'a/config.json': b'{}'})
    pull('owner/vit', tmp_path / 'vit')
    assert sorted(contents(tmp_path / 'vit')) == sorted(set(FILES) - {'pretrain.yaml'})


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_missing_file(published, tmp_path, name):
    del published.repos['owner/vit'].files()[name]
    assert error('owner/vit', tmp_path / 'vit') == f'owner/vit: the repository has no {name}'


def test_missing_revision(published, tmp_path):
    message = 'no such revision (branch, tag or commit) in this repository'
    assert error('owner/vit@v2', tmp_path) == f'owner/vit@v2: {message}'


def test_a_byte_that_flips_on_the_way(published, tmp_path):
    published.tamper = lambda path, data: data[:-1] + b'?' if path == 'model.safetensors' else data
    message = error('owner/vit', tmp_path / 'vit')
    assert message.startswith('owner/vit: model.safetensors in ')
    assert message.endswith(' is not what the Hub has; delete it and pull again')
    assert not (tmp_path / 'vit').exists()


def test_a_configuration_that_is_refused(published, tmp_path):
    published.put('owner/vit', {'config.json': b'{"architecture": "test_vit_sape2", "auto_map": "x.py"}'})
    assert error('owner/vit', tmp_path / 'vit') == (
        "owner/vit: config.json: no 'num_classes', 'num_features', 'model_args', 'pretrained_cfg'"
    )


def test_work_of_the_user_is_not_overwritten(published, package, tmp_path):
    folder = tmp_path / 'vit'
    folder.mkdir()
    (folder / 'README.md').write_text('mine')
    message = f'{folder} has another README.md: choose another folder, or add --overwrite'
    assert error('owner/vit', folder) == message
    assert contents(folder) == {'README.md': b'mine'}
    pull('owner/vit', folder, overwrite=True)
    assert contents(folder) == contents(package)
    pull('owner/vit', folder)
