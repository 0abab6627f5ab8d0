"""Learned absolute embeddings are timm's own."""

import timm
import torch
from timm.layers import resample_abs_pos_embed

import timm_sape2  # noqa: F401  (registers the models)


def tiny(position, **kwargs):
    return timm.create_model('test_vit_sape2', position=position, patch_size=8, img_size=(56, 72), **kwargs)


def test_the_parameter_is_pos_embed_with_entries_for_prefix_tokens():
    assert tiny('learned').pos_embed.shape == (1, 1 + 63, 64)
    assert tiny('learned', reg_tokens=4).pos_embed.shape == (1, 5 + 63, 64)
    assert tiny('learned', no_embed_class=True).pos_embed.shape == (1, 63, 64)
    assert tiny('sape2').pos_embed is None


def test_another_grid_is_bicubic_and_leaves_prefix_entries():
    model = tiny('learned')
    before = model.pos_embed.detach().clone()
    model.set_input_size((72, 56))
    expected = resample_abs_pos_embed(before, new_size=[9, 7], old_size=[7, 9], num_prefix_tokens=1)
    assert torch.equal(model.pos_embed, expected)
    assert torch.equal(model.pos_embed[:, :1], before[:, :1])
