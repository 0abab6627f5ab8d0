"""Opening what was trained: checkpoint, folder, repository."""

import argparse
import inspect
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed

from timm_sape2.trained.opening import fingerprint, open_model, split_revision


@pytest.fixture
def checkpoint(tmp_path):
    """Function that writes a checkpoint of a model on 48x64 images, with the given arguments of the run."""

    def write(name='last.pth.tar', **args):
        run = {'model': 'test_vit_sape2', 'model_kwargs': {'depth': 2}, 'input_size': (3, 48, 64), **args}
        model = timm.create_model('test_vit_sape2', **{'img_size': (48, 64), 'num_classes': 3, **run['model_kwargs']})
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

    @pytest.mark.parametrize('kwargs', [{'position': 'sape2+learned'}, {'position_args': {'sape2': {'target': 'k'}}}])
    def test_the_same_encoding_in_other_words(self, checkpoint, kwargs):
        path, model = checkpoint()
        images = torch.randn(2, 3, 48, 64)
        assert torch.equal(open_model(str(path), model_kwargs=kwargs).model(images), model(images))

    @pytest.mark.parametrize(('trained', 'asked'), [('none', 'grid'), ('grid', 'none')])
    def test_options_that_change_nothing_on_the_grid_of_training_are_free(self, checkpoint, trained, asked):
        path, model = checkpoint(model_kwargs={'position_args': {'sape2': {'distance_scale': trained}}})
        free = {'position_args': {'sape2': {'distance_scale': asked, 'recompute': True}}}
        images = torch.randn(2, 3, 48, 64)
        with torch.no_grad():
            torch.testing.assert_close(open_model(str(path), model_kwargs=free).model(images), model(images))

    def test_options_of_the_encoding(self, checkpoint):
        path, _ = checkpoint()
        message = error(str(path), model_kwargs={'position_args': {'sape2': {'target': 'q', 'axes': 'x'}}})
        assert message.endswith("it was trained with sape2 axes='xy', not 'x', sape2 target='k', not 'q'")

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
        assert f'{path} has an EMA of the weights, which is taken' in caplog.text
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
            error(str(path), 'no_such_model') == f'{path} does not load as no_such_model: unknown model no_such_model'
        )
        close = 'unknown model vit_smal_sape2; close names: vit_small_sape2, '
        assert error(str(path), 'vit_smal_sape2').startswith(f'{path} does not load as vit_smal_sape2: {close}')

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r'no checkpoint run/last\.pth\.tar'):
            open_model('run/last.pth.tar')

    def test_models_of_timm(self, tmp_path):
        model = timm.create_model('test_vit', num_classes=3)
        torch.save({'state_dict': model.state_dict(), 'args': argparse.Namespace(model='test_vit')}, tmp_path / 'm.pth')
        assert fingerprint(open_model(str(tmp_path / 'm.pth')).model) == fingerprint(model)


@pytest.fixture
def folder(tmp_path):
    """Function that writes a folder with config.json of a tiny model, changed, and weights."""

    def write(weights=True, **changes):
        model = timm.create_model('test_vit_sape2', num_classes=3)
        timm.models.save_for_hf(model, tmp_path, {'label_names': ['a', 'b', 'c']}, safe_serialization=True)
        config = json.loads((tmp_path / 'config.json').read_text())
        (tmp_path / 'config.json').write_text(json.dumps({**config, **changes}))
        if not weights:
            (tmp_path / 'model.safetensors').unlink()
        return tmp_path

    return write


class TestFolder:
    def test_with_and_without_its_prefix(self, folder):
        path = folder()
        expected = timm.create_model(f'local-dir:{path}', pretrained=True)
        for source in (str(path), f'local-dir:{path}'):
            opened = open_model(source)
            assert fingerprint(opened.model) == fingerprint(expected)
            assert opened.folder == path and opened.class_names == ['a', 'b', 'c']
            for key, value in resolve_model_data_config(expected).items():
                assert opened.data_config[key] == (tuple(value) if isinstance(value, list) else value), key
        assert error(str(path), 'vit_small_sape2') == f'{path} is a test_vit_sape2, not a vit_small_sape2'
        assert open_model(str(path), img_size=(32, 48)).model.patch_embed.grid_size == (2, 3)

    def test_the_license_stays(self, folder):
        path = folder()
        config = json.loads((path / 'config.json').read_text())
        path = folder(pretrained_cfg={**config['pretrained_cfg'], 'license': 'cc-by-4.0', 'tag': 'flowers'})
        cfg = open_model(str(path)).model.pretrained_cfg
        assert (cfg['license'], cfg['tag'], cfg['architecture']) == ('cc-by-4.0', 'flowers', 'test_vit_sape2')

    def test_another_size_of_a_grid_that_is_not_square(self, tmp_path):
        model = timm.create_model('test_vit_sape2', img_size=(48, 80))
        torch.nn.init.normal_(model.pos_embed)
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        expected = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=(80, 48))
        assert torch.equal(open_model(str(tmp_path), img_size=(80, 48)).model.pos_embed, expected.pos_embed)

    def test_a_model_of_timm(self, tmp_path):
        model = timm.create_model('test_vit', num_classes=3)
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        assert fingerprint(open_model(str(tmp_path)).model) == fingerprint(model)
        config = json.loads((tmp_path / 'config.json').read_text())
        config['model_args']['num_classes'] = config['num_classes'] = config['pretrained_cfg']['num_classes'] = 5
        (tmp_path / 'config.json').write_text(json.dumps(config))
        message = error(f'local-dir:{tmp_path}')
        assert message.startswith(f'local-dir:{tmp_path} does not load: ') and 'size mismatch' in message

    def test_it_is_of_another_position_encoding(self, tmp_path):
        timm.models.save_for_hf(timm.create_model('test_vit_sape2', position='rope'), tmp_path, safe_serialization=True)
        message = (
            f"local-dir:{tmp_path} does not load as test_vit_sape2: it was trained with position='rope', not 'nope'"
        )
        assert error(str(tmp_path), model_kwargs={'position': 'nope'}) == message

    def test_what_is_nothing(self):
        here = 'no model whose weights come with timm_sape2; these do: vit_'
        for name in ('nothing', 'vit_tiny_sape2', 'resnet50', 'vit_compact_sape2_patch4_32.untrained'):
            assert error(name).startswith(f'{name} is no checkpoint, no folder, no OWNER/NAME on the Hub and {here}')

    def test_missing_folder_and_files(self, folder, tmp_path):
        assert error('local-dir:nowhere') == 'local-dir:nowhere: no such folder'
        assert error(f'local-dir:{tmp_path}') == f'local-dir:{tmp_path}: no config.json in the folder'
        path = folder(weights=False)
        reason = 'no weights in the folder, model.safetensors is missing'
        assert error(f'local-dir:{path}') == f'local-dir:{path}: {reason}'

    def test_a_key_of_the_configuration(self, folder):
        path = folder(model_args={'depht': 3})
        message = error(f'local-dir:{path}')
        assert message.startswith(f'local-dir:{path}: config.json: model_args do not build test_vit_sape2: ')
        assert "'depht'" in message

    def test_a_package_that_is_not_imported(self, folder):
        path = folder(architecture='vit_of_others', plugin='others')
        reason = "unknown architecture 'vit_of_others': import the package that registers it first"
        assert error(f'local-dir:{path}') == f'local-dir:{path}: {reason}'

    def test_a_size_that_does_not_match(self, folder):
        path = folder(weights=False)
        weights = timm.create_model('test_vit_sape2', num_classes=7).state_dict()
        torch.save({**weights, 'norm.weight': torch.ones(63)}, path / 'pytorch_model.bin')
        message = error(f'local-dir:{path}')
        assert message.startswith(
            f'local-dir:{path} does not load as test_vit_sape2: The checkpoint does not fit, nothing'
        )
        assert 'norm.weight (63,) instead of (64,)' in message

    def test_weights_of_other_classes(self, folder):
        path = folder(weights=False)
        torch.save(timm.create_model('test_vit_sape2', num_classes=7).state_dict(), path / 'pytorch_model.bin')
        assert 'head.bias (7,) instead of (3,)' in error(f'local-dir:{path}')

    @pytest.mark.parametrize('content', ['pickle', 'garbage'])
    def test_pickled_weights_are_never_executed(self, folder, content):
        path = folder(weights=False)
        if content == 'pickle':
            torch.save({'head.bias': inspect.currentframe}, path / 'pytorch_model.bin')
            reason = 'holds pickled Python objects, which may run code'
        else:
            torch.save({'head.bias': torch.ones(5000)}, path / 'pytorch_model.bin')
            whole = (path / 'pytorch_model.bin').read_bytes()
            (path / 'pytorch_model.bin').write_bytes(whole[: len(whole) // 2])
            reason = 'is truncated or no checkpoint'
        assert error(f'local-dir:{path}') == f'{path}/pytorch_model.bin {reason}'


class TestToTrain:
    """What `--pretrained-path` takes: any source, adapted to the model that is asked for."""

    @pytest.fixture(params=['file', 'run', 'folder', 'local-dir'])
    def source(self, request, checkpoint, tmp_path):
        path, model = checkpoint()
        if request.param in ('file', 'run'):
            return str(path if request.param == 'file' else path.parent), model
        timm.models.save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
        return ('local-dir:' if request.param == 'local-dir' else '') + str(tmp_path / 'saved'), model

    def test_size_classes_and_channels(self, source):
        source, trained = source
        kwargs = {'depth': 2, 'img_size': (80, 32), 'num_classes': 5, 'in_chans': 1, 'drop_path_rate': 0.1}
        model = open_model(source, 'test_vit_sape2', kwargs, to_train=True).model
        assert (model.patch_embed.grid_size, model.num_classes, model.in_chans) == ((5, 2), 5, 1)
        assert torch.equal(model.blocks[1].mlp.fc1.weight, trained.blocks[1].mlp.fc1.weight)
        expected = resample_abs_pos_embed(trained.pos_embed, [5, 2], [3, 4])
        assert torch.equal(model.pos_embed, expected) and 'state_dict' not in model.pretrained_cfg

    def test_the_classifier_stays_where_the_classes_do(self, source):
        source, trained = source
        torch.manual_seed(1)
        model = open_model(source, 'test_vit_sape2', {'depth': 2, 'num_classes': 3}, to_train=True).model
        assert torch.equal(model.head.weight, trained.head.weight)

    def test_a_new_encoding_begins_at_its_initial_values_and_the_log_says_so(self, checkpoint, caplog):
        path, model = checkpoint()
        with caplog.at_level('INFO'):
            position = 'rope+sape2+learned'
            kwargs = {'depth': 2, 'img_size': (48, 64), 'position': position}
            started = open_model(str(path), 'test_vit_sape2', kwargs, to_train=True).model
        assert f'{path} was trained without rope; what is new begins at its initial values' in caplog.text
        assert torch.equal(started.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)

    def test_an_encoding_is_not_dropped(self, checkpoint):
        path, _ = checkpoint()
        for position, way_out in (('learned', 'learned+sape2'), ('rope', 'learned+sape2+rope')):
            message = error(str(path), 'test_vit_sape2', {'depth': 2, 'position': position}, to_train=True)
            assert message == (
                f"{path} does not load as test_vit_sape2: it was trained with position='learned+sape2', "
                f"not '{position}'; position='{way_out}' keeps what was trained"
            )

    def test_weights_of_timm(self, tmp_path):
        """Saved as timm does; a file of theirs is converted by the filter of the model, as `pretrained=True` is."""
        plain = timm.create_model('vit_tiny_patch16_224', depth=1, num_classes=3)
        timm.models.save_for_hf(plain, tmp_path, safe_serialization=True)
        kwargs = {'depth': 1, 'num_classes': 3, 'position': 'learned+sape2'}
        model = open_model(str(tmp_path), 'vit_tiny_sape2', kwargs, to_train=True).model
        assert torch.equal(model.head.weight, plain.head.weight)
        assert model.pretrained_cfg['architecture'] == 'vit_tiny_sape2'

    def test_no_weights(self, tmp_path):
        torch.save({'state_dict': {}}, tmp_path / 'empty.pth')
        message = f'{tmp_path}/empty.pth does not load as test_vit_sape2: there are no weights in it'
        assert error(str(tmp_path / 'empty.pth'), 'test_vit_sape2', to_train=True) == message


def test_a_checkpoint_is_read_once(checkpoint, monkeypatch):
    path, _ = checkpoint()
    reads = []
    load = torch.load
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: reads.append(args) or load(*args, **kwargs))
    open_model(str(path), model_kwargs={'position': 'sape2+learned'})
    assert len(reads) == 1
    open_model(str(path), 'test_vit_sape2', {'depth': 2}, to_train=True)
    assert len(reads) == 2


def test_a_patch_size_that_fits_the_size_of_the_run_alone(tmp_path):
    """Patches of 20 pixels on images of 40x60, of a model that is built for 64x64."""
    kwargs = {'patch_size': 20, 'depth': 2, 'num_classes': 3}
    model = timm.create_model('test_vit_sape2', img_size=(40, 60), **kwargs).eval()
    args = argparse.Namespace(model='test_vit_sape2', model_kwargs=kwargs, img_size=(40, 60))
    path = str(tmp_path / 'last.pth.tar')
    torch.save({'state_dict': model.state_dict(), 'args': args}, path)
    for opened in (
        open_model(path, model_kwargs={'drop_rate': 0.1}),
        open_model(path, 'test_vit_sape2', {**kwargs, 'img_size': (40, 60)}, to_train=True),
    ):
        assert fingerprint(opened.model) == fingerprint(model)


def test_fingerprint_is_of_names_and_values():
    torch.manual_seed(0)
    model = timm.create_model('test_vit_sape2')
    first = fingerprint(model)
    with torch.no_grad():
        model.head.bias[0] += 1e-7
    assert len(first) == 64 and fingerprint(model) != first


@pytest.mark.parametrize(
    ('source', 'parts'),
    [
        ('owner/vit', ('owner/vit', None)),
        ('hf-hub:owner/vit@v1', ('owner/vit', 'v1')),
        ('owner/vit@refs/pr/1', ('owner/vit', 'refs/pr/1')),
        ('owner/vit@', ('owner/vit', None)),
    ],
)
def test_split_revision(source, parts):
    assert split_revision(source) == parts
