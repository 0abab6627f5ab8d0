"""Parameters and FLOPs."""

import pytest
import timm

from timm_sape2.models.flops import count_flops, count_parameters


@pytest.mark.parametrize('device', ['meta', 'cpu'])
def test_a_vit_without_position_encoding(device):
    """16 patches and a class token, 64 channels, three blocks with MLPs of 256, 1,000 classes."""
    model = timm.create_model('test_vit_sape2', position='nope', device=device).eval()
    patch_embedding, classifier = 16 * 768 * 64, 64 * 1000
    block = 17 * 64 * (3 * 64 + 64 + 2 * 256) + 2 * 17 * 17 * 64
    assert count_flops(model) == 2 * (patch_embedding + 3 * block + classifier)
    assert count_parameters(model) == sum(value.numel() for value in model.state_dict().values())
