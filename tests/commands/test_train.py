"""The training script from the outside: what it learns, writes, refuses, and how processes work together."""

import csv
import itertools
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.models import load_checkpoint

from timm_sape2.__main__ import main
from timm_sape2.commands import train
from timm_sape2.data import digits
from timm_sape2.trained.checkpoint import read_checkpoint
from timm_sape2.trained.opening import open_model
from timm_sape2.training import loop
from timm_sape2.training.arguments import parse_arguments
from timm_sape2.training.processes import SignalCatcher
from timm_sape2.training.run_folder import read_record

FLAGS = shlex.split("""
    --dataset digits --model test_vit_sape2 --img-size 16 --num-classes 10 --device cpu --workers 0
    --batch-size 32 --epochs 2 --warmup-epochs 0 --lr 0.001
""")
PLAIN_SGD = shlex.split('--opt momentum --momentum 0 --weight-decay 0 --sched none --lr 0.1 --no-aug --smoothing 0')
DIVERGING = shlex.split('--sched constant --lr 1e30')


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """Only 160 digits to train on and 40 to validate."""
    images, targets = digits._load()
    chosen = [index for target in range(10) for index in (targets == target).nonzero()[0][:20]]
    monkeypatch.setattr(digits, '_load', lambda: (images[chosen], targets[chosen]))


@pytest.fixture
def run_folder(tmp_path):
    """Function that trains with these flags and returns the folder of the run."""

    def run(*flags, experiment='run'):
        assert train.main([*FLAGS, '--output', str(tmp_path), '--experiment', experiment, *flags]) == 0
        return tmp_path / experiment

    return run


def set_up(tmp_path, *flags):
    return loop.set_up(parse_arguments([*FLAGS, '--output', str(tmp_path), *flags], train.DEFAULT_RECIPE))


def summary(folder):
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_one_step_moves_the_weights_against_the_gradient(tmp_path):
    """All digits in one batch, plain SGD: the new weights are w - lr * gradient of the mean cross-entropy."""
    run = set_up(tmp_path, *PLAIN_SGD, '--batch-size', '160', '--epochs', '1')
    model = run.task.get_trainable_module()
    images, targets = next(iter(run.train_loader))
    loss = torch.nn.functional.cross_entropy(model(images), targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = [weights - 0.1 * gradient for weights, gradient in zip(model.parameters(), gradients, strict=True)]
    loop.fit(run, SignalCatcher())
    for weights, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weights, wanted)


def test_accumulated_batches_train_as_one(run_folder):
    small = run_folder(*PLAIN_SGD, '--batch-size', '40', '--grad-accum-steps', '4', experiment='small')
    large = run_folder(*PLAIN_SGD, '--batch-size', '160', experiment='large')
    weights = [read_checkpoint(folder / 'last.pth.tar')['state_dict'] for folder in (small, large)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)


def test_without_data_it_learns_the_digits(tmp_path, monkeypatch, capsys):
    """A short run of the recipe, with all its settings."""
    recipe = yaml.safe_load(train.DEFAULT_RECIPE.read_text())
    short = tmp_path / 'short.yaml'
    short.write_text(yaml.safe_dump({**recipe, 'epochs': 2, 'warmup_epochs': 0}))
    monkeypatch.setattr(train, 'DEFAULT_RECIPE', short)
    argv = ['--output', str(tmp_path), '--device', 'cpu']
    assert train.main(argv) == 0
    assert train.main(argv) == 0, 'the finished run is resumed and has nothing left to do'
    folder = tmp_path / recipe['experiment']
    names = {'args.yaml', 'run.json', 'summary.csv', 'curves.png', 'last.pth.tar', 'model_best.pth.tar'}
    assert names <= {path.name for path in folder.iterdir()}
    assert [row['epoch'] for row in summary(folder)] == ['0', '1']
    assert 'timm.create_model' in capsys.readouterr().out


def test_checkpoint_is_one_of_timm(run_folder):
    """timm loads weights and moving average from it and gets the accuracy that the summary says."""
    folder = run_folder('--model-ema', '--model-ema-decay', '0.7')
    file = str(folder / 'last.pth.tar')
    model = timm.create_model('test_vit_sape2', img_size=16, num_classes=10, checkpoint_path=file).eval()
    loader = set_up(folder, '--experiment', 'loader').val_loader
    with torch.inference_mode():
        correct = [model(images).argmax(1) == targets for images, targets in loader]
    assert float(summary(folder)[-1]['eval_top1']) == pytest.approx(100 * torch.cat(correct).float().mean().item())
    average = model.head.weight.clone()
    load_checkpoint(model, file, use_ema=False)
    assert not torch.equal(model.head.weight, average)


def test_moving_average_is_what_is_validated(run_folder):
    """With a decay of 1 it keeps the weights after the first update, so that its validation never changes."""
    first, second = summary(run_folder('--model-ema', '--model-ema-decay', '1', '--lr', '0.01'))
    assert first['eval_loss'] == second['eval_loss']
    assert first['train_loss'] != second['train_loss']


def test_args_yaml_repeats_the_run(run_folder, tmp_path):
    first = run_folder('--model-kwargs', 'position=nope', 'depth=1', '--mixup', '0.3')
    argv = ['-c', str(first / 'args.yaml'), '--experiment', 'again']
    assert train.main(argv) == 0
    weights = [read_checkpoint(tmp_path / name / 'last.pth.tar')['state_dict'] for name in ('run', 'again')]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_train_py_is_the_door_of_a_checkout_to_the_command(capsys, monkeypatch):
    """One help, but for what the command is called; and the flags arrive as they were given."""
    monkeypatch.setenv('COLUMNS', '80')
    root = Path(__file__).parents[2]
    door = subprocess.run([sys.executable, 'train.py', '--help'], cwd=root, capture_output=True, text=True, check=True)
    with pytest.raises(SystemExit) as leaving:
        main(['train', '--help'])
    assert leaving.value.code == 0
    helps = [door.stdout, capsys.readouterr().out]
    assert '\nexamples:\n  python train.py\n' in helps[0] and '\nexamples:\n  timm-sape2 train\n' in helps[1]
    for names in (('python train.py', 'timm-sape2 train'), ('4 train.py', '4 -m timm_sape2 train')):
        helps[0] = helps[0].replace(*names)
    assert helps[0].replace('usage: train.py', 'usage: timm-sape2 train') == helps[1]

    received = []
    monkeypatch.setattr(train, 'main', lambda argv: received.extend(argv) or 3)
    flags = shlex.split(
        "-c FILE --img-size 32 48 --model-kwargs position=nope 'x=a b' --no-amp -b 3 -vb=4 --lr -1 -- y"
    )
    assert main(['train', *flags]) == 3 and received == flags


def test_names_of_the_classes_are_kept(tmp_path, capsys):
    """In the checkpoint and the folder of the run, wherever the data is afterwards."""
    data, photo = tmp_path / 'data', tmp_path / 'photo.png'
    Image.radial_gradient('L').convert('RGB').save(photo)
    for split, name, index in itertools.product(('train', 'validation'), ('cat', 'dog'), range(4)):
        (data / split / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, data / split / name / f'{index}.png')
    flags = shlex.split('--model test_vit_sape2 --img-size 32 --num-classes 2 --epochs 1 --batch-size 8 --workers 0')
    argv = [*flags, '--data-dir', str(data), '--device', 'cpu', '--output', str(tmp_path), '--experiment', 'run']
    assert train.main(argv) == 0
    shutil.rmtree(data)
    run = tmp_path / 'run'
    assert (run / 'class_names.txt').read_text() == 'cat\ndog\n'
    for name in ('last', 'model_best'):
        assert open_model(str(run / f'{name}.pth.tar')).class_names == ['cat', 'dog']
    capsys.readouterr()
    main(['predict', str(run), str(photo), '--device', 'cpu'])
    assert {word for word in capsys.readouterr().out.split() if word in ('cat', 'dog')} == {'cat', 'dog'}
    push = ['hub', 'push', str(run), '--to', 'owner/vit', '--dry-run', '--folder', str(tmp_path / 'package')]
    main(push)
    assert '--class-names' not in capsys.readouterr().out
    assert open_model(str(tmp_path / 'package')).class_names == ['cat', 'dog']
    checkpoint = torch.load(run / 'last.pth.tar', weights_only=False)
    del checkpoint['class_names']
    torch.save(checkpoint, run / 'last.pth.tar')
    main(push)
    assert '--class-names FILE gives them' in capsys.readouterr().out


def test_many_flags_together(run_folder):
    """Gray images that are not square, and what the other tests leave out."""
    folder = run_folder(
        *shlex.split("""
            --in-chans 1 --img-size 16 32 --amp --torchcompile eager --grad-checkpointing --bce-loss --model-ema
            --model-ema-warmup --mixup 0.5 --cutmix 0.5 --mixup-off-epoch 1 --clip-grad 1 --layer-decay 0.9
            --val-interval 2 --eval-metric loss --sched step --decay-epochs 1 --opt lamb --opt-betas 0.9 0.99
            --train-crop-mode rkrr --train-interpolation bilinear --mean 0.5 --std 0.3 --interpolation nearest
        """)
    )
    assert [row['epoch'] for row in summary(folder)] == ['1'], 'an epoch without validation has no row'
    assert [epoch['epoch'] for epoch in read_record(folder)['epochs']] == [0, 1], 'but it took its time'
    timm.create_model(
        'test_vit_sape2', img_size=(16, 32), in_chans=1, num_classes=10, checkpoint_path=folder / 'model_best.pth.tar'
    )


def test_pretrained_path_adapts_initial_checkpoint_does_not(run_folder, tmp_path, capsys):
    weights = str(run_folder('--epochs', '1') / 'model_best.pth.tar')
    larger = ['--img-size', '32', '--in-chans', '1', '--experiment', 'larger']
    block = read_checkpoint(weights)['state_dict']['blocks.0.attn.qkv.weight']
    model = set_up(tmp_path, *larger, '--pretrained-path', weights).task.get_trainable_module()
    assert torch.equal(model.blocks[0].attn.qkv.weight, block)
    assert model.pos_embed.shape[1] == 2 * 2 + 1
    assert train.main([*FLAGS, *larger, '--output', str(tmp_path), '--initial-checkpoint', weights]) == 2
    assert '--pretrained-path would adapt it' in capsys.readouterr().err


def test_resumed_run_does_not_need_the_weights_it_started_from(run_folder, tmp_path):
    start = run_folder('--epochs', '1', experiment='start') / 'last.pth.tar'
    flags = ['--initial-checkpoint', str(start), '--resume', 'auto']
    run_folder('--epochs', '1', *flags)
    start.unlink()
    assert len(summary(run_folder(*flags))) == 2


def test_loss_that_is_not_finite_ends_the_run(run_folder, tmp_path, capsys, monkeypatch):
    folder = run_folder('--epochs', '1')
    losses = []
    backward = loop.backward
    monkeypatch.setattr(loop, 'backward', lambda run, loss, update: (losses.append(loss), backward(run, loss, update)))
    flags = [*DIVERGING, '--resume', 'auto', '--experiment', 'run']
    assert train.main([*FLAGS, '--output', str(tmp_path), *flags]) == 1
    assert losses and all(loss.isfinite() for loss in losses), 'no step was taken with the loss that is not'
    error = capsys.readouterr().err
    assert 'error: the loss is nan in epoch 1, batch 1' in error
    assert f'last good checkpoint: {folder}/checkpoint-0.pth.tar' in error
    for name, weights in read_checkpoint(folder / 'last.pth.tar')['state_dict'].items():
        assert weights.isfinite().all(), name


def test_validation_loss_that_is_not_finite_saves_nothing(tmp_path, capsys):
    flags = [*DIVERGING, '--batch-size', '160', '--experiment', 'run']
    assert train.main([*FLAGS, '--output', str(tmp_path), *flags]) == 1
    assert 'the loss is nan in validation after epoch 0; last good checkpoint: none' in capsys.readouterr().err
    assert not list((tmp_path / 'run').glob('*.pth.tar'))


@pytest.fixture(scope='module')
def bad_files(tmp_path_factory):
    """Folder with files that are no checkpoints."""
    folder = tmp_path_factory.mktemp('bad')
    torch.save(torch.nn.Linear(2, 2), folder / 'pickled.pth')
    torch.save({'weight': torch.ones(1000)}, folder / 'weights.pth')
    (folder / 'truncated.pth').write_bytes((folder / 'weights.pth').read_bytes()[:1000])
    (folder / 'empty').mkdir()
    return folder


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--dataset= --data-dir BAD/missing', 'BAD/missing is not a folder'),
        ('--dataset= --data-dir BAD/empty', 'Found 0 images'),
        ('--dataset digit', "unknown --dataset 'digit'"),
        ('--dataset=', 'no data: give --data-dir DIR, or --dataset digits'),
        ('--val-split test', "the digits have the splits 'train' and 'validation', not 'test'"),
        ('--num-classes 7', 'the data has 10 classes, the model 7: set --num-classes 10'),
        ('--model vit_smal_sape2', 'unknown --model vit_smal_sape2; close names: vit_small_sape2'),
        ('--model vit_small_sape2.cifar9', 'Invalid pretrained tag (cifar9)'),
        ('--model-kwargs position=sap2', "cannot create test_vit_sape2 with position='sap2': Unknown position"),
        ('--model-kwargs colour=red', "unexpected keyword argument 'colour'"),
        ('--model-kwargs positon=rope', "'positon' (did you mean 'position'?)"),
        ('--model-kwargs red', "argument --model-kwargs: must be KEY=VALUE, not 'red'"),
        ('--img-size 16 --model-kwargs img_size=32', 'Conflicting input image sizes'),
        ('--pretrained', 'No pretrained weights exist for test_vit_sape2'),
        ('--initial-checkpoint BAD/missing.pth', 'no checkpoint BAD/missing.pth'),
        ('--initial-checkpoint BAD/truncated.pth', 'BAD/truncated.pth is truncated or no checkpoint'),
        ('--initial-checkpoint BAD/pickled.pth', 'BAD/pickled.pth holds pickled Python objects'),
        ('--pretrained-path BAD/truncated.pth', 'BAD/truncated.pth is truncated or no checkpoint'),
        ('--pretrained-path BAD/pickled.pth', 'BAD/pickled.pth holds pickled Python objects'),
        ('--resume BAD/truncated.pth', 'BAD/truncated.pth is truncated or no checkpoint'),
        ('--resume BAD/pickled.pth', 'BAD/pickled.pth holds pickled Python objects'),
        ('--resume BAD/weights.pth', 'no state of a training run; use it as --initial-checkpoint'),
        ('--output BAD/weights.pth', 'cannot write to the output folder BAD/weights.pth/run: Not a directory'),
        ('--batch-size 0', "argument -b/--batch-size: must be a whole number above 0, not '0'"),
        ('--epochs -1', "argument --epochs: must be a whole number above 0, not '-1'"),
        ('--workers -1', "argument -j/--workers: must be a whole number, 0 or more, not '-1'"),
        ('--batch-size 999', '160 training images do not fill one batch: lower --batch-size 999'),
        ('--mixup 1 --batch-size 5', '--batch-size 5 must be even'),
        ('--amp-dtype int8', "argument --amp-dtype: invalid choice: 'int8'"),
        ('--amp --amp-dtype float16', '--amp-dtype float16 needs a GPU'),
        ('--device cuda:99', 'no --device cuda:99'),
        ('--device tpu', '--device must be cpu, cuda or cuda:N, not tpu'),
        ('--opt adamwww', 'adamwww'),
        ('--opt sgd --opt-betas 0.9 0.99', '--opt sgd takes no --opt-betas'),
        ('--aa nonsense', 'the augmentation of the training images is malformed'),
        ('--aug-repeats 3', 'start several with torchrun'),
        ('--torchcompile nonsense', 'unknown backend of --torchcompile: nonsense'),
        ('--mean 0.1 0.2', '--mean takes 1 number or 3'),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(flags, message, bad_files, tmp_path, capsys):
    flags = flags.replace('BAD', str(bad_files)).split()
    assert train.main([*FLAGS, '--output', str(tmp_path / 'output'), '--experiment', 'run', *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    assert message.replace('BAD', str(bad_files)) in error
    assert not (tmp_path / 'output').exists()


def test_digits_without_scikit_learn(tmp_path, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    assert train.main([*FLAGS, '--output', str(tmp_path)]) == 2
    assert "pip install 'timm_sape2[demo]'" in capsys.readouterr().err


def test_full_or_read_only_disk(tmp_path, capsys, monkeypatch):
    argv = [*FLAGS, '--output', str(tmp_path), '--experiment', 'run']
    with monkeypatch.context() as patch:
        usage = namedtuple('usage', 'total used free')
        patch.setattr(shutil, 'disk_usage', lambda path: usage(10**9, 10**9 - 10**6, 10**6))
        assert train.main(argv) == 2
        assert 'lower --checkpoint-hist or choose another --output' in capsys.readouterr().err

    def fail(**kwargs):
        raise OSError(30, 'Read-only file system')

    monkeypatch.setattr(tempfile, 'TemporaryFile', fail)
    assert train.main(argv) == 2
    assert 'cannot write to the output folder' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_model_cannot_resume(run_folder, tmp_path, capsys):
    run_folder('--epochs', '1')
    argv = [*FLAGS, '--output', str(tmp_path), '--experiment', 'run']
    assert train.main(argv) == 2
    assert 'holds a run that got as far as' in capsys.readouterr().err
    assert train.main([*argv, '--resume', 'auto', '--model-kwargs', 'position=nope']) == 2
    assert "was trained with model_kwargs {} instead of {'position': 'nope'}" in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(run_folder, tmp_path, capsys):
    """The second is refused from the first write of the other on, before there are checkpoints."""
    argv = [*FLAGS, '--output', str(tmp_path), '--experiment', 'run']
    run = set_up(tmp_path, '--experiment', 'run')
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    assert train.main([*argv, '--epochs', '1']) == 2
    assert f'another process is training in {run.folder}: wait for it, stop it, or choose' in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
    with SignalCatcher() as signals:
        loop.fit(run, signals)
    assert len(summary(run.folder)) == 2
    run_folder('--resume', 'auto', '--epochs', '3')


def train_as_rank(rank, port, argv, signal_at_batch):
    """Train in one of two processes, and save the weights of each; rank 1 may get a signal."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    torch.set_num_threads(1)
    run = loop.set_up(parse_arguments(argv, train.DEFAULT_RECIPE))
    backward, calls = loop.backward, []

    def backward_with_signal(*args):
        calls.append(None)
        if rank == 1 and len(calls) == signal_at_batch:
            os.kill(os.getpid(), signal.SIGTERM)
        backward(*args)

    loop.backward = backward_with_signal
    with SignalCatcher() as signals:
        loop.fit(run, signals)
    torch.save(run.task.get_checkpoint_state()['state_dict'], run.folder / f'rank{rank}.pt')
    del run  # torch 2.12 and 2.13 may hang if a model goes after its process group
    torch.distributed.destroy_process_group()


def train_on_two_processes(argv, signal_at_batch=None):
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = str(server.getsockname()[1])
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm_sape2.commands.train'])
    processes = [context.Process(target=train_as_rank, args=(rank, port, argv, signal_at_batch)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    return [process.exitcode for process in processes]


def test_two_processes_train_one_model_and_stop_and_resume_together(tmp_path):
    flags = shlex.split('--batch-size 128 --drop 0.1 --mixup 0.5 --reprob 0.5 --model-ema --resume auto')
    command = [*FLAGS, *flags, '--output', str(tmp_path), '--experiment']
    assert train_on_two_processes([*command, 'run']) == [0, 0]
    ranks = [torch.load(tmp_path / 'run' / f'rank{rank}.pt') for rank in (0, 1)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    num_correct = float(summary(tmp_path / 'run')[-1]['eval_top1']) * 3.55
    assert num_correct == pytest.approx(round(num_correct)), 'each of the 355 digits counts once, none of the padding'

    assert train_on_two_processes([*command, 'stopped'], signal_at_batch=8) == [128 + signal.SIGTERM] * 2
    assert [path.name for path in (tmp_path / 'stopped').glob('recovery*')] == ['recovery-1-4.pth.tar']
    assert train_on_two_processes([*command, 'stopped']) == [0, 0]
    for name in ('summary.csv', 'args.yaml'):
        expected = (tmp_path / 'run' / name).read_text().replace('experiment: run', 'experiment: stopped')
        assert (tmp_path / 'stopped' / name).read_text() == expected
    resumed = torch.load(tmp_path / 'stopped' / 'rank1.pt')
    assert all(torch.equal(resumed[name], ranks[1][name]) for name in resumed)
