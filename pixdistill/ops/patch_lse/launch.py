"""With which tiles the kernel of `patch_lse` is launched: a rule of a few facts, no Triton needed."""

from typing import NamedTuple

# Elements in the tile of one warp, 32 a thread: twice that, for rows and gradient, stay in registers.
# Where a thread cannot load four pixels at once, as many offsets stay there as well: half a tile.
_TILE = 1024

# Maximum rows per tile: each row needs its own registers, so more would spill for narrow vectors.
_ROWS = 32

# The widest vectors: a tile of eight warps holds four of them, or two.
MAX_WIDTH = 2048


class Launch(NamedTuple):
    """Padded width BD and rows BN of a tile, warps per tile, registers per thread."""

    BD: int
    BN: int
    warps: int
    registers: int


def launch_of(width: int, vectors: int, aligned: bool, wide: bool) -> Launch:
    """The tile for vectors of this width, of which a patch has this many.

    `aligned` and `wide` are what the launcher found in the maps' strides, never both.
    `python -m benchmarks kernels` compiles it. The limit of registers is the one at which the
    assembler, left alone, would spill to fit in one more program.
    """
    padded = power_of_2(width)
    warps = 1 if padded <= 64 else 4 if padded <= 512 else 8
    tile = _TILE if aligned else _TILE // 2
    rows = min(power_of_2(vectors), tile * warps // padded, _ROWS)
    return Launch(padded, rows, warps, 255 if wide else 168)


def power_of_2(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
