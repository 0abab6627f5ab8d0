"""Tokens appear nowhere: not in logs, errors, output, nor in what is sent or kept."""

import logging
import traceback

import pytest

from timm_sape2.__main__ import main

SECRET = 'SecretToken'


@pytest.fixture
def all_that_is_said(capsys, caplog):
    """Function that returns everything printed and logged so far, at the level of debugging."""
    caplog.set_level(logging.DEBUG)
    for name in ('httpx', 'httpx2', 'httpcore', 'httpcore2', 'huggingface_hub', 'timm_sape2', 'timm'):
        caplog.set_level(logging.DEBUG, logger=name)

    def collect():
        out, error = capsys.readouterr()
        return out + error + caplog.text

    return collect


def test_of_the_whole_round_trip(hub, checkpoint, tmp_path, all_that_is_said):
    main(['hub', 'push', str(checkpoint), '--to', 'owner/vit', '--private', '--folder', str(tmp_path / 'sent')])
    main(['hub', 'pull', 'owner/vit', str(tmp_path / 'pulled')])
    main(['hub', 'verify', 'owner/vit'])
    said = all_that_is_said()
    assert 'Pushed' in said and SECRET not in said
    kept = [path for path in tmp_path.rglob('*') if path.is_file()]
    assert kept and not [path for path in kept if SECRET.encode() in path.read_bytes()]
    assert SECRET not in str([entry for entry in hub.log])


@pytest.mark.parametrize('token', ['hf_ownersSecretToken', 'hf_wrongSecretToken'])
@pytest.mark.parametrize('command', ['push', 'pull', 'verify'])
@pytest.mark.parametrize('trouble', ['missing', 'bad day', 'gone'])
def test_of_errors(hub, checkpoint, tmp_path, monkeypatch, no_waiting, all_that_is_said, token, command, trouble):
    monkeypatch.setenv('HF_TOKEN', token)
    if trouble == 'bad day':
        hub.failure = 500
    if trouble == 'gone':
        hub.stop()
    arguments = {
        'push': ['push', str(checkpoint), '--to', 'other/vit'],
        'pull': ['pull', 'owner/none', str(tmp_path / 'pulled')],
        'verify': ['verify', 'owner/none'],
    }
    with pytest.raises(SystemExit) as leaving:
        main(['hub', *arguments[command]])
    assert leaving.value.code == 2
    said = all_that_is_said()
    assert 'timm-sape2: error: ' in said and SECRET not in said
    assert SECRET not in ''.join(traceback.format_exception(leaving.value))
