"""The model card says what the files beside it say, and nothing else."""

import json
import re
import shutil

import pytest
import timm
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_sape2.hub.card import make_card, read_metrics, write_card


@pytest.fixture
def folder(package, tmp_path):
    """A copy of the package, called as a model of CIFAR-10."""
    copy = shutil.copytree(package, tmp_path / 'vit_tiny.cifar10')
    config = json.loads((copy / 'config.json').read_text())
    config['pretrained_cfg']['tag'] = 'cifar10'
    (copy / 'config.json').write_text(json.dumps(config))
    return copy


def section(card, title):
    return card.partition(f'## {title}\n\n')[2].partition('\n\n## ')[0]


def test_what_the_hub_reads(folder):
    metadata = ModelCard(make_card(folder, 'owner/vit_tiny.cifar10')).data
    assert metadata.license == 'apache-2.0' and metadata.library_name == 'timm'
    assert metadata.pipeline_tag == 'image-classification' and metadata.datasets == ['uoft-cs/cifar10']
    assert {'image-classification', 'timm', 'timm_sape2'} <= set(metadata.tags)
    (result,) = metadata.eval_results
    assert (result.metric_value, result.dataset_name, result.dataset_split) == (61.5, 'flowers', 'validation')


def test_the_snippet_imports_the_package_and_runs(folder, monkeypatch):
    card = make_card(folder, 'owner/vit_tiny.cifar10')
    code = section(card, 'Use it').partition('```python\n')[2].partition('```')[0]
    assert 'import timm_sape2' in code
    names = {}
    exec(code.replace('hf-hub:owner/vit_tiny.cifar10', f'local-dir:{folder}'), names)
    assert names['model'].num_classes == 5 and names['transform'] is not None


def test_another_size_as_the_card_says(folder):
    usage = section(make_card(folder, 'owner/vit_tiny.cifar10'), 'Use it')
    (call,) = re.findall(r'`(resolve_model_data_config\(.*\))`', usage)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, img_size=(48, 40))
    names = {'model': model, 'C': 3, 'H': 48, 'W': 40, 'resolve_model_data_config': resolve_model_data_config}
    images = create_transform(**eval(call, names))(Image.new('RGB', (100, 90))).unsqueeze(0)
    assert images.shape == (1, 3, 48, 40) and model.eval()(images).shape == (1, 5)


def test_the_snippet_without_weights_builds_the_same_architecture(folder):
    (folder / 'model.safetensors').unlink()
    card = make_card(folder)
    names = {}
    exec(section(card, 'Use it').partition('```python\n')[2].partition('```')[0], names)
    assert names['model'].embed_dim == 32 and names['model'].patch_embed.grid_size == (4, 6)


def test_results_are_those_of_the_metrics_file(folder):
    assert (
        section(make_card(folder), 'Results')
        == """\
| metric | flowers, split validation |
| --- | --- |
| top-1 accuracy | 61.50 % |

The weights here (the moving average of the weights), measured by training, after epoch 6."""
    )
    measured = {'top1': 50.0, 'top5': 100.0, 'loss': 1.25, 'num_images': 8, 'dataset': 'a|b', 'split': 'test'}
    measured |= {'top1_interval': [21.522, 78.478], 'input_size': [3, 32, 48]}
    versions = {'measured_by': 'timm-sape2 validate', 'versions': {'timm': '1.0'}}
    (folder / 'metrics.json').write_text(json.dumps(measured | versions))
    assert (
        section(make_card(folder), 'Results')
        == r"""| metric | a\|b, split test, 8 images at 32x48 |
| --- | --- |
| top-1 accuracy | 50.00 % (95 % interval 21.52 to 78.48) |
| top-5 accuracy | 100.00 % |
| cross-entropy | 1.2500 |

The weights here, measured by timm-sape2 validate with timm 1.0."""
    )


def test_nothing_is_claimed_without_weights_and_metrics(folder):
    (folder / 'model.safetensors').unlink()
    (folder / 'metrics.json').unlink()
    (folder / 'train.yaml').unlink()
    card = make_card(folder)
    assert '**No weights are published.**' in card and 'trained on' not in card.replace('to train it on', '')
    assert section(card, 'Results') == 'Not measured.'
    assert 'The recipe is not published.' in card and 'model-index' not in card and '## Check' not in card


def test_metrics_without_weights_are_those_of_a_run(folder):
    (folder / 'model.safetensors').unlink()
    card = make_card(folder)
    assert 'A run with the recipe below, whose weights are not published' in card
    assert 'model-index' not in card


def test_the_recipe_is_shown_as_it_is(folder):
    (folder / 'train.yaml').write_text('# Of flowers.\nepochs: 3\naug_repeats: 3\n')
    text = section(make_card(folder), 'Training')
    assert '```yaml\n# Of flowers.\nepochs: 3\naug_repeats: 3\n```' in text
    assert text.startswith('`torchrun --nproc_per_node=N -m timm_sape2 train -c train.yaml --data-dir DIR`')


def test_recipes_of_two_runs_and_what_they_took(folder):
    (folder / 'pretrain.yaml').write_text('dataset: digits\nepochs: 2\n')
    (folder / 'train.yaml').write_text('dataset: digits\nepochs: 1\n')
    run = {'epochs': 2, 'images_per_second': 400, 'hours': 0.5, 'processes': 2, 'hardware': 'A|B, 2 cores'}
    run |= {'torch': '2.11.0', 'commit': 'abc', 'date': '2026-11-22'}
    runs = [run, {**run, 'epochs': 1, 'hours': 0.0, 'commit': None}]
    (folder / 'metrics.json').write_text(json.dumps({'training': runs}))
    text, *code, took, table = section(make_card(folder), 'Training').rstrip().split('\n\n')
    commands = '`timm-sape2 train -c pretrain.yaml`, then `timm-sape2 train -c train.yaml`'
    assert text == f'{commands} of `timm_sape2` trains it, with pretrain.yaml and train.yaml:'
    assert code == ['```yaml\ndataset: digits\nepochs: 2\n```', '```yaml\ndataset: digits\nepochs: 1\n```']
    assert took == 'What training took, one run after the other:'
    assert (
        table
        == r"""| run | epochs | images per second | hours | processes | hardware | torch | commit | date |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 1 | 2 | 400 | 0.5 | 2 | A\|B, 2 cores | 2.11.0 | abc | 2026-11-22 |
| 2 | 1 | 400 | 0.0 | 2 | A\|B, 2 cores | 2.11.0 |  | 2026-11-22 |"""
    )


def test_weights_that_are_in_a_folder_alone(folder):
    card = make_card(folder)
    assert f"timm.create_model('local-dir:{folder}', pretrained=True)" in card
    assert 'No repository of the Hub is known to have them' in card and 'hf-hub:' not in card
    assert 'No repository' not in make_card(folder, 'owner/vit')


def test_class_names_cannot_break_the_card(folder):
    config = json.loads((folder / 'config.json').read_text())
    config['label_names'] = ['a|b', '# c', '<script>', '[d](x)', '---']
    (folder / 'config.json').write_text(json.dumps(config))
    card = make_card(folder)
    assert yaml.safe_load(card.split('\n---\n')[0].removeprefix('---\n'))['license'] == 'apache-2.0'
    assert '<script>' not in card.replace('\\<', '') and card.count('\n---\n') == 1


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{', 'is not JSON'),
        ('[]', 'must be a mapping, as `timm-sape2 validate --json` writes it'),
        ('{"top1": "98"}', "top1 cannot be '98'"),
        ('{"top1": NaN}', 'top1 cannot be nan'),
        ('{"accuracy": 98}', "unknown 'accuracy'"),
        ('{"top1_interval": [1]}', 'top1_interval must be two numbers, not [1]'),
        ('{"top1_interval": [1, NaN]}', 'top1_interval must be two numbers, not [1, nan]'),
        ('{"training": [1]}', 'training must be a list of mappings, not [1]'),
        ('{"probe": {"a": 1.0}}', "probe cannot have 'a': 1.0"),
        ('{"probe": {"1": "high"}}', "probe cannot have '1': 'high'"),
    ],
)
def test_metrics_that_are_none(tmp_path, content, message):
    (tmp_path / 'metrics.json').write_text(content)
    with pytest.raises(ValueError) as raised:
        read_metrics(tmp_path / 'metrics.json')
    assert message in str(raised.value)


def test_a_probe_of_more_classes(folder):
    (folder / 'metrics.json').write_text('{"probe": {"5": 1.0}}')
    with pytest.raises(ValueError, match='probe has classes that the model does not have, it has 5'):
        make_card(folder)


def test_written_all_at_once(folder):
    write_card(folder, 'owner/vit')
    assert (folder / 'README.md').read_text() == make_card(folder, 'owner/vit')
    assert not list(folder.glob('tmp-*'))
