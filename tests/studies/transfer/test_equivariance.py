"""What a shift does to logits and feature maps."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from timm_sape2.__main__ import main
from timm_sape2.studies.transfer.equivariance import DIRECTIONS, Shift, amounts, check_overlap, compare_shifts, shifted


def test_content_moves_down_and_to_the_right():
    """One bright pixel in a 5x7 image, and the same on a canvas with a margin of 2."""
    image = torch.zeros(1, 1, 5, 7)
    image[0, 0, 1, 2] = 1
    canvas = F.pad(image, (2, 0, 2, 0))
    for picture, mode in ((image, 'circular'), (canvas, 'crop')):
        still = shifted(picture, (5, 7), Shift(mode, 'both', 0))
        moved = shifted(picture, (5, 7), Shift(mode, 'both', 2))
        assert still.nonzero().tolist() == [[0, 0, 1, 2]]
        assert moved.nonzero().tolist() == [[0, 0, 3, 4]]


@pytest.mark.parametrize(('direction', 'place'), [('horizontal', [0, 3]), ('vertical', [3, 0]), ('both', [3, 3])])
def test_directions(direction, place):
    image = torch.zeros(1, 1, 5, 7)
    image[0, 0, 0, 0] = 1
    assert shifted(image, (5, 7), Shift('circular', direction, 3)).nonzero().tolist() == [[0, 0, *place]]


def test_what_leaves_a_circular_shift_comes_back():
    image = torch.rand(2, 3, 5, 7)
    assert torch.equal(shifted(image, (5, 7), Shift('circular', 'horizontal', 7)), image)


def test_quarters_of_a_patch_and_two_patches():
    assert amounts(4) == [0, 1, 2, 3, 4, 8]
    assert amounts(16) == [0, 4, 8, 12, 16, 32]
    assert amounts(2) == [0, 1, 2, 4]


class Pooling:
    """Equivariant by construction: the feature map is the mean color of each 4x4 patch, the logits are its sum."""

    patch_embed = SimpleNamespace(patch_size=(4, 4))

    def forward_intermediates(self, images, indices, norm):
        feature_map = F.avg_pool2d(images, 4)
        return feature_map.flatten(2).transpose(1, 2), [feature_map]

    def forward_head(self, tokens):
        return tokens.sum(1)


def measured(images, mode, size, pixels, model=None):
    shifts = [Shift(mode, direction, pixels) for direction in DIRECTIONS]
    return [values for _, values in compare_shifts(model or Pooling(), images, size, shifts)]


@pytest.mark.parametrize(('mode', 'margin'), [('circular', 0), ('crop', 8)])
@pytest.mark.parametrize('pixels', [4, 8])
def test_an_equivariant_model_has_no_error_on_the_overlap(mode, margin, pixels):
    images = torch.rand(3, 3, 20 + margin, 28 + margin)
    for values in measured(images, mode, (20, 28), pixels):
        assert values['feature_error'] == pytest.approx([0, 0, 0], abs=1e-6)


def test_relative_change_of_logits_by_hand():
    """A crop of threes, logits 4 * 3, that moves to ones, logits 4 * 1."""
    canvas = torch.ones(1, 3, 8, 16)
    canvas[:, :, :, 8:] = 3
    (values,) = [v for s, v in compare_shifts(Pooling(), canvas, (8, 8), [Shift('crop', 'horizontal', 8)])]
    assert values['logit_change'] == pytest.approx([8 / 12])
    assert values['consistency'] == [100.0]


def test_parts_of_a_patch_have_no_feature_map_to_compare():
    assert all(values['feature_error'] == [] for values in measured(torch.rand(1, 3, 20, 28), 'circular', (20, 28), 3))


def test_no_encoding_does_not_see_a_circular_shift_by_patches(tiny_vit):
    images = torch.randn(2, 3, 56, 72)
    with torch.inference_mode():
        nope = measured(images, 'circular', (56, 72), 8, tiny_vit('nope'))
        learned = measured(images, 'circular', (56, 72), 8, tiny_vit('learned'))
    assert all(max(values['feature_error'] + values['logit_change']) < 1e-4 for values in nope)
    assert all(min(values['feature_error']) > 1e-2 for values in learned)


def test_from_the_command_line(compared, study):
    folder = study('equivariance', '--runs', str(compared), '--val-num-samples', '4')
    with open(folder / 'results.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2 * 3 * 6  # encodings, weights, modes, directions, shifts
    for row in rows:
        if row['pixels'] == '0':
            assert float(row['consistency']) == 100 and float(row['logit_change']) == 0
        assert (row['feature_error'] == '') == (float(row['patches']) % 1 != 0)
        assert math.isfinite(float(row['logit_change']))
        if (row['encoding'], row['mode']) == ('nope', 'circular') and row['feature_error']:
            assert float(row['feature_error']) < 1e-4
    text = (folder / 'results.md').read_text()
    assert text.count('| nope | off |') == 4
    assert (folder / 'shifts.png').exists()


@pytest.mark.parametrize('grid', [(2, 2), (1, 5), (7, 2)])
def test_grid_without_an_overlap(grid):
    with pytest.raises(ValueError, match=f'two patches, leaves nothing of a {grid[0]}x{grid[1]} grid'):
        check_overlap(grid)


def test_runs_are_required(capsys):
    with pytest.raises(SystemExit):
        main(['study', 'equivariance'])
    assert 'the following arguments are required: --runs' in capsys.readouterr().err
