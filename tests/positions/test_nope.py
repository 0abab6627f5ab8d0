"""Without position encoding, patches are a set."""

import timm
import torch

import timm_sape2  # noqa: F401  (registers the models)


def test_permuted_patches_give_the_same_logits():
    torch.manual_seed(0)
    model = timm.create_model('test_vit_sape2', position='nope', patch_size=8, img_size=(56, 72)).eval()
    image = torch.randn(2, 3, 7, 8, 9, 8)
    permuted = image[:, :, torch.randperm(7)][:, :, :, :, torch.randperm(9)]
    with torch.no_grad():
        torch.testing.assert_close(model(permuted.reshape(2, 3, 56, 72)), model(image.reshape(2, 3, 56, 72)))


def test_there_is_no_position_parameter():
    model = timm.create_model('test_vit_sape2', position='nope')
    assert not [name for name in model.state_dict() if 'pos' in name]
