"""What both kinds of Triton kernels are written with: rows of a matrix, and products, of the tiles of a program.

Strides come divided by UNIT, so that the compiler knows that rows start where a GPU loads 16 bytes at once.
"""

from typing import Any

import triton
import triton.language as tl

from .operator import UNIT_OF_STRIDES

LOG2_E = tl.constexpr(1.4426950408889634)
UNIT = tl.constexpr(UNIT_OF_STRIDES)
MOST_REGISTERS = 255  # of a thread; where the compiler is not told, it may spill to take fewer
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_rows(pointer, rows, is_row, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows of a matrix of SIZE columns, 0 outside of it: [rows, BLOCK]."""
    columns = tl.arange(0, BLOCK)
    pointers = pointer + rows[:, None] * stride + columns[None, :]
    if is_row is None and SIZE == BLOCK:
        tile = tl.load(pointers)
    else:
        mask = (columns < SIZE)[None, :]
        if is_row is not None:
            mask = mask & is_row[:, None]
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def store_rows(pointer, rows, is_row, stride, tile, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store [rows, BLOCK] as rows of a matrix of SIZE columns, except what is outside of it."""
    columns = tl.arange(0, BLOCK)
    mask = is_row[:, None]
    if SIZE != BLOCK:
        mask = mask & (columns < SIZE)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def add_to_rows(pointer, rows, is_row, stride, tile, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Add [rows, BLOCK] to rows of a matrix of SIZE columns."""
    there = load_rows(pointer, rows, is_row, stride, SIZE, BLOCK)
    store_rows(pointer, rows, is_row, stride, there.to(tl.float32) + tile, SIZE, BLOCK)


@triton.jit
def dot(left, right, sums=None):
    """Matrix product accumulated in float32."""
    if INTERPRETED:  # it takes bfloat16 for integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision='ieee')


def architecture() -> Any:
    """Return the GPU's: 80 for compute capability 8.0, None in the interpreter."""
    return None if INTERPRETED.value else triton.runtime.driver.active.get_current_target().arch
