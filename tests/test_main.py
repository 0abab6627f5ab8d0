"""The command line."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent

import pytest
import timm
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

import timm_sape2
from timm_sape2 import __main__ as command_line
from timm_sape2.__main__ import build_parser, main
from timm_sape2.commands import COMMANDS
from timm_sape2.commands.list_models import count_gmacs


def write(path: Path, source: str) -> Path:
    path.write_text(dedent(source))
    return path


def refusal(capsys, *argv: str) -> str:
    """Run a command that must fail as users' errors do, and return its message."""
    with pytest.raises(SystemExit) as leaving:
        main(argv)
    assert leaving.value.code == 2
    out, error = capsys.readouterr()
    assert out == ''
    assert error.startswith('timm-sape2: error: ')
    assert error.count('\n') == 1 and error.endswith('\n')
    return error.removeprefix('timm-sape2: error: ').rstrip('\n')


class TestTeach:
    def test_list_shows_every_model(self, capsys):
        assert main(['list']) is None
        header, *rows = capsys.readouterr().out.splitlines()
        assert header.split() == ['model', 'position', 'input', 'patch', 'parameters']
        assert [row.split()[0] for row in rows] == timm.list_models(module='vision_transformer_sape2')

    def test_list_takes_a_pattern_as_timm_does(self, capsys):
        main(['list', 'test_vit_sape?'])
        _, row = capsys.readouterr().out.splitlines()
        assert row.split() == ['test_vit_sape2', 'learned+sape2', '3x64x64', '16x16', '0.27', 'M']

    def test_gmacs_of_a_vit_without_position_encoding(self):
        """16 patches and a class token, 64 channels, three blocks with MLPs of 256, 1,000 classes."""
        model = timm.create_model('test_vit_sape2', position='nope', device='meta').eval()
        patch_embedding, classifier = 16 * 768 * 64, 64 * 1000
        block = 17 * 64 * (3 * 64 + 64 + 2 * 256) + 2 * 17 * 17 * 64
        assert count_gmacs(model) == (patch_embedding + 3 * block + classifier) / 1e9

    def test_list_counts_gmacs_on_demand(self, capsys):
        main(['list', 'test_vit_sape2', '--gmacs'])
        header, row = capsys.readouterr().out.splitlines()
        assert header.split()[-1] == 'GMACs'
        assert row.split()[-1] == '0.00355'

    def test_run_starts_a_script_with_its_arguments(self, tmp_path, capsys):
        script = write(tmp_path / 'show.py', 'import sys, timm\nprint(timm.is_model(sys.argv[1]), sys.argv[2:])')
        assert main(['run', str(script), 'vit_small_sape2', '--img-size', '48']) is None
        assert capsys.readouterr().out == "True ['--img-size', '48']\n"

    def test_it_is_the_command_timm_sape2(self):
        (command,) = entry_points(group='console_scripts', name='timm-sape2')
        assert command.load() is main


class TestList:
    @pytest.mark.parametrize(
        ('pattern', 'position'),
        [
            ('vit_small_pos_nope', 'nope'),
            ('vit_small_pos_learned', 'learned'),
            ('vit_small_pos_sape2', 'sape2'),
            ('vit_small_sape2', 'learned+sape2'),
        ],
    )
    def test_position_is_what_the_model_was_built_with(self, capsys, pattern, position):
        main(['list', pattern])
        _, row = capsys.readouterr().out.splitlines()
        assert row.split()[1] == position

    def test_parameters_are_those_of_the_real_model(self, capsys):
        main(['list', 'vit_compact_sape2_patch4_32'])
        model = timm.create_model('vit_compact_sape2_patch4_32')
        count = sum(parameter.numel() for parameter in model.parameters())
        assert capsys.readouterr().out.endswith(f'  {count / 1e6:.2f} M\n')

    def test_no_model_is_allocated(self, monkeypatch):
        models, create_model = [], timm.create_model

        def create(*args, **kwargs):
            models.append(create_model(*args, **kwargs))
            return models[-1]

        monkeypatch.setattr(timm, 'create_model', create)
        main(['list', 'vit_large_sape2'])
        assert {parameter.device.type for parameter in models[0].parameters()} == {'meta'}

    def test_columns_are_aligned(self, capsys):
        main(['list', '*compact*'])
        lines = capsys.readouterr().out.splitlines()
        column = lines[0].index('position')
        assert all(line[column - 2 : column] == '  ' and line[column] != ' ' for line in lines)

    def test_no_match(self, capsys):
        assert refusal(capsys, 'list', 'resnet*') == "no model matches 'resnet*'; 'timm-sape2 list' shows them all"


class TestRun:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.text()))
    @example(['--help'])
    @example(['-h', '--version'])
    @example(['--', '-1', '--', ''])
    @example(['list', '--model-kwargs', 'img_size=32'])
    @example(['a', '--', 'b'])
    def test_all_that_follows_the_script_is_the_scripts(self, arguments):
        parsed = build_parser().parse_args(['run', 'train.py', *arguments])
        assert parsed.script == ['train.py', *arguments]

    def test_help_after_the_script_is_the_scripts(self, tmp_path, capsys):
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

    def test_help_before_the_script_is_ours(self, capsys):
        with pytest.raises(SystemExit):
            main(['run', '--help'])
        assert 'timm-sape2 run [-h] SCRIPT ...' in capsys.readouterr().out

    @pytest.mark.parametrize('code', [0, 2, 7, 'text'])
    def test_exit_codes_pass(self, tmp_path, code):
        with pytest.raises(SystemExit) as leaving:
            main(['run', str(write(tmp_path / 'leave.py', f'raise SystemExit({code!r})'))])
        assert leaving.value.code == code

    def test_an_error_of_the_script_is_not_taken_for_the_users(self, tmp_path):
        with pytest.raises(ValueError, match='bad data'):
            main(['run', str(write(tmp_path / 'fail.py', 'raise ValueError("bad data")'))])

    def test_bad_scripts(self, tmp_path, capsys):
        missing = str(tmp_path / 'train.py')
        assert refusal(capsys, 'run', missing) == f'cannot run {missing}: No such file or directory'
        assert refusal(capsys, 'run', str(tmp_path)).startswith(f'cannot run {tmp_path}: ')
        assert refusal(capsys, 'run') == 'the following arguments are required: SCRIPT'


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
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main()
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


class TestCommandLine:
    def test_version_names_what_a_bug_report_needs(self, capsys):
        with pytest.raises(SystemExit) as leaving:
            main(['--version'])
        assert leaving.value.code == 0
        out = capsys.readouterr().out
        assert out == f'timm-sape2 {timm_sape2.__version__} (timm {timm.__version__}, torch {torch.__version__})\n'

    @pytest.mark.parametrize('command', [[], *([add.__name__.removeprefix('add_')] for add in COMMANDS)])
    def test_every_help_has_examples_and_fits_a_terminal(self, monkeypatch, capsys, command):
        monkeypatch.setenv('COLUMNS', '80')
        with pytest.raises(SystemExit) as leaving:
            main([*command, '--help'])
        assert leaving.value.code == 0
        out = capsys.readouterr().out
        assert '\nexamples:\n  timm-sape2 ' in out
        assert max(map(len, out.splitlines())) <= 80

    def test_a_command_is_one_function_that_adds_its_parser(self, monkeypatch, capsys):
        def add_double(commands):
            parser = commands.add_parser('double', help='double a number')
            parser.add_argument('number', type=int)
            parser.set_defaults(command=double)

        def double(arguments):
            if arguments.number < 0:
                raise ValueError('number must not be negative')
            return arguments.number * 2

        monkeypatch.setattr(command_line, 'COMMANDS', (*COMMANDS, add_double))
        assert main(['double', '21']) == 42
        assert refusal(capsys, 'double', '-1') == 'number must not be negative'

    @pytest.mark.parametrize('argv', [[], ['train'], ['--models'], ['list', '--json'], ['list', 'a', 'b']])
    def test_bad_arguments(self, capsys, argv):
        assert refusal(capsys, *argv)

    def test_arguments_come_from_the_process_by_default(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, 'argv', ['timm-sape2', 'list', 'test_vit_sape2'])
        main()
        assert 'test_vit_sape2' in capsys.readouterr().out
