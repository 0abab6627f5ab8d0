"""config.json is data of somebody else: what is refused, by name."""

import json
import os
from pathlib import Path

import pytest
import timm

from timm_sape2.trained.config import check_config, is_ours, load_config, read_config


@pytest.fixture(scope='module')
def package(tmp_path_factory):
    """Folder of a model with 5 classes on images of 32x48, as timm saves it."""
    folder = tmp_path_factory.mktemp('package')
    sizes = dict(img_size=(32, 48), patch_size=8, embed_dim=32, depth=2, num_heads=2)
    timm.models.save_for_hf(
        timm.create_model('test_vit_sape2', num_classes=5, **sizes), folder, safe_serialization=True
    )
    return folder


@pytest.fixture
def config(package):
    return json.loads((package / 'config.json').read_text())


def refusal(config):
    with pytest.raises(ValueError) as raised:
        check_config(config)
    return str(raised.value)


def test_what_the_package_writes_is_accepted(config):
    check_config(config)
    check_config({**config, 'label_names': list('abcde'), 'label_descriptions': {'a': 'first'}})


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'architecture': 'resnet18'}, "config.json: timm_sape2 has no architecture 'resnet18'"),
        ({'architecture': '../vit'}, "config.json: timm_sape2 has no architecture '../vit'"),
        ({'num_classes': '5'}, "config.json: 'num_classes' must be int, not '5'"),
        ({'num_classes': True}, "config.json: 'num_classes' must be int, not True"),
        ({'num_classes': 6}, 'config.json: num_classes is 6, but 5 in pretrained_cfg'),
        ({'num_features': 64}, 'config.json: num_features is 64, but model_args build a model with 32'),
        ({'global_pool': 'avg'}, "config.json: global_pool is 'avg', but model_args build a model with 'token'"),
        ({'label_names': ['a']}, 'config.json: label_names must be 5 lines of text, one for each class'),
        (
            {'label_names': ['a', 'b', 'c', 'd', '\x1b[2J']},
            'config.json: label_names must be 5 lines of text, one for each class',
        ),
        ({'label_names': [1, 2, 3, 4, 5]}, 'config.json: label_names must be 5 lines of text, one for each class'),
        ({'model_args': []}, "config.json: 'model_args' must be dict, not []"),
    ],
)
def test_wrong_keys_and_values(config, changes, message):
    assert refusal({**config, **changes}) == message


def test_keys_of_a_newer_timm_are_left_out_with_a_warning(config, caplog):
    check_config({**config, 'auto_map': 'modeling.py', 'pretrained_cfg': {**config['pretrained_cfg'], 'resize': 'fit'}})
    assert "config.json: 'auto_map' not known here, left out" in caplog.text
    assert "config.json: pretrained_cfg: 'resize' not known here, left out" in caplog.text


def test_model_args_name_no_other_source(config):
    for value in ('hf-hub:somebody/vit', 'local-dir:/home/somebody'):
        config['model_args']['act_layer'] = value
        assert refusal(config) == "config.json: model_args: 'act_layer' must be no source of models"


@pytest.mark.parametrize('key', ['architecture', 'num_classes', 'num_features', 'model_args', 'pretrained_cfg'])
def test_missing_keys(config, key):
    del config[key]
    assert refusal(config) == f'config.json: no {key!r}'


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        ('url', 'https://example.org/weights.pth'),
        ('file', '../../other/model.safetensors'),
        ('state_dict', {'head.bias': [0]}),
        ('hf_hub_id', 'somebody/else'),
        ('hf_hub_filename', '../pytorch_model.bin'),
        ('source', 'url'),
        ('custom_load', 'hf'),
    ],
)
def test_another_source_of_weights(config, key, value):
    config['pretrained_cfg'][key] = value
    assert refusal(config) == (
        f'config.json: pretrained_cfg names another source of weights, {key!r}; only the weights beside it are loaded'
    )


@pytest.mark.parametrize(
    'key',
    [
        *('pretrained_cfg_overlay', 'pretrained_cfg', 'pretrained_strict', 'pretrained_filter_fn', 'checkpoint_path'),
        *('cache_dir', 'features_only', 'block_fn', 'attn_layer', 'device'),
    ],
)
def test_model_args_that_are_no_options_of_the_model(config, key):
    config['model_args'][key] = 'x'
    assert refusal(config) == f'config.json: model_args: unknown {key!r}'


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        ({'depth': 'two'}, "for +: 'int' and 'str'"),
        ({'position': 'sape3'}, "Unknown position encoding 'sape3'"),
        ({'position_args': {'sape2': {'tagret': 'q'}}}, "Unknown option 'tagret'"),
        ({'img_size': [33, 48]}, 'is not divisible by patch_size (8, 8)'),
        ({'num_heads': 5}, 'num_heads'),
        ({'depht': 3}, "unexpected keyword argument 'depht'"),
    ],
)
def test_model_args_that_build_nothing(config, arguments, reason):
    config['model_args'].update(arguments)
    message = refusal(config)
    assert message.startswith('config.json: model_args do not build test_vit_sape2: ') and reason in message


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'mean': 'red'}, "mean of pretrained_cfg must be a list of numbers, not 'red'"),
        ({'std': [1, 0, 1]}, 'std of pretrained_cfg must be a list of numbers, not [1, 0, 1]'),
        ({'mean': []}, 'mean of pretrained_cfg must be a list of numbers, not []'),
        ({'crop_pct': '1'}, "crop_pct of pretrained_cfg must be a number, not '1'"),
        ({'crop_pct': -1}, 'crop_pct of pretrained_cfg must be a number, not -1'),
        ({'license': ['mit']}, "license of pretrained_cfg must be a line of text, not ['mit']"),
        ({'tag': 'a\nb'}, "tag of pretrained_cfg must be a line of text, not 'a\\nb'"),
        ({'mean': [float('nan')]}, 'mean of pretrained_cfg must be a list of numbers, not [nan]'),
        ({'input_size': [3, 64, 64]}, 'input_size is [3, 64, 64], but model_args build a model with [3, 32, 48]'),
    ],
)
def test_preprocessing(config, values, message):
    config['pretrained_cfg'].update(values)
    assert refusal(config) == f'config.json: {message}'


@pytest.mark.parametrize('size', [[1, 64, 64], [3, 64], [3, 64.0, 64], [3, 64, -64], [3, 64, True], '3, 64, 64', 64])
def test_sizes_that_are_none(config, size):
    """A model that takes any size may be recommended another one than it was built with, but a size it must be."""
    config['model_args']['dynamic_img_size'] = True
    config['pretrained_cfg']['input_size'] = [3, 64, 64]
    check_config(config)
    config['pretrained_cfg']['input_size'] = size
    assert refusal(config).startswith(f'config.json: input_size is {size!r}, but model_args build a model with ')


@pytest.mark.parametrize('key', ['input_size', 'mean', 'std', 'crop_pct', 'interpolation'])
def test_preprocessing_is_complete(config, key):
    del config['pretrained_cfg'][key]
    assert refusal(config) == f'config.json: pretrained_cfg: no {key!r}'


@pytest.mark.parametrize('text', ['', '{', '[' * 100_000, '{"architecture": 3}', '[]', 'null', '\xff'])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / 'config.json'
    path.write_bytes(text.encode('latin-1'))
    with pytest.raises(ValueError, match=r"config.json is not JSON: |config.json names no 'architecture'"):
        read_config(path)


def test_configurations_of_others_are_left_to_timm(tmp_path):
    (tmp_path / 'config.json').write_text('{"architecture": "resnet18", "anything": 1}')
    assert load_config(tmp_path / 'config.json', 'resnet')['anything'] == 1
    assert not is_ours('resnet18') and not is_ours('no_such_model') and is_ours('vit_small_sape2')


def test_weights_of_a_path_elsewhere_are_never_read(package, tmp_path, monkeypatch):
    """What timm would do with such a configuration does not matter: nothing is opened."""
    folder = tmp_path / 'vit'
    folder.mkdir()
    config = json.loads((package / 'config.json').read_text())
    config['pretrained_cfg']['file'] = str(package / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(config))
    opened = []
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: opened.append(args))
    with pytest.raises(ValueError, match='another source of weights'):
        load_config(Path(os.fspath(folder), 'config.json'), 'vit')
    assert opened == []
