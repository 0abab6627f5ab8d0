"""How far a new encoding moves a trained model before it is trained itself: the figures of docs/equip.md.

    python docs/benchmarks/equip.py --model CHECKPOINT --data-dir DATA --output FILE

takes a vision transformer that was trained with learned embeddings alone, timm's own or one of ours, adds each encoding
to it as `timm_sape2.equip` does, and measures how far features (all tokens after the last norm, relative to their
norm) and accuracy move. With `--updates`, each is then trained on for so many updates.
"""

import argparse
import copy
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from timm_sape2 import PositionVisionTransformer, equip, provenance
from timm_sape2._files import write_json
from timm_sape2._table import markdown_table
from timm_sape2.data.datasets import open_split
from timm_sape2.models.vit import install
from timm_sape2.positions import ENCODINGS, parse_position
from timm_sape2.studies.accuracy.training_grid import encoding_arguments
from timm_sape2.trained.opening import open_model

ALL = [f'learned+{name}' for name in ENCODINGS if name not in ('nope', 'learned')]


def equipped(model: Any, name: str) -> PositionVisionTransformer:
    """Return a copy of a model with learned embeddings that has the encodings of a name such as 'learned+sape2'."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {'position_args': None, **encoding_arguments(name)}
    model = copy.deepcopy(model)
    if isinstance(model, PositionVisionTransformer):
        install(model, parse_position(**arguments))
        return model
    return equip(model, **arguments)


def evenly_spaced(dataset: Any, count: int) -> Dataset:
    """Return a part of a data set that has images of all classes where they come class by class."""
    return Subset(dataset, range(0, len(dataset), max(1, len(dataset) // count)))


@torch.inference_mode()
def look(model: Any, loader: DataLoader) -> tuple[Tensor, Tensor, float]:
    """Return features (N, tokens, C), predicted classes (N,) and top-1 accuracy in percent."""
    model.eval()
    features, predictions, hits = [], [], []
    for images, targets in loader:
        tokens = model.forward_features(images)
        predicted = model.forward_head(tokens).argmax(1)
        features.append(tokens)
        predictions.append(predicted)
        hits.append(predicted == targets)
    return torch.cat(features), torch.cat(predictions), 100 * torch.cat(hits).float().mean().item()


def relative_change(new: Tensor, old: Tensor) -> float:
    """Return the mean over tokens of the distance from their old features, relative to the norm of these."""
    return ((new - old).norm(dim=-1) / old.norm(dim=-1)).mean().item()


def repeated(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def train(model: Any, loader: DataLoader, updates: int, lr: float) -> list[float]:
    """Train for some updates with AdamW at a constant learning rate and return the loss of each."""
    model.train()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=0.05)
    losses = []
    for images, targets in islice(repeated(loader), updates):
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description='How far new encodings move a trained model.')
    add = parser.add_argument
    add('--model', required=True, metavar='SOURCE', help='a ViT that was trained with learned embeddings alone')
    add('--dataset', default='', metavar='NAME', help="'digits', a type/name of timm's, or folders (the default)")
    add('--data-dir', metavar='DIR', help='where the data is')
    add('--encodings', nargs='+', default=ALL, metavar='NAME', help="such as 'learned+sape2(initial_std=0.0001)'")
    add('--img-size', type=int, metavar='N', help='side of images in pixels (default: as trained)')
    add('--images', type=int, default=1000, metavar='N', help='of validation (default: %(default)s)')
    add('--updates', type=int, default=0, metavar='N', help='of training afterwards (default: %(default)s)')
    add('--lr', type=float, default=1e-4, metavar='RATE', help='of these updates (default: %(default)s)')
    add('--batch-size', type=int, default=64, metavar='N', help='of these updates (default: %(default)s)')
    add('--output', metavar='FILE', help='JSON file with the figures')
    args = parser.parse_args(argv)

    opened = open_model(args.model, img_size=args.img_size and (args.img_size, args.img_size))
    transform = create_transform(**opened.data_config)
    parts = {}
    for split, count in (('validation', args.images), ('train', args.updates * args.batch_size)):
        if count:
            dataset = open_split(args.dataset, args.data_dir, split, in_chans=opened.model.in_chans)
            dataset.transform = transform
            parts[split] = evenly_spaced(dataset, count)
    validation = DataLoader(parts['validation'], 250)

    features, predictions, top1 = look(opened.model, validation)
    rows = []
    for name in ['learned', *args.encodings]:
        model = equipped(opened.model, name)
        new_features, new_predictions, new_top1 = look(model, validation)
        row: dict[str, Any] = {
            'encodings': name,
            'change of features': f'{100 * relative_change(new_features, features):.2f} %',
            'same prediction': f'{100 * (new_predictions == predictions).float().mean().item():.1f} %',
            'top-1': f'{new_top1:.1f} %',
        }
        if args.updates:
            generator = torch.Generator().manual_seed(0)
            loader = DataLoader(parts['train'], args.batch_size, shuffle=True, drop_last=True, generator=generator)
            losses = train(model, loader, args.updates, args.lr)
            row['loss, first 10'], row['loss, last 10'] = (
                f'{sum(part) / len(part):.3f}' for part in (losses[:10], losses[-10:])
            )
            row['top-1 then'] = f'{look(model, validation)[2]:.1f} %'
        print(row, flush=True)
        rows.append(row)
    print(markdown_table(rows))
    if args.output:
        measured = {
            'time': provenance.now(),
            'command': shlex.join(['python', 'docs/benchmarks/equip.py', *(sys.argv[1:] if argv is None else argv)]),
            'commit': provenance.commit(),
            'versions': provenance.versions(),
            'hardware': provenance.hardware(),
            'top1': round(top1, 2),
            'rows': rows,
        }
        write_json(Path(args.output), measured)


if __name__ == '__main__':
    main()
