"""What a user gets from the wheel, without the checkout: training, recipes, and the weights that come with it."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

# Not by importing pip: setuptools then leaves distutils to Python for good, and fails to import (torch.compile does).
if not any(distribution.name == 'pip' for distribution in metadata.distributions()):
    pytest.skip('pip is not installed', allow_module_level=True)
hatchling = pytest.importorskip('hatchling.build')

ROOT = Path(__file__).parents[1]
NAME = 'vit_compact_sape2_patch4_32.cifar10'
COMMANDS = f"""
import sys
from pathlib import Path

def refuse(event, args):
    if event in ('socket.connect', 'socket.getaddrinfo'):
        raise RuntimeError(event)
sys.addaudithook(refuse)
import timm
import timm_sape2
from timm_sape2.__main__ import main

(image,) = Path(timm_sape2.__file__).parent.glob('hub_configs/{NAME}/probe.png')
assert timm.create_model('{NAME}', pretrained=True).pretrained_cfg['file'].startswith(sys.prefix)
assert not main(['list', '--pretrained', '{NAME}'])
assert not main(['predict', '{NAME}', str(image), '--device', 'cpu', '--json', 'named.json'])
run = 'output/train/vit_compact_sape2_patch4_32.digits'
assert not main(['predict', run, str(image), '--device', 'cpu', '--json', 'trained.json'])
assert not main(['validate', '{NAME}', '--dataset', 'digits', '--device', 'cpu', '-j', '0', '--json', 'metrics.json'])
assert not main(['visualize', str(image), '--checkpoint', '{NAME}'])
assert not main(['hub', 'push', '{NAME}', '--to', 'owner/{NAME}', '--dry-run'])
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel, built from the sdist alone."""
    place = tmp_path_factory.mktemp('built')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        sdist = hatchling.build_sdist(str(place))
        shutil.unpack_archive(place / sdist, place)
        patch.chdir(place / sdist.removesuffix('.tar.gz'))
        return place / hatchling.build_wheel(str(place))


def test_wheel_of_the_checkout_is_that_of_the_sdist(wheel, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    built = tmp_path / hatchling.build_wheel(str(tmp_path))
    first, second = ({file.filename: file.CRC for file in zipfile.ZipFile(path).infolist()} for path in (built, wheel))
    assert first == second


def test_configurations_recipes_and_weights_are_in_it_once(wheel):
    files = {file.filename: file.file_size for file in zipfile.ZipFile(wheel).infolist()}
    assert {name.partition('/')[0].partition('-')[0] for name in files} == {'timm_sape2'}
    inside = 'timm_sape2/hub_configs/'
    found = {name.removeprefix(inside): size for name, size in files.items() if name.startswith(inside)}
    folder = ROOT / 'hub_configs'
    paths = [path for path in folder.rglob('*') if path.is_file()]
    assert found == {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    assert [name for name in files if name.endswith('.safetensors')] == [
        inside + name for name in found if name.endswith('.safetensors')
    ]
    assert all(size <= 4 * 2**20 for size in files.values())


def test_no_link_of_its_description_needs_the_checkout(wheel):
    """The package index shows it, and has no other file."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        description = archive.read(name).decode().partition('\n\n')[2]
    targets = re.findall(r'\]\(([^)]*)\)', description)
    assert targets and all(target.startswith('https://') for target in targets)
    assert '`docs/equip.md` has the families' in description
    readme = (ROOT / 'README.md').read_text()
    assert readme.count('```') == description.count('```'), 'code stays as it is'
    assert all(block in description for block in re.findall(r'```.*?```', readme, flags=re.DOTALL))


def test_it_trains_predicts_and_packs_without_the_checkout(wheel, tmp_path):
    """And without a network. Other packages are those of the environment of the tests."""
    environment = tmp_path / 'environment'
    venv.create(environment)
    python = environment / 'bin' / 'python'
    paths = sysconfig.get_paths(vars={'base': str(environment), 'platbase': str(environment)})
    others = [folder for folder in sys.path if folder.endswith('-packages')]
    Path(paths['purelib'], 'others.pth').write_text('\n'.join(others))
    pip = [sys.executable, '-m', 'pip', '--python', str(python), 'install', '-q', '--no-deps', '--no-index']
    subprocess.run([*pip, str(wheel)], check=True, timeout=100)

    home = tmp_path / 'home'
    home.mkdir()
    settings = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1'}

    def run(*command):
        done = subprocess.run(command, cwd=home, env=settings, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run(environment / 'bin' / 'timm-sape2', 'train', '--epochs', '1', '--warmup-epochs', '0', '--device', 'cpu')
    trained = home / 'output' / 'train' / 'vit_compact_sape2_patch4_32.digits'
    assert (trained / 'model_best.pth.tar').exists() and 'timm-sape2 train -c' in said
    assert json.loads((trained / 'run.json').read_text())['starts'][0]['commit'] is None, 'it was not the checkout'

    said = run(python, '-W', 'error::UserWarning', '-c', COMMANDS)
    assert f'\n{NAME}  learned+sape2' in said
    named, digits = (json.loads((home / name).read_text()) for name in ('named.json', 'trained.json'))
    logits = json.loads((ROOT / 'hub_configs' / NAME / 'metrics.json').read_text())['probe']
    labels = json.loads((ROOT / 'hub_configs' / NAME / 'config.json').read_text())['label_names']
    assert named[0]['classes'][0]['name'] == labels[int(max(logits, key=logits.get))]
    assert len(digits[0]['classes']) == 5
    assert json.loads((home / 'metrics.json').read_text())['num_images'] == 355
    Image.open(home / 'bias_maps.png').verify()
    pushed = [path for path in (home / 'output' / 'hub' / NAME).iterdir() if path.suffix != '.safetensors']
    assert 'README.md' in {path.name for path in pushed}
    assert not [path for path in pushed if bytes(tmp_path) in path.read_bytes()]
