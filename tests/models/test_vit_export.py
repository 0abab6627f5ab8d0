"""The host in TorchScript, torch.fx, torch.export and ONNX."""

import io

import pytest
import torch
from timm.layers import create_feature_extractor
from torch.export import Dim

from timm_sape2.positions import ENCODINGS

VARIANTS = (
    {'target': 'qk', 'gate_source': 'separate', 'axes': 'x', 'distance_scale': 'grid'},
    {'target': 'q', 'gating': 'none', 'axes': 'y'},
    {'gate_source': 'value', 'num_positions': 2},
    {'distance': 'squared', 'target': 'qk'},
)
OTHER_SIZES = ((56, 72), (112, 112), (72, 24), (40, 16))

pytestmark = pytest.mark.filterwarnings(
    'ignore::DeprecationWarning',
    'ignore::FutureWarning',
    'ignore::torch.jit.TracerWarning',
    'ignore:Constant folding:UserWarning',
)


def images(height=56, width=72, batch=2):
    return torch.randn(batch, 3, height, width)


def dynamic_shapes():
    return {0: Dim('batch', max=64), 2: 8 * Dim('rows', min=2, max=40), 3: 8 * Dim('columns', min=2, max=40)}


def gradients(model, compiled, x):
    model.zero_grad()
    compiled(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


class TestScript:
    @pytest.mark.parametrize('dynamic', [True, False])
    def test_same_outputs_after_saving_and_loading(self, tiny_vit, position, dynamic):
        model = tiny_vit(position, dynamic_img_size=dynamic, reg_tokens=2)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(model), buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
        for size in OTHER_SIZES[: 4 if dynamic else 1]:
            x = images(*size)
            torch.testing.assert_close(loaded(x), model(x))
        x, upper = images(), torch.ones(66, 66, dtype=torch.bool).triu()
        for mask in ({'attn_mask': upper}, {'is_causal': True}):
            torch.testing.assert_close(loaded(x, **mask), model(x, **mask))

    @pytest.mark.parametrize('options', VARIANTS)
    def test_variants(self, tiny_vit, options):
        model = tiny_vit('sape2', position_args={'sape2': options}, dynamic_img_size=True)
        scripted = torch.jit.script(model)
        for size in OTHER_SIZES[:2]:
            x = images(*size)
            torch.testing.assert_close(scripted(x), model(x))

    def test_trains(self, tiny_vit, position):
        model = tiny_vit(position, global_pool='avg').train()
        x = images()
        torch.testing.assert_close(gradients(model, torch.jit.script(model), x), gradients(model, model, x))

    def test_helpers_of_optimizers_work(self, tiny_vit):
        model = tiny_vit()
        scripted = torch.jit.script(model)
        assert scripted.no_weight_decay() == model.no_weight_decay()
        assert scripted.group_matcher() == model.group_matcher()


class TestTrace:
    def test_fixed(self, tiny_vit, position):
        model = tiny_vit(position)
        traced = torch.jit.trace(model, images())
        x = images(batch=3)
        torch.testing.assert_close(traced(x), model(x))

    @pytest.mark.parametrize('position', sorted(set(ENCODINGS) - {'learned', 'relbias'}))
    def test_dynamic_where_nothing_is_resampled(self, tiny_vit, position):
        model = tiny_vit(position, dynamic_img_size=True)
        traced = torch.jit.trace(model, images())
        for size in OTHER_SIZES:
            x = images(*size)
            torch.testing.assert_close(traced(x), model(x))


class TestFx:
    @pytest.mark.parametrize('dynamic', [True, False])
    def test_graph_gives_outputs_and_inner_nodes(self, tiny_vit, position, dynamic):
        model = tiny_vit(position, dynamic_img_size=dynamic, reg_tokens=2)
        graph = create_feature_extractor(model, ['blocks.0.mlp', 'blocks.1.attn.proj', 'head'])
        for size in OTHER_SIZES[: 4 if dynamic else 1]:
            x, seen = images(*size), []
            for module in (model.blocks[0].mlp, model.blocks[1].attn.proj):
                module.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out))
            expected = model(x)
            nodes = graph(x)
            torch.testing.assert_close(list(nodes.values()), [*seen[:2], expected])

    def test_graph_trains_and_scripts(self, tiny_vit, position):
        model = tiny_vit(position, global_pool='avg').train()
        graph = create_feature_extractor(model, ['head'])
        x = images()
        expected = gradients(model, model, x)
        for compiled in (graph, torch.jit.script(graph)):
            graph.zero_grad()
            compiled(x)['head'].square().sum().backward()
            torch.testing.assert_close({name: p.grad for name, p in graph.named_parameters()}, expected)


class TestExport:
    def test_dynamic_batch(self, tiny_vit, position):
        model = tiny_vit(position)
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: Dim('batch', max=64)},)).module()
        for batch in (1, 5):
            x = images(batch=batch)
            torch.testing.assert_close(program(x), model(x))

    def test_dynamic_grid(self, tiny_vit, position):
        model = tiny_vit(position, dynamic_img_size=True)
        program = torch.export.export(model, (images(),), dynamic_shapes=(dynamic_shapes(),)).module()
        for size in OTHER_SIZES:
            x = images(*size, batch=3)
            torch.testing.assert_close(program(x), model(x))

    @pytest.mark.parametrize('options', VARIANTS)
    def test_variants(self, tiny_vit, options):
        model = tiny_vit('sape2', depth=1, position_args={'sape2': options}, dynamic_img_size=True)
        program = torch.export.export(model, (images(),), dynamic_shapes=(dynamic_shapes(),)).module()
        for size in OTHER_SIZES[1:3]:
            x = images(*size)
            torch.testing.assert_close(program(x), model(x))


class TestOnnx:
    def check(self, model, path, sizes):
        onnxruntime = pytest.importorskip('onnxruntime')
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        for size in sizes:
            x = images(*size, batch=3)
            (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(out), model(x), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(
        ('position', 'dynamic'),
        [
            ('learned+sape2', False),
            *((name, True) for name in ('learned+sape2', 'relbias', 'rope', 'rope_mixed', 'liere', 'cope')),
        ],
    )
    def test_dynamo_exporter(self, tiny_vit, tmp_path, position, dynamic):
        pytest.importorskip('onnxscript')
        model = tiny_vit(position, dynamic_img_size=dynamic, reg_tokens=2, depth=1 if dynamic else 2)
        shapes = dynamic_shapes() if dynamic else {0: Dim('batch', max=64)}
        path = tmp_path / 'model.onnx'
        torch.onnx.export(model, (images(),), path, dynamo=True, dynamic_shapes=(shapes,), verbose=False)
        self.check(model, path, OTHER_SIZES if dynamic else [(56, 72)])

    def test_legacy_exporter(self, tiny_vit, tmp_path, position):
        pytest.importorskip('onnx')
        model, path = tiny_vit(position), tmp_path / 'model.onnx'
        axes = {'x': {0: 'batch'}}
        torch.onnx.export(
            model, (images(),), path, dynamo=False, opset_version=18, input_names=['x'], dynamic_axes=axes
        )
        self.check(model, path, [(56, 72)])
