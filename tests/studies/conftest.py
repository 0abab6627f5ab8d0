"""Studies of a toy model on some digits."""

import shlex

import pytest

from timm_sape2.__main__ import main

TRAINING = shlex.split("""
    --dataset digits --model test_vit_sape2 --model-kwargs depth=2 --img-size 48 64 --num-classes 10 --device cpu
    --workers 0 --train-num-samples 32 --val-num-samples 10 --batch-size 16 --epochs 2 --warmup-epochs 0 --lr 0.001
    --drop-path 0.2
""")


@pytest.fixture(scope='session')
def study(tmp_path_factory):
    """Function that runs a study and returns its folder, in a folder of its own if none is given."""

    def run(name, *flags, output=None):
        output = output or tmp_path_factory.mktemp(name)
        assert main(['study', name, '--output', str(output), *flags]) is None
        return output / name

    return run


@pytest.fixture(scope='session')
def compared(study):
    """Folder of a comparison of three encodings."""
    flags = ['--encodings', 'nope', 'learned', 'learned+sape2', '--layer-scale', 'off', '--seeds', '0']
    return study('compare', *flags, *TRAINING)
