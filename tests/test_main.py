"""The command line."""

import sys
from importlib.metadata import entry_points

import pytest
import timm
import torch

import timm_sape2
from timm_sape2 import __main__ as command_line
from timm_sape2.__main__ import main
from timm_sape2.commands import COMMANDS


@pytest.mark.parametrize('command', [['predict'], ['validate'], ['hub', 'push'], ['visualize']])
def test_help_says_which_checkpoint_the_folder_of_a_run_means(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert 'its last checkpoint' in text or 'the last checkpoint is taken' in text


def test_it_is_the_command_timm_sape2():
    (command,) = entry_points(group='console_scripts', name='timm-sape2')
    assert command.load() is main


def test_version_names_what_a_bug_report_needs(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(['--version'])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert out == f'timm-sape2 {timm_sape2.__version__} (timm {timm.__version__}, torch {torch.__version__})\n'


@pytest.mark.parametrize('command', [[], *([add.__name__.removeprefix('add_')] for add in COMMANDS)])
def test_every_help_has_examples_and_fits_a_terminal(monkeypatch, capsys, command):
    monkeypatch.setenv('COLUMNS', '80')
    with pytest.raises(SystemExit) as leaving:
        main([*command, '--help'])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert '\nexamples:\n  timm-sape2 ' in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_command_is_one_function_that_adds_its_parser(monkeypatch, refusal):
    def add_double(commands):
        parser = commands.add_parser('double', help='double a number')
        parser.add_argument('number', type=int)
        parser.set_defaults(command=double)

    def double(arguments):
        if arguments.number < 0:
            raise ValueError('number must not be negative')
        if arguments.number == 0:
            raise FileNotFoundError('no file 0')
        return arguments.number * 2

    monkeypatch.setattr(command_line, 'COMMANDS', (*COMMANDS, add_double))
    assert main(['double', '21']) == 42
    assert refusal('double', '-1') == 'number must not be negative'
    assert refusal('double', '0') == 'no file 0'


def test_interrupted(monkeypatch, capsys):
    """Ctrl-C: no traceback, and the exit code that shells know it by."""

    def add_sleep(commands):
        commands.add_parser('sleep').set_defaults(command=sleep)

    def sleep(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, 'COMMANDS', (*COMMANDS, add_sleep))
    with pytest.raises(SystemExit) as leaving:
        main(['sleep'])
    assert leaving.value.code == 130
    assert capsys.readouterr().err == 'timm-sape2: interrupted\n'


@pytest.mark.parametrize('argv', [[], ['learn'], ['--models'], ['list', '--json'], ['list', 'a', 'b']])
def test_bad_arguments(refusal, argv):
    assert refusal(*argv)


def test_a_flag_that_is_mistyped(refusal):
    message = refusal('validate', 'model.pth', '--batchsize', '3')
    assert message == "unrecognized arguments: --batchsize 3 (did you mean '--batch-size'?)"


def test_arguments_come_from_the_process_by_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['timm-sape2', 'list', 'test_vit_sape2'])
    main()
    assert 'test_vit_sape2' in capsys.readouterr().out
