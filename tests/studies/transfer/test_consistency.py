"""Shifted images by the published measures."""

import csv
from types import SimpleNamespace

import pytest
import torch

from timm_sape2.__main__ import main
from timm_sape2.studies.transfer.consistency import DRAWS, MEASURES, Consistency, random_crops, rolled


def consistency(compared, worst_pixels=None):
    return Consistency(SimpleNamespace(runs=[str(compared)], worst_pixels=worst_pixels), [])


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_whole_pixels_come_in_at_the_other_side():
    """Every image of the batch is rolled by pixels of its own, as `torch.roll` does; 5x8 pixels."""
    images = torch.rand(2, 3, 5, 8)
    moved = rolled(images, torch.tensor([1.0, 4.0]), torch.tensor([7.0, 0.0]))
    expected = torch.stack([images[0].roll((1, 7), (1, 2)), images[1].roll((4, 0), (1, 2))])
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


def test_half_pixels_of_a_wave():
    """A wave that is sampled half a pixel earlier, down and to the right."""

    def wave(shift):
        y, x = torch.meshgrid(torch.arange(6.0) - shift, torch.arange(10.0) - shift, indexing='ij')
        return (torch.cos(2 * torch.pi * (y / 6 + 2 * x / 10)) + torch.sin(2 * torch.pi * 2 * y / 6))[None, None]

    half = torch.tensor([0.5])
    torch.testing.assert_close(rolled(wave(0.0), half, half), wave(0.5), atol=1e-5, rtol=0)


def test_two_halves_are_a_whole_where_the_side_is_odd():
    images, half = torch.rand(3, 1, 5, 7), torch.full((3,), 0.5)
    twice = rolled(rolled(images, half, half), half, half)
    torch.testing.assert_close(twice, images.roll((1, 1), (2, 3)), atol=1e-5, rtol=0)


def test_crops_reach_every_corner(generator):
    """A canvas of 4x5 pixels whose values are their places, cropped to 3x3: 2x3 corners."""
    canvas = torch.arange(20.0).view(1, 1, 4, 5).repeat(50, 1, 1, 1)
    crops = list(random_crops(canvas, (3, 3), generator))
    assert len(crops) == 2 * DRAWS and {crop.shape for crop in crops} == {(50, 1, 3, 3)}
    assert set(torch.cat(crops)[:, 0, 0, 0].tolist()) == {0, 1, 2, 5, 6, 7}
    assert all((crop[:, 0, 2, 2] - crop[:, 0, 0, 0] == 12).all() for crop in crops)


def test_rolls(compared, generator):
    study = consistency(compared)
    for shift, fraction in (('whole pixels', 0.0), ('half pixels', 0.5)):
        offsets = study.rolls(shift, 100, (4, 6), generator)
        assert len(offsets) == DRAWS
        for side, drawn in zip((4, 6), map(torch.cat, zip(*offsets, strict=True)), strict=True):
            assert sorted(set(drawn.tolist())) == [pixels + fraction for pixels in range(side)]


@pytest.mark.parametrize(('pixels', 'count'), [(None, 3 * 5), (1, 9), (3, 49), (4, 8 * 9), (8, 8 * 16), (99, 8 * 16)])
def test_all_rolls_are_there_once(compared, pixels, count):
    """By up to so many pixels each way, by default an eighth of the side: 1 of 8 and 2 of 16."""
    rolls = consistency(compared, pixels).all_rolls((8, 16))
    assert len(rolls) == len(set(rolls)) == count and (0, 0) in rolls


def test_from_the_command_line(compared, study):
    """A model without positions does not see rolls by whole patches; the worst case is never better than the mean."""
    folder = study('consistency', '--runs', str(compared), '--worst-pixels', '1', '--val-num-samples', '6')
    with open(folder / 'results.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(MEASURES)
    for row in rows:
        assert 0 <= float(row['consistency']) <= 100 and 0 <= float(row['accuracy']) <= 100
        if row['shift'] == 'none':
            assert float(row['consistency']) == 100
    accuracy = {(row['encoding'], row['shift']): float(row['accuracy']) for row in rows}
    assert all(accuracy[name, 'worst'] <= accuracy[name, 'none'] for name in ('nope', 'learned', 'learned+sape2'))
    text = (folder / 'results.md').read_text()
    assert text.count('| learned | off |') == 1 and 'right, worst of all rolls' in text
    assert (folder / 'shifts.png').exists()


def test_without_shift_the_accuracy_is_that_of_training(compared, study):
    folder = study('consistency', '--runs', str(compared / 'runs' / 'nope_off_seed0'), '--worst-pixels', '1')
    with open(folder / 'results.csv', newline='') as file:
        (still,) = [row for row in csv.DictReader(file) if row['shift'] == 'none']
    with open(compared / 'runs' / 'nope_off_seed0' / 'summary.csv', newline='') as file:
        *_, last = csv.DictReader(file)
    assert float(still['accuracy']) == pytest.approx(float(last['eval_top1']))


def test_worst_case_by_hand(compared, monkeypatch):
    """A model that calls an image by the place of its bright row: the class holds until a roll moves it."""
    study = consistency(compared, worst_pixels=1)
    run = study.runs[0]
    images = torch.zeros(2, 1, *run.img_size)
    images[0, 0, 0], images[1] = 1, 1
    loader = [(images, torch.tensor([0, 0]))]

    def first_bright_row(images):
        return images.amax((1, 3)).round()

    monkeypatch.setattr(type(run), 'model_at', lambda self, size: torch.nn.Identity())
    monkeypatch.setattr(type(run), 'validation_loader', lambda self, model, size, device: loader)
    monkeypatch.setattr(torch.nn.Identity, 'forward', lambda self, images: first_bright_row(images))
    rows = {shift: study.run({**run.factors, 'shift': shift}, None)[0] for shift in ('none', 'worst')}
    assert (rows['none']['consistency'], rows['none']['accuracy']) == (100, 100)
    assert (rows['worst']['consistency'], rows['worst']['accuracy']) == (50, 50)


@pytest.mark.parametrize('pixels', ['0', '-1', 'x'])
def test_bad_input(compared, capsys, pixels):
    with pytest.raises(SystemExit):
        main(['study', 'consistency', '--runs', str(compared), '--worst-pixels', pixels])
    assert f"argument --worst-pixels: must be a whole number above 0, not '{pixels}'" in capsys.readouterr().err
