"""Fixtures that the tests share."""

import functools
import os

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():  # triton must be imported, as timm does indirectly, in the mode it will be used in
    os.environ['TRITON_INTERPRET'] = '1'

import timm

from timm_sape2.__main__ import main
from timm_sape2.positions import ENCODINGS

os.environ.pop('TRITON_INTERPRET', None)


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def triton_device(monkeypatch):
    """Device on which Triton kernels run: a GPU, or the CPU through Triton's interpreter."""
    pytest.importorskip('triton')
    if torch.cuda.is_available():
        return 'cuda'
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    fault = fault_of_the_interpreter()
    if fault is not None:
        pytest.skip(fault)
    return 'cpu'


@functools.cache
def fault_of_the_interpreter():
    """Return why Triton's interpreter cannot run kernels that are right, None if it can; one runs to find out."""
    import numpy
    import triton

    @triton.jit
    def count_up(pointer, end):
        for i in range(end):
            triton.language.store(pointer + i, i)

    counted = torch.full((3,), -1)
    try:
        count_up[(1,)](counted, 3)
    except triton.runtime.errors.InterpreterError as error:
        return f'the interpreter of Triton {triton.__version__} with numpy {numpy.__version__} has no loops: {error}'
    assert counted.tolist() == [0, 1, 2]
    return None


@pytest.fixture
def process_group(tmp_path):
    """A process group of one, which outlives the models of the test: torch 2.12 and 2.13 may hang if they go last."""
    torch.distributed.init_process_group('gloo', f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(params=[*ENCODINGS, 'learned+sape2'])
def position(request):
    """Every position encoding, and two together."""
    return request.param


@pytest.fixture(scope='session')
def tiny_vit():
    """Function that creates a model on a 7x9 grid in which positions matter, unlike right after initialisation."""

    def create(position='learned+sape2', **kwargs):
        sizes = dict(img_size=(56, 72), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
        model = timm.create_model('test_vit_sape2', position=position, **(sizes | kwargs)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if 'qkv.weight' in name or 'pos_embed' in name or 'position.' in name:
                    parameter.normal_(std=0.2)
        return model

    return create


@pytest.fixture
def refusal(capsys):
    """Function that runs a command that must fail as users' errors do, and returns its message."""

    def run(*argv):
        with pytest.raises(SystemExit) as leaving:
            main(argv)
        assert leaving.value.code == 2
        out, error = capsys.readouterr()
        assert out == ''
        assert error.startswith('timm-sape2: error: ')
        assert error.count('\n') == 1 and error.endswith('\n')
        return error.removeprefix('timm-sape2: error: ').rstrip('\n')

    return run


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    """Folder of 40 images of noise to train on and 8 to validate, of two classes."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp('photos')
    for split, count in (('train', 20), ('validation', 4)):
        for name in ('cat', 'dog'):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{index}.png')
    return folder
