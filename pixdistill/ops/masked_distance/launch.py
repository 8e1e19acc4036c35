"""With which tiles the kernels of `masked_distance` are launched. No Triton needed.

The tiles are the largest that spill no registers, for any strides, with as many programs as a large GPU
needs. They have not been searched on a GPU.
"""

from typing import NamedTuple

# Rows of a tile of logits, which are registers. More tokens take the form in PyTorch.
MAX_TOKENS = 16

# Pixels of a program of the attention: a tile [16, 128] is 16 registers of a thread.
ATTENTION_PIXELS = 128

# Registers of a thread where there is a valid mask: the assembler, left alone, would spill to fit in one
# more program.
MASKED_REGISTERS = 255

# Programs that keep every multiprocessor of a large GPU busy.
_PROGRAMS = 128


class Launch(NamedTuple):
    """Channels BC and pixels BP of a tile, its warps, and stages of the loop over channels."""

    BC: int
    BP: int
    warps: int
    stages: int


# By bytes of an element, for large and for small maps. Each program writes a row of window sums, which
# wider tiles have fewer of.
_READ = {
    2: (Launch(32, 128, 8, 2), Launch(32, 64, 4, 3), Launch(64, 32, 4, 3)),
    4: (Launch(32, 32, 4, 2),),
}


def read_launch(channels: int, pixels: int, images: int, itemsize: int) -> Launch:
    """The tile that runs down the channels of BP pixels: the widest of which there are enough."""
    tiles = _READ[itemsize]
    enough = (tile for tile in tiles if images * -(-pixels // tile.BP) >= _PROGRAMS)
    tile = next(enough, tiles[-1])
    return tile._replace(BC=max(16, min(tile.BC, _power(channels))))


def grad_launch(channels: int, pixels: int, channels_last: bool) -> Launch:
    """A tile whose longer side runs along neighbours in memory."""
    bc, bp = (128, 16) if channels_last else (16, 128)
    return Launch(min(bc, _power(channels)), min(bp, _power(pixels)), 4, 1)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
