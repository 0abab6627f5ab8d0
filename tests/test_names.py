"""Typos and what was meant."""

from timm_sape2._names import close_names, did_you_mean


def test_the_closest_name():
    assert did_you_mean('positon', ['depth', 'position', 'position_args']) == " (did you mean 'position'?)"
    assert did_you_mean('batchsize', ['lr', 'batch-size'], prefix='--') == " (did you mean '--batch-size'?)"
    assert did_you_mean('xyz', ['depth', 'position']) == ''


def test_some_close_names():
    assert close_names('vit_smal', ['vit_small', 'vit_tiny', 'resnet18']) == '; close names: vit_small, vit_tiny'
    assert close_names('xyz', ['vit_small']) == ''
