"""A run that is stopped, however and whenever, and resumed must end exactly as a run that was left alone."""

import argparse
import importlib
import logging
import multiprocessing
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from timm_sape2.commands import train
from timm_sape2.trained.checkpoint import Checkpoint, ResumePoint, read_checkpoint
from timm_sape2.training import loop
from timm_sape2.training.resume import check_same_run, find_checkpoint, newest_checkpoint
from timm_sape2.training.run_folder import read_record
from timm_sape2.training.task import ResumableTask

# Everything random that train.py has, and 5 batches an epoch, which do not come out even with updates of 2.
FLAGS = shlex.split("""
    --model test_vit_sape2 --img-size 32 --num-classes 2 --epochs 3 --batch-size 8 --grad-accum-steps 2
    --lr 0.01 --warmup-epochs 1 --clip-grad 1 --drop 0.1 --drop-path 0.2 --mixup 0.8 --cutmix 1 --reprob 0.5
    --model-ema --model-ema-decay 0.9 --checkpoint-hist 2 --device cpu --resume auto
""")


@pytest.fixture(scope='module')
def undisturbed(photos, tmp_path_factory):
    """Function that returns the folder of a run that was left alone."""
    folders = {}

    def folder(workers):
        if workers not in folders:
            argv = command(photos, tmp_path_factory.mktemp(f'workers{workers}'), workers)
            assert train.main(argv) == 0
            folders[workers] = Path(argv[-3], 'run')
        return folders[workers]

    return folder


def command(photos, output, workers=0, *flags):
    loader = shlex.split(f'--workers {workers} --aa rand-m9-mstd0.5-inc1')
    if workers == 'memory':
        loader = shlex.split('--loader memory --workers 0')
    data = ['--data-dir', str(photos), *loader]
    return [*FLAGS, *flags, *data, '--output', str(output), '--experiment', 'run']


def assert_same_run(folder, expected):
    """Compare weights, moving average, optimizer, best weights and summary, bit for bit, epochs and names of files."""
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        ours, theirs = read_checkpoint(folder / name), read_checkpoint(expected / name)
        for key in ('epoch', 'state_dict', 'state_dict_ema', 'task_state', 'optimizer'):
            assert_equal(ours.get(key), theirs.get(key))
    assert (folder / 'summary.csv').read_text() == (expected / 'summary.csv').read_text()
    ours, theirs = (read_record(path)['epochs'] for path in (folder, expected))
    assert [(epoch['epoch'], epoch['images']) for epoch in ours] == [(e['epoch'], e['images']) for e in theirs]
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}


def assert_equal(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list):
        for our, their in zip(ours, theirs, strict=True):
            assert_equal(our, their)
    else:
        assert ours == theirs


def at_call(number, act, when=lambda *args: True):
    """Decorator that does something before the n-th of the calls that matter."""

    def decorate(function):
        count = 0

        def wrapper(*args, **kwargs):
            nonlocal count
            count += when(*args)
            if count == number and when(*args):
                act(*args)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def die_of_half_a_checkpoint(state, path):
    Path(path).write_bytes(Path(path).with_name('last.pth.tar').read_bytes()[:50_000])
    die()


def replaces(name):
    return lambda source, target: Path(target).name == name


DEATHS = {
    'in the middle of an epoch': ('timm_sape2.training.loop.backward', at_call(8, die)),
    'after a recovery checkpoint': ('timm_sape2.training.loop.backward', at_call(10, die)),
    'in validation': ('timm_sape2.training.loop.evaluate', at_call(3, die)),
    'while a checkpoint is written': ('torch.save', at_call(4, die_of_half_a_checkpoint)),
    'while last.pth.tar is away': ('os.replace', at_call(2, die, replaces('last.pth.tar'))),
    'before the copies of a checkpoint': ('os.link', at_call(3, die)),
    'before the best is replaced': ('os.link', at_call(2, die)),
    'while the summary is written': ('os.replace', at_call(3, die, replaces('summary.csv'))),
}


def train_and_die(death, argv):
    place, decorate = DEATHS[death]
    with pytest.MonkeyPatch.context() as patch:
        module, _, name = place.rpartition('.')
        patch.setattr(place, decorate(getattr(importlib.import_module(module), name)))
        train.main(argv)


def in_child(function, *args):
    """Run a function in a process of its own, forked from one that has imported everything, and return how it ended."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm_sape2.commands.train'])
    process = context.Process(target=as_main_process, args=(function, *args))
    process.start()
    process.join(timeout=120)
    return process.exitcode


def as_main_process(function, *args):
    multiprocessing.set_start_method('fork', force=True)
    torch.set_num_threads(1)
    function(*args)


@pytest.mark.parametrize(
    ('death', 'workers', 'flags'),
    [
        ('in the middle of an epoch', 0, []),
        ('in the middle of an epoch', 1, []),
        ('in the middle of an epoch', 'memory', []),
        ('after a recovery checkpoint', 0, ['--recovery-interval', '1']),
        ('after a recovery checkpoint', 'memory', ['--recovery-interval', '1']),
        ('in validation', 0, []),
        ('while a checkpoint is written', 0, ['--recovery-interval', '2']),
        ('while last.pth.tar is away', 0, []),
        ('before the copies of a checkpoint', 0, []),
        ('before the best is replaced', 0, []),
        ('while the summary is written', 0, []),
    ],
)
def test_killed_and_resumed_is_exact(death, workers, flags, photos, undisturbed, tmp_path):
    argv = command(photos, tmp_path, workers, *flags)
    assert in_child(train_and_die, death, argv) == -signal.SIGKILL
    assert train.main(argv) == 0
    assert_same_run(tmp_path / 'run', undisturbed(workers))


@pytest.mark.parametrize(
    'flags',
    [
        '--opt muon --opt-kwargs ns_steps=1 --channels-last --kd-model-name TEACHER --kd-distill-type feature',
        '--model-dtype bfloat16 --no-model-ema --opt-kwargs amsgrad=1 --train-img-sizes 16 48 --train-batch-sizes 8 4',
    ],
)
def test_less_usual_runs_are_exact_too(flags, photos, tmp_path):
    """Matrices by Muon and tables by AdamW, a map to the features of a teacher; 16 bits, batches of several sizes."""
    teacher = timm.create_model('test_vit_sape2', img_size=32, num_classes=2, embed_dim=32, num_heads=2)
    kwargs = dict(embed_dim=32, num_heads=2)
    args = argparse.Namespace(model='test_vit_sape2', model_kwargs=kwargs, num_classes=2, input_size=(3, 32, 32))
    torch.save({'state_dict': teacher.state_dict(), 'args': args}, tmp_path / 'teacher.pth')
    flags = flags.replace('TEACHER', shlex.quote(str(tmp_path / 'teacher.pth'))).split()
    flags += ['--epochs', '2', '--model-kwargs', 'depth=1', 'dynamic_img_size=True']
    runs = [command(photos, tmp_path / name, 0, *flags) for name in ('killed', 'undisturbed')]
    assert in_child(train_and_die, 'in the middle of an epoch', runs[0]) == -signal.SIGKILL
    for argv in runs:
        assert train.main(argv) == 0
    assert_same_run(tmp_path / 'killed' / 'run', tmp_path / 'undisturbed' / 'run')


@pytest.mark.parametrize(
    ('place', 'call', 'workers', 'number', 'saved'),
    [
        # The signal comes in batch 2 of epoch 1. Its update takes batch 3 too.
        ('backward', 8, 0, signal.SIGTERM, 'recovery-1-4.pth.tar'),
        ('backward', 10, 1, signal.SIGINT, 'recovery-1-5.pth.tar'),
        ('evaluate', 3, 0, signal.SIGTERM, 'recovery-1-5.pth.tar'),
        ('backward', 8, 'memory', signal.SIGTERM, 'recovery-1-4.pth.tar'),
    ],
)
def test_stopped_by_a_signal_and_resumed_is_exact(
    place, call, workers, number, saved, photos, undisturbed, tmp_path, monkeypatch
):
    argv = command(photos, tmp_path, workers)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        send = at_call(call, lambda *args: os.kill(os.getpid(), number))
        patch.setattr(loop, place, send(getattr(loop, place)))
        train.main(argv)
    assert stop.value.code == 128 + number
    assert (tmp_path / 'run' / saved).exists()
    assert train.main(argv) == 0
    assert_same_run(tmp_path / 'run', undisturbed(workers))


def train_with_signal_to_all(argv):
    os.setsid()
    loop.backward = at_call(2, lambda *args: os.killpg(0, signal.SIGTERM))(loop.backward)
    train.main(argv)


def train_with_bug(argv):
    loop.backward = None
    train.main(argv)


def test_signal_to_the_loader_processes_too(photos, tmp_path):
    """`timeout` and batch systems signal all processes of a job, and those of the loader must not die before us."""
    assert in_child(train_with_signal_to_all, command(photos, tmp_path, 1)) == 128 + signal.SIGTERM
    assert (tmp_path / 'run' / 'recovery-0-4.pth.tar').exists()


def test_a_bug_does_not_leave_the_loader_processes_behind(photos, tmp_path):
    assert in_child(train_with_bug, command(photos, tmp_path, 1)) == 1


def test_finished_run_has_nothing_left_to_do(photos, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, 'train_one_epoch', None)
    folder = undisturbed(0)
    before = (folder / 'summary.csv').read_text()
    assert train.main(command(photos, folder.parent)) == 0
    assert (folder / 'summary.csv').read_text() == before


@pytest.fixture
def checkpoint(tmp_path):
    """Function that writes a checkpoint with these arguments and returns its path."""

    def write(name='last', epoch=3, folder='', **args):
        path = tmp_path / folder / f'{name}.pth.tar'
        path.parent.mkdir(exist_ok=True)
        torch.save({'epoch': epoch, 'optimizer': {}, 'args': argparse.Namespace(**args)}, path)
        return path

    return write


@pytest.mark.parametrize(
    ('trained_with', 'message'),
    [
        ({'model': 'test_vit'}, "model 'test_vit' instead of 'test_vit_sape2'"),
        ({'model_kwargs': {'position': 'nope'}}, "model_kwargs {'position': 'nope'} instead of {'depth': 2}"),
        ({'num_classes': 3, 'input_size': (3, 48, 64)}, r'num_classes 3 instead of 2, input_size \(3, 48, 64\)'),
        ({'weight_decay': 0.1}, 'weight_decay 0.1 instead of 0.05'),
    ],
)
def test_another_run_is_refused_by_what_differs(trained_with, message, checkpoint):
    now = dict(model='test_vit_sape2', model_kwargs={'depth': 2}, num_classes=2, input_size=(3, 32, 32))
    now.update(weight_decay=0.05, batch_size=8, lr=0.1)
    same = checkpoint(**dict(now, lr=0.2, batch_size=16, input_size=[3, 32, 32]))
    check_same_run(Checkpoint.read(same), now)
    with pytest.raises(ValueError, match=message):
        check_same_run(Checkpoint.read(checkpoint(**dict(now, **trained_with))), now)


@pytest.mark.parametrize(
    ('was', 'wanted', 'is_same'),
    [
        ({'position': 'learned+sape2'}, {'position': 'sape2+learned'}, True),
        ({}, {'position': 'sape2+learned'}, True),
        ({'position_args': {'sape2': {'target': 'k'}}}, {}, True),
        ({'position_args': {'sape2': {'recompute': True}}}, {}, True),
        ({'position_args': {'sape2': {'target': 'q'}}}, {}, False),
        ({'position': 'rope'}, {'position': 'nope'}, False),
        ({'position': 'learned'}, {'position': 'learned+sape2'}, False),
        ({'position': 'learned', 'depth': 2}, {'position': 'learned'}, False),
    ],
)
def test_encodings_are_compared_by_what_they_compute(was, wanted, is_same, checkpoint):
    path = checkpoint(model='test_vit_sape2', model_kwargs=was)
    args = dict(model='test_vit_sape2', model_kwargs=wanted)
    if is_same:
        check_same_run(Checkpoint.read(path), args)
        return
    with pytest.raises(ValueError, match=re.escape(f'trained with model_kwargs {was} instead of {wanted}')):
        check_same_run(Checkpoint.read(path), args)


def test_other_flags_are_listed(checkpoint, caplog):
    """What they change is named; where the run is and how it is watched is not."""
    was = dict(lr=0.1, epochs=10, batch_size=8, output='a', log_interval=5, workers=4, mean=(0.5,), seed=1)
    path = checkpoint(**was)
    with caplog.at_level('INFO'):
        now = dict(was, output='b', log_interval=7, workers=2, mean=[0.5], new_flag=3)
        check_same_run(Checkpoint.read(path), now)
        assert not caplog.records
        check_same_run(Checkpoint.read(path), dict(now, lr=0.2, epochs=20))
    assert caplog.messages == [
        'Resumed with other flags, which make another run of it from here on: '
        'lr 0.2 instead of 0.1, epochs 20 instead of 10'
    ]


def test_a_run_goes_on_with_its_own_loader(checkpoint):
    for was in (dict(batch_size=8), dict(batch_size=8, loader='workers')):
        path = checkpoint(**was)
        check_same_run(Checkpoint.read(path), dict(batch_size=8, loader='workers'))
        with pytest.raises(ValueError, match="trained with loader 'workers' instead of 'memory'"):
            check_same_run(Checkpoint.read(path), dict(batch_size=8, loader='memory'))


def test_another_batch_size_is_refused_in_the_middle_of_an_epoch(checkpoint):
    path = checkpoint(batch_size=16)
    state = dict(read_checkpoint(path), resume_point=vars(ResumePoint(epoch=1, num_batches=2)))
    torch.save(state, path)
    with pytest.raises(ValueError, match='batch_size 16 instead of 8'):
        check_same_run(Checkpoint.read(path), dict(batch_size=8))


def save_state(path, **state):
    torch.save({'optimizer': {}, 'weights': torch.ones(3000), **state}, path)


def test_newest_is_furthest_in_training(tmp_path, caplog):
    assert newest_checkpoint(tmp_path / 'missing') == (None, ResumePoint())
    save_state(tmp_path / 'model_best.pth.tar', epoch=2)
    save_state(tmp_path / 'checkpoint-10.pth.tar', epoch=10)
    save_state(tmp_path / 'recovery-11-300.pth.tar', epoch=11, resume_point=vars(ResumePoint(11, num_batches=300)))
    save_state(tmp_path / 'tmp.pth.tar', epoch=11)
    assert newest_checkpoint(tmp_path) == (tmp_path / 'tmp.pth.tar', ResumePoint(12))
    os.truncate(tmp_path / 'tmp.pth.tar', 5000)
    with caplog.at_level(logging.WARNING):
        newest, point = newest_checkpoint(tmp_path)
    assert (newest.name, point.epoch, point.num_batches) == ('recovery-11-300.pth.tar', 11, 300)
    assert 'Skipping' in caplog.text and 'tmp.pth.tar is truncated' in caplog.text


def test_find_checkpoint(checkpoint, tmp_path):
    run = tmp_path / 'run'
    assert find_checkpoint('', run) is None
    assert find_checkpoint('auto', run) is None
    elsewhere = checkpoint('elsewhere', epoch=9)
    assert find_checkpoint(str(elsewhere), run).path == elsewhere
    older, newest = checkpoint('checkpoint-2', 2, 'run'), checkpoint('last', 3, 'run')
    assert find_checkpoint('auto', run).path == newest
    assert find_checkpoint(str(newest), run).path == newest
    for resume in ('', str(older), str(elsewhere)):
        with pytest.raises(ValueError, match='holds a run that got as far as last'):
            find_checkpoint(resume, run)


def test_a_resumed_run_reads_its_checkpoint_once(photos, undisturbed, monkeypatch):
    """Besides a look at each file of the folder for where it stopped, which leaves the tensors in the file."""
    reads, load = [], torch.load
    monkeypatch.setattr(torch, 'load', lambda *args, **kwargs: reads.append(kwargs['mmap']) or load(*args, **kwargs))
    folder = undisturbed(0)
    reads.clear()
    assert train.main(command(photos, folder.parent)) == 0
    assert reads.count(False) == 1 and reads.count(True) == len(list(folder.glob('*.pth.tar')))


def test_weights_alone_cannot_be_resumed(tmp_path):
    torch.save({'state_dict': {}}, tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match='use it as --initial-checkpoint'):
        find_checkpoint(str(tmp_path / 'weights.pth'), tmp_path / 'run')


def test_mean_loss_of_an_epoch():
    """Losses 1 and 4 of batches with 2 and 1 images: (1 * 2 + 4 * 1) / 3."""
    point = ResumePoint(epoch=5)
    point.add_batch(1.0, 2)
    point.add_batch(4.0, 1)
    assert (point.num_batches, point.mean_loss) == (2, 2.0)


def test_checkpoint_carries_the_resume_point(tmp_path):
    task = ResumableTask(nn.Linear(2, 2), verbose=False)
    assert set(task.get_checkpoint_state()) == {'state_dict'}
    task.resume_point = ResumePoint(3, 7, 1.5, 28, random_states=[{'torch': torch.get_rng_state()}])
    torch.save(dict(task.get_checkpoint_state(), optimizer={}), tmp_path / 'checkpoint.pth')
    loaded = ResumePoint.of_checkpoint(torch.load(tmp_path / 'checkpoint.pth', weights_only=True))
    assert torch.equal(loaded.random_states[0].pop('torch'), task.resume_point.random_states[0].pop('torch'))
    assert loaded == task.resume_point
    assert 'resume_point' not in task.get_checkpoint_state(ema=True)


def test_weights_alone_say_nothing():
    with pytest.raises(ValueError, match='no state of a training run'):
        ResumePoint.of_checkpoint({'state_dict': {}})
