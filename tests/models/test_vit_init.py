"""Initialisation, devices and number formats of the host."""

import pytest
import timm
import torch

TINY = dict(img_size=(56, 72), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)


@pytest.fixture
def x():
    return torch.randn(2, 3, 56, 72)


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class TestMetaDevice:
    @pytest.mark.parametrize('mode', ['', 'jax', 'moco', 'reset'])
    def test_to_empty_then_init_weights_restores_everything(self, x, position, mode):
        options = {
            'sape2': {'distance_scale': 'grid', 'gate_source': 'separate', 'num_positions': 100},
            'axial_cope': {'num_positions': 100},
            'shaw': {'clip': 50},
        }
        arguments = {name: options[name] for name in position.split('+') if name in options}
        model = timm.create_model(
            'test_vit_sape2', position=position, position_args=arguments, reg_tokens=2, device='meta', **TINY
        )
        assert all(tensor.is_meta for tensor in tensors(model).values())
        model.to_empty(device='cpu')
        with torch.no_grad():
            for tensor in tensors(model).values():
                tensor.fill_(float('nan') if tensor.is_floating_point() else -1)
        model.init_weights(mode)
        assert all(tensor.isfinite().all() for tensor in tensors(model).values())
        for name, tensor in tensors(model).items():
            if name.endswith('_table'):
                std = 0.2 if 'axial_cope' in name else 0.02
                assert 0.85 * std < tensor.std() < 1.15 * std and tensor.abs().max() > 2 * std, name
            if name.endswith('reference_grid'):
                assert tensor.tolist() == [7, 9]
        assert model.eval()(x).isfinite().all()

    def test_device_context_is_the_same(self, position):
        with torch.device('meta'):
            model = timm.create_model('test_vit_sape2', position=position, **TINY)
        assert all(tensor.is_meta for tensor in tensors(model).values())
        assert model(torch.randn(2, 3, 56, 72, device='meta')).shape == (2, 5)

    def test_skipping_initialisation_still_fills_the_tables(self):
        model = timm.create_model('test_vit_sape2', weight_init='skip', **TINY)
        assert all(0.01 < p.std() < 0.03 for name, p in model.named_parameters() if name.endswith('_table'))

    def test_seed_decides_all_weights(self, position):
        states = []
        for _ in range(2):
            torch.manual_seed(3)
            states.append(timm.create_model('test_vit_sape2', position=position, **TINY).state_dict())
        assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


class TestNumberFormats:
    @pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
    def test_dtype_argument(self, x, position, dtype):
        options = {'sape2': {'gate_source': 'separate'}} if 'sape2' in position else None
        model = timm.create_model('test_vit_sape2', position=position, position_args=options, dtype=dtype, **TINY)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(x.to(dtype)).dtype == dtype

    @pytest.mark.parametrize('variant', [{}, {'qk_norm': True}, {'init_values': 0.1, 'reg_tokens': 4}])
    def test_autocast_is_near_float32(self, tiny_vit, x, position, variant):
        model = tiny_vit(position, global_pool='avg', **variant)
        expected = model(x)
        with torch.autocast('cpu', torch.bfloat16):
            out = model(x)
        assert out.dtype == torch.bfloat16
        assert (out - expected).norm() < 0.05 * expected.norm()
        out.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())

    def test_bfloat16_is_near_float32(self, tiny_vit, x, position):
        model = tiny_vit(position, global_pool='avg')
        expected = model(x)
        model.bfloat16()
        out = model(x.bfloat16())
        assert out.dtype == torch.bfloat16
        assert (out - expected).norm() < 0.05 * expected.norm()
        out.square().sum().backward()
        assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())

    def test_reference_grid_survives_a_change_of_dtype(self, tiny_vit, x):
        model = tiny_vit(position_args={'sape2': {'distance_scale': 'grid'}}).bfloat16()
        assert model.blocks[0].attn.position['sape2'].reference_grid.tolist() == [7, 9]
        assert model(x.bfloat16()).isfinite().all()
