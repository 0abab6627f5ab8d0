"""Study: what a shift of the image does to logits and feature maps."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .report import grouped, markdown_table, new_figure, plus_minus
from .study import Row, Study, Unit
from .trained import TrainedRun, open_runs
from .training_grid import check_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = {'horizontal': (0, 1), 'vertical': (1, 0), 'both': (1, 1)}
MODES = ('circular', 'crop')


class Shift(NamedTuple):
    """A shift of the content, in pixels down and to the right."""

    mode: str
    direction: str
    pixels: int

    @property
    def offset(self) -> tuple[int, int]:
        """Pixels down and to the right."""
        down, right = DIRECTIONS[self.direction]
        return down * self.pixels, right * self.pixels


class Equivariance(Study):
    """Shift images and compare logits and feature maps with those of the images as they were."""

    name = 'equivariance'
    summary = 'shift images: what happens to predictions and feature maps'
    description = """\
Shift the validation images by quarters of a patch up to one patch, and by two
patches; horizontally, vertically and both; in a circle, and as another crop
from a larger canvas (the images, enlarged by two patches). Reported are the
share of images that keep their prediction, the relative change of the logits,
and for whole patches the relative error of the feature map against the shifted
feature map where the two overlap; of trained models and of the same models
before training."""
    examples = """\
  timm-sape2 study equivariance --runs output/studies/compare
  timm-sape2 study equivariance --runs output/train/mine \\
      --val-num-samples 1000 --data-dir photos"""

    def __init__(self, arguments: argparse.Namespace, flags: Sequence[str]) -> None:
        self.runs = open_runs(arguments.runs, flags)
        for run in self.runs:
            check_overlap(check_model(run.arguments_at(run.img_size), {}).patch_embed.grid_size)
        self.units = [{**run.factors, 'weights': weights} for run in self.runs for weights in ('trained', 'initial')]
        self.configuration = {'data_dir': self.runs[0].args.data_dir, 'images': self.runs[0].args.val_num_samples}

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            '--runs', nargs='+', required=True, metavar='DIR', help='runs of train.py, or studies that trained some'
        )

    def run(self, unit: Unit, folder: Path) -> list[Row]:
        run = next(run for run in self.runs if run.factors.items() <= unit.items())
        device, autocast = run.set_up_device()
        model: Any = run.model_at(run.img_size) if unit['weights'] == 'trained' else run.initial_model()
        model.to(device)
        patch = max(model.patch_embed.patch_size)
        samples: dict[Shift, dict[str, list[float]]] = {}
        with torch.inference_mode(), autocast():
            for mode in MODES:
                shifts = [Shift(mode, direction, pixels) for direction in DIRECTIONS for pixels in amounts(patch)]
                for images in self.canvases(run, model, mode, patch, device):
                    for shift, measured in measure(model, images, run.img_size, shifts):
                        of_shift = samples.setdefault(shift, {name: [] for name in measured})
                        for name, values in measured.items():
                            of_shift[name] += values
        return [
            {**unit, **shift._asdict(), 'patches': shift.pixels / patch, **{k: mean(v) for k, v in measured.items()}}
            for shift, measured in samples.items()
        ]

    @staticmethod
    def canvases(run: TrainedRun, model: Any, mode: str, patch: int, device: torch.device) -> Iterator[Tensor]:
        """Yield batches of images, for crops two patches larger than the model takes them."""
        margin = 2 * patch if mode == 'crop' else 0
        height, width = run.img_size
        for images, _ in run.validation_loader(model, (height + margin, width + margin), device):
            yield images.to(device)

    def report(self, rows: list[Row]) -> str:
        parts = []
        for (weights, mode), of_mode in grouped(rows, 'weights', 'mode').items():
            table = []
            for (encoding, layer_scale), of_model in grouped(of_mode, 'encoding', 'layer_scale').items():
                inside = [row for row in of_model if 0 < row['patches'] < 1]
                one = [row for row in of_model if row['patches'] == 1]
                two = [row for row in of_model if row['patches'] == 2]
                table.append(
                    {
                        'encoding': encoding,
                        'LayerScale': layer_scale,
                        'same prediction, parts of a patch': over_seeds(inside, 'consistency', 1),
                        'same prediction, one patch': over_seeds(one, 'consistency', 1),
                        'same prediction, two patches': over_seeds(two, 'consistency', 1),
                        'logit change, one patch': over_seeds(one, 'logit_change', 3),
                        'feature map error, one patch': over_seeds(one, 'feature_error', 3),
                        'feature map error, two patches': over_seeds(two, 'feature_error', 3),
                    }
                )
            parts.append(f'## Weights {weights}, {mode} shift\n\n{markdown_table(table)}')
        explanation = (
            'Share of images with the same prediction in %, and relative changes (0 is perfectly equivariant), each '
            'the mean over directions and images, ± standard deviation over seeds. The feature map is the last one, '
            'after its normalisation, on the patches whose content is in both images.'
        )
        return '\n\n'.join([explanation, *parts])

    def plots(self, rows: list[Row]) -> 'dict[str, Figure]':
        figure = new_figure(11, 7)
        panels = figure.subplots(2, 2, sharex=True)
        trained = [row for row in rows if row['weights'] == 'trained'] or rows
        for column, mode in enumerate(MODES):
            of_mode = [row for row in trained if row['mode'] == mode]
            for i, ((encoding, scale), of_model) in enumerate(grouped(of_mode, 'encoding', 'layer_scale').items()):
                by_shift = sorted(grouped(of_model, 'patches').items())
                style = {'color': f'C{i % 10}', 'linestyle': '-' if scale == 'off' else '--', 'marker': '.'}
                label = encoding if scale == 'off' else f'{encoding}, LayerScale {scale}'
                for line, name in enumerate(('consistency', 'logit_change')):
                    values = [mean([row[name] for row in of_shift]) for _, of_shift in by_shift]
                    panels[line, column].plot([patches for (patches,), _ in by_shift], values, label=label, **style)
            panels[0, column].set(title=f'{mode} shift', ylabel='same prediction in %')
            panels[1, column].set(ylabel='relative change of the logits', xlabel='shift in patches')
        panels[0, 1].legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
        return {'shifts': figure}


def check_overlap(grid: tuple[int, int]) -> None:
    """Raise a ValueError if images that are two patches apart have nothing in common."""
    if min(grid) <= 2:
        raise ValueError(f'the largest shift, two patches, leaves nothing of a {grid[0]}x{grid[1]} grid of patches')


def amounts(patch: int) -> list[int]:
    """Return the shifts in pixels: quarters of a patch up to one, and two patches."""
    return sorted({round(patch * quarters / 4) for quarters in range(5)} | {2 * patch})


def shifted(images: Tensor, size: tuple[int, int], shift: Shift) -> Tensor:
    """Return images of a size whose content has moved down and to the right.

    Args:
        images: For circular shifts of that size, for crops a larger canvas, (B, C, height, width).
        size: Height and width.
        shift: The shift; a crop's is at most the margin of the canvas.
    """
    down, right = shift.offset
    if shift.mode == 'circular':
        return images.roll((down, right), (2, 3))
    top, left = images.shape[2] - size[0] - down, images.shape[3] - size[1] - right
    return images[:, :, top : top + size[0], left : left + size[1]]


def measure(
    model: Any,
    images: Tensor,
    size: tuple[int, int],
    shifts: Sequence[Shift],
) -> Iterator[tuple[Shift, dict[str, list[float]]]]:
    """Compare shifted images with the images as they are, all `shifts` being of one mode.

    Args:
        model: A vision transformer, in evaluation mode.
        images: Images, or canvases of them, (B, C, height, width).
        size: Height and width of the images.
        shifts: What to do with them.

    Yields:
        For each shift, by image: `consistency` (100 for the same prediction, else 0), `logit_change`, and for whole
        patches `feature_error` (else an empty list).
    """
    still = shifts[0]._replace(pixels=0)
    logits, feature_map = outputs(model, shifted(images, size, still))
    patch = model.patch_embed.patch_size
    for shift in shifts:
        moved_logits, moved_map = outputs(model, shifted(images, size, shift))
        same = (moved_logits.argmax(1) == logits.argmax(1)).float() * 100
        (down, down_rest), (right, right_rest) = (divmod(o, p) for o, p in zip(shift.offset, patch, strict=True))
        error: list[float] = []
        if down_rest == right_rest == 0:
            height, width = feature_map.shape[2:]
            error = relative_change(moved_map[:, :, down:, right:], feature_map[:, :, : height - down, : width - right])
        yield (
            shift,
            {
                'consistency': same.tolist(),
                'logit_change': relative_change(moved_logits, logits),
                'feature_error': error,
            },
        )


def outputs(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (B, classes) and the normalised map of the last features, (B, C, rows, columns)."""
    tokens, (feature_map,) = model.forward_intermediates(images, indices=1, norm=True)
    return model.forward_head(tokens).float(), feature_map.float()


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the numbers, or None if there is none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def over_seeds(rows: Sequence[Row], name: str, digits: int) -> str:
    """Return mean and standard deviation over seeds of the means of a column."""
    means = [mean([row[name] for row in of_seed]) for of_seed in grouped(rows, 'seed').values()]
    numbers = [value for value in means if value is not None]
    return plus_minus(numbers, digits) if numbers else ''


def relative_change(changed: Tensor, original: Tensor) -> list[float]:
    """Return `|changed - original| / |original|` of each image, (B, ...) both."""
    differences = (changed - original).flatten(1).double().norm(dim=1)
    return (differences / original.flatten(1).double().norm(dim=1)).tolist()
