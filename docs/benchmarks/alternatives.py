"""What else could compute SaPE2's bias on a GPU: the figures of docs/gpu-alternatives.md.

    python docs/benchmarks/alternatives.py --model local-dir:MODEL --images DIR

prints, for a trained model on real images, what rank its biases have (a bias of low rank rides in extra channels of
queries and keys), and how far FlexAttention, with the bias in its score_mod, is from the reference on a CPU.
"""

import argparse
import os
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from timm_sape2.ops.sape2.reference import sape2_bias, sape2_signatures
from timm_sape2.studies.bias_maps.biases import record_attention_inputs
from timm_sape2.trained.opening import open_model

TOLERANCES = (1e-1, 1e-2)


def needed_rank(bias: Tensor, tolerance: float) -> Tensor:
    """Return the least rank of an approximation within a Frobenius error relative to the bias, of each matrix."""
    energy = torch.linalg.svdvals(bias).square()
    rest = energy.flip(-1).cumsum(-1).flip(-1)  # what ranks 0, 1, 2 ... leave out
    return (rest > tolerance**2 * energy.sum(-1, keepdim=True)).sum(-1)


def flex(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Attention with distances of signatures (B, h, N, W) and (B, h, N, H) in the score_mod of FlexAttention."""

    def add_distance(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for points in (rows, columns):
            score = score + (points[b, h, i] - points[b, h, j]).square().sum(-1).sqrt()
        return score

    return flex_attention(query, key, value, score_mod=add_distance, scale=scale)


def describe(values: Tensor) -> str:
    """Median and range."""
    numbers = values.flatten().tolist()
    return f'{statistics.median(numbers):.0f} ({min(numbers)} to {max(numbers)})'


def main() -> None:
    parser = argparse.ArgumentParser(description='Rank of the biases of a trained model; FlexAttention on a CPU.')
    parser.add_argument('--model', required=True, metavar='SOURCE', help='a trained model with default SaPE2')
    parser.add_argument('--images', required=True, metavar='DIR', help='folder of images, searched in order of names')
    parser.add_argument('--count', type=int, default=4, metavar='N', help='images (default: %(default)s)')
    parser.add_argument('--sizes', type=int, nargs='+', default=[32, 64, 128], metavar='N', help='sides in pixels')
    args = parser.parse_args()
    files = sorted(Path(args.images).rglob('*.png'))
    files = files[:: max(1, len(files) // args.count)][: args.count]
    if not files:
        parser.error(f'there is no .png in {args.images}')
    torch.manual_seed(0)
    for size in args.sizes:
        trained = open_model(args.model, img_size=(size, size))
        transform = create_transform(**trained.data_config, is_training=False)
        images = torch.stack([transform(Image.open(file).convert('RGB')) for file in files])
        model = trained.model.double().eval()
        with torch.no_grad():
            show(model, images.double(), size)


def show(model: torch.nn.Module, images: Tensor, size: int) -> None:
    """Print the lines of one image size."""
    for block, (query, key, value, grid, _) in record_attention_inputs(model, images).items():
        sape2 = model.blocks[block].attn.position['sape2']
        prefix = model.num_prefix_tokens
        query, key, value = (x[:, :, prefix:] for x in (query, key, value))
        tables = sape2.row_table, sape2.column_table
        bias = sape2_bias(query, key, key, *tables, grid, sape2.scale)
        ranks = '; '.join(f'{error:g}: {describe(needed_rank(bias, error))}' for error in TOLERANCES)
        (rows,), (columns,) = sape2_signatures(query, key, key, *tables, grid, sape2.scale)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=sape2.scale)
        error = 'not run'
        if len(query[0, 0]) <= 256:  # not compiled, FlexAttention stores all differences
            found = flex(query, key, value, rows, columns, sape2.scale)
            error = f'{((found - expected).norm() / expected.norm()).item():.1e}'
        print(f'{size}px N={bias.shape[-1]} block {block}: mean bias {bias.mean():.3f}, rank for {ranks}; Flex {error}')


if __name__ == '__main__':
    os.environ.setdefault('TORCH_LOGS', '-all')
    main()
