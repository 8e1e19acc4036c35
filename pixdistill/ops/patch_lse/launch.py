"""With which tiles the kernel of `patch_lse` is launched: a rule of two sizes, no Triton needed."""

from typing import NamedTuple

# Numbers in the tile of one warp, 32 a thread: twice that, for rows and gradient, stay in registers.
_TILE = 1024

# The widest vectors: a tile of eight warps holds four of them.
MAX_WIDTH = 2048


class Launch(NamedTuple):
    """Padded width BD and rows BN of a tile, its warps, registers a thread."""

    BD: int
    BN: int
    warps: int
    registers: int


def launch_of(width: int, vectors: int, wide: bool) -> Launch:
    """The tile for vectors of this width, of which a patch has this many.

    `python -m benchmarks kernels` compiles it: the limit of registers is the one at which the
    assembler, left alone, would spill to fit in one more program.
    """
    padded = _power(width)
    warps = 1 if padded <= 64 else 4 if padded <= 512 else 8
    rows = min(_power(vectors), _TILE * warps // padded, 128)
    return Launch(padded, rows, warps, 255 if wide else 168)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
