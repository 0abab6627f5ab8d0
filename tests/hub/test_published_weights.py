"""The weights in hub_configs: they load from the checkout, at any size, and are those that their card describes."""

from pathlib import Path

import pytest
import timm
import torch

import timm_sape2  # noqa: F401  registers the models
from timm_sape2.hub.card import read_metrics
from timm_sape2.hub.verify import check_logits
from timm_sape2.trained.opening import fingerprint

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / 'hub_configs' / 'vit_compact_sape2_patch4_32.cifar10'
FOLDERS = sorted({SHIPPED, *(path.parent for path in (ROOT / 'hub_configs').glob('*/model.safetensors'))})

pytestmark = pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)


def test_they_are_small(folder):
    assert (folder / 'model.safetensors').stat().st_size <= 4 * 2**20


def test_they_load_from_a_checkout_and_are_those_that_were_measured(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    model = timm.create_model(f'local-dir:hub_configs/{folder.name}', pretrained=True)
    assert fingerprint(model) == read_metrics(folder / 'metrics.json')['fingerprint']
    call = f"timm.create_model('local-dir:hub_configs/{folder.name}', pretrained=True)"
    assert call in (folder / 'README.md').read_text()


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


def test_the_name_alone_claims_none(folder):
    assert not timm.models.get_pretrained_cfg(folder.name.partition('.')[0]).has_weights
    assert 'No repository of the Hub is known to have them' in (folder / 'README.md').read_text()
