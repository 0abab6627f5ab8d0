"""What Weights & Biases and TensorBoard are told, with stand-ins for their packages."""

import csv
import shlex
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from timm_sape2.commands import train
from timm_sape2.training.tracking import TensorBoard, check_trackers

FLAGS = shlex.split("""
    --model test_vit_sape2 --img-size 32 --num-classes 2 --batch-size 20 --workers 0 --device cpu --warmup-epochs 0
    --model-kwargs depth=1 --experiment mine
""")


@pytest.fixture
def wandb(monkeypatch):
    """A package that keeps what it is given: `starts`, `rows`, and how often a run was finished."""
    module = ModuleType('wandb')
    module.starts, module.rows, module.finished = [], [], 0

    def finish():
        module.finished += 1

    def init(**kwargs):
        module.starts.append(kwargs)
        return SimpleNamespace(id=kwargs['id'] or 'abc123', log=module.rows.append, finish=finish)

    module.init = init
    module.__spec__ = SimpleNamespace(name='wandb')
    monkeypatch.setitem(sys.modules, 'wandb', module)
    return module


@pytest.fixture
def summary_writer(monkeypatch):
    """`SummaryWriter` that keeps its scalars."""
    package, module = ModuleType('tensorboard'), ModuleType('torch.utils.tensorboard')
    package.__spec__ = SimpleNamespace(name='tensorboard')

    class SummaryWriter:
        made: ClassVar = []

        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.scalars, self.flushed = folder, purge_step, [], 0
            self.made.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def flush(self):
            self.flushed = len(self.scalars)

        def close(self):
            pass

    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, 'tensorboard', package)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)
    return SummaryWriter


def test_a_run_and_the_rest_of_it(photos, tmp_path, wandb, summary_writer):
    """Both get the rows of summary.csv; a run that goes on is the same run there."""
    argv = [*FLAGS, '--data-dir', str(photos), '--output', str(tmp_path), '--log-wandb', '--log-tensorboard']
    argv += ['--wandb-project', 'positions', '--wandb-tags', 'a', 'b']
    assert train.main([*argv, '--epochs', '1']) == 0
    assert train.main([*argv, '--epochs', '2', '--resume', 'auto']) == 0
    assert train.main([*argv, '--epochs', '2', '--resume', 'auto']) == 0, 'nothing is left to report'
    with open(tmp_path / 'mine' / 'summary.csv', newline='') as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert wandb.rows == rows and [row['epoch'] for row in rows] == [0, 1]
    assert set(rows[0]) == {'epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'}
    first, second = wandb.starts
    assert (first['project'], first['tags'], first['name']) == ('positions', ['a', 'b'], 'mine')
    assert (first['id'], first['resume'], second['id'], second['resume']) == (None, None, 'abc123', 'allow')
    assert first['config']['model'] == 'test_vit_sape2' and first['config']['lr'] == 5e-4
    assert wandb.finished == 2

    one, two = summary_writer.made
    assert (one.purge_step, two.purge_step) == (0, 1)
    assert dict((name, value) for name, value, _ in one.scalars) == {k: v for k, v in rows[0].items() if k != 'epoch'}
    assert {step for *_, step in two.scalars} == {1} and two.flushed == len(two.scalars)


def test_run_that_is_named(photos, tmp_path, wandb):
    flags = ['--resume', 'auto', '--log-wandb', '--wandb-resume-id', 'xyz', '--epochs', '1']
    assert train.main([*FLAGS, '--data-dir', str(photos), '--output', str(tmp_path), *flags]) == 0
    assert (wandb.starts[0]['id'], wandb.starts[0]['resume']) == ('xyz', 'must')
    assert (tmp_path / 'mine' / 'wandb_id.txt').read_text() == 'xyz\n'


@pytest.mark.parametrize('package', ['wandb', 'tensorboard'])
def test_without_its_package_nothing_begins(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    argv = [*FLAGS, '--dataset', 'digits', '--output', str(tmp_path), f'--log-{package}']
    assert train.main(argv) == 2
    assert capsys.readouterr().err == (f"error: --log-{package} needs {package}: pip install 'timm_sape2[{package}]'\n")
    assert not list(tmp_path.iterdir())
    check_trackers(False, False)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--wandb-project x', '--wandb-project, --wandb-tags and --wandb-resume-id need --log-wandb'),
        ('--log-wandb --wandb-resume-id x', '--wandb-resume-id goes on with a run: add --resume'),
    ],
)
def test_flags_that_need_others(flags, message, tmp_path, capsys):
    assert train.main([*FLAGS, '--dataset', 'digits', '--output', str(tmp_path), *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_events_on_disk(tmp_path):
    """With the real package: what is read back, and that events of epochs to come again are hidden."""
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    for first, losses in ((0, (0.5, 0.4, 0.3)), (1, (0.45,))):
        board = TensorBoard(tmp_path, first)
        for epoch, loss in enumerate(losses, first):
            board.log({'epoch': epoch, 'eval_loss': loss})
        board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    read = [(event.step, event.value) for event in events.Scalars('eval_loss')]
    assert [step for step, _ in read] == [0, 1] and [value for _, value in read] == pytest.approx([0.5, 0.45])
