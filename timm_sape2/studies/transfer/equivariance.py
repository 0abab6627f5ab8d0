"""Study: what a shift of the image does to logits and feature maps."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..._figure import new_figure
from ..._table import markdown_table
from ..accuracy.training_grid import check_model
from ..report import (
    by_model,
    draw_line,
    grouped,
    line_styles,
    models_in_words,
    plus_minus,
    spread_over_seeds,
    title_of_lines,
)
from ..study import Row, Study, Unit
from .runs import TrainedRun, add_runs_argument, open_runs, run_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = {'horizontal': (0, 1), 'vertical': (1, 0), 'both': (1, 1)}
MODES = ('circular', 'crop')
TITLES = {'circular': 'shifted in a circle', 'crop': 'cropped from a larger image'}


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
        add_runs_argument(parser)

    def run(self, unit: Unit, folder: Path) -> list[Row]:
        run = run_of(unit, self.runs)
        device, autocast = run.set_up_device()
        model: Any = run.model_at(run.img_size) if unit['weights'] == 'trained' else run.initial_model()
        model.to(device)
        patch = max(model.patch_embed.patch_size)
        samples: dict[Shift, dict[str, list[float]]] = {}
        with torch.inference_mode(), autocast():
            for mode in MODES:
                shifts = [Shift(mode, direction, pixels) for direction in DIRECTIONS for pixels in amounts(patch)]
                for images in self.canvases(run, model, mode, patch, device):
                    for shift, measured in compare_shifts(model, images, run.img_size, shifts):
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
            for (encoding, layer_scale), of_model in by_model(of_mode).items():
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

    @staticmethod
    def plots(rows: list[Row], configuration: Mapping[str, Any]) -> 'dict[str, Figure]':
        trained = [row for row in rows if row['weights'] == 'trained'] or rows
        models = by_model(trained)
        figure = new_figure(12, 8)
        panels = figure.subplots(2, 2, sharex=True, sharey='row')
        styles = line_styles([encoding for encoding, _ in models])
        names = models_in_words(models)
        for (model, of_model), style in zip(models.items(), styles, strict=True):
            for column, mode in enumerate(MODES):
                by_shift = sorted(grouped((row for row in of_model if row['mode'] == mode), 'patches').items())
                for line, name in enumerate(('consistency', 'logit_change')):
                    spreads = [spread_over_seeds(means_of_seeds(of_shift, name)) for _, of_shift in by_shift]
                    places = [patches for (patches,), _ in by_shift]
                    draw_line(panels[line, column], places, spreads, names[model], style)
        for column, mode in enumerate(MODES):
            panels[0, column].set(title=TITLES[mode])
            panels[1, column].set(xlabel='shift in patches')
        panels[0, 0].set(ylabel='images with the same prediction in %')
        panels[1, 0].set(ylabel='relative change of the logits')
        for axes in panels.flat:
            axes.grid(alpha=0.3)
        weights = 'trained' if trained[0]['weights'] == 'trained' else 'untrained'
        figure.suptitle(title_of_lines(f'What do {weights} models make of a shifted image?', trained))
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc='outside right center', fontsize=8)
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


def compare_shifts(
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


def means_of_seeds(rows: Sequence[Row], name: str) -> list[float]:
    """Return the mean of a column for each seed that has numbers in it."""
    means = [mean([row[name] for row in of_seed]) for of_seed in grouped(rows, 'seed').values()]
    return [value for value in means if value is not None]


def over_seeds(rows: Sequence[Row], name: str, digits: int) -> str:
    """Return mean and standard deviation over seeds of the means of a column."""
    return plus_minus(means_of_seeds(rows, name), digits)


def relative_change(changed: Tensor, original: Tensor) -> list[float]:
    """Return `|changed - original| / |original|` of each image, (B, ...) both."""
    differences = (changed - original).flatten(1).double().norm(dim=1)
    return (differences / original.flatten(1).double().norm(dim=1)).tolist()
