"""The models that timm knows after the import."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from timm.models import get_pretrained_cfg, is_model_pretrained, resolve_model_input_args, save_for_hf

from timm_sape2 import PositionVisionTransformer
from timm_sape2.models import vision_transformer_sape2 as registered
from timm_sape2.positions import ENCODINGS

NAMES = timm.list_models(module='vision_transformer_sape2')
SHIPPED = {path.parent.name: path for path in (Path(__file__).parents[2] / 'hub_configs').glob('*/model.safetensors')}
COMPACT = 'vit_compact_sape2_patch4_32.cifar10'
TINY = dict(img_size=(56, 72), patch_size=8, embed_dim=32, depth=4, num_heads=2)


@functools.cache
def on_meta(name):
    return timm.create_model(name, device='meta')


def run_python(code, *options):
    return subprocess.run([sys.executable, *options, '-c', code], capture_output=True, text=True, timeout=100)


class TestNames:
    def test_models_promised_to_users_are_there(self):
        promised = {f'vit_{size}_sape2' for size in ('tiny', 'small', 'base', 'large')}
        promised |= {f'vit_{size}_sape2_patch4_32' for size in ('compact', 'tiny', 'small')} | {'test_vit_sape2'}
        for name in ENCODINGS:
            promised |= {
                f'vit_small_pos_{name}',
                f'vit_small_pos_{name}_patch4_32',
                f'vit_compact_pos_{name}_patch4_32',
            }
        assert promised <= set(NAMES)

    def test_listing_finds_them(self):
        assert {name for name in NAMES if 'sape2' in name} == set(timm.list_models('*sape2*'))
        assert set(timm.list_models('vit_*_pos_*_patch4_32')) <= set(NAMES)
        tags = timm.list_models(module='vision_transformer_sape2', include_tags=True)
        assert {tag.partition('.')[0] for tag in tags} == set(NAMES)

    @pytest.mark.parametrize('name', NAMES)
    def test_registry_knows_it(self, name):
        assert timm.is_model(name) and timm.is_model(f'{name}.untrained')
        assert timm.model_entrypoint(name) is getattr(registered, name)
        assert name in registered.default_cfgs and timm.model_entrypoint(name).__doc__
        assert name.startswith(('vit_', 'test_vit'))

    def test_those_claim_weights_that_have_some(self):
        tags = timm.list_models(module='vision_transformer_sape2', include_tags=True)
        assert set(timm.list_pretrained('*')) & {*tags, *NAMES} == SHIPPED.keys() and COMPACT in SHIPPED
        assert set(timm.list_models(pretrained=True, module='vision_transformer_sape2')) == SHIPPED.keys()
        with_weights = {name.partition('.')[0] for name in SHIPPED}
        assert {name for name in NAMES if is_model_pretrained(name)} == with_weights
        assert not [name for name in NAMES if is_model_pretrained(f'{name}.untrained')]

    @pytest.mark.parametrize('name', [name for name in NAMES if name != 'vit_equipped'])
    def test_pretrained_without_weights_raises(self, name):
        with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}'):
            timm.create_model(f'{name}.untrained', pretrained=True, **TINY)

    def test_where_there_are_none_those_that_ship_are_named(self):
        """And what is named loads."""
        with pytest.raises(RuntimeError) as raised:
            timm.create_model('vit_small_sape2', pretrained=True)
        (commands,) = re.findall(r'and so do those that come with timm_sape2: (.+)\.$', str(raised.value))
        models = [eval(command) for command in commands.split('; ')]
        assert {f'{m.pretrained_cfg["architecture"]}.{m.pretrained_cfg["tag"]}' for m in models} == SHIPPED.keys()

    @pytest.mark.parametrize('name', NAMES)
    def test_unknown_argument_raises(self, name):
        with pytest.raises(TypeError, match='not_an_argument'):
            timm.create_model(name, device='meta', not_an_argument=1)


class TestWeightsThatComeWithThePackage:
    @pytest.mark.parametrize('name', SHIPPED)
    def test_a_name_loads_them_from_anywhere(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        model = timm.create_model(name, pretrained=True)
        expected = load_file(SHIPPED[name])
        assert expected.keys() == model.state_dict().keys()
        assert all(torch.equal(weights, expected[key]) for key, weights in model.state_dict().items())
        config = json.loads(SHIPPED[name].with_name('config.json').read_text())
        assert list(model.pretrained_cfg['label_names']) == config['label_names']
        same = timm.create_model(f'local-dir:{SHIPPED[name].parent}', pretrained=True)
        assert same.position_options == model.position_options and same.num_classes == model.num_classes
        data, expected = map(resolve_model_data_config, (model, same))
        assert {key: list(data[key]) for key in ('input_size', 'mean', 'std')} == {
            key: list(expected[key]) for key in ('input_size', 'mean', 'std')
        }
        assert all(data[key] == expected[key] for key in ('interpolation', 'crop_pct', 'crop_mode'))

    def test_a_model_without_a_tag_has_its_first(self):
        model = timm.create_model('vit_compact_sape2_patch4_32', pretrained=True)
        assert model.pretrained_cfg['tag'] == 'cifar10'
        assert torch.equal(model.head.weight, load_file(SHIPPED[COMPACT])['head.weight'])

    def test_other_sizes_channels_and_classes(self):
        expected = load_file(SHIPPED[COMPACT])
        model = timm.create_model(COMPACT, pretrained=True, img_size=(28, 36), in_chans=1, num_classes=3)
        weights = model.state_dict()
        changed = {key for key in weights if weights[key].shape != expected[key].shape}
        assert changed == {'pos_embed', 'patch_embed.proj.weight', 'head.weight', 'head.bias'}
        assert all(torch.equal(weights[key], expected[key]) for key in weights.keys() - changed)
        torch.testing.assert_close(
            weights['patch_embed.proj.weight'], expected['patch_embed.proj.weight'].sum(1, keepdim=True)
        )

    def test_they_load_strictly(self):
        with pytest.raises(ValueError, match=r'missing keys: .*blocks\.6'):
            timm.create_model(COMPACT, pretrained=True, depth=7)
        with pytest.raises(ValueError, match=r'unexpected keys: .*blocks\.5'):
            timm.create_model(COMPACT, pretrained=True, depth=5, num_classes=3)

    def test_other_weights_win_over_them(self, tmp_path, monkeypatch):
        """Wherever they come from, although timm takes a file before an address; and they have no class names then."""
        monkeypatch.setenv('TORCH_HOME', str(tmp_path))
        other = {key: torch.zeros_like(weights) for key, weights in load_file(SHIPPED[COMPACT]).items()}
        torch.save(other, tmp_path / 'other.pth')
        place = str(tmp_path / 'other.pth')
        for overlay in ({'state_dict': other}, {'file': place}, {'url': f'file://{place}'}):
            model = timm.create_model('vit_compact_sape2_patch4_32', pretrained=True, pretrained_cfg_overlay=overlay)
            assert not any(parameter.any() for parameter in model.parameters())
            assert 'label_names' not in model.pretrained_cfg
            model = timm.create_model(COMPACT, pretrained=True, pretrained_cfg_overlay=overlay)
            assert not any(parameter.any() for parameter in model.parameters())

    def test_a_model_without_weights_has_nothing_of_them(self):
        model = timm.create_model('vit_compact_sape2_patch4_32')
        untrained = timm.create_model('vit_compact_sape2_patch4_32.untrained').pretrained_cfg
        assert {'url': '', **model.pretrained_cfg} == untrained
        equipped = timm.create_model('vit_equipped', base='vit_compact_sape2_patch4_32', position='learned+sape2')
        of_script = timm.create_model(**resolve_model_input_args(COMPACT, {'img_size': 20}))
        for cfg in (model.pretrained_cfg, equipped.pretrained_cfg, of_script.pretrained_cfg):
            assert not cfg.keys() & {'file', 'label_names'}

    def test_an_equipped_model_takes_them_from_its_base(self):
        model = timm.create_model('vit_equipped', base=COMPACT, position='learned+sape2', pretrained=True)
        assert torch.equal(model.head.weight, load_file(SHIPPED[COMPACT])['head.weight'])
        assert model.pretrained_cfg['label_names'][4] == 'deer' and 'file' not in model.pretrained_cfg

    def test_what_is_saved_of_such_a_model_names_no_path(self, tmp_path):
        save_for_hf(timm.create_model(COMPACT, pretrained=True), tmp_path, safe_serialization=True)
        assert 'file' not in json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg']
        assert not [path for path in tmp_path.iterdir() if bytes(SHIPPED[COMPACT].parents[2]) in path.read_bytes()]
        again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
        assert torch.equal(again.head.weight, load_file(SHIPPED[COMPACT])['head.weight'])


class TestConfigurations:
    @pytest.mark.parametrize('name', NAMES)
    def test_complete_and_true_of_the_model(self, name):
        cfg, model = get_pretrained_cfg(f'{name}.untrained'), on_meta(name)
        assert not cfg.has_weights and cfg.tag == 'untrained' and cfg.license == 'apache-2.0'
        assert isinstance(model, PositionVisionTransformer)
        assert cfg.num_classes == model.num_classes == model.get_submodule(cfg.classifier).out_features
        assert cfg.input_size[0] == model.get_submodule(cfg.first_conv).in_channels == model.in_chans
        assert cfg.input_size[1:] == model.patch_embed.img_size
        assert cfg.fixed_input_size and cfg.pool_size is None and cfg.interpolation == 'bicubic'

    @pytest.mark.parametrize('name', NAMES)
    def test_input_follows_the_name(self, name):
        cfg, model = get_pretrained_cfg(name), on_meta(name)
        small = name.endswith('_patch4_32')
        assert cfg.input_size[1] == (32 if small else 64 if name == 'test_vit_sape2' else 224)
        assert model.patch_embed.patch_size == ((4, 4) if small else (16, 16))
        assert cfg.num_classes == (10 if small else 1000)
        assert cfg.mean == ((0.4914, 0.4822, 0.4465) if small else IMAGENET_DEFAULT_MEAN)
        assert cfg.std == ((0.2470, 0.2435, 0.2616) if small else IMAGENET_DEFAULT_STD)
        assert not small or cfg.crop_pct == 1.0

    @pytest.mark.parametrize('name', NAMES)
    def test_encodings_follow_the_name(self, name):
        keys = on_meta(name).state_dict()
        encodings = name.split('_pos_')[1].removesuffix('_patch4_32') if '_pos_' in name else 'learned+sape2'
        assert on_meta(name).position_name == encodings
        assert ('pos_embed' in keys) == ('learned' in encodings)
        assert ('blocks.0.attn.position.sape2.row_table' in keys) == ('sape2' in encodings)

    @pytest.mark.parametrize(
        ('name', 'count'),
        [
            ('vit_compact_sape2_patch4_32', 814_986),
            ('vit_compact_pos_learned_patch4_32', 814_986 - 6 * 2 * 10 * 32),
            ('vit_compact_pos_sape2_patch4_32', 814_986 - 65 * 128),
            ('vit_compact_pos_nope_patch4_32', 814_986 - 65 * 128 - 6 * 2 * 10 * 32),
            ('vit_compact_pos_sincos_patch4_32', 814_986 - 65 * 128 - 6 * 2 * 10 * 32),
            ('vit_compact_pos_relbias_patch4_32', 814_986 - 65 * 128 - 6 * (2 * 10 * 32 - (15 * 15 + 3) * 4)),
            ('vit_compact_pos_cpe_patch4_32', 814_986 - 65 * 128 - 6 * 2 * 10 * 32 + 10 * 128),
            ('vit_compact_pos_rope_patch4_32', 814_986 - 65 * 128 - 6 * 2 * 10 * 32),
            ('vit_compact_pos_rope_mixed_patch4_32', 814_986 - 65 * 128 - 6 * (2 * 10 * 32 - 128)),
            ('vit_compact_pos_cope_patch4_32', 814_986 - 65 * 128 - 6 * (2 * 10 * 32 - 64 * 32)),
            ('vit_tiny_sape2', 5_717_416 + 12 * 2 * 10 * 64),
            ('vit_small_sape2', 22_050_664 + 12 * 2 * 10 * 64),
            ('vit_base_sape2', 86_567_656 + 12 * 2 * 10 * 64),
            ('vit_large_sape2', 304_326_632 + 24 * 2 * 10 * 64),
        ],
    )
    def test_parameter_count(self, name, count):
        """timm's own count and what its docstring says of an encoding, such as two tables of 10 x head_dim a block."""
        assert sum(p.numel() for p in on_meta(name).parameters()) == count

    @pytest.mark.parametrize('size', ['tiny', 'small', 'base', 'large'])
    def test_sizes_are_timms(self, size):
        ours = timm.create_model(f'vit_{size}_sape2', position='learned', device='meta')
        plain = timm.create_model(f'vit_{size}_patch16_224', device='meta')
        assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


class TestCreation:
    @pytest.mark.parametrize('name', NAMES)
    def test_tiny_edition_runs(self, name):
        model = timm.create_model(name, num_classes=3, in_chans=1, **TINY)
        model(torch.randn(2, 1, 56, 72)).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize('name', NAMES)
    def test_features_only(self, name):
        model = timm.create_model(name, features_only=True, device='meta', img_size=64)
        x = torch.randn(2, 3, 64, 64, device='meta')
        reduction, channels = model.feature_info.reduction(), model.feature_info.channels()
        assert [f.shape for f in model(x)] == [
            (2, c, 64 // r, 64 // r) for c, r in zip(channels, reduction, strict=True)
        ]

    @pytest.mark.parametrize('size', [None, (72, 56)])
    def test_saved_for_the_hub_and_created_again(self, tiny_vit, position, size, tmp_path):
        options = {'sape2': {'target': 'qk', 'distance_scale': 'grid'}} if 'sape2' in position else None
        model = tiny_vit(position, position_args=options, reg_tokens=2, num_classes=7, depth=1)
        save_for_hf(model, tmp_path, safe_serialization=True)
        again = timm.create_model(
            f'local-dir:{tmp_path}', pretrained=True, **({'img_size': size} if size else {})
        ).eval()
        if size:
            model.set_input_size(size)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
        x = torch.randn(2, 3, *(size or (56, 72)))
        assert torch.equal(again(x), model(x))


class TestImport:
    def test_silent_and_alone(self):
        """No warning, no network, no heavy optional package, and nothing of timm's replaced."""
        code = """
import sys
import timm
from timm.models import _registry
import torchvision
def table():
    return {name: (fn, _registry._model_to_module[name]) for name, fn in _registry._model_entrypoints.items()}
before, tagged, modules = table(), set(timm.list_models(include_tags=True)), set(sys.modules)
def refuse(event, args):
    if event.startswith('socket.'):
        raise RuntimeError(event)
sys.addaudithook(refuse)
import timm_sape2
after = table()
assert all(after[name] == entry for name, entry in before.items()), 'replaced'
assert tagged <= set(timm.list_models(include_tags=True)), 'lost'
new = set(after) - set(before)
assert new == set(timm.list_models(module='vision_transformer_sape2')) and new, new
heavy = {'triton', 'matplotlib', 'sklearn', 'onnx', 'onnxruntime'}
assert not heavy & {name.partition('.')[0] for name in set(sys.modules) - modules}
rooms = {name.split('.')[1] for name in sys.modules if name.startswith('timm_sape2.')}
assert rooms == {'models', 'positions', 'ops', 'version', '_compat', '_names', '_shipped'}, rooms
assert 'timm_sape2.ops.sape2.operator' in sys.modules and 'timm_sape2.ops.sape2.triton_kernel' not in sys.modules
"""
        done = run_python(code, '-W', 'error')
        assert (done.returncode, done.stdout, done.stderr) == (0, '', '')

    def test_alone_it_brings_timm(self):
        done = run_python("import timm_sape2, timm; timm.create_model('test_vit_sape2', device='meta')", '-W', 'error')
        assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
