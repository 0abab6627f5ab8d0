"""The published configurations in hub_configs: each loads as it stands, agrees with the registry, and trains."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import get_pretrained_cfg
from timm.optim import optimizer_kwargs

from timm_sape2.hub.card import RECIPES, make_card
from timm_sape2.hub.package import write_config
from timm_sape2.trained.config import check_config
from timm_sape2.training import loaders
from timm_sape2.training.arguments import flags_of, parse_arguments
from timm_sape2.training.model import build_model, create_optimizer
from timm_sape2.training.run_folder import path_of_run
from timm_sape2.training.task import ResumableTask

FOLDERS = sorted((Path(__file__).parents[2] / 'hub_configs').iterdir())
WANTED = {
    *('vit_small_sape2_patch4_32.cifar10', 'vit_small_sape2_patch4_32.cifar100'),
    *('vit_compact_sape2_patch4_32.cifar10', 'vit_compact_sape2_patch4_32.digits'),
    *('vit_tiny_sape2.in1k', 'vit_small_sape2.in1k', 'vit_base_sape2.in1k'),
}

pytestmark = pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)


class RandomImages(torch.utils.data.Dataset):
    """Two images of noise, of the classes 0 and 1."""

    transform = None

    def __len__(self):
        return 2

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        return self.transform(Image.fromarray(pixels)), index


def recipe(folder, *flags, name='train.yaml'):
    """The recipe, but for the weights of a run before that it starts from."""
    return parse_arguments(['-c', str(folder / name), '--pretrained-path', '', *flags], Path())


def config_of(folder):
    return json.loads((folder / 'config.json').read_text())


def test_all_are_there(folder):
    assert {folder.name for folder in FOLDERS} >= WANTED
    assert {'config.json', 'train.yaml', 'README.md'} <= {file.name for file in folder.iterdir()}


def test_it_loads_as_it_stands(folder):
    config = config_of(folder)
    check_config(config)
    model = timm.create_model(f'local-dir:{folder}', pretrained=False, device='meta')
    assert model.pretrained_cfg['architecture'] == config['architecture'] == folder.name.partition('.')[0]
    assert model.pretrained_cfg['tag'] == folder.name.partition('.')[2]
    assert (model.num_classes, model.num_features) == (config['num_classes'], config['num_features'])


def test_it_is_what_the_registry_says(folder):
    config = config_of(folder)
    registered = get_pretrained_cfg(f'{config["architecture"]}.untrained').to_dict(remove_source=True)
    exported = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config['pretrained_cfg'].items()
    }
    allowed = {'tag', 'num_classes'} | ({'input_size'} if recipe(folder).img_size else set())
    assert registered.keys() <= exported.keys() | {'architecture'}
    different = {key for key in exported if exported[key] != registered.get(key)}
    assert different <= allowed


def test_no_key_is_without_an_effect(folder, caplog):
    """timm drops unknown keys at the top; `plugin` is for people."""
    config = config_of(folder)
    check_config(config)
    assert config['plugin'] == 'timm_sape2' and not caplog.records
    for place in (config, config['pretrained_cfg']):
        place['surprise'] = 1
        check_config(config)
        assert caplog.messages[-1].endswith("'surprise' not known here, left out")
    config['model_args']['surprise'] = 1
    with pytest.raises(ValueError, match="unexpected keyword argument 'surprise'"):
        check_config(config)


def test_it_is_exactly_what_the_model_of_the_recipe_exports(folder, tmp_path):
    with torch.device('meta'):
        model = build_model(**flags_of(build_model, recipe(folder)))
    write_config(
        tmp_path / 'config.json', model, folder.name.partition('.')[2], None, config_of(folder).get('label_names')
    )
    assert config_of(tmp_path) == config_of(folder)


def test_the_card_is_up_to_date(folder, monkeypatch):
    monkeypatch.chdir(folder.parents[1])
    expected = make_card(folder.relative_to(folder.parents[1]))
    assert (folder / 'README.md').read_text() == expected, 'run `timm-sape2 hub card hub_configs/*`'
    if not (folder / 'model.safetensors').exists():
        assert '**No weights are published.**' in (folder / 'README.md').read_text()


def test_its_recipes_train_one_step(folder):
    for name in RECIPES:
        if (folder / name).exists():
            train_one_step(folder, name)


def train_one_step(folder, name):
    flags = ('--device', 'cpu', '--batch-size', '2', '--workers', '0', '--aug-repeats', '0', '--no-amp')
    args = recipe(folder, *flags, name=name)
    args.distributed, args.world_size, args.rank = False, 1, 0
    device = torch.device('cpu')
    model = build_model(**flags_of(build_model, args))
    args.num_classes = model.num_classes
    mixup = loaders.create_mixup(args.num_classes, device, **flags_of(loaders.create_mixup, args))
    data_config = loaders.resolve_data(model, **flags_of(loaders.resolve_data, args))
    flags = flags_of(loaders.create_train_loader, args)
    loader = loaders.create_train_loader(RandomImages(), data_config, device, mixup, **flags)
    images, targets = next(iter(loader))
    images, targets = mixup(images, targets) if mixup else (images, targets)
    loss = dict(loss_type='bce' if args.bce_loss else 'ce', smoothing=args.smoothing, soft_targets=mixup is not None)
    task, optimizer = (
        ResumableTask(model, criterion_kwargs=loss, device=device, verbose=False),
        create_optimizer(model, **optimizer_kwargs(args)),
    )
    before = model.head.weight.clone()
    value = task(images, targets)['loss']
    value.backward()
    optimizer.step()
    assert torch.isfinite(value) and not torch.equal(model.head.weight, before)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_recipes_follow_one_another(folder):
    """train.yaml starts from where pretrain.yaml leaves its weights, if there are two."""
    weights = parse_arguments(['-c', str(folder / 'train.yaml')], Path()).pretrained_path
    if (folder / 'pretrain.yaml').exists():
        before = recipe(folder, name='pretrain.yaml')
        assert Path(weights) == path_of_run(before.output, before.experiment, before.model) / 'last.pth.tar'
    else:
        assert not weights
