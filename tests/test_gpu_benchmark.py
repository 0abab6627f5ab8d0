"""docs/benchmarks/gpu.py: its parts are commands that exist, and what fails, hangs or is finished stops no other.

`python docs/benchmarks/gpu.py --small` runs every part, which takes minutes.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from timm_sape2.__main__ import build_parser

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('gpu_benchmark', ROOT / 'docs' / 'benchmarks' / 'gpu.py')
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def python(name, code, limit=60.0):
    return gpu.Part(name, [sys.executable, '-c', code], limit)


def results(rows):
    return {row['part']: row['result'] for row in rows}


@pytest.mark.parametrize('small', [True, False])
def test_parts_are_studies_and_tests_that_exist(tmp_path, small):
    found = gpu.parts(tmp_path, small, 'cpu', 1)
    assert len({part.name for part in found}) == len(found)
    for part in found:
        if part.name == 'tests':
            assert all(Path(argument.split('::')[0]).exists() for argument in part.command if argument.endswith('.py'))
        else:
            arguments = build_parser().parse_args(part.command[3:])
            if small or 'attention-cost' in part.command:  # the others build models
                arguments.study(arguments, [])


def test_measures_all_sizes_precisions_and_modes(tmp_path):
    names = [part.name for part in gpu.parts(tmp_path, False, 'cpu', 1)]
    for size in ('32_4', '224_16', '384_16', '512_16', '1024_16'):
        for precision in ('bfloat16', 'float32'):
            assert {f'model_{size}_{precision}_{mode}' for mode in ('eager', 'compiled')} <= set(names)
    assert names[:3] == ['tests', 'tune', 'attention_bfloat16']


def test_the_rest_runs_after_what_fails_or_hangs(tmp_path):
    parts = [
        python('bad', 'raise SystemExit("no such kernel")'),
        python('slow', 'print("begun", flush=True); import time; time.sleep(60)', limit=2.0),
        python('good', 'print(1)'),
    ]
    rows = gpu.run_all(parts, tmp_path, minutes=5)
    assert results(rows) == {'bad': 'failed', 'slow': 'stopped', 'good': 'done'}
    assert rows[0]['why'] == 'no such kernel'
    assert (tmp_path / 'slow.log').read_text() == 'begun\n'
    assert rows[1]['seconds'] < 30
    assert '| good | done |' in (tmp_path / 'summary.md').read_text()


def test_a_second_run_does_what_the_first_did_not(tmp_path):
    count = f'open({str(tmp_path / "count")!r}, "a").write("x")'
    part, late = python('counted', count), python('late', count)
    assert results(gpu.run_all([part, late], tmp_path, minutes=0)) == {'counted': 'not run', 'late': 'not run'}
    assert results(gpu.run_all([part], tmp_path, minutes=5)) == {'counted': 'done'}
    assert results(gpu.run_all([part, late], tmp_path, minutes=5)) == {'counted': 'done', 'late': 'done'}
    assert (tmp_path / 'count').read_text() == 'xx'
    assert results(json.loads((tmp_path / 'parts.json').read_text())) == {'counted': 'done', 'late': 'done'}


def test_says_that_there_is_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert 'there is no GPU; --small tries the script on a CPU' in capsys.readouterr().err
