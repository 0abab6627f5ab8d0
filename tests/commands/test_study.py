"""The command `timm-sape2 study`."""

import pytest

from timm_sape2.__main__ import main
from timm_sape2.studies import STUDIES


@pytest.mark.parametrize('name', STUDIES)
def test_help_of_every_study_has_examples_and_fits_a_terminal(monkeypatch, capsys, name):
    monkeypatch.setenv('COLUMNS', '80')
    with pytest.raises(SystemExit) as leaving:
        main(['study', name, '--help'])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert f'\nexamples:\n  timm-sape2 study {name}' in out
    assert ('torchrun' in out) is not STUDIES[name].one_process
    assert max(map(len, out.splitlines())) <= 80


def test_unknown_study(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(['study', 'speed'])
    assert leaving.value.code == 2
    assert "invalid choice: 'speed' (choose from" in capsys.readouterr().err


def test_flags_of_other_commands_are_not_swallowed(capsys):
    with pytest.raises(SystemExit):
        main(['list', '--lr=1'])
    assert capsys.readouterr().err == 'timm-sape2: error: unrecognized arguments: --lr=1\n'
