"""The host transformer: tokens, attention, gradients and what training needs of it."""

import copy
import pickle
import threading

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

TABLES = ('row_table', 'column_table')
SIZES = dict(img_size=(56, 72), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)


@pytest.fixture
def x():
    return torch.randn(2, 3, 56, 72)


def gradients(model, x, **kwargs):
    model.zero_grad()
    model(x, **kwargs).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def masks(length=64):
    allowed = torch.rand(2, 1, length, length) > 0.3
    allowed |= torch.eye(length, dtype=torch.bool)
    return {
        'none': {},
        'bool': {'attn_mask': allowed},
        'float': {'attn_mask': torch.randn(2, 2, length, length)},
        'causal': {'is_causal': True},
    }


class TestPlainTransformer:
    """What remains without SaPE2 is timm's own model, to the bit."""

    VARIANTS = (
        {},
        {'reg_tokens': 4, 'no_embed_class': True, 'pre_norm': True},
        {'class_token': False, 'global_pool': 'avg', 'qk_norm': True},
        {'global_pool': 'map', 'init_values': 1e-2, 'scale_attn_norm': True, 'scale_mlp_norm': True},
        {'dynamic_img_size': True, 'dynamic_img_pad': True},
        {'drop_rate': 0.1, 'pos_drop_rate': 0.1, 'patch_drop_rate': 0.25, 'proj_drop_rate': 0.1}
        | {'attn_drop_rate': 0.1, 'drop_path_rate': 0.2},
    )

    @pytest.mark.parametrize('fused', [True, False])
    @pytest.mark.parametrize('variant', VARIANTS)
    @pytest.mark.parametrize(('position', 'pos_embed'), [('learned', 'learn'), ('nope', 'none')])
    def test_outputs_and_gradients_are_timms(self, tiny_vit, x, position, pos_embed, variant, fused):
        ours = tiny_vit(position, **variant).train()
        plain = VisionTransformer(pos_embed=pos_embed, **SIZES, **variant).train()
        plain.load_state_dict(ours.state_dict(), strict=True)
        for block in [*ours.blocks, *plain.blocks]:
            block.attn.fused_attn = fused
        results = []
        for model in (ours, plain):
            torch.manual_seed(1)
            results.append(gradients(model, x))
        assert results[0].keys() == results[1].keys()
        assert all(torch.equal(grad, results[1][name]) for name, grad in results[0].items())
        assert torch.equal(ours.eval()(x), plain.eval()(x))

    @pytest.mark.parametrize('kind', ['bool', 'float', 'causal'])
    @pytest.mark.parametrize(('position', 'pos_embed'), [('learned', 'learn'), ('nope', 'none')])
    def test_masks_are_timms(self, tiny_vit, x, position, pos_embed, kind):
        ours, mask = tiny_vit(position), masks()[kind]
        plain = VisionTransformer(pos_embed=pos_embed, **SIZES).eval()
        plain.load_state_dict(ours.state_dict(), strict=True)
        assert torch.equal(ours(x, **mask), plain(x, **mask))


class TestTokens:
    @pytest.mark.parametrize('registers', [0, 4])
    @pytest.mark.parametrize('class_token', [True, False])
    def test_prefix_tokens_have_no_bias(self, tiny_vit, class_token, registers):
        model = tiny_vit('sape2', class_token=class_token, reg_tokens=registers, global_pool='avg')
        attention, prefix = model.blocks[0].attn, int(class_token) + registers
        query, key, value = torch.randn(3, 2, 2, prefix + 63, 16)
        bias = attention.position.bias(query, key, value, (7, 9))
        assert bias.shape == (2, 2, prefix + 63, prefix + 63)
        assert (bias[:, :, :prefix] == 0).all() and (bias[..., :prefix] == 0).all()
        assert (bias.diagonal(dim1=2, dim2=3) == 0).all()
        patches = bias[:, :, prefix:, prefix:]
        assert (patches + torch.eye(63) > 0).all()
        query[:, :, :prefix], key[:, :, :prefix] = 0, 0
        assert torch.equal(attention.position.bias(query, key, value, (7, 9)), bias)

    def test_biases_of_all_encodings_add_up(self, tiny_vit, monkeypatch):
        model = tiny_vit('sape2')
        attention = model.blocks[0].attn
        query, key, value = torch.randn(3, 1, 2, 64, 16)
        single = attention.position.bias(query, key, value, (7, 9))
        attention.position['again'] = copy.deepcopy(attention.position['sape2'])
        torch.testing.assert_close(attention.position.bias(query, key, value, (7, 9)), 2 * single)

    @pytest.mark.parametrize('registers', [0, 4])
    @pytest.mark.parametrize(('pool', 'class_token'), [('token', True), ('avg', True), ('avg', False), ('map', False)])
    def test_pooling_takes_the_right_tokens(self, tiny_vit, x, position, pool, class_token, registers):
        model = tiny_vit(position, global_pool=pool, class_token=class_token, reg_tokens=registers)
        prefix = int(class_token) + registers
        tokens = model.forward_features(x)
        assert tokens.shape == (2, prefix + 63, 32)
        patches = tokens[:, prefix:]
        pooled = {
            'token': lambda: tokens[:, 0],
            'avg': lambda: patches.mean(1),
            'map': lambda: model.attn_pool(patches),
        }
        assert torch.equal(model(x), model.head(model.fc_norm(pooled[pool]())))

    def test_registers_and_class_token_take_part(self, tiny_vit, position, x):
        model = tiny_vit(position, reg_tokens=4)
        out = model(x)
        for token in (model.reg_token, model.cls_token):
            with torch.no_grad():
                token += torch.randn_like(token)
            changed = model(x)
            assert (changed - out).abs().max() > 1e-4
            out = changed


class TestMasks:
    @pytest.mark.parametrize('kind', ['none', 'bool', 'float', 'causal'])
    def test_fused_and_unfused_attention_agree(self, tiny_vit, x, position, kind):
        model = tiny_vit(position, global_pool='avg', dtype=torch.float64, qk_norm=True)
        x, mask = x.double(), masks()[kind]
        mask = {k: v.double() if k == 'attn_mask' and v.is_floating_point() else v for k, v in mask.items()}
        fused, fused_gradients = model(x, **mask), gradients(model, x, **mask)
        for block in model.blocks:
            assert block.attn.fused_attn
            block.attn.fused_attn = False
        torch.testing.assert_close(model(x, **mask), fused)
        torch.testing.assert_close(gradients(model, x, **mask), fused_gradients)

    def test_masks_mean_the_same_in_every_form(self, tiny_vit, x, position):
        model = tiny_vit(position)
        lower = torch.ones(64, 64, dtype=torch.bool).tril()
        additive = torch.zeros(64, 64).masked_fill(~lower, float('-inf'))
        causal = model(x, is_causal=True)
        torch.testing.assert_close(model(x, attn_mask=lower), causal)
        torch.testing.assert_close(model(x, attn_mask=additive), causal)
        torch.testing.assert_close(model(x, attn_mask=torch.zeros(64, 64)), model(x))
        keys = torch.rand(2, 1, 1, 64) > 0.5
        torch.testing.assert_close(model(x, attn_mask=keys), model(x, attn_mask=keys.expand(-1, -1, 64, -1)))

    @pytest.mark.parametrize('kind', ['bool', 'float', 'causal'])
    def test_mask_reaches_every_forward(self, tiny_vit, x, position, kind):
        model, mask = tiny_vit(position, global_pool='avg'), masks()[kind]
        features = model.forward_features(x, **mask)
        assert (features - model.forward_features(x)).abs().max() > 1e-3
        final, _ = model.forward_intermediates(x, **mask)
        torch.testing.assert_close(final, features)
        if kind != 'causal':
            (last,) = model.get_intermediate_layers(x, norm=True, attn_mask=mask['attn_mask'])
            torch.testing.assert_close(last, model.forward_intermediates(x, norm=True, output_fmt='NLC', **mask)[1][-1])


class TestGradients:
    def test_every_parameter_gets_one(self, tiny_vit, x, position):
        for name, grad in gradients(tiny_vit(position, global_pool='avg', reg_tokens=2), x).items():
            assert grad.isfinite().all() and grad.abs().sum() > 0, name

    @pytest.mark.parametrize(
        'options', [{'gate_source': 'separate'}, {'target': 'qk'}, {'axes': 'y'}, {'gating': 'none'}]
    )
    def test_every_parameter_of_a_variant_gets_one(self, tiny_vit, x, options):
        for name, grad in gradients(tiny_vit(position_args={'sape2': options}, global_pool='avg'), x).items():
            assert grad.isfinite().all() and grad.abs().sum() > 0, name

    def test_also_right_after_initialisation(self, x):
        model = timm.create_model('test_vit_sape2', img_size=(56, 72), patch_size=8, global_pool='avg', depth=3)
        for name, grad in gradients(model, x).items():
            assert grad.isfinite().all() and grad.abs().sum() > 0, name

    def test_last_block_is_blind_to_sape2_with_token_pooling(self, tiny_vit, x):
        """The class token alone is pooled, and its own attention has bias 0: the last tables get a gradient of 0."""
        model = tiny_vit(global_pool='token')
        grads = gradients(model, x)
        for table in TABLES:
            assert (grads[f'blocks.1.attn.position.sape2.{table}'] == 0).all()
            assert grads[f'blocks.0.attn.position.sape2.{table}'].abs().sum() > 0

    @pytest.mark.parametrize('kind', ['none', 'bool', 'float', 'causal'])
    def test_checkpointing_recomputes_and_changes_nothing(self, tiny_vit, x, position, kind):
        model, mask = tiny_vit(position, global_pool='avg', drop_path_rate=0.3).train(), masks()[kind]
        calls, expected = [], None
        for block in model.blocks:
            block.attn.register_forward_hook(lambda *_: calls.append(1))
        for enabled in (False, True):
            calls.clear()
            model.set_grad_checkpointing(enabled)
            torch.manual_seed(1)
            grads = gradients(model, x, **mask)
            assert len(calls) == (4 if enabled else 2)
            expected = expected or grads
        torch.testing.assert_close(grads, expected)
        calls.clear()
        final, _ = model.forward_intermediates(x, **mask)
        final.square().sum().backward()
        assert len(calls) == 4


class TestParameterGroups:
    @pytest.fixture
    def model(self, tiny_vit):
        return tiny_vit(position_args={'sape2': {'gate_source': 'separate'}}, reg_tokens=2)

    def test_tables_have_no_weight_decay(self, model):
        tables = {f'blocks.{i}.attn.position.sape2.{table}' for i in (0, 1) for table in TABLES}
        assert model.no_weight_decay() == tables | {'pos_embed', 'cls_token', 'reg_token', 'dist_token'}

    def test_weight_decay_groups(self, model):
        groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
        decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
        for name, parameter in model.named_parameters():
            is_weight = parameter.ndim > 1 and name not in model.no_weight_decay()
            assert decay[id(parameter)] == (0.05 if is_weight else 0), name
        assert decay[id(model.blocks[0].attn.position['sape2'].gate_key.weight)] == 0.05

    def test_layer_decay_follows_the_block(self, model):
        groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
        found = {id(p): (group['lr_scale'], group['weight_decay']) for group in groups for p in group['params']}
        scales = {'blocks.0.': 0.25, 'blocks.1.': 0.5, 'norm.': 0.5, 'head.': 1.0}
        for name, parameter in model.named_parameters():
            expected = next((scale for start, scale in scales.items() if name.startswith(start)), 0.125)
            decays = parameter.ndim > 1 and name not in model.no_weight_decay()
            assert found[id(parameter)] == (expected, 0.05 if decays else 0), name

    def test_coarse_groups_take_the_same_names(self, model):
        assert model.group_matcher(coarse=True).keys() == {'stem', 'blocks'}


class TestClassifier:
    def test_reset_changes_classes_and_pooling(self, tiny_vit, x, position):
        model = tiny_vit(position, global_pool='map')
        tokens = model.forward_features(x)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7) and model.global_pool == 'map'
        model.reset_classifier(0, 'avg')
        assert torch.equal(model(x), tokens[:, 1:].mean(1))
        model.reset_classifier(0, '')
        assert torch.equal(model(x), tokens)
        model.reset_classifier(3, 'token')
        assert torch.equal(model(x), model.head(tokens[:, 0])) and model.get_classifier().out_features == 3


class TestCopies:
    def test_copies_are_equal_and_independent(self, tiny_vit, x, position):
        model = tiny_vit(position, position_args={'sape2': {'target': 'q'}} if 'sape2' in position else None)
        out = model(x)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(clone(x), out)
            with torch.no_grad():
                for parameter in clone.parameters():
                    parameter.zero_()
        assert torch.equal(model(x), out)

    @pytest.mark.parametrize('training', [True, False])
    def test_forward_writes_no_attribute(self, tiny_vit, x, position, training):
        def attributes(model):
            found = {name: dict(vars(module)) for name, module in model.named_modules()}
            inner = ('_parameters', '_buffers', '_modules')
            return {name: (values, [dict(values[key]) for key in inner]) for name, values in found.items()}

        model = tiny_vit(position, dynamic_img_size=True).train(training)
        before, state = attributes(model), copy.deepcopy(model.state_dict())
        model(x)
        model.forward_intermediates(x.transpose(2, 3), stop_early=True, indices=[0])
        assert attributes(model) == before
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())

    def test_threads_with_two_sizes_do_not_meet(self, tiny_vit, position):
        model = tiny_vit(position, dynamic_img_size=True)
        sizes = [torch.randn(2, 3, 56, 72), torch.randn(2, 3, 72, 56)]
        wrong, barrier = [], threading.Barrier(2)

        def work(x, expected):
            barrier.wait()
            wrong.extend(i for i in range(15) if not torch.equal(model(x), expected))

        threads = [threading.Thread(target=work, args=(x, model(x))) for x in sizes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


@pytest.mark.usefixtures('process_group')
def test_ddp_trains_without_searching_unused_parameters(tiny_vit, x, position):
    model = tiny_vit(position)
    before = copy.deepcopy(dict(model.named_parameters()))
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        parallel(x).square().sum().backward()
        optimizer.step()
    unchanged = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert all(name.startswith('blocks.1.attn.position.') for name in unchanged), unchanged
