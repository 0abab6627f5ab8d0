"""The models that timm knows after the import."""

import functools
import re
import subprocess
import sys

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg, is_model_pretrained, save_for_hf

from timm_sape2 import PositionVisionTransformer
from timm_sape2.models import vision_transformer_sape2 as registered
from timm_sape2.positions import ENCODINGS

NAMES = timm.list_models(module='vision_transformer_sape2')
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

    def test_none_claims_weights(self):
        tags = timm.list_models(module='vision_transformer_sape2', include_tags=True)
        assert tags and not set(timm.list_pretrained('*')) & {*tags, *NAMES}
        assert timm.list_models(pretrained=True, module='vision_transformer_sape2') == []
        assert not [name for name in NAMES if is_model_pretrained(name)]

    @pytest.mark.parametrize('name', [name for name in NAMES if name != 'vit_equipped'])
    def test_pretrained_without_weights_raises(self, name):
        with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}'):
            timm.create_model(name, pretrained=True, **TINY)

    def test_where_there_are_none_those_that_ship_are_named(self):
        """And what is named loads."""
        with pytest.raises(RuntimeError) as raised:
            timm.create_model('vit_small_sape2', pretrained=True)
        (command,) = re.findall(r'such as those that ship here: (.+)\.$', str(raised.value))
        model = eval(command)
        assert model.pretrained_cfg['architecture'] == 'vit_compact_sape2_patch4_32'

    @pytest.mark.parametrize('name', NAMES)
    def test_unknown_argument_raises(self, name):
        with pytest.raises(TypeError, match='not_an_argument'):
            timm.create_model(name, device='meta', not_an_argument=1)


class TestConfigurations:
    @pytest.mark.parametrize('name', NAMES)
    def test_complete_and_true_of_the_model(self, name):
        cfg, model = get_pretrained_cfg(name), on_meta(name)
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
assert rooms == {'models', 'positions', 'ops', 'version', '_compat'}, rooms
assert 'timm_sape2.ops.sape2.operator' in sys.modules and 'timm_sape2.ops.sape2.triton_kernel' not in sys.modules
"""
        done = run_python(code, '-W', 'error')
        assert (done.returncode, done.stdout, done.stderr) == (0, '', '')

    def test_alone_it_brings_timm(self):
        done = run_python("import timm_sape2, timm; timm.create_model('test_vit_sape2', device='meta')", '-W', 'error')
        assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
