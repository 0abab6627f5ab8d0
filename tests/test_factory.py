"""`timm_sape2.create_model` is timm's, but its errors say what to do. (Those of the Hub are in tests/hub.)"""

import inspect
import json

import pytest
import timm
import torch

import timm_sape2


@pytest.fixture
def folder(tmp_path):
    """Function that writes config.json of a tiny model, changed, and weights."""

    def write(weights=True, **changes):
        model = timm.create_model('test_vit_sape2', num_classes=3)
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        config = json.loads((tmp_path / 'config.json').read_text())
        (tmp_path / 'config.json').write_text(json.dumps({**config, **changes}))
        if not weights:
            (tmp_path / 'model.safetensors').unlink()
        return tmp_path

    return write


def error(*args, **kwargs):
    with pytest.raises(ValueError) as raised:
        timm_sape2.create_model(*args, **kwargs)
    return str(raised.value)


class TestSameAsTimm:
    @pytest.mark.parametrize('name', ['test_vit_sape2', 'test_vit', 'test_vit_sape2.untrained'])
    def test_models_by_name(self, name):
        models = []
        for create_model in (timm.create_model, timm_sape2.create_model):
            torch.manual_seed(0)
            models.append(create_model(name, num_classes=3, drop_rate=None))
        for (name, expected), (_, tensor) in zip(*(model.state_dict().items() for model in models), strict=True):
            assert torch.equal(tensor, expected), name
        assert models[0].pretrained_cfg == models[1].pretrained_cfg

    def test_a_folder(self, folder):
        path = folder()
        ours, theirs = (f(f'local-dir:{path}', True) for f in (timm_sape2.create_model, timm.create_model))
        assert ours.pretrained_cfg == theirs.pretrained_cfg
        assert torch.equal(ours.head.weight, theirs.head.weight)

    def test_arguments_by_position(self):
        assert list(inspect.signature(timm.create_model).parameters)[:2] == ['model_name', 'pretrained']
        overlay = {'num_classes': 4}
        assert timm_sape2.create_model('test_vit_sape2', False, None, overlay).num_classes == 4

    def test_unknown_arguments_are_type_errors(self):
        with pytest.raises(TypeError, match='depht'):
            timm_sape2.create_model('test_vit_sape2', depht=3)

    def test_the_error_of_timm_is_kept(self):
        with pytest.raises(ValueError) as raised:
            timm_sape2.create_model('test_vit_sape2', pretrained=True)
        assert isinstance(raised.value.__cause__, RuntimeError)


class TestErrors:
    def test_unknown_model(self):
        reason = 'no such model, or a package that registers it is still to be imported'
        close = 'vit_small_sape2, vit_tiny_sape2, vit_base_sape2'
        assert error('vit_smal_sape2').startswith(f'vit_smal_sape2: {reason}; close names: vit_small_sape2')
        assert error('x' * 40) == f'{"x" * 40}: {reason}'
        assert close.split(', ')[0] in error('vit_smal_sape2')

    def test_no_weights(self):
        reason = 'no weights are published under this name; hf-hub:OWNER/NAME and local-dir:FOLDER name some'
        assert error('vit_small_sape2', pretrained=True) == f'vit_small_sape2: {reason}'

    def test_missing_folder_and_files(self, folder, tmp_path):
        assert error('local-dir:nowhere') == 'local-dir:nowhere: no such folder'
        assert error(f'local-dir:{tmp_path}') == f'local-dir:{tmp_path}: no config.json in the folder'
        path = folder(weights=False)
        reason = 'no weights in the folder, model.safetensors is missing'
        assert error(f'local-dir:{path}', pretrained=True) == f'local-dir:{path}: {reason}'

    def test_a_repository_without_its_source(self):
        assert "Use 'hf-hub:owner/vit'" in error('owner/vit')

    def test_a_key_of_the_configuration(self, folder):
        path = folder(model_args={'depht': 3})
        assert error(f'local-dir:{path}') == f"local-dir:{path}: config.json: model_args: unknown 'depht'"

    def test_a_package_that_is_not_imported(self, folder):
        path = folder(architecture='vit_of_others', plugin='others')
        reason = "unknown architecture 'vit_of_others': `import others` before creating it"
        assert error(f'local-dir:{path}') == f'local-dir:{path}: {reason}'
        path = folder(architecture='vit_of_others', plugin='\x1b[2J; rm')
        reason = "unknown architecture 'vit_of_others': import the package that registers it before creating it"
        assert error(f'local-dir:{path}') == f'local-dir:{path}: {reason}'

    def test_a_size_that_does_not_match(self, folder):
        path = folder()
        weights = timm.create_model('test_vit_sape2', num_classes=7).state_dict()
        torch.save(weights, path / 'pytorch_model.bin')
        (path / 'model.safetensors').unlink()
        message = error(f'local-dir:{path}', pretrained=True)
        assert message == (
            f'local-dir:{path}: The checkpoint does not fit, nothing was loaded; '
            'wrong shapes: head.bias (7,) instead of (3,), head.weight (7, 64) instead of (3, 64).'
        )

    def test_a_size_that_does_not_match_in_a_model_of_timm(self, tmp_path):
        timm.models.save_for_hf(timm.create_model('test_vit', num_classes=3), tmp_path, safe_serialization=True)
        config = json.loads((tmp_path / 'config.json').read_text())
        config['model_args']['num_classes'] = config['num_classes'] = config['pretrained_cfg']['num_classes'] = 5
        (tmp_path / 'config.json').write_text(json.dumps(config))
        message = error(f'local-dir:{tmp_path}', pretrained=True)
        assert message.startswith(f'local-dir:{tmp_path}: the weights do not fit: ') and 'size mismatch' in message

    @pytest.mark.parametrize('content', ['pickle', 'garbage'])
    def test_pickled_weights_are_never_executed(self, folder, content):
        path = folder(weights=False)
        if content == 'pickle':
            torch.save({'head.bias': inspect.currentframe}, path / 'pytorch_model.bin')
            reason = 'its weights are pickled Python objects, which may run code; ask the owner for model.safetensors'
        else:
            torch.save({'head.bias': torch.ones(5000)}, path / 'pytorch_model.bin')
            whole = (path / 'pytorch_model.bin').read_bytes()
            (path / 'pytorch_model.bin').write_bytes(whole[: len(whole) // 2])
            reason = 'the file of weights is truncated or no weights'
        assert error(f'local-dir:{path}', pretrained=True) == f'local-dir:{path}: {reason}'
