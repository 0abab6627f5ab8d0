"""The command `timm-sape2 export`."""

import argparse

import pytest
import timm
import torch

from timm_sape2.__main__ import main
from timm_sape2.commands import export as command
from timm_sape2.trained.export import Exported


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of train.py."""
    torch.manual_seed(0)
    model = timm.create_model('test_vit_sape2', num_classes=3, depth=1)
    args = argparse.Namespace(model='test_vit_sape2', num_classes=3, model_kwargs={'depth': 1})
    torch.save({'state_dict': model.state_dict(), 'args': args, 'class_names': ['a', 'b', 'c']}, tmp_path / 'last.pth')
    return tmp_path / 'last.pth'


@pytest.fixture
def given(monkeypatch):
    """The models that were to be exported; nothing is."""
    models = []

    def export_onnx(trained, path):
        path.write_bytes(b'onnx')
        models.append(trained.model)
        return Exported(('batch', 3, 64, 64), 20, [(64, 64)], 1e-6)

    monkeypatch.setattr(command, 'export_onnx', export_onnx)
    return models


def test_a_checkpoint(checkpoint, tmp_path, caplog):
    onnxruntime = pytest.importorskip('onnxruntime')
    output = tmp_path / 'new' / 'vit.onnx'
    assert main(['export', str(checkpoint), '--output', str(output)]) is None
    session = onnxruntime.InferenceSession(output, providers=['CPUExecutionProvider'])
    assert session.get_inputs()[0].shape == ['batch', 3, 64, 64]
    images = torch.randn(2, 3, 64, 64)
    model = timm.create_model('test_vit_sape2', num_classes=3, depth=1).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=False)['state_dict'])
    with torch.inference_mode():
        expected = model(images)
    torch.testing.assert_close(torch.from_numpy(session.run(None, {'images': images.numpy()})[0]), expected)
    assert 'preprocessing' in session.get_modelmeta().custom_metadata_map
    assert f'{output}: ' in caplog.text and 'images of (batch, 3, 64, 64)' in caplog.text
    assert 'On images of 64x64, onnxruntime agrees with torch to ' in caplog.text


def test_names_of_classes_go_with_it(checkpoint, given, tmp_path):
    main(['export', str(checkpoint), '--output', str(tmp_path / 'vit.onnx')])
    assert given[0].pretrained_cfg['label_names'] == ['a', 'b', 'c']


def test_every_size(checkpoint, given, tmp_path):
    output = ['--output', str(tmp_path / 'vit.onnx')]
    main(['export', str(checkpoint), '--dynamic-size', *output])
    main(['export', str(checkpoint), '--dynamic-size', '--model-kwargs', 'dynamic_img_pad=True', *output])
    main(['export', str(checkpoint), '--img-size', '32', '48', *output])
    assert [(model.dynamic_img_size, model.patch_embed.dynamic_img_pad) for model in given] == [
        (True, False),
        (True, True),
        (False, False),
    ]
    assert given[2].patch_embed.img_size == (32, 48)


def test_the_name_of_a_model(given, tmp_path, caplog):
    flags = ['--model-kwargs', 'position=rope', '--output', str(tmp_path / 'vit.onnx')]
    main(['export', 'test_vit_sape2', *flags])
    assert given[0].position_name == 'rope' and not given[0].training
    assert 'test_vit_sape2 is the name of a model without weights, so what is exported is untrained' in caplog.text


@pytest.mark.parametrize('name', ['vit_compact_sape2_patch4_32.cifar10', 'vit_compact_sape2_patch4_32'])
def test_a_name_that_has_weights(name, given, tmp_path, caplog):
    main(['export', name, '--output', str(tmp_path / 'vit.onnx')])
    expected = timm.create_model('vit_compact_sape2_patch4_32.cifar10', pretrained=True)
    assert torch.equal(given[0].head.weight, expected.head.weight) and 'untrained' not in caplog.text


def test_a_file_that_is_called_as_a_model_is(checkpoint, given, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    checkpoint.rename('test_vit_sape2')
    main(['export', 'test_vit_sape2'])
    assert given[0].num_classes == 3 and (tmp_path / 'model.onnx').exists()
    assert 'untrained' not in caplog.text


def test_errors(refusal, tmp_path, given, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal('export', 'test_vit_sape2', '--output', 'model.pt') == '--output must end in .onnx, not model.pt'
    message = 'test_vit_sape2 and --model test_resnet are two models: give one of them'
    assert refusal('export', 'test_vit_sape2', '--model', 'test_resnet') == message
    assert refusal('export', 'nowhere').startswith('nowhere is no checkpoint, no folder')
    assert refusal('export', 'test_resnet', '--dynamic-size').startswith('cannot create test_resnet: ')
    (tmp_path / 'file').write_text('')
    message = refusal('export', 'test_vit_sape2', '--output', 'file/model.onnx')
    assert message.startswith('cannot write to the output folder file')
    (tmp_path / 'folder.onnx').mkdir()
    message = refusal('export', 'test_vit_sape2', '--output', 'folder.onnx')
    assert message == '--output must be a file, but folder.onnx is a folder'
    (tmp_path / 'folder.onnx').rmdir()
    monkeypatch.setattr('timm_sape2.trained.export.PACKAGES', ('onnxlost',))
    assert refusal('export', 'test_vit_sape2') == "export needs onnxlost: pip install 'timm_sape2[export]'"
    assert not given and [path.name for path in tmp_path.iterdir()] == ['file']
