"""With which tiles the kernels of `patch_contrast` are launched; no Triton needed.

They read or write each map once, so any tile of whole cache lines serves. The tiles are small enough to
fill a GPU with pooled maps, and spill no registers (`python -m benchmarks kernels`). They are not tuned.
"""

import torch

WARPS = 4
_TILE = 512
"""Elements of a tile: four per thread, each of which keeps two maxima and a position."""

BLOCK = 1024
"""Partial sums that the last kernel reads at a time."""


def tile_of(channels: int, pixels: int, channels_last: bool) -> tuple[int, int]:
    """Channels and pixels, or windows, of a tile: powers of two, 32 of those that are neighbours."""
    if channels_last:
        down = min(32, power_of_2(channels))
        return down, min(_TILE // down, power_of_2(pixels))
    across = min(32, power_of_2(pixels))
    return min(_TILE // across, power_of_2(channels)), across


def power_of_2(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def argmax_dtype(pool: tuple[int, int]) -> torch.dtype:
    """The dtype of positions in a window, and of one more."""
    return torch.uint8 if pool[0] * pool[1] < 256 else torch.int32
