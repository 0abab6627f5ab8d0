"""The weights in hub_configs: they load by name, at any size, and are those that their card describes."""

from pathlib import Path

import pytest
import timm
import torch

from timm_sape2.__main__ import main
from timm_sape2.hub.card import read_metrics
from timm_sape2.hub.files import FILES
from timm_sape2.hub.package import write_package
from timm_sape2.hub.verify import check_logits
from timm_sape2.trained.opening import TrainedModel, fingerprint, open_model

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / 'hub_configs' / 'vit_compact_sape2_patch4_32.cifar10'
FOLDERS = sorted({SHIPPED, *(path.parent for path in (ROOT / 'hub_configs').glob('*/model.safetensors'))})

pytestmark = pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)


def test_they_are_small(folder):
    assert (folder / 'model.safetensors').stat().st_size <= 4 * 2**20


def test_they_load_by_name_and_are_those_that_were_measured(folder):
    model = timm.create_model(folder.name, pretrained=True)
    assert fingerprint(model) == read_metrics(folder / 'metrics.json')['fingerprint']
    assert f"timm.create_model('{folder.name}', pretrained=True)" in (folder / 'README.md').read_text()


def test_logits_are_those_of_the_card(folder):
    assert check_logits(folder, folder.name) < 1e-3


@pytest.mark.parametrize('size', [(48, 48), (64, 64), (28, 36)])
def test_they_load_at_another_size(folder, size):
    """Also 7x9 patches. Learned embeddings are resampled, all else is as it was."""
    trained, model = (timm.create_model(f'local-dir:{folder}', pretrained=True, img_size=s) for s in (None, size))
    weights, expected = model.state_dict(), trained.state_dict()
    same = [name for name in weights if torch.equal(weights[name], expected[name])]
    assert set(weights) - set(same) == {'pos_embed'}
    with torch.inference_mode():
        assert model.eval()(torch.randn(2, 3, *size)).isfinite().all()


def test_what_is_published_of_them_names_no_path(folder, tmp_path, monkeypatch, capsys):
    """Neither from the name nor from the model that timm makes of it."""
    monkeypatch.chdir(tmp_path)
    main(['hub', 'push', folder.name, '--to', 'owner/vit.cifar10', '--dry-run', '--folder', 'from_name'])
    assert str(folder) not in capsys.readouterr().out
    created = TrainedModel(timm.create_model(folder.name, pretrained=True).eval())
    write_package(Path('from_model'), created, 'owner/vit.cifar10')
    for package in (Path('from_name'), Path('from_model')):
        files = {path.name: path.read_bytes() for path in package.iterdir()}
        assert {'model.safetensors', 'config.json', 'README.md'} <= files.keys() <= set(FILES)
        for place in (str(ROOT), str(tmp_path), 'local-dir:', 'hub_configs'):
            assert not [name for name, content in files.items() if place.encode() in content]
        assert "timm.create_model('hf-hub:owner/vit.cifar10', pretrained=True)" in files['README.md'].decode()
    name_of_weights = 'model.safetensors'
    assert Path('from_name', name_of_weights).read_bytes() == Path('from_model', name_of_weights).read_bytes()


def test_recipes_and_metrics_go_with_the_name(folder):
    trained = open_model(folder.name)
    assert trained.folder == folder and fingerprint(trained.model) == fingerprint(open_model(str(folder)).model)
    assert trained.class_names == open_model(str(folder)).class_names
