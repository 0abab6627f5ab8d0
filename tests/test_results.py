"""Figures of docs/results.md, of the screening in docs/studies.md and of README are those of the files beside them."""

import csv
import json
import re
import shlex
from pathlib import Path
from statistics import mean

import pytest

from timm_sape2.__main__ import build_parser
from timm_sape2.studies.report import grouped, improvement, plus_minus
from timm_sape2.trained.accuracy import binomial_interval
from timm_sape2.training.arguments import build_parser as build_training_parser
from timm_sape2.training.arguments import parse_arguments as parse_training_arguments
from timm_sape2.training.run_folder import read_record, summarize_record

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'docs' / 'results'
PAGE = (ROOT / 'docs' / 'results.md').read_text()
README = (ROOT / 'README.md').read_text()
NAME = 'vit_compact_sape2_patch4_32.cifar10'


def table_of(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def measured(program, size):
    return json.loads((RESULTS / 'validation' / f'{program}_{size}.json').read_text())


@pytest.mark.parametrize('size', [32, 48, 64])
def test_accuracy_is_that_of_both_programs(size):
    ours, timms = measured('timm-sape2', size), measured('timm', size)
    assert ours['num_images'] == 10_000 and ours['input_size'] == [3, size, size] and timms['img_size'] == size
    assert ours['top1'] == timms['top1'] and ours['top5'] == timms['top5']
    low, high = ours['top1_interval']
    row = f'| {size}x{size} | {ours["top1"]:.2f} % | {timms["top1"]:.2f} % | {low:.2f} to {high:.2f} % |'
    assert row in PAGE and row in README


def test_accuracy_is_that_of_the_shipped_weights():
    card = json.loads((ROOT / 'hub_configs' / NAME / 'metrics.json').read_text())
    assert card['fingerprint'] == measured('timm-sape2', 32)['fingerprint']
    assert card['top1'] == measured('timm-sape2', 32)['top1']


@pytest.mark.parametrize('run', [f'{NAME}_at_20', NAME])
def test_what_training_took(run):
    record, epochs = read_record(RESULTS / run), table_of(RESULTS / run / 'summary.csv')
    took = summarize_record(record)
    assert len(epochs) == took['epochs']
    assert {start['training_images'] for start in record['starts']} == {50_000}
    assert (
        f'| [{run}](results/{run}/run.json) | {took["epochs"]} | {took["images_per_second"]} | {took["hours"]} | '
        f'`{took["commit"]}` | {float(epochs[-1]["eval_top1"]):.2f} % |'
    ) in PAGE
    for start in record['starts']:
        assert start['command'] in PAGE


def test_half_an_hour():
    folder = RESULTS / 'half_hour'
    record = read_record(folder)
    (start,), took = record['starts'], summarize_record(record)
    cells = []
    for size in (32, 48, 64):
        accuracy = json.loads((folder / f'validation_{size}.json').read_text())
        assert accuracy['num_images'] == 10_000 and accuracy['input_size'] == [3, size, size]
        cells.append('{:.2f} % ({:.2f} to {:.2f})'.format(accuracy['top1'], *accuracy['top1_interval']))
    minutes = sum(epoch['training_seconds'] for epoch in record['epochs']) / 60
    row = (
        f'[half_hour](results/half_hour/run.json) | {minutes:.0f} | {took["images_per_second"]} | {" | ".join(cells)} |'
    )
    assert f'| {row}' in PAGE and start['command'] in PAGE and start['commit'] in PAGE
    top1 = json.loads((folder / 'validation_32.json').read_text())['top1']
    assert f'That is {measured("timm-sape2", 32)["top1"] - top1:.2f} points below the weights above' in PAGE
    assert f'half an hour of one CPU core reaches {top1:.2f} %' in README


def test_accuracy_by_size():
    rows = table_of(RESULTS / 'resolution' / 'results.csv')
    for scale in ('none', 'grid'):
        top1 = {row['size']: float(row['top1']) for row in rows if row['distance_scale'] == scale}
        assert f'| `{scale}` | {" | ".join(f"{value:.2f}" for value in top1.values())} |' in PAGE


def test_twelve_epochs_more():
    folder = RESULTS / 'continued'
    took = summarize_record(read_record(folder))
    assert f'{took["hours"]} hours of one thread, commit\n`{took["commit"]}`' in PAGE and took['epochs'] == 12
    assert read_record(folder)['starts'][0]['command'] in PAGE
    accuracy = {size: json.loads((folder / f'validation_{size}.json').read_text()) for size in (32, 48)}
    assert all(one['num_images'] == 10_000 for one in accuracy.values())
    more, less = (accuracy[size]['top1'] - measured('timm-sape2', size)['top1'] for size in (32, 48))
    text = (
        f'{accuracy[32]["top1"]:.2f} % at 32x32, which is {more:.2f} points more, but '
        f'{accuracy[48]["top1"]:.2f} % at 48x48, which is {-less:.2f} less'
    )
    assert text in ' '.join(PAGE.split())
    rows = table_of(folder / 'resolution' / 'results.csv')
    for scale in ('none', 'grid'):
        top1 = {row['size']: f'{float(row["top1"]):.2f}' for row in rows if row['distance_scale'] == scale}
        cells = [top1[size] for size in ('24x24', '28x28', '32x32', '40x40', '48x48', '64x64', '32x48')]
        assert f'| `{scale}`, 12 epochs more | {" | ".join(cells)} |' in PAGE


def test_equivariance():
    rows = table_of(RESULTS / 'equivariance' / 'results.csv')
    for weights in ('trained', 'initial'):
        for mode in ('circular', 'crop'):
            of_mode = [row for row in rows if (row['weights'], row['mode']) == (weights, mode)]
            cells = []
            for patches in (1, 2):
                shifts = [row for row in of_mode if float(row['patches']) == patches]
                same, error = (
                    sum(float(row[name]) for row in shifts) / len(shifts) for name in ('consistency', 'feature_error')
                )
                cells += [f'{same:.1f}', f'{error:.3f}']
            assert f'| {weights}, {mode} | {" | ".join(cells)} |' in PAGE


@pytest.mark.parametrize('command', re.findall(r'^(?:torchrun|python|timm-sape2) .*$', PAGE, re.MULTILINE))
def test_commands(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    if 'train.py' in words:
        build_training_parser().parse_args(words[words.index('train.py') + 1 :])
    else:
        program = 'timm-sape2' if 'timm-sape2' in words else 'timm_sape2'  # python -m timm_sape2
        arguments, flags = build_parser().parse_known_args(words[words.index(program) + 1 :])
        assert not flags or arguments.takes_flags


def test_fair_table():
    rows = table_of(RESULTS / 'fair' / 'results.csv')
    last = [row for row in rows if int(row['epoch']) == 15]
    assert last
    for row in last:
        low, high = binomial_interval(float(row['top1']), 10_000)
        line = f'| `{row["encoding"]}` | {row["layer_scale"]} | {row["seed"]} | {float(row["top1"]):.2f} |'
        assert f'{line} {low:.2f} to {high:.2f} |' in PAGE
    assert_made_by_what_the_page_says('fair', PAGE)


def fair(*encodings):
    """Top-1 of these encodings after the last epoch."""
    last = {row['encoding']: row['top1'] for row in table_of(RESULTS / 'fair' / 'results.csv') if row['epoch'] == '15'}
    return (float(last[encoding]) for encoding in encodings)


def test_verdict_at_the_top():
    names = ('learned+sape2', 'sape2', 'nope', 'rope', 'rope+sape2', 'learned')
    both, sape2, none, rotary, beside, learned = fair(*names)
    text = (
        f'SaPE2 + learned ends {learned - both:.2f} points below learned embeddings alone, and SaPE2 alone '
        f'{learned - sape2:.2f} points below them, which is no more than no encoding at all has ({none:.2f} %), while '
        f'rotary is {rotary - learned:.2f} points above. SaPE2 adds nothing to rotary either: together they are '
        f'{rotary - beside:.2f} points below rotary alone.'
    )
    assert text in ' '.join(PAGE.split())


def screened(folder='screening'):
    """Runs of a screening by encoding, as the report reads them."""
    last = [row for row in table_of(RESULTS / folder / 'results.csv') if row['epoch'] == '3']
    assert len({(row['encoding'], row['seed']) for row in last}) == len(last) > 1
    rows = [{**row, 'seed': int(row['seed']), 'top1': float(row['top1'])} for row in last]
    rows.sort(key=lambda row: row['seed'])
    return {encoding: of_encoding for (encoding,), of_encoding in grouped(rows, 'encoding').items()}


def test_screening():
    page, runs = (ROOT / 'docs' / 'studies.md').read_text(), screened()
    for encoding, of_encoding in runs.items():
        top1 = plus_minus([row['top1'] for row in of_encoding])
        seeds = ', '.join(str(row['seed']) for row in of_encoding)
        assert f'| `{encoding}` | {top1} | {improvement(of_encoding, runs["learned"])} | {seeds} |' in page
    assert_made_by_what_the_page_says('screening', page)


def assert_made_by_what_the_page_says(folder, page):
    record = json.loads((RESULTS / folder / 'run.json').read_text())
    for made in record['made_by']:
        assert made['command'] in page and made['commit'][:7] in page


def gains_with_muon():
    """What Muon adds to the accuracy of every encoding, on average over the seeds that both screenings have."""
    adamw, gains = screened(), []
    for encoding, of_encoding in screened('screening_muon').items():
        before = {row['seed']: row['top1'] for row in adamw[encoding]}
        gains.append(mean(row['top1'] - before[row['seed']] for row in of_encoding))
    return gains


def test_screening_with_muon():
    page, (adamw, muon) = (ROOT / 'docs' / 'studies.md').read_text(), (screened(), screened('screening_muon'))
    for encoding, of_encoding in muon.items():
        cells = []
        for runs in (adamw, muon):
            cells += [plus_minus([row['top1'] for row in runs[encoding]]), improvement(runs[encoding], runs['learned'])]
        seeds = ', '.join(str(row['seed']) for row in of_encoding)
        assert f'| `{encoding}` | {" | ".join(cells)} | {seeds} |' in page
    gains = gains_with_muon()
    assert f'accuracies by {min(gains):.0f} to {max(gains):.0f} points' in page
    assert_made_by_what_the_page_says('screening_muon', page)


def test_the_readme_has_the_screening_with_muon():
    runs, gains, readme = screened('screening_muon'), gains_with_muon(), ' '.join(README.split())
    assert f'the same updates end {min(gains):.0f} to {max(gains):.0f} points higher' in readme
    for encoding, other, text in [
        ('rope', 'learned', 'lead over learned embeddings is {} points then'),
        ('axial_cope(gating=none)', 'rope', '`axial_cope` without gates is {} above rotary'),
        ('learned+sape2', 'learned', 'SaPE2 changes learned embeddings by {}, rotary'),
        ('rope+sape2', 'rope', 'rotary by {} and'),
        ('sape2', 'nope', 'and no encoding by {}.'),
    ]:
        assert text.format(improvement(runs[encoding], runs[other])) in readme


@pytest.mark.parametrize('run', sorted(folder.name for folder in (RESULTS / 'optimizers').iterdir()))
def test_optimizers(run):
    record, epochs = read_record(RESULTS / 'optimizers' / run), table_of(RESULTS / 'optimizers' / run / 'summary.csv')
    (start,) = record['starts']
    args = parse_training_arguments(shlex.split(start['command'])[2:])
    encoding = args.model_kwargs.get('position', 'learned+sape2')
    minutes = sum(epoch['training_seconds'] for epoch in record['epochs']) / 60
    row = f'[{args.opt}](results/optimizers/{run}/run.json) | {args.lr:g} | {float(epochs[-1]["eval_top1"]):.2f} %'
    page = (ROOT / 'docs' / 'training.md').read_text()
    assert f'| `{encoding}` | {row} | {minutes:.1f} |' in page and start['commit'][:7] in page


def test_speed_of_optimizers():
    muon, adamw = (
        summarize_record(read_record(RESULTS / 'optimizers' / run))['images_per_second'] for run in ('muon3', 'adamw1')
    )
    assert (
        f'as long as one with AdamW here: {muon} and {adamw} images/s.' in (ROOT / 'docs' / 'training.md').read_text()
    )


def test_bfloat16_on_a_cpu():
    page = (ROOT / 'docs' / 'training.md').read_text()
    speeds = {}
    for name in ('float32', 'bfloat16', 'bfloat16_plain'):
        folder = ROOT / 'docs' / 'studies' / f'overhead_{name}'
        for row in table_of(folder / 'results.csv'):
            speeds.setdefault(row['encoding'], []).append(f'{float(row["training_images_per_second"]):.0f}')
        (made,) = json.loads((folder / 'run.json').read_text())['made_by']
        assert made['commit'][:7] in page
    for encoding, cells in speeds.items():
        assert f'| `{encoding}` | {" | ".join(cells)} |' in page
    ours, none = ([float(cell) for cell in speeds[encoding]] for encoding in ('learned+sape2', 'nope'))
    text = 'SaPE2 + learned trains at {:.2f} of the speed without encoding, and in bfloat16'
    assert text.format(ours[0] / none[0]) in page and f'at {ours[1] / none[2]:.2f}.' in page
    assert f'it takes {none[2] / ours[1]:.2f} of the time.' in README


def test_the_readme_has_the_fair_table():
    names = ('learned+sape2', 'learned', 'rope', 'rope+sape2', 'sape2', 'nope')
    both, alone, rotary, beside, sape2, none = fair(*names)
    text = (
        f'SaPE2 + learned reaches {both:.2f} %, learned embeddings alone {alone:.2f} %, rotary {rotary:.2f} %, '
        f'rotary with SaPE2 {beside:.2f} %, SaPE2 alone {sape2:.2f} %, no encoding {none:.2f} %'
    )
    assert text in ' '.join(README.split())


def test_the_readme_has_the_screening():
    runs = screened()

    def ahead(encoding, other):
        return improvement(runs[encoding], runs[other])

    text = (
        f'(`axial_cope`) is {ahead("axial_cope", "sape2")} points above taking their distances (`sape2`), '
        f'{ahead("axial_cope(gating=none)", "axial_cope")} better still without gates, and then '
        f'{ahead("rope", "axial_cope(gating=none)")} below rotary. Beside rotary, `sape2` changes the accuracy by '
        f'{ahead("rope+sape2", "rope")} points'
    )
    assert text in ' '.join(README.split())


@pytest.mark.parametrize(
    ('folder', 'encoding', 'other', 'text'),
    [
        ('screening', 'axial_cope', 'sape2', '{} points above `sape2`'),
        ('screening', 'sape2', 'learned', 'level with learned embeddings ({})'),
        ('screening', 'sape2', 'nope', 'with no encoding at all ({})'),
        (
            'screening',
            'axial_cope(gating=none)',
            'axial_cope',
            '`axial_cope` is {} points better than with semantic gates',
        ),
        ('screening', 'rope', 'axial_cope', 'Rotary is {} points above `axial_cope`'),
        ('screening', 'rope', 'axial_cope(gating=none)', 'and {} above it without gates'),
        ('screening', 'rope+sape2', 'rope', '`sape2` changes the accuracy by {} points'),
        ('screening', 'rope+axial_cope', 'rope', 'and `axial_cope` by {}.'),
        ('screening', 'rope_mixed', 'rope', '`rope_mixed` ({})'),
        ('screening', 'liere', 'rope', '`liere` ({})'),
        ('screening', 'sape2', 'sape2(distance=squared)', 'attention, are {} points below the distances of the paper'),
        ('screening', 'learned+rope', 'rope', 'they change `rope` by {} points'),
        ('screening', 'learned+axial_cope', 'axial_cope', 'points, `axial_cope` by {} and'),
        ('screening', 'learned+sape2', 'sape2', 'and `sape2` by {}.'),
        ('screening', 'sincos', 'axial_cope(gating=none)', 'level with `axial_cope(gating=none)` ({})'),
        ('screening', 'rope', 'sincos', '{} points below rotary'),
        (
            'screening',
            'axial_cope(gating=none)',
            'axial_bias(content=false)',
            'is {} points below tables that queries read',
        ),
        ('screening', 'axial_cope(gating=none)', 'lookhere', '`lookhere` is {} points below `axial_cope(gating=none)`'),
        ('screening_muon', 'rope', 'learned', 'Rotary is ahead of learned embeddings by {} points'),
        ('screening_muon', 'axial_cope(gating=none)', 'rope', 'directly without gates is {} points above rotary'),
        ('screening_muon', 'axial_cope(gating=none)', 'learned', 'and {} above learned embeddings'),
        ('screening_muon', 'learned+sape2', 'learned', 'SaPE2 itself changes learned embeddings by {} points'),
        ('screening_muon', 'rope+sape2', 'rope', 'rotary by {}, and'),
        ('screening_muon', 'sape2', 'nope', 'and no encoding by {}.'),
    ],
)
def test_differences_in_the_screenings(folder, encoding, other, text):
    runs, page = screened(folder), ' '.join((ROOT / 'docs' / 'studies.md').read_text().split())
    assert text.format(improvement(runs[encoding], runs[other])) in page


@pytest.mark.parametrize(
    ('variant', 'before'),
    [
        ('axial_cope(counts=outwards)', 'axial_cope'),
        ('axial_cope(counts=outwards,gating=none)', 'axial_cope(gating=none)'),
        ('rope+axial_cope(gating=none)', 'rope'),
        ('sape2(initial_std=0.2)', 'sape2'),
        ('sape2(gating=none)', 'sape2'),
        ('sape2_factor', 'sape2(initial_std=0.2)'),
        ('sape2_factor(initial_factor=1.0)', 'sape2(initial_std=0.2)'),
        ('sape2_tied', 'sape2'),
        ('axial_cope_tied(gating=none)', 'axial_cope(gating=none)'),
        ('axial_cope(initial_std=0.02)', 'axial_cope'),
        ('axial_bias', 'axial_cope(gating=none)'),
        ('axial_bias(content=false)', 'axial_cope(gating=none)'),
        ('rope+axial_bias', 'rope'),
    ],
)
def test_variants_in_the_screening(variant, before):
    runs = screened()
    was, became = (f'{runs[encoding][0]["top1"]:.2f}' for encoding in (before, variant))
    (line,) = [
        x for x in (ROOT / 'docs' / 'studies.md').read_text().splitlines() if x.endswith(f'| {was} | {became} |')
    ]
    assert line.startswith(f'| `{variant}` |')
