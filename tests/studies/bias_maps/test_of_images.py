"""Biases of a model on images, drawn."""

import copy
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_sape2.studies.bias_maps.biases import attention_biases
from timm_sape2.studies.bias_maps.of_images import bias_maps, see_images
from timm_sape2.trained.opening import TrainedModel


@pytest.fixture
def model():
    """A grid of 2x3 patches, three blocks, two heads, and biases that are not small; in training."""
    options = dict(img_size=(16, 24), patch_size=8, depth=3, num_heads=2, embed_dim=32, proj_drop_rate=0.5)
    model = timm.create_model('test_vit_sape2', num_classes=3, **options).train()
    model.pretrained_cfg['crop_pct'] = 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'position.' in name or 'qkv.weight' in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture
def photo(tmp_path):
    """An image of noise, as large as the model takes it."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png'


def biases_of(model, photo):
    """Biases by block, (heads, 2, 3, 2, 3), of an image that the test prepares by itself."""
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ('mean', 'std'))
    pixels = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1) / 255
    evaluated = copy.deepcopy(model).eval()
    return {block: bias[0] for block, bias in attention_biases(evaluated, ((pixels - mean) / std)[None]).items()}


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_the_last_block_with_an_effect_and_the_mean_of_the_heads(model, photo):
    """Block 2 is the last, after which the class token alone is read."""
    figure = bias_maps(model, photo, patches=[(1, 2)])
    folder = photo.parent.name[-26:]
    assert titles(figure)[0].split('/')[-1] == 'photo.png\nblock 1, mean of 2 heads' and folder in titles(figure)[0]
    assert titles(figure)[1:3] == ['every query patch', 'query patch: row 1, column 2']
    drawn = np.asarray(figure.axes[2].images[0].get_array())
    np.testing.assert_allclose(drawn, biases_of(model, photo)[1].mean(0)[1, 2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), np.asarray(Image.open(photo)) / 255, atol=1e-6)
    assert all(module.training for module in model.modules())


def test_blocks_and_heads(model, photo):
    one = bias_maps(model, photo, blocks=0, heads=1, patches=[(0, 0)])
    drawn = np.asarray(one.axes[2].images[0].get_array())
    np.testing.assert_allclose(drawn, biases_of(model, photo)[0][1][0, 0], rtol=1e-4, atol=1e-5)
    several = bias_maps(model, [photo, photo], blocks=[0, 1], heads=[0, 'mean'])
    lines = [title.split('\n')[1] for title in titles(several) if '\n' in title]
    assert lines == 2 * ['block 0, head 0', 'block 0, mean of 2 heads', 'block 1, head 0', 'block 1, mean of 2 heads']


def test_all_heads_are_side_by_side(model, photo):
    figure = bias_maps(model, photo, heads='all')
    assert [title for title in titles(figure) if title.startswith('head ')] == ['head 0', 'head 1']


def test_images_of_pil(model, photo):
    """One that was opened has the name of its file, another one a number."""
    opened, made = Image.open(photo), Image.new('L', (24, 16))
    seen = see_images(TrainedModel(model), [opened, made], [0])
    assert seen[0].name.endswith('photo.png') and seen[1].name == 'image 1'
    np.testing.assert_allclose(seen[0].bias[0], biases_of(model, photo)[0], rtol=1e-4, atol=1e-5)
    assert seen[1].image.shape == (16, 24, 3) and (seen[1].image < 1e-6).all()


def test_a_folder_in_place_of_a_model(model, photo, tmp_path):
    timm.models.save_for_hf(model, tmp_path / 'vit', safe_serialization=True)
    of_folder, of_model = (bias_maps(source, photo, patches=[(0, 1)]) for source in (str(tmp_path / 'vit'), model))
    maps = [np.asarray(figure.axes[2].images[0].get_array()) for figure in (of_folder, of_model)]
    np.testing.assert_array_equal(*maps)


def test_weights_of_another_type(model, photo):
    figure = bias_maps(model.bfloat16(), photo, patches=[(0, 0)])
    assert np.isfinite(np.asarray(figure.axes[2].images[0].get_array())).all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'blocks': 3}, r'no bias in block 3: there is one in the blocks 0 to 2'),
        ({'blocks': [0, -1]}, r'no bias in block -1: '),
        ({'heads': 2}, r"no head 2: heads go from 0 to 1, or 'all', or their 'mean'"),
        ({'heads': ['mean', 'median']}, r'no head median: '),
        ({'patches': [(0, 0), (2, 0)]}, r'no patch 2 0: rows go from 0 to 1, columns from 0 to 2'),
        ({'patches': [(0, -1)]}, r'no patch 0 -1: '),
    ],
)
def test_what_is_not_there(model, photo, options, message):
    with pytest.raises(ValueError, match=message):
        bias_maps(model, photo, **options)


def test_models_and_images_that_are_none(model, photo, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='the model has no exchangeable position encoding'):
        bias_maps(timm.create_model('test_resnet'), photo)
    with pytest.raises(ValueError, match=r'a model of timm, a checkpoint, .* is needed, not Linear'):
        bias_maps(torch.nn.Linear(2, 2), photo)
    with pytest.raises(ValueError, match=r'none\.png cannot be read as an image'):
        bias_maps(model, tmp_path / 'none.png')
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    with pytest.raises(ValueError, match='plots need matplotlib'):
        bias_maps(model, photo)
