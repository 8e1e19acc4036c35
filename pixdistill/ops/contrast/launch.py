"""With which tiles the kernels of `contrast` are launched: plain tables, no Triton needed."""

from typing import NamedTuple

FINISH_BLOCK, FINISH_WARPS = 4096, 16
"""Pixels at a step of the one program of `finish_kernel`."""


class Launch(NamedTuple):
    """Tile of channels BD, which holds all of them, tile of pixels BP, warps."""

    BD: int
    BP: int
    warps: int


def launch_of(width: int) -> Launch:
    """Tiles of the kernels that read or write maps and rows."""
    channels = max(16, 1 << (width - 1).bit_length())
    return Launch(channels, 32 if channels <= 128 else 16, 4)
