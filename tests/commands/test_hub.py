"""The command `timm-sape2 hub`: its help, and what needs no server. (The rest is in tests/hub.)"""

import shutil

import pytest

from timm_sape2.__main__ import main


@pytest.mark.parametrize('command', ['push', 'pull', 'verify', 'card'])
def test_every_help_has_examples_and_fits_a_terminal(monkeypatch, capsys, command):
    monkeypatch.setenv('COLUMNS', '80')
    with pytest.raises(SystemExit) as leaving:
        main(['hub', command, '--help'])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert f'\nexamples:\n  timm-sape2 hub {command} ' in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize('argv', [['hub'], ['hub', 'publish'], ['hub', 'push', 'a.pth'], ['hub', 'verify']])
def test_bad_arguments(capsys, argv):
    with pytest.raises(SystemExit) as leaving:
        main(argv)
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith('timm-sape2')


@pytest.mark.parametrize('command', ['pull', 'verify'])
def test_names_of_repositories(capsys, command):
    with pytest.raises(SystemExit):
        main(['hub', command, '../vit'])
    assert '../vit: the name of a repository is OWNER/NAME' in capsys.readouterr().err


def test_card_is_written_anew(tmp_path, capsys, request):
    folder = tmp_path / 'vit_compact_sape2_patch4_32.digits'
    shutil.copytree(request.config.rootpath / 'hub_configs' / folder.name, folder)
    expected = (folder / 'README.md').read_text().replace(f'-c {folder.name}/train.yaml', '-c train.yaml')
    (folder / 'README.md').write_text('by hand')
    assert main(['hub', 'card', str(folder)]) is None
    assert (folder / 'README.md').read_text() == expected


def test_card_of_what_is_no_configuration(tmp_path, refusal):
    config = tmp_path / 'config.json'
    assert str(config) in refusal('hub', 'card', str(tmp_path))
    config.write_text('{')
    assert refusal('hub', 'card', str(tmp_path)).startswith(f'{tmp_path}: config.json is not JSON: ')
    config.write_text('{"architecture": "vit_tiny_patch16_224"}')
    assert refusal('hub', 'card', str(tmp_path)) == f'{tmp_path} is not a model of timm_sape2'
