"""A model of timm that was given another encoding goes where models of this package go, and comes back."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import train
from timm_sape2 import equip
from timm_sape2.__main__ import main
from timm_sape2.trained.opening import fingerprint, open_model

REPO = 'owner/vit_equipped.test'
ENCODINGS = {'learned': {}, 'sape2': {'num_positions': 7}}


@pytest.fixture
def base():
    """A model as timm has it; it takes images of any size."""
    return timm.create_model('test_vit', img_size=32, depth=2, num_classes=2)


def journey(hub, source, tmp_path, photos, capsys):
    """Push, pull and verify a model, open it in every way, and return it."""
    sent = open_model(str(source)).model
    main(['hub', 'push', str(source), '--to', REPO])
    main(['hub', 'pull', REPO, str(tmp_path / 'pulled')])
    capsys.readouterr()
    main(['hub', 'verify', REPO, '--folder', str(tmp_path / 'pulled')])
    assert capsys.readouterr().out.startswith(f'{REPO} is as published')

    config = json.loads(hub.repos[REPO].files()['config.json'].data)
    assert (config['architecture'], config['model_args']['base']) == ('vit_equipped', 'test_vit')
    images = torch.randn(2, 3, 32, 32)
    for name in (f'hf-hub:{REPO}', f'local-dir:{tmp_path / "pulled"}'):
        again = timm.create_model(name, pretrained=True).eval()
        assert again.position_options == ENCODINGS and fingerprint(again) == fingerprint(sent)
        assert torch.equal(again(images), sent(images))

    assert (
        main(['predict', REPO, str(photos / 'validation' / 'cat' / '0.png'), '--json', '-', '--device', 'cpu']) is None
    )
    (prediction,) = json.loads(capsys.readouterr().out)
    assert len(prediction['classes']) == 2
    return sent


def test_trained_from_a_checkpoint_of_the_base(hub, base, tmp_path, photos, capsys):
    save_file(base.state_dict(), tmp_path / 'base.safetensors')
    flags = '--model vit_equipped --img-size 32 --num-classes 2 --epochs 1 -b 20 --workers 0 --device cpu --lr 1e-3'
    options = "position_args={'sape2':{'num_positions':7}}"
    kwargs = ['--model-kwargs', 'base=test_vit', 'depth=2', 'position=learned+sape2', options]
    files = ['--data-dir', str(photos), '--pretrained-path', str(tmp_path / 'base.safetensors')]
    where = ['--output', str(tmp_path), '--experiment', 'run']
    assert train.main([*flags.split(), *kwargs, *files, *where]) == 0

    model = journey(hub, tmp_path / 'run', tmp_path, photos, capsys)
    moved = (model.state_dict()['blocks.0.attn.qkv.weight'] - base.state_dict()['blocks.0.attn.qkv.weight']).abs()
    assert 0 < moved.max() < 0.01, 'trained, from where the base was'
    main(['validate', REPO, '--data-dir', str(photos), '--workers', '0', '--device', 'cpu', '--json', '-'])
    assert json.loads(capsys.readouterr().out)['num_images'] == 8


def test_equipped_in_place(hub, base, tmp_path, photos, capsys):
    model = equip(base, 'learned+sape2', {'sape2': {'num_positions': 7}})
    save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    assert fingerprint(journey(hub, tmp_path / 'saved', tmp_path, photos, capsys)) == fingerprint(model)
