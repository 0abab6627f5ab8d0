"""The command `timm-sape2 run`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

from timm_sape2.__main__ import build_parser, main


def write(path: Path, source: str) -> Path:
    path.write_text(dedent(source))
    return path


def test_starts_a_script_with_its_arguments(tmp_path, capsys):
    script = write(tmp_path / 'show.py', 'import sys, timm\nprint(timm.is_model(sys.argv[1]), sys.argv[2:])')
    assert main(['run', str(script), 'vit_small_sape2', '--img-size', '48']) is None
    assert capsys.readouterr().out == "True ['--img-size', '48']\n"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text()))
@example(['--help'])
@example(['-h', '--version'])
@example(['--', '-1', '--', ''])
@example(['list', '--model-kwargs', 'img_size=32'])
@example(['a', '--', 'b'])
def test_all_that_follows_the_script_is_the_scripts(arguments):
    parsed = build_parser().parse_args(['run', 'train.py', *arguments])
    assert parsed.script == ['train.py', *arguments]


def test_a_script_that_starts_others(tmp_path, capfd):
    """timm's bulk_runner.py is told to start `timm-sape2 run`, as it would start `python`."""
    bulk = write(
        tmp_path / 'bulk_runner.py',
        """
        import subprocess, sys, timm
        for name in timm.list_models('test_vit_sape*'):
            subprocess.run([*sys.argv[1:], '--model', name], check=True)
        """,
    )
    script = write(tmp_path / 'show.py', 'import sys, timm\nprint(timm.is_model(sys.argv[-1]), sys.argv[1:])')
    main(['run', str(bulk), sys.executable, '-m', 'timm_sape2', 'run', str(script), 'DATA'])
    assert capfd.readouterr().out == "True ['DATA', '--model', 'test_vit_sape2']\n"


def test_help_after_the_script_is_the_scripts(tmp_path, capsys):
    script = write(
        tmp_path / 'train.py',
        """
        import argparse
        argparse.ArgumentParser(description='Train it.').parse_args()
        """,
    )
    with pytest.raises(SystemExit) as leaving:
        main(['run', str(script), '--help'])
    assert leaving.value.code == 0
    assert 'usage: train.py [-h]' in capsys.readouterr().out


def test_help_before_the_script_is_ours(capsys):
    with pytest.raises(SystemExit):
        main(['run', '--help'])
    assert 'timm-sape2 run [-h] SCRIPT ...' in capsys.readouterr().out


@pytest.mark.parametrize('code', [0, 2, 7, 'text'])
def test_exit_codes_pass(tmp_path, code):
    with pytest.raises(SystemExit) as leaving:
        main(['run', str(write(tmp_path / 'leave.py', f'raise SystemExit({code!r})'))])
    assert leaving.value.code == code


def test_an_error_of_the_script_is_not_taken_for_the_users(tmp_path):
    with pytest.raises(ValueError, match='bad data'):
        main(['run', str(write(tmp_path / 'fail.py', 'raise ValueError("bad data")'))])


def test_bad_scripts(tmp_path, refusal):
    missing = str(tmp_path / 'train.py')
    assert refusal('run', missing) == f'cannot run {missing}: No such file or directory'
    assert refusal('run', str(tmp_path)).startswith(f'cannot run {tmp_path}: ')
    assert refusal('run') == 'the following arguments are required: SCRIPT'


TRAIN = """
import argparse
import json
from pathlib import Path

import torch
from timm import create_model, utils
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

parser = argparse.ArgumentParser()
parser.add_argument('--model')
parser.add_argument('--device', default='cpu')


def main():
    args = parser.parse_args()
    device = utils.init_distributed_device(args)
    utils.random_seed(0, args.rank)
    task = ClassificationTask(create_model(args.model, num_classes=3), criterion=torch.nn.CrossEntropyLoss())
    task.prepare_distributed(device_ids=[device])
    model = task.get_trainable_module()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3)
    task(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))['loss'].backward()
    optimizer.step()
    total = sum(parameter.double().abs().sum().item() for parameter in model.parameters())
    Path(f'rank{args.rank}.json').write_text(json.dumps([args.world_size, type(model).__name__, total]))


if __name__ == '__main__':
    main()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='no gloo')
@pytest.mark.skipif(torch.accelerator.is_available(), reason='checks what is special on CPUs')
def test_training_under_torchrun_on_cpus(tmp_path):
    write(tmp_path / 'train.py', TRAIN)
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'timm_sape2']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [*launch, 'run', 'train.py', '--model', 'test_vit_sape2'],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f'rank{rank}.json').read_text()) for rank in range(2))
    assert first == second
    assert first[:2] == [2, 'DistributedDataParallel']
