"""Variants differ in their position encoding, and in nothing else."""

import functools
import re

import pytest
import torch

from timm_sape2.studies.accuracy.training_grid import (
    encoding_arguments,
    last_epochs,
    parse_training_flags,
    recipe_of,
    share_initial_weights,
    train,
    with_seeds,
)
from timm_sape2.training import loaders, loop
from timm_sape2.training.arguments import flags_of
from timm_sape2.training.model import build_model

from ..conftest import TRAINING


def initial_model(position, seed=0):
    args = parse_training_flags(TRAINING)
    args.model_kwargs['position'], args.seed = position, seed
    model = build_model(**flags_of(build_model, args))
    share_initial_weights(model, args)
    return model


@pytest.mark.parametrize('position', ['learned', 'sape2', 'learned+relbias', 'cope', 'cpe'])
def test_shared_weights_start_the_same(position):
    plain, model = initial_model('nope').state_dict(), initial_model(position).state_dict()
    assert set(plain) < set(model)
    for name, weights in plain.items():
        assert torch.equal(model[name], weights), name


def test_weights_of_the_encoding_stay_drawn():
    model = initial_model('learned+sape2')
    assert model.pos_embed.std() > 0.01
    assert all(block.attn.position['sape2'].row_table.std() > 0.01 for block in model.blocks)


def test_another_seed_starts_elsewhere():
    first, second = (initial_model('sape2', seed).blocks[0].mlp.fc1.weight for seed in (0, 1))
    assert not torch.equal(first, second)


def test_batches_are_the_same_in_the_same_order(tmp_path, monkeypatch):
    """Though the models draw random numbers too, for stochastic depth."""
    seen = []
    original = loaders.epoch_batches

    @functools.wraps(original)
    def recorded(*args, **kwargs):
        for images, targets in original(*args, **kwargs):
            seen[-1].append((images.clone(), targets.clone()))
            yield images, targets

    monkeypatch.setattr(loaders, 'epoch_batches', recorded)
    for position in ('nope', 'learned+sape2'):
        seen.append([])
        train(parse_training_flags(TRAINING), position, {'position': position}, 3, tmp_path)
    assert len(seen[0]) == len(seen[1]) == 4
    for first, second in zip(*seen, strict=True):
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_every_epoch_gives_a_row(tmp_path):
    rows = train(parse_training_flags(TRAINING), 'name', {'position': 'nope'}, 0, tmp_path)
    assert [list(row) for row in rows] == [['epoch', 'train_loss', 'eval_loss', 'top1']] * 2
    assert [row['epoch'] for row in rows] == [0, 1]
    assert (tmp_path / 'runs' / 'name' / 'last.pth.tar').exists()


def test_a_run_that_diverges_gives_not_a_number(tmp_path):
    flags = [*TRAINING, '--lr', '1e30', '--sched', 'constant']
    (row,) = train(parse_training_flags(flags), 'name', {'position': 'nope'}, 0, tmp_path)
    assert row['epoch'] == 1 and row['top1'] != row['top1']


def test_killed_in_the_middle_it_goes_on_to_the_same_end(tmp_path, monkeypatch):
    args = parse_training_flags(TRAINING)
    undisturbed = train(args, 'undisturbed', {'position': 'sape2'}, 0, tmp_path)
    backward, calls = loop.backward, []

    def dying(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        backward(*args)

    monkeypatch.setattr(loop, 'backward', dying)
    with pytest.raises(KeyboardInterrupt):
        train(args, 'killed', {'position': 'sape2'}, 0, tmp_path)
    assert train(args, 'killed', {'position': 'sape2'}, 0, tmp_path) == undisturbed
    assert len(calls) == 6, 'the first of the two epochs was not trained again'


def test_defaults_train_the_compact_model_on_the_digits():
    args = parse_training_flags([])
    assert (args.model, args.dataset, args.epochs) == ('vit_compact_sape2_patch4_32', 'digits', 8)
    assert parse_training_flags(['--dataset', 'digits']).epochs == 100, 'data that is named has the recipe of train.py'


def test_configuration_is_what_the_result_depends_on():
    first = recipe_of(parse_training_flags([*TRAINING, '--device', 'cpu', '--output', 'a', '--seed', '1']))
    second = recipe_of(parse_training_flags([*TRAINING, '--device', 'cuda', '--output', 'b', '--seed', '2']))
    assert first == second
    assert first != recipe_of(parse_training_flags([*TRAINING, '--lr', '0.002']))


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--model-kwargs', 'position=rope'], '--model-kwargs position=... is what the study varies; leave it out'),
        (['--model', 'vit_tiny_patch16_224'], '--model vit_tiny_patch16_224 has no exchangeable position encoding'),
        (['--model', 'vit_none'], 'cannot create vit_none with {}: Unknown model'),
        (['--img-size', '30'], 'cannot create test_vit_sape2 with {}'),
        (['--leraning-rate', '1'], 'unrecognized arguments: --leraning-rate 1'),
        (['--config'], 'argument -c/--config: expected one argument'),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_training_flags([*TRAINING, *flags])


def test_seeds_come_one_after_the_other():
    units = with_seeds([{'encoding': 'a'}, {'encoding': 'b'}], [0, 1])
    assert [(unit['seed'], unit['encoding']) for unit in units] == [(0, 'a'), (0, 'b'), (1, 'a'), (1, 'b')]


def test_last_epoch_of_every_run():
    rows = [{'encoding': 'a', 'epoch': 0}, {'encoding': 'a', 'epoch': 2}, {'encoding': 'b', 'epoch': 1}]
    assert last_epochs(rows, ['encoding']) == [rows[1], rows[2]]


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('rope', {'position': 'rope'}),
        ('learned+rope', {'position': 'learned+rope'}),
        (
            'learned+rope(coordinates=max, jitter=2)+shaw(values=False)',
            {
                'position': 'learned+rope+shaw',
                'position_args': {'rope': {'coordinates': 'max', 'jitter': 2}, 'shaw': {'values': False}},
            },
        ),
        (
            'sape2(recompute=true, target=q)',
            {'position': 'sape2', 'position_args': {'sape2': {'recompute': True, 'target': 'q'}}},
        ),
    ],
)
def test_options_of_encodings_stand_in_brackets(name, arguments):
    assert encoding_arguments(name) == arguments


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('rope(jitter)', "is not like 'rope'"),
        ('rope(jitter=2', "is not like 'rope'"),
        ('rope(jitters=2)', "Unknown option 'jitters' of position encoding 'rope'"),
        ('ropes(jitter=2)', "Unknown position encoding 'ropes'"),
    ],
)
def test_bad_options_of_encodings(name, message):
    with pytest.raises(ValueError, match=message):
        encoding_arguments(name)
