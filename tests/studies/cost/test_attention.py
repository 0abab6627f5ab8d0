"""What attention with SaPE2 costs: the sums are right, and a wrong implementation stops the study."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F

from timm_sape2.__main__ import main
from timm_sape2.ops.sape2.cpu import cpu_attention
from timm_sape2.studies.cost.attention import (
    BOTH,
    COMPILED,
    FORWARD,
    NAMES,
    STORED,
    AttentionCost,
    attentions,
    backward_step,
    draw_inputs,
    forward_step,
    plain_attention,
    why_not,
)
from timm_sape2.studies.cost.correctness import sape2_by
from timm_sape2.studies.cost.measure import peak_memory

QUICK = ('--settings', '32/8', '--rounds', '2', '--heads', '2', '--head-dim', '16', '--device', 'cpu')
reference_attention = sape2_by('reference')
CPU = torch.device('cpu')
GRID = (3, 5)


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Function that runs the study, with turns of one call and without a compiler, and returns its folder."""
    monkeypatch.setattr('timm_sape2.studies.cost.measure.TURN', 1e-6)
    monkeypatch.setattr(torch, 'compile', lambda function, **options: function)

    def run(*flags):
        main(['study', 'attention-cost', *QUICK, '--output', str(tmp_path), *flags])
        return tmp_path / 'attention-cost'

    return run


def table(folder):
    with open(folder / 'results.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_a_study(study):
    folder = study('--settings', '32/8', '24/8', '--batch-size', '4', '2')
    rows = table(folder)
    measured = [row for row in rows if not row['skipped']]
    names = ['plain', 'reference', 'compiled reference', 'cpu']
    factors = ('setting', 'batch_size', 'patches', 'pass', 'implementation')
    assert [tuple(row[factor] for factor in factors) for row in measured] == [
        (*unit, phase, name)
        for unit in (('32/8', '4', '16'), ('24/8', '2', '9'))
        for phase in ('forward', 'forward + backward')
        for name in names
    ]
    for first in range(0, len(measured), len(names)):
        bases = {row['implementation']: row for row in measured[first : first + len(names)]}
        for row in bases.values():
            assert float(row['seconds']) > 0
            for base in ('plain', 'reference'):
                quartiles = [float(row[f'time_to_{base}{end}']) for end in ('_q1', '', '_q3')]
                assert quartiles == sorted(quartiles) and quartiles[0] > 0
                assert float(row[f'memory_to_{base}']) == int(row['peak_bytes']) / int(bases[base]['peak_bytes'])
                assert row is not bases[base] or set(quartiles) == {1.0}
    assert (folder / 'growth.png').stat().st_size > 10_000
    assert json.loads((folder / 'run.json').read_text())['configuration']['heads'] == 2


def test_memory_by_hand(study):
    """Plain attention without gradients: the output, 4 images * 17 tokens * 2 heads * 16 channels * 4 bytes."""
    plain, reference = table(study('--batch-size', '4'))[:2]
    assert 4 * 17 * 2 * 16 * 4 <= int(plain['peak_bytes']) < 1.5 * 4 * 17 * 2 * 16 * 4
    assert int(reference['peak_bytes']) - int(plain['peak_bytes']) > 4 * 2 * 17 * 17 * 4, 'a bias is stored'


def test_a_report(study):
    text = (study('--batch-size', '2') / 'results.md').read_text()
    assert '## 32/8, 16 patches, batches of 2' in text and '![growth](growth.png)' in text
    assert all(f'- `triton`, {phase}, cannot run here: not a CUDA tensor' in text for phase in (FORWARD, BOTH))
    lines = [line for line in text.splitlines() if line.startswith('| forward')]
    assert len(lines) == 8 and not any('triton' in line for line in lines)
    assert ' ms | ' in lines[0] and ' MiB | 1.00 (1.00 to 1.00) | 1.000 | ' in lines[0]


def test_half_precision(study):
    folder = study('--amp', '--batch-size', '1')
    assert [row['implementation'] for row in table(folder) if row['seconds'] and row['pass'] == 'forward'] == [
        'plain',
        'reference',
        'compiled reference',
        'cpu',
    ]
    assert 'bfloat16' in (folder / 'results.md').read_text()


def test_a_compiler_that_fails(monkeypatch, study):
    def fail(function, **options):
        def compiled(*arguments):
            raise torch._dynamo.exc.TorchDynamoException('no compiler\nand much more')

        return compiled

    monkeypatch.setattr(torch, 'compile', fail)
    folder = study('--batch-size', '1')
    assert (
        '`compiled reference`, forward, cannot run here: torch.compile: no compiler\n'
        in (folder / 'results.md').read_text()
    )
    assert 'cpu' in {row['implementation'] for row in table(folder) if not row['skipped']}


@pytest.mark.parametrize('wrong', [lambda x: 1.01 * x, lambda x: 0 * x, lambda x: x * torch.nan])
def test_a_wrong_implementation_stops_the_study_without_a_figure(monkeypatch, study, tmp_path, wrong):
    monkeypatch.setattr(
        'timm_sape2.ops.sape2.attention.cpu_attention', lambda *args, **kwargs: wrong(cpu_attention(*args, **kwargs))
    )
    with pytest.raises(RuntimeError, match=r'^cpu: the output of attention differs from the reference by'):
        study()
    assert not list(tmp_path.rglob('*.csv')) and not list(tmp_path.rglob('units/*.json'))


def test_a_device_that_is_too_small(monkeypatch, study, capsys):
    monkeypatch.setattr(AttentionCost, 'measure_implementations', lambda *arguments: torch.empty(2**55))
    with pytest.raises(SystemExit):
        study('--batch-size', '64')
    assert '32/8 with batches of 64 is too large for cpu: lower --batch-size' in capsys.readouterr().err


def test_the_folder_of_models_is_refused(study, refusal, tmp_path, capsys):
    study('--batch-size', '1')
    capsys.readouterr()
    models = ('--model', 'test_vit_sape2', '--settings', '32/8', '--encodings', 'nope', '--output', str(tmp_path))
    message = refusal('study', 'overhead', *models, '--experiment', 'attention-cost')
    assert "study='attention-cost' instead of 'overhead'; --experiment NAME puts this one into another" in message


def test_each_pass_is_a_unit(study):
    """So a study that is stopped has lost one pass at one size at most."""
    done = sorted(path.name for path in (study('--batch-size', '1') / 'units').glob('*.json'))
    assert done == ['32-8_1_forward-+-backward.json', '32-8_1_forward.json']


def test_what_needs_more_memory_than_is_free_is_left_out(monkeypatch, study):
    """A class token and 16 patches, 4 images of 2 heads."""
    free = 4 * (STORED[FORWARD] + STORED[BOTH]) / 2 * 4 * 2 * 17**2
    monkeypatch.setattr('timm_sape2.studies.cost.attention.free_memory', lambda device: free)
    folder = study('--batch-size', '4')
    by_pass = {phase: [row for row in table(folder) if row['pass'] == phase] for phase in (FORWARD, BOTH)}
    assert 'reference' in [row['implementation'] for row in by_pass[FORWARD] if not row['skipped']]
    plain, cpu = (row for row in by_pass[BOTH] if not row['skipped'])
    assert (plain['implementation'], cpu['implementation']) == ('plain', 'cpu')
    assert float(cpu['time_to_plain']) > 0 and cpu['time_to_reference'] == cpu['memory_to_reference'] == ''
    text = (folder / 'results.md').read_text()
    for name in ('reference', COMPILED):
        assert f'- `{name}`, {BOTH}, cannot run here: it needs 0.0 GiB of memory, 0.0 are free' in text
    assert f'`reference`, {FORWARD}, cannot' not in text


def test_what_cannot_be_checked_is_refused(monkeypatch, study, capsys):
    """The check computes one head in float64."""
    monkeypatch.setattr(
        'timm_sape2.studies.cost.attention.free_memory', lambda device: 2 * 4 * STORED[BOTH] * 17**2 - 1
    )
    with pytest.raises(SystemExit):
        study('--batch-size', '1')
    assert '32/8 with batches of 1 is too large for cpu: ' in capsys.readouterr().err


@pytest.mark.parametrize(('phase', 'make_step'), [(FORWARD, forward_step), (BOTH, backward_step)])
def test_memory_of_the_reference_is_what_the_guard_says(phase, make_step):
    """A wrong figure would let a machine run out of memory, or leave out what can run."""
    grid = (24, 24)
    step = make_step(reference_attention, draw_inputs(1, 2, 32, grid, torch.float32, CPU), grid)
    assert 0.85 < peak_memory(step, CPU) / (4 * STORED[phase] * 2 * (24 * 24 + 1) ** 2) <= 1.05


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--model vit_small_sape2', 'unrecognized arguments: --model vit_small_sape2'),
        ('--baseline nope --compile', 'unrecognized arguments: --baseline nope --compile'),
        ('--heads 0', "argument --heads: must be a whole number above 0, not '0'"),
        ('--head-dim 1.5', "argument --head-dim: must be a whole number above 0, not '1.5'"),
        ('--settings 30/8', '--settings 30/8: patches of 8 do not divide images of 30'),
        ('--batch-size 1 2', '--batch-size takes 1 number or 1, one for each of --settings'),
        ('--device tpu', '--device must be cpu, cuda or cuda:N, not tpu'),
    ],
)
def test_bad_input(refusal, tmp_path, flags, message):
    assert refusal('study', 'attention-cost', *QUICK, '--output', str(tmp_path), *flags.split()) == message
    assert not list(tmp_path.iterdir())


@pytest.fixture
def inputs():
    return draw_inputs(2, 2, 16, GRID, torch.float32, CPU)


def test_inputs_are_views_of_one_projection(inputs):
    query, key, value, row_table, column_table = inputs
    assert query.shape == key.shape == value.shape == (2, 2, 16, 16)
    assert query.stride() == (16 * 3 * 2 * 16, 16, 3 * 2 * 16, 1)
    assert key.data_ptr() - query.data_ptr() == value.data_ptr() - key.data_ptr() == 4 * 2 * 16
    assert row_table.shape == column_table.shape == (10, 16)


def test_without_signatures_the_reference_is_plain_attention(inputs):
    """With tables of 0 all distances are 0."""
    nothing = inputs._replace(row_table=0 * inputs.row_table, column_table=0 * inputs.column_table)
    expected = F.scaled_dot_product_attention(*inputs[:3])
    torch.testing.assert_close(plain_attention(inputs, GRID), expected)
    torch.testing.assert_close(reference_attention(nothing, GRID), expected)
    assert (reference_attention(inputs, GRID) - expected).abs().max() > 0.1


@pytest.mark.parametrize('name', ['cpu', 'triton'])
def test_all_compute_the_same(inputs, name, request):
    device = request.getfixturevalue('triton_device') if name == 'triton' else CPU
    inputs = type(inputs)(*(x.to(device) for x in inputs))
    torch.testing.assert_close(
        attentions()[name](inputs, GRID), reference_attention(inputs, GRID), rtol=1e-3, atol=1e-4
    )


def test_reasons(inputs, monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert {name: why_not(name, inputs, GRID, BOTH) for name in NAMES} == dict.fromkeys(NAMES) | {
        'triton': 'not a CUDA tensor'
    }
    whole = type(inputs)(*(x.long() for x in inputs))
    assert why_not('cpu', whole, GRID, BOTH).startswith('torch.int64 is none of')
