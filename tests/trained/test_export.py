"""Models as files of ONNX that compute the same."""

import json
import shutil
import types

import pytest
import timm
import torch

from timm_sape2.trained import export
from timm_sape2.trained.export import compare, export_onnx, free_dimensions, metadata, sizes_to_compare
from timm_sape2.trained.opening import TrainedModel

onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')


def trained_model(seed=0, **options):
    torch.manual_seed(seed)
    model = timm.create_model('test_vit_sape2', depth=1, num_classes=3, in_chans=1, **options).eval()
    model.pretrained_cfg['label_names'] = ['ape', 'bee', 'cat']
    return TrainedModel(model)


def onnx_outputs(path, images):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(['logits'], {'images': images.numpy()})[0])


@pytest.fixture(scope='module')
def trained():
    return trained_model(dynamic_img_size=True)


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
    """The file of a model of any size, in place of an older file, and what is said of it."""
    path = tmp_path_factory.mktemp('onnx') / 'model.onnx'
    path.write_text('older')
    return path, export_onnx(trained, path)


class TestExport:
    def test_what_it_says(self, exported):
        path, said = exported
        assert said.inputs == ('batch', 1, '16*rows', '16*columns') and said.opset >= 18
        assert said.sizes == [(64, 64), (80, 96), (32, 48)] and 0 < said.difference < 5e-3
        assert [file.name for file in path.parent.iterdir()] == ['model.onnx']

    @pytest.mark.parametrize('shape', [(5, 1, 64, 64), (1, 1, 48, 160)])
    def test_the_file_computes_what_the_model_does(self, exported, trained, shape):
        """On batches and sizes of which none was compared when it was made."""
        images = torch.randn(shape)
        with torch.inference_mode():
            expected = trained.model(images)
        torch.testing.assert_close(onnx_outputs(exported[0], images), expected, rtol=1e-3, atol=1e-3)

    def test_it_knows_classes_and_preprocessing(self, exported, trained):
        session = onnxruntime.InferenceSession(exported[0], providers=['CPUExecutionProvider'])
        said = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
        assert said['class_names'] == ['ape', 'bee', 'cat']
        mean = list(trained.data_config['mean'])
        assert said['preprocessing']['mean'] == mean and said['preprocessing']['input_size'] == [1, 64, 64]
        without = TrainedModel(timm.create_model('test_vit_sape2', num_classes=3))
        assert list(metadata(without)) == ['preprocessing']

    def test_any_size_with_padding(self, tmp_path):
        trained = trained_model(dynamic_img_size=True, dynamic_img_pad=True, position='nope')
        said = export_onnx(trained, tmp_path / 'model.onnx')
        assert said.inputs == ('batch', 1, 'height', 'width') and said.sizes[-1] == (65, 66)
        images = torch.randn(2, 1, 71, 50)
        with torch.inference_mode():
            expected = trained.model(images)
        torch.testing.assert_close(onnx_outputs(tmp_path / 'model.onnx', images), expected, rtol=1e-3, atol=1e-3)


class TestRefusal:
    def test_what_computes_something_else_is_not_written(self, trained, exported, tmp_path, monkeypatch):
        """The program of other weights takes the place of that of the model."""

        def save(copy, external_data):
            assert not external_data
            shutil.copy(exported[0], copy)

        program = types.SimpleNamespace(model=types.SimpleNamespace(metadata_props={}), save=save)
        path = tmp_path / 'model.onnx'
        path.write_text('older')
        monkeypatch.setattr(export, 'onnx_program', lambda trained: program)
        with pytest.raises(ValueError, match=r'onnxruntime computes .* by .* for 1 images of 64x64; other versions'):
            export_onnx(trained_model(seed=1, dynamic_img_size=True), path)
        assert path.read_text() == 'older' and len(list(tmp_path.iterdir())) == 1

    def test_outputs_that_are_no_numbers(self, exported):
        trained = trained_model(dynamic_img_size=True)
        torch.nn.init.constant_(trained.model.head.bias, torch.nan)
        with pytest.raises(ValueError, match='by nan of the largest output'):
            compare(trained, exported[0], [(64, 64)])

    def test_what_torch_cannot_export(self, tmp_path):
        class Undecided(torch.nn.Module):
            num_classes = 2

            def __init__(self):
                super().__init__()
                self.pretrained_cfg = {'input_size': (3, 8, 8)}

            def forward(self, images):
                return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))

        with pytest.raises(ValueError, match=r'^the model cannot be exported: .*data-dependent'):
            export_onnx(TrainedModel(Undecided()), tmp_path / 'model.onnx')
        assert not list(tmp_path.iterdir())

    def test_too_large_for_a_file(self, trained, tmp_path, monkeypatch):
        monkeypatch.setattr(export, 'MOST_BYTES', 1000)
        with pytest.raises(ValueError, match=r'the weights have .* GB, but a file of ONNX holds 2 GB at most'):
            export_onnx(trained, tmp_path / 'model.onnx')

    def test_without_the_packages(self, trained, tmp_path, monkeypatch):
        monkeypatch.setattr(export, 'PACKAGES', ('onnx', 'onnxmissing', 'onnxlost'))
        with pytest.raises(ValueError, match=r"export needs onnxmissing, onnxlost: pip install 'timm_sape2\[export\]'"):
            export_onnx(trained, tmp_path / 'model.onnx')


class TestSizes:
    """Patches of 16 pixels."""

    def test_a_model_of_one_size(self):
        trained = trained_model(img_size=(32, 48))
        assert list(free_dimensions(trained.model)) == [0] and sizes_to_compare(trained) == [(32, 48)]

    def test_every_size_that_the_patches_divide(self):
        trained = trained_model(dynamic_img_size=True, img_size=(32, 48))
        assert list(free_dimensions(trained.model)) == [0, 2, 3]
        assert sizes_to_compare(trained) == [(32, 48), (48, 80), (32, 48)]

    def test_any_size(self):
        trained = trained_model(dynamic_img_size=True, dynamic_img_pad=True)
        assert [size.__name__ for size in free_dimensions(trained.model).values()] == ['batch', 'height', 'width']
        assert (65, 66) in sizes_to_compare(trained)

    @pytest.mark.parametrize('name', ['test_resnet', 'vit_tiny_r_s16_p8_224'])
    def test_models_whose_sizes_are_not_known(self, name):
        model = timm.create_model(name, device='meta', **({'dynamic_img_size': True} if 'vit' in name else {}))
        assert list(free_dimensions(model)) == [0]
