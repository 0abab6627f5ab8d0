"""Study: whether shifted images keep their class, by the measures that are published."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._arguments import positive_int
from ..._figure import new_figure
from ..._table import markdown_table
from ..report import (
    by_model,
    draw_dots,
    encoding_color,
    grouped,
    models_in_words,
    plus_minus,
    spread_over_seeds,
)
from ..study import Row, Study, Unit
from .runs import add_runs_argument, open_runs, run_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {
    'none': 'as they are',
    'crops': 'pairs of random crops',
    'whole pixels': 'random rolls by whole pixels',
    'half pixels': 'random rolls by half pixels',
    'worst': 'worst of all rolls',
}
CROP_SHARE = 7  # crops lie up to a seventh of the side apart: 224 pixels out of 256
DRAWS = 5  # of each image


class Consistency(Study):
    """Shift images as papers on shift invariance do, and count equal and right predictions."""

    name = 'consistency'
    summary = 'shift images at random, and by all shifts: equal and right predictions'
    description = """\
Share of validation images that keep their class when they are shifted, each
beside the accuracy on the shifted images:
  crops         two random crops of an image that is a seventh larger
                (Zhang 2019), five pairs each
  whole pixels  five random rolls against the image itself
  half pixels   the same by a half pixel more down and to the right, between
                pixels by the phase of the frequencies
  worst         images whose class no roll changes, and that every roll gets
                right: all rolls by up to --worst-pixels each way
What a roll takes out at one side comes in at the other. The shifts are the
same for all models."""
    examples = """\
  timm-sape2 study consistency --runs output/studies/compare
  timm-sape2 study consistency --runs output/train/mine --worst-pixels 16 \\
      --val-num-samples 1000 --data-dir photos"""

    def __init__(self, arguments: argparse.Namespace, flags: Sequence[str]) -> None:
        self.runs = open_runs(arguments.runs, flags)
        self.worst_pixels = arguments.worst_pixels
        self.units = [{**run.factors, 'shift': shift} for shift in MEASURES for run in self.runs]
        args = self.runs[0].args
        self.configuration = {
            'data_dir': args.data_dir,
            'images': args.val_num_samples,
            'worst_pixels': self.worst_pixels,
        }

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_runs_argument(parser)
        parser.add_argument(
            '--worst-pixels',
            type=positive_int,
            metavar='N',
            help='pixels up to which all rolls are tried, (2N + 1)² of them; half the side is all that there are '
            '(default: an eighth of the side)',
        )

    def run(self, unit: Unit, folder: Path) -> list[Row]:
        run, shift = run_of(unit, self.runs), unit['shift']
        device, autocast = run.set_up_device()
        model: Any = run.model_at(run.img_size).to(device)
        height, width = size = run.img_size
        if shift == 'crops':
            height, width = height + height // CROP_SHARE, width + width // CROP_SHARE
        generator = torch.Generator().manual_seed(0)
        same, right = [], []
        with torch.inference_mode(), autocast():
            for images, targets in run.validation_loader(model, (height, width), device):
                images = images.to(device)
                if shift == 'crops':
                    classes = [predicted(model, crops) for crops in random_crops(images, size, generator)]
                    pairs = [first == second for first, second in zip(classes[::2], classes[1::2], strict=True)]
                else:
                    still = predicted(model, images)
                    offsets = self.rolls(shift, len(images), size, generator)
                    classes = [predicted(model, rolled(images, *offset)) for offset in offsets] or [still]
                    pairs = [other == still for other in classes]
                kept = torch.stack(pairs).float()
                correct = torch.stack([of_shift == targets.to(device) for of_shift in classes]).float()
                same += (kept.amin(0) if shift == 'worst' else kept.mean(0)).tolist()
                right += (correct.amin(0) if shift == 'worst' else correct.mean(0)).tolist()
        return [{**unit, 'consistency': 100 * sum(same) / len(same), 'accuracy': 100 * sum(right) / len(right)}]

    def rolls(
        self, shift: str, num_images: int, size: tuple[int, int], generator: torch.Generator
    ) -> list[tuple[Tensor, Tensor]]:
        """Return how far to roll each image of a batch: pixels down and to the right, a pair for each time."""
        if shift == 'none':
            return []
        if shift == 'worst':
            same_for_all = torch.ones(num_images)
            return [(down * same_for_all, right * same_for_all) for down, right in self.all_rolls(size)]
        half = 0.5 if shift == 'half pixels' else 0.0
        drawn = torch.rand(num_images, DRAWS, 2, generator=generator) * torch.tensor(size)
        down, right = drawn.floor().add(half).unbind(2)
        return list(zip(down.unbind(1), right.unbind(1), strict=True))

    def all_rolls(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return all rolls (down, right) of the worst case, each once."""
        down, right = (
            sorted({offset % side for offset in range(-most, most + 1)})
            for side, most in ((side, self.worst_pixels or max(side // 8, 1)) for side in size)
        )
        return [(y, x) for y in down for x in right]

    def report(self, rows: list[Row]) -> str:
        table = []
        for (encoding, layer_scale), of_model in by_model(rows).items():
            line = {'encoding': encoding, 'LayerScale': layer_scale}
            by_shift = grouped(of_model, 'shift')
            for shift, words in MEASURES.items():
                of_shift = by_shift.get((shift,), [])
                names = ('accuracy',) if shift == 'none' else ('consistency', 'accuracy')
                for name in names:
                    title = f'{"same class" if name == "consistency" else "right"}, {words}'
                    line[title] = plus_minus([row[name] for row in of_shift], 1)
            table.append(line)
        return (
            'Share of images in %, mean ± standard deviation over seeds: those that keep their class when they are '
            'shifted, and those whose class is right then. Crops are compared in pairs (Zhang 2019), up to a seventh '
            'of the side apart; rolls, in a circle, with the image itself, those by half pixels by the phase of '
            f'the frequencies. The mean of {DRAWS} draws; the worst of all rolls, by up to '
            f'{self.worst_pixels or "an eighth of the side in"} pixels each way, counts an image if not one changes '
            f'it, or gets it wrong.\n\n{markdown_table(table)}'
        )

    @staticmethod
    def plots(rows: list[Row], configuration: Mapping[str, Any]) -> 'dict[str, Figure]':
        models = by_model(rows)
        names = models_in_words(models)
        colors = {names[model]: encoding_color(model[0]) for model in models}
        figure = new_figure(12, 2.5 + 0.7 * len(models))
        panels = figure.subplots(2, 2, sharex=True)
        shifts = [shift for shift in MEASURES if shift != 'none']
        for axes, shift in zip(panels.flat, shifts, strict=True):
            dots = {
                words: {
                    names[model]: spread_over_seeds([row[name] for row in of_model if row['shift'] == shift])
                    for model, of_model in models.items()
                    if any(row['shift'] == shift for row in of_model)
                }
                for name, words in (('consistency', 'same class'), ('accuracy', 'right'))
            }
            if any(dots.values()):
                draw_dots(axes, dots, color=colors.__getitem__)
            axes.set(title=MEASURES[shift])
        for axes in panels[1]:
            axes.set(xlabel='images in %')
        figure.suptitle(
            'Do shifted images keep their class? (a dot: a seed; stroke and bar: mean ± standard deviation)'
        )
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc='outside right center')
        return {'shifts': figure}


def predicted(model: Any, images: Tensor) -> Tensor:
    """Return the likeliest class of each image, (B,)."""
    return model(images).argmax(1)


def random_crops(canvas: Tensor, size: tuple[int, int], generator: torch.Generator) -> Iterator[Tensor]:
    """Yield two crops of a batch for each draw, every image cropped at a place of its own.

    Args:
        canvas: Images (B, C, height, width), at least as large as the crops.
        size: Height and width of the crops.
        generator: Where the places are drawn from.
    """
    free = torch.tensor([canvas.shape[2] - size[0], canvas.shape[3] - size[1]])
    corners = (torch.rand(len(canvas), 2 * DRAWS, 2, generator=generator) * (free + 1)).long()
    for places in corners.unbind(1):
        cropped = [
            image[:, top : top + size[0], left : left + size[1]]
            for image, (top, left) in zip(canvas, places.tolist(), strict=True)
        ]
        yield torch.stack(cropped)


def rolled(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Roll every image of a batch by pixels of its own, parts of a pixel too, by shifting the phase of its frequencies.

    Args:
        images: Shape (B, C, H, W).
        down: Pixels down, (B,).
        right: Pixels to the right, (B,).
    """
    for dim, offset in ((2, down), (3, right)):
        side = images.shape[dim]
        turns = offset.to(images.device)[:, None] * torch.fft.rfftfreq(side, device=images.device)
        phase = torch.polar(torch.ones_like(turns), -2 * torch.pi * turns)
        phase = phase[:, None, :, None] if dim == 2 else phase[:, None, None, :]
        images = torch.fft.irfft(torch.fft.rfft(images, dim=dim) * phase, n=side, dim=dim)
    return images
