"""Checkpoints: the authors' layout and numbers, plain timm ViTs, other sizes, and all that must not load."""

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf

import timm_sape2  # noqa: F401  (registers the models)
from timm_sape2.models.convert import checkpoint_filter_fn, position_embedding_grid, rename_from_authors

DATA = Path(__file__).parents[1] / 'data'
TINY = dict(embed_dim=32, depth=2, num_heads=2, patch_size=8, num_classes=5)


def create(position='learned+sape2', **kwargs):
    torch.manual_seed(1)
    return timm.create_model('test_vit_sape2', position=position, **dict(TINY, **kwargs)).eval()


def source(tmp_path, position='learned+sape2', img_size=(56, 72), **kwargs):
    """Save a model with random weights; return its state dict and the overlay that declares the file."""
    torch.manual_seed(0)
    model = timm.create_model('test_vit_sape2', position=position, img_size=img_size, **dict(TINY, **kwargs))
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    overlay = dict(
        file=str(tmp_path / 'model.safetensors'),
        input_size=(model.in_chans, *model.patch_embed.img_size),
        num_classes=model.num_classes,
    )
    return model.state_dict(), overlay


def load(overlay, position='learned+sape2', **kwargs):
    return create(position, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def changed(model, state_dict):
    """Names of entries that differ from a state dict."""
    own = model.state_dict()
    assert set(own) == set(state_dict)
    return {k for k in own if own[k].shape != state_dict[k].shape or not torch.equal(own[k], state_dict[k])}


class TestAuthors:
    """Their network, as numbers: state, input, every block's bias, logits (float64)."""

    @pytest.fixture(params=['k', 'q'])
    def golden(self, request):
        with safe_open(DATA / f'authors_d64_l2_h2_i32p4_{request.param}.safetensors', 'pt') as file:
            assert file.metadata()['target'] == request.param
            return request.param, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    @pytest.fixture
    def model(self, golden, tmp_path, request):
        target, tensors = golden
        state = {key.removeprefix('state.'): x for key, x in tensors.items() if key.startswith('state.')}
        torch.save({'model': state}, tmp_path / 'authors.pth')
        return timm.create_model(
            'vit_small_sape2_patch4_32',
            pretrained=True,
            pretrained_cfg_overlay=dict(file=str(tmp_path / 'authors.pth')),
            position_args={'sape2': {'target': target}},
            embed_dim=64,
            depth=2,
            num_heads=2,
            dtype=torch.float64,
        ).eval()

    def test_logits_and_every_bias_in_float64(self, golden, model):
        _, tensors = golden
        biases = []
        with torch.no_grad():
            torch.testing.assert_close(model(tensors['input']), tensors['logits'], rtol=0, atol=1e-12)
        for block in model.blocks:
            block.attn.fused_attn = False  # the plain path, which has a bias to look at
            original = block.attn.position.bias
            block.attn.position.bias = lambda *args, original=original: biases.append(original(*args)) or biases[-1]
        with torch.no_grad():
            logits = model(tensors['input'])
        torch.testing.assert_close(logits, tensors['logits'], rtol=0, atol=1e-12)
        off_diagonal = ~torch.eye(65, dtype=torch.bool)
        for index, bias in enumerate(biases):
            expected = tensors[f'bias.{index}']
            torch.testing.assert_close(bias[..., off_diagonal], expected[..., off_diagonal], rtol=0, atol=1e-9)
            assert (bias.diagonal(dim1=-2, dim2=-1) == 0).all()
        assert len(biases) == 2

    def test_logits_in_float32(self, golden, model):
        _, tensors = golden
        with torch.no_grad():
            logits = model.float()(tensors['input'].float())
        error = (logits - tensors['logits']).abs().max() / tensors['logits'].abs().max()
        assert error < 1e-4

    def test_unused_keys_are_dropped_by_name_in_one_line(self, caplog):
        state = {
            'blocks.0.attn.cope.cope_x.pos_emb': torch.rand(1, 16, 10),
            'blocks.0.attn.cope.cope_y.pos_emb': torch.rand(1, 16, 10),
            'blocks.0.attn.cope.cope_x.w_k': torch.rand(16, 16),
            'blocks.0.attn.cope.norm.weight': torch.rand(16),
            'blocks.0.gamma_1': torch.rand(32),
            'blocks.0.norm1.weight': torch.rand(32),
        }
        with caplog.at_level(logging.INFO, 'timm_sape2'):
            renamed = rename_from_authors(state)
        assert set(renamed) == {
            'blocks.0.attn.position.sape2.row_table',
            'blocks.0.attn.position.sape2.column_table',
            'blocks.0.norm1.weight',
        }
        table = renamed['blocks.0.attn.position.sape2.row_table']
        assert torch.equal(table, state['blocks.0.attn.cope.cope_x.pos_emb'][0].t())
        (record,) = caplog.records
        for key in ('blocks.0.gamma_1', 'blocks.0.attn.cope.cope_x.w_k', 'blocks.0.attn.cope.norm.weight', "'target'"):
            assert key in record.message

    def test_layer_scale_of_another_checkpoint_is_not_dropped(self):
        state = {'blocks.0.gamma_1': torch.rand(32)}
        assert rename_from_authors(state) == state


class TestPlainTimmViT:
    @pytest.fixture
    def plain(self, tmp_path):
        torch.manual_seed(0)
        model = timm.create_model('vit_tiny_patch16_224', img_size=(56, 72), **TINY).eval()
        save_file(model.state_dict(), tmp_path / 'plain.safetensors')
        return model, dict(file=str(tmp_path / 'plain.safetensors'), input_size=(3, 56, 72), num_classes=5)

    def test_loads_strictly_into_learned(self, plain):
        model, overlay = plain
        ours = load(overlay, 'learned', img_size=(56, 72))
        assert not changed(ours, model.state_dict())
        images = torch.randn(2, 3, 56, 72)
        with torch.no_grad():
            assert torch.equal(ours(images), model(images))

    def test_sape2_tables_keep_their_initial_values_and_the_log_says_so(self, plain, caplog):
        model, overlay = plain
        tables = {k: v.clone() for k, v in create(img_size=(56, 72)).state_dict().items() if 'sape2' in k}
        with caplog.at_level(logging.WARNING, 'timm_sape2'):
            ours = load(overlay, img_size=(56, 72))
        assert not changed(ours, {**model.state_dict(), **tables})
        (record,) = caplog.records
        names = 'blocks.*.attn.position.sape2.row_table, blocks.*.attn.position.sape2.column_table'
        assert record.message == f'Not in the checkpoint, kept at their initial values: {names}.'
        assert len(tables) == 4

    def test_with_other_classes_tables_are_still_the_only_thing_missing(self, plain):
        model, overlay = plain
        ours = load(overlay, img_size=(56, 72), num_classes=7)
        assert ours.head.out_features == 7
        shared = {k for k in model.state_dict() if not k.startswith('head')}
        assert all(torch.equal(ours.state_dict()[k], model.state_dict()[k]) for k in shared)


class TestOtherSize:
    @pytest.mark.parametrize('grid', [(14, 14), (1, 5), (9, 7), (4, 6)], ids=str)
    def test_another_grid_changes_pos_embed_alone(self, tmp_path, grid):
        """(9, 7) has as many tokens as the (7, 9) of the checkpoint."""
        state, overlay = source(tmp_path)
        model = load(overlay, img_size=(8 * grid[0], 8 * grid[1]))
        assert changed(model, state) == {'pos_embed'}
        expected = resample_abs_pos_embed(state['pos_embed'], new_size=list(grid), old_size=[7, 9])
        assert torch.equal(model.pos_embed, expected)
        assert torch.equal(model.pos_embed[:, 0], state['pos_embed'][:, 0])

    def test_sape2_alone_needs_no_change_at_all(self, tmp_path):
        state, overlay = source(tmp_path, 'sape2')
        assert not changed(load(overlay, 'sape2', img_size=(112, 40)), state)

    def test_register_entries_stay(self, tmp_path):
        state, overlay = source(tmp_path, reg_tokens=4)
        model = load(overlay, img_size=112, reg_tokens=4)
        assert changed(model, state) == {'pos_embed'}
        assert torch.equal(model.pos_embed[:, :5], state['pos_embed'][:, :5])

    def test_same_as_set_input_size(self, tmp_path):
        _, overlay = source(tmp_path)
        model = load(overlay, img_size=(56, 72))
        model.set_input_size((112, 40))
        assert not changed(load(overlay, img_size=(112, 40)), model.state_dict())

    def test_dynamic_model_gives_the_same_logits(self, tmp_path):
        _, overlay = source(tmp_path)
        images = torch.randn(2, 3, 112, 40)
        fixed, dynamic = load(overlay, img_size=(112, 40)), load(overlay, img_size=(56, 72), dynamic_img_size=True)
        with torch.no_grad():
            torch.testing.assert_close(dynamic(images), fixed(images))

    def test_other_patch_size_channels_and_classes(self, tmp_path):
        state, overlay = source(tmp_path)
        model = load(overlay, img_size=(28, 36), patch_size=4)
        assert changed(model, state) == {'patch_embed.proj.weight'}
        assert changed(load(overlay, img_size=(56, 72), in_chans=1), state) == {'patch_embed.proj.weight'}
        gray = load(overlay, img_size=(56, 72), in_chans=1).patch_embed.proj.weight
        torch.testing.assert_close(gray, state['patch_embed.proj.weight'].sum(1, keepdim=True))
        assert changed(load(overlay, img_size=(56, 72), num_classes=7), state) == {'head.weight', 'head.bias'}
        features = load(overlay, img_size=(112, 40), patch_size=4, in_chans=1, num_classes=0)
        assert torch.equal(features.blocks[1].mlp.fc1.weight, state['blocks.1.mlp.fc1.weight'])

    def test_scaled_distances_refer_to_the_grid_of_the_checkpoint(self, tmp_path):
        _, overlay = source(tmp_path)
        scaled = {'sape2': {'distance_scale': 'grid'}}
        model = load(overlay, img_size=(112, 40), position_args=scaled)
        assert model.blocks[0].attn.position.sape2.reference_grid.tolist() == [7, 9]
        images = torch.randn(1, 3, 56, 72)
        with torch.no_grad():
            same_grid = load(overlay, img_size=(56, 72), position_args=scaled)(images)
            torch.testing.assert_close(same_grid, load(overlay, img_size=(56, 72))(images))

    def test_scaled_distances_are_dropped_with_a_warning(self, tmp_path, caplog):
        state, overlay = source(tmp_path, position_args={'sape2': {'distance_scale': 'grid'}})
        plain = load(overlay, img_size=(56, 72)).state_dict()
        assert plain and all(torch.equal(value, state[key]) for key, value in plain.items())
        assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
            'Dropped: blocks.*.attn.position.sape2.reference_grid.'
        ]


class TestSources:
    """The same adaptation through a file, a local folder and the Hub's cache."""

    @pytest.fixture(params=['local-dir', 'hf-hub'])
    def folder(self, request, tmp_path, monkeypatch):
        torch.manual_seed(0)
        options = {'sape2': {'target': 'q', 'num_positions': 4}}
        model = timm.create_model('test_vit_sape2', img_size=(56, 72), position_args=options, **TINY)
        if request.param == 'local-dir':
            save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
            return model, f'local-dir:{tmp_path / "saved"}', {}
        repository = tmp_path / 'models--someone--tiny'
        (repository / 'refs').mkdir(parents=True)
        (repository / 'refs' / 'main').write_text('0' * 40)
        save_for_hf(model, repository / 'snapshots' / ('0' * 40), safe_serialization=True)
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        return model, 'hf-hub:someone/tiny', {'cache_dir': str(tmp_path)}

    def test_as_it_is(self, folder):
        model, name, kwargs = folder
        loaded = timm.create_model(name, pretrained=True, **kwargs)
        assert not changed(loaded, model.state_dict())
        assert loaded.blocks[0].attn.position.sape2.target == 'q'

    def test_at_another_grid_with_other_channels_and_classes(self, folder):
        model, name, kwargs = folder
        loaded = timm.create_model(name, pretrained=True, img_size=(72, 56), in_chans=1, num_classes=3, **kwargs)
        assert loaded.patch_embed.grid_size == (9, 7)
        assert torch.equal(loaded.pos_embed, resample_abs_pos_embed(model.pos_embed, [9, 7], [7, 9]).detach())
        table = 'blocks.1.attn.position.sape2.row_table'
        assert torch.equal(loaded.state_dict()[table], model.state_dict()[table])

    def test_configuration_is_json(self, folder, tmp_path):
        config = json.loads(next(tmp_path.rglob('config.json')).read_text())
        assert config['model_args']['position_args'] == {'sape2': {'target': 'q', 'num_positions': 4}}


class TestSourceGrid:
    def test_declared_grid_counts_if_it_accounts_for_every_token(self):
        assert position_embedding_grid(63, (7, 9), (9, 7)) == (7, 9)

    def test_stale_declaration_means_a_square_and_a_warning(self, caplog):
        assert position_embedding_grid(144, (14, 14), (14, 14)) == (12, 12)
        assert 'square grid (12, 12)' in caplog.text

    @pytest.mark.parametrize(
        ('num_tokens', 'target'), [(63, (14, 14)), (63, (9, 7)), (63, (7, 9)), (16, (2, 8)), (16, (8, 2))]
    )
    def test_what_cannot_be_told_is_an_error_with_the_way_out(self, num_tokens, target):
        with pytest.raises(ValueError, match=r'pretrained_cfg_overlay=dict\(file=..., input_size=\(3, H, W\)\)'):
            position_embedding_grid(num_tokens, (14, 14), target)


class TestPrefixTokens:
    """On the 7x9 grid, 63 entries of `pos_embed` are for patches alone, 64 are with one for the class token."""

    @pytest.mark.parametrize('declared', [True, False])
    @pytest.mark.parametrize(
        ('made_with', 'missing'),
        [
            ({'no_embed_class': True}, 'a class token, no register tokens and no entries of pos_embed for them'),
            ({'reg_tokens': 4}, 'a class token, 4 register tokens'),
            (
                {'reg_tokens': 4, 'no_embed_class': True},
                'a class token, 4 register tokens and no entries of pos_embed for them',
            ),
            ({'class_token': False, 'global_pool': 'avg'}, 'no class token, no register tokens'),
            ({'class_token': False, 'global_pool': 'map'}, 'no class token, no register tokens'),
            (
                {'class_token': False, 'reg_tokens': 2, 'no_embed_class': True, 'global_pool': 'avg'},
                'no class token, 2 register tokens and no entries of pos_embed for them',
            ),
        ],
    )
    def test_the_refusal_names_the_arguments_and_they_are_right(self, tmp_path, made_with, missing, declared):
        size = (56, 72) if declared else 72
        state, overlay = source(tmp_path, img_size=size, **made_with)
        if not declared:
            del overlay['input_size']  # the default then, 64, which is wrong: only a square grid can be assumed
        message = f'The checkpoint does not fit, nothing was loaded; it has {missing}. Create the model with '
        with pytest.raises(ValueError) as raised:
            load(overlay, img_size=size)
        text = str(raised.value)
        assert text.startswith(message)
        named = eval(f'dict({text.removeprefix(message).rstrip(".")})')
        assert named == made_with
        assert not changed(load(overlay, img_size=size, **named), state)

    def test_a_model_made_for_others_is_told_too(self, tmp_path):
        _, overlay = source(tmp_path)
        with pytest.raises(ValueError, match='Create the model with reg_tokens=0, no_embed_class=False'):
            load(overlay, img_size=(56, 72), reg_tokens=4, no_embed_class=True)

    def test_without_a_learned_embedding(self, tmp_path):
        _, overlay = source(tmp_path, 'rope', reg_tokens=3)
        with pytest.raises(ValueError, match=r'Create the model with reg_tokens=3\.$'):
            load(overlay, 'rope', img_size=(56, 72))

    def test_distilled(self, tmp_path):
        state, overlay = source(tmp_path)
        save_file({**state, 'dist_token': torch.zeros(1, 1, 32)}, tmp_path / 'model.safetensors')
        with pytest.raises(ValueError, match=r'a distilled model, with a second class token \(dist_token\)'):
            load(overlay, img_size=(56, 72))


class TestMisfits:
    @pytest.fixture
    def state(self):
        torch.manual_seed(0)
        return create(img_size=(56, 72)).state_dict()

    @pytest.mark.parametrize('other_classes', [False, True])
    @pytest.mark.parametrize(
        ('edit', 'message'),
        [
            (lambda s: s.pop('blocks.1.norm1.weight'), 'missing keys: blocks.1.norm1.weight'),
            (
                lambda s: s.pop('blocks.0.attn.position.sape2.row_table'),
                'missing keys: blocks.0.attn.position.sape2.row_table',
            ),
            (lambda s: s.pop('pos_embed'), 'missing keys: pos_embed'),
            (lambda s: s.update(ghost=torch.zeros(1)), 'unexpected keys: ghost'),
            (
                lambda s: s.update({'norm.weight': torch.zeros(31)}),
                r'wrong shapes: norm.weight \(31,\) instead of \(32,\)',
            ),
            (lambda s: s.pop('patch_embed.proj.weight'), 'no convolution patch_embed.proj.weight'),
        ],
        ids=['missing', 'partial tables', 'no pos_embed', 'unexpected', 'shape', 'no patch embedding'],
    )
    def test_names_the_keys_and_changes_nothing(self, state, tmp_path, edit, message, other_classes):
        """timm alone would let most of these pass once the number of classes differs."""
        edit(state)
        model = create(img_size=(56, 72))
        model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 56, 72), num_classes=9 if other_classes else 5)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            checkpoint_filter_fn(state, model)
        assert not changed(model, before)

        save_file(state, tmp_path / 'edited.safetensors')
        overlay = dict(file=str(tmp_path / 'edited.safetensors'), input_size=(3, 56, 72), num_classes=5)
        with pytest.raises(ValueError, match=message):
            load(overlay, img_size=(56, 72), num_classes=9 if other_classes else 5)

    @pytest.mark.parametrize(
        ('target', 'message'),
        [
            (dict(position='learned'), 'unexpected keys: blocks.0.attn.position.sape2.column_table'),
            (dict(position='nope'), 'unexpected keys: .*pos_embed'),
            (dict(position_args={'sape2': {'num_positions': 4}}), r'\(10, 16\) instead of \(4, 16\)'),
            (dict(position_args={'sape2': {'axes': 'x'}}), 'unexpected keys: .*column_table'),
            (dict(depth=3), 'missing keys: blocks.2.'),
            (dict(embed_dim=64), 'wrong shapes: .*cls_token'),
            (dict(global_pool='avg'), 'missing keys: fc_norm.bias, fc_norm.weight; unexpected keys: norm.bias'),
        ],
        ids=str,
    )
    def test_another_architecture(self, tmp_path, target, message):
        _, overlay = source(tmp_path)
        with pytest.raises(ValueError, match=message):
            load(overlay, **dict(dict(img_size=(56, 72)), **target))

    @pytest.mark.parametrize('in_chans', [1, 4])
    def test_undeclared_channels(self, tmp_path, in_chans):
        _, overlay = source(tmp_path, in_chans=in_chans)
        with pytest.raises(ValueError, match=r'wrong shapes: patch_embed\.proj\.weight'):
            load(dict(overlay, input_size=(3, 56, 72)), img_size=(56, 72))

    def test_undeclared_classes(self, tmp_path):
        _, overlay = source(tmp_path)
        with pytest.raises(ValueError, match=r'wrong shapes: head.bias \(5,\) instead of \(9,\)'):
            load(dict(overlay, num_classes=9), img_size=(56, 72), num_classes=9)
