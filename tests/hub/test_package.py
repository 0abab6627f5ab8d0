"""The folder that the Hub gets."""

import json
import shutil

import pytest
import timm
import torch
import yaml
from safetensors import SafetensorError

from timm_sape2.hub.files import FILES
from timm_sape2.hub.package import write_package
from timm_sape2.trained.opening import TrainedModel, open_model
from timm_sape2.trained.prediction import predict
from timm_sape2.training.arguments import parse_arguments
from timm_sape2.training.run_folder import add_to_record, begin_record, write_arguments


@pytest.fixture
def trained(checkpoint):
    return open_model(str(checkpoint))


def error(*args, **kwargs):
    with pytest.raises(ValueError) as raised:
        write_package(*args, **kwargs)
    return str(raised.value)


def test_its_files(package):
    assert sorted(file.name for file in package.iterdir()) == sorted(set(FILES) - {'pretrain.yaml'})


def test_the_configuration(package, trained):
    config = json.loads((package / 'config.json').read_text())
    assert config['plugin'] == 'timm_sape2'
    assert config['model_args']['embed_dim'] == 32 and config['model_args']['img_size'] == [32, 48]
    assert config['pretrained_cfg']['input_size'] == [3, 32, 48]
    assert config['pretrained_cfg']['tag'] is None
    assert config['num_classes'] == 5 and 'num_classes' not in config['model_args']


def test_transformers_loads_it(package):
    transformers = pytest.importorskip('transformers')
    image = package / 'probe.png'
    classify = transformers.pipeline('image-classification', model=str(package), device='cpu')
    (ours,) = predict(open_model(str(package)), [image], top_k=5)
    theirs = classify(str(image), top_k=5)
    assert [entry['label'] for entry in theirs] == [f'LABEL_{entry.index}' for entry in ours.classes]
    scores = [entry['score'] for entry in theirs], [entry.probability for entry in ours.classes]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    model = transformers.AutoModelForImageClassification.from_pretrained(package)
    assert model.timm_model.num_classes == 5


def test_the_readme_of_something_else_stays(trained, tmp_path):
    (tmp_path / 'README.md').write_text('# A project')
    with pytest.raises(ValueError, match=r'README\.md is not the card of a model: choose another folder'):
        write_package(tmp_path, trained, 'owner/vit')
    assert [path.read_text() for path in tmp_path.iterdir()] == ['# A project']


def test_metrics_come_from_the_checkpoint(package):
    metrics = json.loads((package / 'metrics.json').read_text())
    assert metrics['top1'] == 61.5 and metrics['measured_by'] == 'training, after epoch 6'


def test_the_metric_of_the_moving_average_is_not_that_of_the_weights(checkpoint, tmp_path):
    write_package(tmp_path, open_model(str(checkpoint), ema=False), 'owner/vit')
    assert list(json.loads((tmp_path / 'metrics.json').read_text())) == ['probe']


@pytest.mark.parametrize('metric', [float('nan'), None, '61.5'])
def test_what_is_no_metric(trained, tmp_path, metric):
    training = dict(trained.training, metric=metric)
    write_package(tmp_path, TrainedModel(trained.model, training=training), 'owner/vit')
    assert '## Results\n\nNot measured.' in (tmp_path / 'README.md').read_text()


def test_the_recipe_comes_from_the_checkpoint_and_train_py_takes_it(package, tmp_path):
    recipe = yaml.safe_load((package / 'train.yaml').read_text())
    assert recipe['epochs'] == 7 and recipe['lr'] == 0.002 and recipe['model'] == 'test_vit_sape2'
    args = parse_arguments(['-c', str(package / 'train.yaml')], tmp_path)
    assert args.img_size == (32, 48) and args.model_kwargs['embed_dim'] == 32


def test_nothing_of_the_machine_is_in_it(package):
    for file in package.iterdir():
        assert b'somebody' not in file.read_bytes() and b'secret-project' not in file.read_bytes(), file.name


def test_own_license_class_names_recipe_and_metrics(trained, package, tmp_path):
    recipe, metrics = tmp_path / 'mine.yaml', tmp_path / 'mine.json'
    recipe.write_text('epochs: 3\n')
    recipe.with_name('pretrain.yaml').write_text('epochs: 2\n')
    measured = json.loads((package / 'metrics.json').read_text())
    metrics.write_text(json.dumps(measured | {'top1': 62.0}))
    names = ['rose', 'tulip', 'lily', 'iris', 'poppy']
    folder = tmp_path / 'folder'
    write_package(folder, trained, 'owner/vit.flowers', 'cc-by-4.0', metrics, recipe, names)
    config = json.loads((folder / 'config.json').read_text())
    assert config['label_names'] == names
    assert config['pretrained_cfg']['license'] == 'cc-by-4.0' and config['pretrained_cfg']['tag'] == 'flowers'
    assert (folder / 'train.yaml').read_text() == 'epochs: 3\n'
    assert (folder / 'pretrain.yaml').read_text() == 'epochs: 2\n'
    assert '| top-1 accuracy | 62.00 % |' in (folder / 'README.md').read_text()
    assert open_model(str(folder)).class_names == names


def test_what_training_took_comes_from_the_folders_of_the_runs(checkpoint, tmp_path):
    """Two runs: the second one, whose checkpoint is packed, started from the weights of the first."""
    for name, before, seconds in (('first', None, 9.0), ('second', tmp_path / 'first' / 'last.pth.tar', 4.0)):
        run = tmp_path / name
        run.mkdir()
        write_arguments(run, {'pretrained_path': str(before) if before else ''})
        begin_record(run, 0, processes=1)
        add_to_record(run, 0, 3600, training_seconds=seconds, validation_seconds=0)
    shutil.copy(checkpoint, tmp_path / 'second' / 'last.pth.tar')
    write_package(tmp_path / 'out', open_model(str(tmp_path / 'second' / 'last.pth.tar')), 'owner/vit')
    training = json.loads((tmp_path / 'out' / 'metrics.json').read_text())['training']
    assert [run['images_per_second'] for run in training] == [400, 900]
    metrics = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    (tmp_path / 'new.json').write_text(json.dumps({'top1': 62.0, 'fingerprint': metrics['fingerprint']}))
    write_package(tmp_path / 'again', open_model(str(tmp_path / 'out')), 'owner/vit', metrics=tmp_path / 'new.json')
    assert json.loads((tmp_path / 'again' / 'metrics.json').read_text())['training'] == training


def test_the_recipe_of_a_run_before_as_the_recipe(trained, tmp_path):
    (tmp_path / 'pretrain.yaml').write_text('epochs: 2\n')
    write_package(tmp_path / 'out', trained, 'owner/vit', recipe=tmp_path / 'pretrain.yaml')
    assert (tmp_path / 'out' / 'train.yaml').read_text() == 'epochs: 2\n'
    assert not (tmp_path / 'out' / 'pretrain.yaml').exists()


def test_classes_and_recipe_of_the_digits(tmp_path):
    model = timm.create_model('vit_compact_sape2_patch4_32', img_size=16).eval()
    model.pretrained_cfg['label_names'] = list('0123456789')
    args = {'dataset': 'digits', 'num_classes': 10, 'model': 'vit_compact_sape2_patch4_32', 'val_split': 'validation'}
    write_package(tmp_path, TrainedModel(model, training={'args': args, 'epoch': 1, 'metric': 9.5}), 'owner/vit.digits')
    assert open_model(str(tmp_path)).class_names == list('0123456789')
    assert 'label_names' not in json.loads((tmp_path / 'config.json').read_text())['pretrained_cfg']
    assert 'It was trained on the handwritten digits of scikit-learn.' in (tmp_path / 'README.md').read_text()


def test_classes_have_the_names_that_they_had_in_training(checkpoint, tmp_path):
    """Not those of a folder that lies where the data of training lay."""
    content = torch.load(checkpoint, weights_only=False)
    content['args'].data_dir = str(tmp_path / 'data')
    for name in ('b10', 'b9', 'a', 'c', 'd'):
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
    for names in (None, ['rose', 'tulip', 'lily', 'iris', 'poppy']):
        torch.save(content | {'class_names': names}, tmp_path / 'last.pth.tar')
        write_package(tmp_path / 'out', open_model(str(tmp_path / 'last.pth.tar')), 'owner/vit')
        assert open_model(str(tmp_path / 'out')).class_names == names


def test_flags_of_another_script_are_no_recipe(trained, tmp_path):
    args = dict(trained.training['args'], jsd_loss=True)
    write_package(tmp_path, TrainedModel(trained.model, training={'args': args}), 'owner/vit')
    assert not (tmp_path / 'train.yaml').exists()


def test_gray_images(tmp_path):
    model = timm.create_model('test_vit_sape2', in_chans=1, num_classes=3).eval()
    write_package(tmp_path, TrainedModel(model), 'owner/vit')
    assert open_model(str(tmp_path)).data_config['input_size'] == (1, 64, 64)


class TestRefusals:
    def test_models_of_timm(self, tmp_path):
        model = TrainedModel(timm.create_model('test_vit').eval())
        message = 'VisionTransformer is not a model of timm_sape2; timm.models.push_to_hf_hub pushes it'
        assert error(tmp_path, model, 'owner/vit') == message

    def test_weights_that_are_not_finite(self, tmp_path):
        model = timm.create_model('test_vit_sape2').eval()
        with torch.no_grad():
            model.head.bias[0] = float('nan')
        assert error(tmp_path, TrainedModel(model), 'owner/vit') == 'weights that are not finite: head.bias'

    def test_metrics_of_other_weights(self, trained, tmp_path):
        (tmp_path / 'metrics.json').write_text('{"top1": 99.9, "fingerprint": "abc"}')
        message = f'{tmp_path}/metrics.json was measured on other weights: run `timm-sape2 validate --json` on these'
        assert error(tmp_path / 'out', trained, 'owner/vit', metrics=tmp_path / 'metrics.json') == message

    def test_metrics_that_are_not_there(self, trained, package, tmp_path):
        for model in (trained, open_model(str(package))):
            with pytest.raises(FileNotFoundError, match=r'no file .*/none\.json'):
                write_package(tmp_path / 'out', model, 'owner/vit', metrics=tmp_path / 'none.json')

    def test_recipes_that_train_py_does_not_take(self, trained, tmp_path):
        (tmp_path / 'train.yaml').write_text('epochz: 3\n')
        message = f"{tmp_path}/train.yaml: unknown key 'epochz' (did you mean 'epochs'?)"
        assert error(tmp_path / 'out', trained, 'owner/vit', recipe=tmp_path / 'train.yaml') == message

    def test_too_few_class_names(self, trained, tmp_path):
        message = '2 names for the 5 classes of the model'
        assert error(tmp_path / 'out', trained, 'owner/vit', class_names=['a', 'b']) == message

    def test_channels_that_images_do_not_have(self, tmp_path):
        model = timm.create_model('test_vit_sape2', in_chans=4).eval()
        message = 'the model takes 4 channels, but images have 1 or 3'
        assert error(tmp_path, TrainedModel(model), 'owner/vit') == message

    def test_the_folder_that_the_model_comes_from(self, package, tmp_path):
        message = f'{package} is where the model comes from: choose another folder'
        assert error(package, open_model(str(package)), 'owner/vit') == message

    def test_nothing_is_written_before(self, trained, tmp_path):
        error(tmp_path / 'out', trained, 'owner/vit', class_names=['a'])
        assert not (tmp_path / 'out').exists()

    def test_a_disk_that_is_full(self, trained, tmp_path, monkeypatch):
        def full(*arguments, **options):
            raise SafetensorError('I/O error: No space left on device')

        monkeypatch.setattr('timm_sape2.hub.package.save_file', full)
        with pytest.raises(OSError, match=r'cannot write .*model.safetensors: I/O error: No space left on device'):
            write_package(tmp_path, trained, 'owner/vit')
