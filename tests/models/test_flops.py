"""Parameters and FLOPs."""

import pytest
import timm
import torch

from timm_sape2.models.flops import count_flops, count_parameters

DEVICES = ['meta', 'cpu', *['cuda'] * torch.cuda.is_available()]
PLAIN = 2 * (16 * 768 * 64 + 3 * (17 * 64 * (3 * 64 + 64 + 2 * 256) + 2 * 17 * 17 * 64) + 64 * 1000)


def create(position, device='cpu', **kwargs):
    return timm.create_model('test_vit_sape2', position=position, device=device, **kwargs).eval()


@pytest.mark.parametrize('device', DEVICES)
def test_a_vit_without_position_encoding(device):
    """16 patches and a class token, 64 channels, three blocks with MLPs of 256, 1,000 classes."""
    model = create('nope', device)
    patch_embedding, classifier = 16 * 768 * 64, 64 * 1000
    block = 17 * 64 * (3 * 64 + 64 + 2 * 256) + 2 * 17 * 17 * 64
    assert count_flops(model) == 2 * (patch_embedding + 3 * block + classifier) == PLAIN
    assert count_parameters(model) == sum(value.numel() for value in model.state_dict().values())


class TestSape2:
    """Gates in both directions (lines of 4 patches) and scores of 10 positions for 16 patches, in three blocks."""

    COST = PLAIN + 2 * 3 * 2 * 16 * 64 * (4 + 10)

    @pytest.mark.parametrize('device', DEVICES)
    def test_whatever_computes_it(self, device):
        assert count_flops(create('sape2', device)) == self.COST


class TestAttention:
    """It is two matrix products in every form."""

    @pytest.mark.parametrize('device', DEVICES)
    def test_fused_or_not(self, position, device):
        fused, plain = create(position, device), create(position, device)
        for block in plain.blocks:
            block.attn.fused_attn = False
        assert count_flops(fused) == count_flops(plain)

    @pytest.mark.parametrize('device', DEVICES)
    def test_of_a_model_of_timm(self, device):
        model = timm.create_model('test_vit', img_size=64, depth=3, mlp_ratio=4, device=device).eval()
        assert count_flops(model, (3, 64, 64)) == PLAIN

    def test_of_pooling(self):
        """One query for 16 patches, 64 channels, keys and values of 128, and an MLP of 256."""
        kwargs = {'class_token': False, 'device': 'meta'}
        average, attention = (create('nope', global_pool=pool, **kwargs) for pool in ('avg', 'map'))
        products = 64 * 64 + 16 * 64 * 128 + 2 * 16 * 64 + 64 * 64 + 2 * 64 * 256
        assert count_flops(attention) - count_flops(average) == 2 * products


def test_another_image_size():
    """32 patches and a class token."""
    blocks = 3 * (33 * 64 * (3 * 64 + 64 + 2 * 256) + 2 * 33 * 33 * 64)
    expected = 2 * (32 * 768 * 64 + blocks + 64 * 1000)
    assert count_flops(create('nope', img_size=(64, 128))) == expected
    assert count_flops(create('nope', dynamic_img_size=True), (3, 64, 128)) == expected


def test_the_model_stays_as_it_is():
    model = create('learned+sape2').to(torch.bfloat16)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    assert count_flops(model) == TestSape2.COST
    for name, value in model.state_dict().items():
        pointer, copy = before[name]
        assert value.data_ptr() == pointer and torch.equal(value, copy)
    assert all(parameter.requires_grad for parameter in model.parameters())
