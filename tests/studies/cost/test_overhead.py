"""What an encoding costs: the sums are right, and a wrong model stops the study."""

import csv
import json

import pytest
import timm
import torch

from timm_sape2.__main__ import main
from timm_sape2.ops.sape2 import sape2_attention
from timm_sape2.positions.sape2 import SaPE2
from timm_sape2.studies.cost import overhead

QUICK = ('--model', 'test_vit_sape2', '--settings', '32/8', '--rounds', '2', '--device', 'cpu')


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Function that runs the study on tiny models with turns of one call, and returns its folder."""
    monkeypatch.setattr('timm_sape2.studies.cost.measure.TURN', 1e-6)

    def run(*flags):
        main(['study', 'overhead', *QUICK, '--output', str(tmp_path), *flags])
        return tmp_path / 'overhead'

    return run


def refusal(capsys, *flags):
    """Return the message of a study that is refused."""
    with pytest.raises(SystemExit) as leaving:
        main(['study', 'overhead', *flags])
    assert leaving.value.code == 2
    return capsys.readouterr().err.removeprefix('timm-sape2: error: ').rstrip('\n')


def table(folder):
    with open(folder / 'results.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_a_study(study):
    """Two settings, three encodings: SaPE2 adds 3 blocks * 2 tables * 10 positions * 32 channels."""
    folder = study('--settings', '32/8', '24/8', '--batch-size', '4', '2', '--encodings', 'sape2', 'learned+sape2')
    rows = table(folder)
    assert [(row['setting'], row['batch_size'], row['encoding']) for row in rows] == [
        (setting, size, encoding)
        for setting, size in (('32/8', '4'), ('24/8', '2'))
        for encoding in ('nope', 'sape2', 'learned+sape2')
    ]
    baseline, sape2, both = rows[:3]
    assert int(sape2['parameters']) - int(baseline['parameters']) == 3 * 2 * 10 * 32
    assert int(both['parameters']) - int(sape2['parameters']) == (16 + 1) * 64
    assert float(sape2['parameters_ratio']) == int(sape2['parameters']) / int(baseline['parameters'])
    for row in rows:
        for phase in ('inference', 'training'):
            assert float(row[f'{phase}_images_per_second']) > 0
            quartiles = [float(row[f'{phase}_time_ratio{end}']) for end in ('_q1', '', '_q3')]
            assert quartiles == sorted(quartiles)
            if row['encoding'] == 'nope':
                assert {*quartiles, float(row[f'{phase}_peak_bytes_ratio'])} == {1.0}
        assert int(row['training_peak_bytes']) > int(row['inference_peak_bytes']) > 0
    assert 1 < float(sape2['training_peak_bytes_ratio']) < 1.15, 'tables and their gradients, and no biases'
    text = (folder / 'results.md').read_text()
    assert '## 32/8, batches of 4' in text and '## 24/8, batches of 2' in text and '![ratios](ratios.png)' in text
    assert (folder / 'ratios.png').stat().st_size > 10_000


def test_flops_by_hand(study):
    """16 patches and a class token, 64 channels, three blocks, 1,000 classes; two operations a multiply-accumulate.

    SaPE2 adds, for each block and each of rows and columns: gates, 2 heads * 4 lines * 4 * 4 pairs * 32 channels, and
    scores, 2 heads * 16 queries * 10 positions * 32 channels.
    """
    patch_embedding, classifier = 16 * 3 * 8 * 8 * 64, 64 * 1000
    block = 17 * 64 * (3 * 64 + 64 + 2 * 256) + 2 * 17 * 17 * 64
    plain = 2 * (patch_embedding + 3 * block + classifier)
    gates, scores = 2 * 4 * 4 * 4 * 32, 2 * 16 * 10 * 32
    folder = study('--encodings', 'sape2', 'sape2:reference', '--batch-size', '1')
    assert [int(row['flops']) for row in table(folder)] == [plain] + [plain + 2 * 3 * 2 * (gates + scores)] * 2


def test_implementations_of_sape2(study):
    """The reference stores biases for the backward pass."""
    names = ['sape2', 'sape2:reference']
    rows = table(study('--settings', '64/8', '--batch-size', '8', '--encodings', *names))
    assert [row['encoding'] for row in rows] == ['nope', *names]
    assert len({row['parameters'] for row in rows[1:]}) == 1
    usual, reference = (int(row['training_peak_bytes']) for row in rows[1:])
    assert usual < reference


def test_one_entry_is_compiled(monkeypatch, study):
    compiled = []
    monkeypatch.setattr(
        torch, 'compile', lambda model, **options: compiled.append((model.position_name, options)) or model
    )
    folder = study('--encodings', 'sape2', 'learned:compiled', '--batch-size', '1')
    assert compiled == [('learned', {'fullgraph': True, 'dynamic': False})]
    assert [row['encoding'] for row in table(folder)] == ['nope', 'sape2', 'learned:compiled']
    assert '`:compiled` is the model under torch.compile.' in (folder / 'results.md').read_text()


def test_a_model_of_timm_as_the_baseline(study):
    folder = study('--baseline', 'test_vit', '--encodings', 'sape2', 'nope', '--batch-size', '2')
    baseline, sape2, nope = table(folder)
    assert [row['encoding'] for row in (baseline, sape2, nope)] == ['test_vit', 'sape2', 'nope']
    created = timm.create_model('test_vit', img_size=32, patch_size=8)
    assert int(baseline['parameters']) == sum(parameter.numel() for parameter in created.parameters())
    assert float(baseline['training_time_ratio']) == float(baseline['flops_ratio']) == 1
    for row in (sape2, nope):
        ratio = int(row['training_peak_bytes']) / int(baseline['training_peak_bytes'])
        assert float(row['training_peak_bytes_ratio']) == ratio
    assert 'relative to `test_vit`' in (folder / 'results.md').read_text()


def test_an_encoding_as_the_baseline(study):
    rows = table(study('--baseline', 'sape2:reference', '--encodings', 'sape2', 'sape2:reference', '--batch-size', '2'))
    assert [row['encoding'] for row in rows] == ['sape2:reference', 'sape2']
    assert float(rows[0]['inference_time_ratio']) == 1


def test_amp(study):
    assert (
        'bfloat16 mixed precision'
        in (study('--amp', '--encodings', 'sape2', '--batch-size', '1') / 'results.md').read_text()
    )


def test_a_wrong_bias_stops_the_study_without_a_figure(monkeypatch, study, tmp_path):
    attention_bias = SaPE2.attention_bias
    monkeypatch.setattr(SaPE2, 'attention_bias', lambda self, *inputs: 1.01 * attention_bias(self, *inputs))
    with pytest.raises(RuntimeError, match='the bias of SaPE2 differs from the reference'):
        study('--encodings', 'sape2')
    assert not list(tmp_path.rglob('*.csv')) and not list(tmp_path.rglob('units/*.json'))


def test_wrong_fused_attention_stops_the_study_without_a_figure(monkeypatch, study, tmp_path):
    """The bias alone is right, but the path that runs forgets it."""

    def without_rows(query, key, value, gate_key, row_table, *rest, **options):
        return sape2_attention(query, key, value, gate_key, 0 * row_table, *rest, **options)

    monkeypatch.setattr('timm_sape2.positions.sape2.sape2_attention', without_rows)
    with pytest.raises(RuntimeError, match='sape2, block 0: attention differs from the reference by'):
        study('--encodings', 'sape2:reference', 'sape2')
    assert not list(tmp_path.rglob('*.csv')) and not list(tmp_path.rglob('units/*.json'))


def test_wrong_logits_stop_the_study_without_a_figure(monkeypatch, study, tmp_path):
    create = timm.create_model

    def broken(*args, **kwargs):
        model = create(*args, **kwargs)
        if kwargs['position'] == 'learned':
            torch.nn.init.constant_(model.head.bias, torch.nan)
        return model

    monkeypatch.setattr(timm, 'create_model', broken)
    with pytest.raises(RuntimeError, match='learned: logits are not finite'):
        study('--encodings', 'sape2', 'learned')
    assert not list(tmp_path.rglob('*.csv'))


@pytest.mark.parametrize('lack_of_memory', [torch.OutOfMemoryError, lambda: torch.empty(2**55)])
def test_a_device_that_is_too_small(monkeypatch, study, capsys, lack_of_memory):
    def measure(*arguments):
        raise lack_of_memory()

    monkeypatch.setattr(overhead.Overhead, 'measure_models', measure)
    with pytest.raises(SystemExit):
        study('--batch-size', '64')
    assert '32/8 with batches of 64 is too large for cpu: lower --batch-size' in capsys.readouterr().err


def test_a_folder_of_other_encodings_is_refused(study, capsys):
    folder = study('--encodings', 'learned', '--batch-size', '1')
    before = (folder / 'results.csv').read_bytes()
    with pytest.raises(SystemExit):
        study('--encodings', 'sape2')
    assert "encodings=['nope', 'learned'] instead of ['nope', 'sape2']" in capsys.readouterr().err
    assert (folder / 'results.csv').read_bytes() == before
    assert json.loads((folder / 'run.json').read_text())['configuration']['device'] == 'cpu'


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--settings 224', "--settings takes IMAGE/PATCH in pixels such as 224/16, not '224'"),
        ('--settings 32/0', "--settings takes IMAGE/PATCH in pixels such as 224/16, not '32/0'"),
        ('--settings 32/-4', "--settings takes IMAGE/PATCH in pixels such as 224/16, not '32/-4'"),
        ('--settings 32/4/2', "--settings takes IMAGE/PATCH in pixels such as 224/16, not '32/4/2'"),
        ('--settings 32/4 30/4', '--settings 30/4: patches of 4 do not divide images of 30'),
        ('--settings 32/4 32/4', 'listed twice: 32-4_16'),
        ('--settings 32/4 64/4 --batch-size 1 2 3', '--batch-size takes 1 number or 2, one for each of --settings'),
        ('--batch-size 0', "argument --batch-size: must be a whole number above 0, not '0'"),
        ('--rounds 0', "argument --rounds: must be a whole number above 0, not '0'"),
        ('--op', 'unrecognized arguments: --op'),
        ('--baseline vit_nowhere', '--baseline: cannot create vit_nowhere at 32/8: Unknown model (vit_nowhere)'),
        ('--baseline test_resnet', '--baseline: cannot create test_resnet at 32/8: '),
        (
            '--encodings sape2:fast',
            "sape2:fast: sape2 has no implementation 'fast', only reference, compiled",
        ),
        ('--encodings cope:reference', "cope:reference: cope has no implementation 'reference', only compiled"),
        ('--encodings sape2:', "sape2:: sape2 has no implementation '', only reference, compiled"),
        ('--encodings sape3', "Unknown position encoding 'sape3' in position='sape3'"),
        ('--model vit_nowhere', 'cannot create vit_nowhere with nope at 32/8: Unknown model (vit_nowhere)'),
        ('--model test_resnet', 'cannot create test_resnet with nope at 32/8: '),
        ('--device tpu', '--device must be cpu, cuda or cuda:N, not tpu'),
        ('--device cuda:99', 'no --device cuda:99: '),
        ('--lr 1', 'unrecognized arguments: --lr 1'),
    ],
)
def test_bad_input(capsys, tmp_path, flags, message):
    assert refusal(capsys, *QUICK, '--output', str(tmp_path), *flags.split()).startswith(message)
    assert not list(tmp_path.iterdir())
