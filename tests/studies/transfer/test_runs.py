"""Taking up models that were trained."""

import re
import shutil

import pytest
import torch
import yaml

from timm_sape2.hub.package import write_package
from timm_sape2.studies.transfer.runs import open_runs
from timm_sape2.trained.accuracy import evaluate
from timm_sape2.trained.checkpoint import read_checkpoint
from timm_sape2.trained.opening import open_model


@pytest.fixture
def run(compared):
    return open_runs([str(compared / 'runs' / 'learned+sape2_off_seed0')], [])[0]


def test_a_study_stands_for_its_runs(compared):
    runs = open_runs([str(compared)], [])
    assert [run.factors for run in runs] == [
        {'encoding': encoding, 'layer_scale': 'off', 'seed': 0} for encoding in ('nope', 'learned', 'learned+sape2')
    ]
    assert {run.img_size for run in runs} == {(48, 64)}


def test_a_checkpoint_of_a_run(compared):
    checkpoint = compared / 'runs' / 'nope_off_seed0' / 'model_best.pth.tar'
    (run,) = open_runs([str(checkpoint)], [])
    assert (run.checkpoint, run.factors['encoding']) == (checkpoint, 'nope')


def test_a_package_of_a_run(compared, tmp_path):
    folder = compared / 'runs' / 'nope_off_seed0'
    write_package(tmp_path, open_model(str(folder)), 'owner/vit')
    of_run, of_package = open_runs([str(folder), str(tmp_path)], [])
    assert (of_package.factors, of_package.img_size) == (of_run.factors, of_run.img_size)
    weights = of_run.model_at((32, 48)).state_dict()
    assert all(torch.equal(weights[name], x) for name, x in of_package.model_at((32, 48)).state_dict().items())
    (tmp_path / 'train.yaml').unlink()
    with pytest.raises(ValueError, match=f'there is no {re.escape(str(tmp_path))}.train.yaml'):
        open_runs([str(tmp_path)], [])


def test_encoding_that_is_the_default_of_the_model(compared, tmp_path):
    """A run without `position=`: the encoding is that of the model, `learned+sape2` for this one."""
    run = shutil.copytree(compared / 'runs' / 'learned+sape2_off_seed0', tmp_path / 'run')
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    del checkpoint['args'].model_kwargs['position']
    torch.save(checkpoint, run / 'last.pth.tar')
    recipe = yaml.safe_load((run / 'args.yaml').read_text())
    del recipe['model_kwargs']['position']
    (run / 'args.yaml').write_text(yaml.safe_dump(recipe))
    assert open_runs([str(run)], [])[0].encoding == 'learned+sape2'


def test_encodings_that_differ_in_options_are_told_apart(compared, tmp_path):
    first = compared / 'runs' / 'learned+sape2_off_seed0'
    second = shutil.copytree(first, tmp_path / 'run')
    recipe = yaml.safe_load((second / 'args.yaml').read_text())
    recipe['model_kwargs']['position_args'] = {'sape2': {'initial_std': 0.5}}
    (second / 'args.yaml').write_text(yaml.safe_dump(recipe))
    runs = open_runs([str(first), str(second)], [])
    assert [run.encoding for run in runs] == ['learned+sape2', 'learned+sape2(initial_std=0.5)']


def test_weights_are_those_of_the_checkpoint(run):
    state = read_checkpoint(run.checkpoint)['state_dict']
    model = run.model_at(run.img_size)
    assert not model.training
    assert all(torch.equal(weights, state[name]) for name, weights in model.state_dict().items())


def test_another_size_resamples_learned_embeddings_only(run):
    state, larger = run.model_at(run.img_size).state_dict(), run.model_at((80, 112)).state_dict()
    changed = [name for name in state if not torch.equal(state[name], larger[name].resize_as_(state[name]))]
    assert changed == ['pos_embed']
    assert larger['pos_embed'].shape[1] == state['pos_embed'].shape[1]


def test_initial_model_is_not_the_trained_one(run, compared):
    initial, trained = run.initial_model().state_dict(), run.model_at(run.img_size).state_dict()
    assert not torch.equal(initial['head.weight'], trained['head.weight'])
    plain = open_runs([str(compared / 'runs' / 'nope_off_seed0')], [])[0].initial_model().state_dict()
    assert all(torch.equal(weights, initial[name]) for name, weights in plain.items())


def test_accuracy_at_the_size_of_training_is_that_of_training(run):
    device, autocast = run.set_up_device()
    model = run.model_at(run.img_size)
    metrics = evaluate(model, run.validation_loader(model, run.img_size, device), device, autocast)
    assert metrics['top1'] == pytest.approx(read_checkpoint(run.checkpoint)['metric'])


def test_flags_replace_what_it_was_trained_with(compared):
    (run,) = open_runs([str(compared / 'runs' / 'nope_off_seed0')], ['--val-num-samples', '5'])
    assert (run.args.val_num_samples, run.args.train_num_samples) == (5, 32)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--model-kwargs', 'position=rope'], "was trained with position='nope', not 'rope'"),
        (['--model', 'vit_small_sape2'], "was trained with model 'test_vit_sape2', not 'vit_small_sape2'"),
        (['--sizes', '3'], 'unrecognized arguments: --sizes 3'),
    ],
)
def test_flags_that_do_not_fit(compared, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        open_runs([str(compared / 'runs' / 'nope_off_seed0')], flags)


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f'{tmp_path} is no run of train.py: there is no {tmp_path}')):
        open_runs([str(tmp_path)], [])
    (tmp_path / 'runs').mkdir()
    with pytest.raises(ValueError, match=re.escape(f'no finished runs in {tmp_path}')):
        open_runs([str(tmp_path)], [])


def test_garbage_and_foreign_checkpoints(compared, tmp_path):
    shutil.copy(compared / 'runs' / 'nope_off_seed0' / 'args.yaml', tmp_path)
    (tmp_path / 'last.pth.tar').write_bytes(b'garbage')
    with pytest.raises(ValueError, match='truncated or no checkpoint'):
        open_runs([str(tmp_path)], [])
    torch.save({'weight': torch.zeros(1)}, tmp_path / 'last.pth.tar')
    with pytest.raises(ValueError, match='does not say what it was trained with'):
        open_runs([str(tmp_path)], [])
