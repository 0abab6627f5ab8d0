"""Opening what was trained: checkpoint, folder, repository."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_sape2.trained.opening import fingerprint, open_model


@pytest.fixture
def checkpoint(tmp_path):
    """Function that writes a checkpoint of a model on 48x64 images, with the given arguments of the run."""

    def write(name='last.pth.tar', **args):
        model = timm.create_model('test_vit_sape2', img_size=(48, 64), num_classes=3, depth=2)
        run = {'model': 'test_vit_sape2', 'model_kwargs': {'depth': 2}, 'input_size': (3, 48, 64), **args}
        torch.save({'state_dict': model.state_dict(), 'args': argparse.Namespace(**run), 'epoch': 4}, tmp_path / name)
        return tmp_path / name, model.eval()

    return write


def error(*args, **kwargs):
    with pytest.raises(ValueError) as raised:
        open_model(*args, **kwargs)
    return str(raised.value)


class TestCheckpoint:
    def test_it_says_what_it_is(self, checkpoint):
        path, model = checkpoint()
        opened = open_model(str(path))
        images = torch.randn(2, 3, 48, 64)
        assert torch.equal(opened.model(images), model(images))
        assert opened.data_config['input_size'] == (3, 48, 64)
        assert opened.weights == 'weights' and opened.training['epoch'] == 4

    def test_preprocessing_of_the_run(self, checkpoint):
        path, _ = checkpoint(mean=[0.1, 0.2, 0.3], crop_pct=0.5, interpolation='')
        config = open_model(str(path)).data_config
        assert config['mean'] == (0.1, 0.2, 0.3) and config['crop_pct'] == 0.5 and config['interpolation'] == 'bicubic'

    def test_flags_of_timms_script(self, checkpoint):
        path, model = checkpoint(
            input_size=None, img_size=None, gp=None, model_kwargs={'depth': 2, 'img_size': (48, 64)}
        )
        assert fingerprint(open_model(str(path)).model) == fingerprint(model)

    def test_another_size_resamples_as_the_checkpoint_filter_does(self, checkpoint):
        path, _ = checkpoint()
        opened = open_model(str(path), img_size=(80, 32))
        assert opened.model.patch_embed.grid_size == (5, 2) and opened.data_config['input_size'] == (3, 80, 32)

    def test_folder_of_the_run(self, checkpoint):
        path, model = checkpoint()
        opened = open_model(str(path.parent))
        assert fingerprint(opened.model) == fingerprint(model)
        assert opened.run == path.parent and opened.folder is None

    def test_it_is_of_another_position_encoding(self, tmp_path):
        """Rotary and no encoding have the same weights: only the record of the run tells them apart."""
        model = timm.create_model('test_vit_sape2', position='rope')
        args = argparse.Namespace(model='test_vit_sape2', model_kwargs={'position': 'rope'})
        path = tmp_path / 'last.pth.tar'
        torch.save({'state_dict': model.state_dict(), 'args': args}, path)
        message = f"{path} does not load as test_vit_sape2: it was trained with position='rope', not 'nope'"
        assert error(str(path), model_kwargs={'position': 'nope'}) == message
        assert open_model(str(path), 'test_vit_sape2', {'position': 'rope'}).model.position_name == 'rope'

    def test_plain_timm_becomes_one_of_ours(self, tmp_path):
        """timm's models do not say their encoding, and their weights are converted."""
        model = timm.create_model('vit_tiny_patch16_224', depth=1, num_classes=3)
        args = argparse.Namespace(model='vit_tiny_patch16_224', model_kwargs={'depth': 1})
        path = tmp_path / 'last.pth.tar'
        torch.save({'state_dict': model.state_dict(), 'args': args}, path)
        opened = open_model(str(path), 'vit_tiny_sape2', {'depth': 1, 'position': 'learned'})
        images = torch.randn(1, 3, 224, 224)
        torch.testing.assert_close(opened.model(images), model.eval()(images))

    def test_size_of_a_dynamic_model(self, checkpoint):
        path, _ = checkpoint()
        opened = open_model(str(path), model_kwargs={'dynamic_img_size': True}, img_size=(80, 32))
        assert opened.data_config['input_size'] == (3, 80, 32)

    def test_moving_average_and_its_absence(self, checkpoint, caplog):
        path, model = checkpoint()
        content = torch.load(path, weights_only=False)
        average = {name: tensor + 1 for name, tensor in content['state_dict'].items()}
        torch.save({**content, 'state_dict_ema': average}, path)
        with caplog.at_level('INFO'):
            opened = open_model(str(path))
        assert torch.equal(opened.model.head.bias, model.head.bias + 1)
        assert opened.weights == 'moving average of the weights'
        assert f'{path} has a moving average of the weights, which is taken' in caplog.text
        assert fingerprint(open_model(str(path), ema=False).model) == fingerprint(model)

    @pytest.mark.parametrize(
        ('names', 'taken'),
        [
            (['ape', 'bee', 'cat'], ['ape', 'bee', 'cat']),
            (None, None),
            (['ape', 'bee'], None),
            ([1, 2, 3], None),
            ('abc', None),
            (['ape', 'bee', '\x1b[2J'], None),
        ],
    )
    def test_names_of_the_classes(self, checkpoint, names, taken):
        path, _ = checkpoint()
        torch.save({**torch.load(path, weights_only=False), 'class_names': names}, path)
        assert open_model(str(path)).class_names == taken

    def test_bare_weights_need_the_name_of_the_model(self, tmp_path):
        model = timm.create_model('test_vit_sape2', num_classes=7)
        save_file(model.state_dict(), tmp_path / 'weights.safetensors')
        path = str(tmp_path / 'weights.safetensors')
        assert error(path) == f'{path} does not say which model it is of: add --model NAME'
        assert open_model(path, 'test_vit_sape2').model.num_classes == 7

    def test_weights_of_another_model(self, checkpoint):
        path, _ = checkpoint()
        message = error(str(path), 'vit_compact_sape2_patch4_32')
        assert message.startswith(f'{path} does not load as vit_compact_sape2_patch4_32: ')
        assert (
            error(str(path), 'no_such_model') == f'{path} does not load as no_such_model: Unknown model (no_such_model)'
        )

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r'no checkpoint run/last\.pth\.tar'):
            open_model('run/last.pth.tar')

    def test_models_of_timm(self, tmp_path):
        model = timm.create_model('test_vit', num_classes=3)
        torch.save({'state_dict': model.state_dict(), 'args': argparse.Namespace(model='test_vit')}, tmp_path / 'm.pth')
        assert fingerprint(open_model(str(tmp_path / 'm.pth')).model) == fingerprint(model)


class TestFolder:
    def test_with_and_without_its_prefix(self, tmp_path):
        model = timm.create_model('test_vit_sape2', num_classes=3)
        timm.models.save_for_hf(model, tmp_path, {'label_names': ['a', 'b', 'c']}, safe_serialization=True)
        for source in (str(tmp_path), f'local-dir:{tmp_path}'):
            opened = open_model(source)
            assert fingerprint(opened.model) == fingerprint(model)
            assert opened.folder == tmp_path and opened.class_names == ['a', 'b', 'c']
        assert error(str(tmp_path), 'vit_small_sape2') == f'{tmp_path} is a test_vit_sape2, not a vit_small_sape2'
        assert open_model(str(tmp_path), img_size=(32, 48)).model.patch_embed.grid_size == (2, 3)

    def test_what_is_nothing(self):
        assert error('nothing') == 'nothing is no checkpoint, no folder and no OWNER/NAME on the Hub'


def test_fingerprint_is_of_names_and_values():
    torch.manual_seed(0)
    model = timm.create_model('test_vit_sape2')
    first = fingerprint(model)
    with torch.no_grad():
        model.head.bias[0] += 1e-7
    assert len(first) == 64 and fingerprint(model) != first
