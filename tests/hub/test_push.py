"""Pushing a checkpoint: what arrives, what is replaced, what is refused before anything is sent."""

import json

import pytest

from timm_sape2.__main__ import main

REPO = 'owner/vit_tiny.test'


@pytest.mark.parametrize('upload_path', ['lfs', 'xet'])
def test_the_files_arrive(hub, checkpoint, capsys, tmp_path):
    assert main(['hub', 'push', str(checkpoint), '--to', REPO, '--folder', str(tmp_path / 'sent')]) is None
    files = hub.repos[REPO].files()
    print(capsys.readouterr().out)
    print([x[:3] for x in hub.log])
    assert sorted(files) == sorted(p.name for p in (tmp_path/'sent').iterdir())
    main(['hub', 'verify', REPO])
    main(['hub', 'pull', REPO, str(tmp_path / 'pulled')])
    assert (tmp_path/'pulled'/'model.safetensors').read_bytes() == (tmp_path/'sent'/'model.safetensors').read_bytes()
    print(capsys.readouterr().out)
