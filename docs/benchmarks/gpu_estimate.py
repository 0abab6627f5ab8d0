"""Estimate what SaPE2 costs on an H100, by counting: nothing here was measured on a GPU.

python docs/benchmarks/gpu_estimate.py

A loop over tokens takes, for 32 pairs on a quarter of a multiprocessor, the clocks of its tensor cores and those of
the busiest other unit: the issue of instructions, one a clock, or the special functions (roots and exponentials), 4 a
clock. Pairs count as tiles are padded. Signatures take what moving their tensors through memory takes.
"""

from typing import NamedTuple

from timm_sape2._table import markdown_table

CLOCKS_PER_SECOND = 132 * 4 * 1.755e9  # quarters of multiprocessors, at the boost clock
BYTES_PER_SECOND = 2.5e12  # of 3.35e12 that the data sheet states
FLASH_FORWARD = 320e12  # operations a second in bfloat16, as FlashAttention-2 publishes
FLASH_BACKWARD = 270e12  # assumed
HALF, SINGLE = 2, 4  # bytes
BLOCKS, HEADS, DIM = 12, 6, 64  # ViT-S
COLUMNS = (
    *('ViT-S/16', 'plain attention, us a block', 'SaPE2', 'signatures'),
    *('attention to plain', 'training step to plain'),
)


class Kernel(NamedTuple):
    """A lane's instructions and special functions a pair, tensor-core clocks for 32 pairs, and the tile.

    As `python tests/ops/sape2/ahead_of_time.py sm_90` counts them (Triton 3.8.0, bfloat16, 64 channels); special
    functions and tensor clocks are from the same machine code.
    """

    instructions: float
    special: float
    tensor: float
    own: int
    other: int

    def microseconds(self, tokens: int, heads: int) -> float:
        """Time of attention over all pairs."""
        pairs = padded(tokens, self.own) * padded(tokens, self.other) * heads
        clocks = self.tensor + max(self.instructions, 32 / 4 * self.special)
        return 1e6 * pairs / 32 * clocks / CLOCKS_PER_SECOND


class Setting(NamedTuple):
    """A ViT-S/16 in training: size, images, kernels, tail (what a launch takes beyond its loop), plain step in ms."""

    size: int
    batch_size: int
    forward: Kernel
    backward: Kernel
    tail: float
    plain_step: float


SETTINGS = [
    Setting(224, 256, Kernel(27.2, 3.1, 12, 64, 32), Kernel(56.2, 4, 34, 64, 16), 1.2, 33),  # published for a ViT-S
    Setting(384, 64, Kernel(22.4, 3.1, 16, 128, 64), Kernel(61.0, 4, 40, 64, 16), 1.1, 27),  # scaled from it
]


def padded(tokens: int, tile: int) -> int:
    return -(-tokens // tile) * tile


def estimate(setting: Setting) -> dict[str, float]:
    """Return microseconds a block of plain attention, SaPE2 attention and signatures, and ratios to plain."""
    tokens, line = (setting.size // 16) ** 2 + 1, setting.size // 16
    heads = setting.batch_size * HEADS
    pairs = padded(tokens, 128) * padded(tokens, 64) * heads
    plain = 1e6 * setting.tail * DIM * pairs * (4 / FLASH_FORWARD + 10 / FLASH_BACKWARD)
    inputs = heads * tokens * DIM * HALF
    delta = 1e6 * 2 * inputs / BYTES_PER_SECOND  # reads the output and its gradient
    kernels = setting.forward, setting.backward
    attention = setting.tail * sum(kernel.microseconds(tokens, heads) for kernel in kernels) + delta
    points = heads * tokens * 2 * padded(line, 16) * SINGLE
    forward = 2 * inputs + points  # reads queries and keys, writes signatures
    backward = 6 * inputs + points  # reads queries and keys, reads and writes their gradients
    signatures = 1e6 * (forward + backward) / BYTES_PER_SECOND
    step = 1 + BLOCKS * (attention - plain + signatures) / 1000 / setting.plain_step
    return {
        'plain': plain,
        'attention': attention,
        'signatures': signatures,
        'attention to plain': attention / plain,
        'step to plain': step,
    }


def table() -> str:
    rows = []
    for setting in SETTINGS:
        *times, attention, step = estimate(setting).values()
        cells = [f'{time:.0f}' for time in times] + [f'{attention:.2f}', f'{step:.2f}']
        rows.append(dict(zip(COLUMNS, [f'{setting.size}, batches of {setting.batch_size}', *cells], strict=True)))
    return markdown_table(rows)


if __name__ == '__main__':
    print(table())
