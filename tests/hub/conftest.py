"""A Hub for each test, the real client pointed at it, and a model to publish."""

import argparse
import importlib.util
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

import timm_sape2
from timm_sape2.hub.package import write_package
from timm_sape2.trained.opening import open_model

_spec = importlib.util.spec_from_file_location('hub_server', Path(__file__).with_name('server.py'))
server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(server)

TOKEN = 'hf_ownersSecretToken'


@pytest.fixture
def upload_path():
    """How large files go up: 'lfs', or 'xet', which is what the client does by default."""
    return 'lfs'


@pytest.fixture
def hub(tmp_path, monkeypatch, upload_path):
    """A Hub with one user, whose token is in the environment; cache and configuration of the client are empty."""
    running = server.Hub({TOKEN: 'owner'}, tmp_path / 'store' if upload_path == 'xet' else None)
    home = tmp_path / 'hf_home'
    client = {
        'ENDPOINT': running.url,
        'HUGGINGFACE_CO_URL_TEMPLATE': running.url + '/{repo_id}/resolve/{revision}/{filename}',
        'HF_HUB_CACHE': str(home / 'hub'),
        'HF_TOKEN_PATH': str(home / 'token'),
        'HF_STORED_TOKENS_PATH': str(home / 'stored_tokens'),
        'HF_HUB_DISABLE_XET': upload_path == 'lfs',
        'HF_HUB_OFFLINE': False,
    }
    for name, value in client.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.delenv('HUGGING_FACE_HUB_TOKEN', raising=False)
    running.home = home
    disable_progress_bars()
    yield running
    enable_progress_bars()
    running.stop()


@pytest.fixture
def no_waiting(monkeypatch):
    """The client's pauses between attempts take no time."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
    """File of a trained model as train.py writes it, with optimizer and moving average, 5 classes, 32x48 images."""
    arguments = dict(img_size=(32, 48), patch_size=8, embed_dim=32, depth=2, num_heads=2)
    torch.manual_seed(0)
    models = [timm.create_model('test_vit_sape2', num_classes=5, **arguments) for _ in range(2)]
    path = tmp_path_factory.mktemp('run') / 'model_best.pth.tar'
    kwargs = {name: value for name, value in arguments.items() if name != 'img_size'}
    args = argparse.Namespace(
        model='test_vit_sape2',
        model_kwargs=kwargs,
        num_classes=5,
        input_size=(3, 32, 48),
        img_size=(32, 48),
        dataset='',
        data_dir='/home/somebody/secret-project/flowers',
        val_split='validation',
        eval_metric='top1',
        epochs=7,
        lr=0.002,
    )
    state = {'state_dict': models[0].state_dict(), 'state_dict_ema': models[1].state_dict(), 'optimizer': {'lr': 1}}
    torch.save({**state, 'args': args, 'epoch': 6, 'metric': 61.5, 'arch': 'test_vit_sape2'}, path)
    return path


@pytest.fixture
def fresh_process(hub):
    """Function that runs Python code in a new process, whose environment points at the Hub, and returns its output."""

    def run(code, **environment):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith('HF_')}
        inherited |= {'HF_ENDPOINT': hub.url, 'HF_HOME': str(hub.home), 'OMP_NUM_THREADS': '1'}
        inherited['PYTHONPATH'] = str(Path(timm_sape2.__file__).parents[1])
        done = subprocess.run(
            [sys.executable, '-c', textwrap.dedent(code)],
            env={**inherited, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture(scope='session')
def package(checkpoint, tmp_path_factory):
    """Folder of the model of `checkpoint`, as the Hub gets it."""
    folder = tmp_path_factory.mktemp('package') / 'vit'
    write_package(folder, open_model(str(checkpoint)), 'owner/vit')
    return folder


@pytest.fixture(scope='session')
def package_model(checkpoint):
    """The model that `package` was written from."""
    return open_model(str(checkpoint)).model
