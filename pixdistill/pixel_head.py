"""The student's head on maps (PCD, ICCV 2023, arXiv 2211.00218), and the map of a ViT's tokens."""

import itertools
import math
from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn

from . import _checks
from .spatial_adaptor import SpatialAdaptor


class PixelHead(nn.Module):
    """The student's projector, and a predictor of the same shape after it, on maps `[B, C, H, W]`.

    Each of the two is, for every hidden width, a 1x1 convolution, BatchNorm2d and ReLU, and then a
    1x1 convolution with bias. It is trained with the student and dropped afterwards.

    Args:
        in_channels: of the student's map.
        hidden: the hidden width, or one for each hidden layer; `()` for none.
        out_channels: of the teacher's adapted map.
        predictor: False leaves the predictor out.

    Raises:
        ValueError, TypeError: for a width that is not an int of at least 1.

    Source: the student's heads of the official code, for MoCo v3
    `PixelHead(in_channels, 4096, 256)`: in -> 4096 -> 256 -> 4096 -> 256.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int | Sequence[int],
        out_channels: int,
        *,
        predictor: bool = True,
    ) -> None:
        _checks.integer("in_channels", in_channels)
        _checks.integer("out_channels", out_channels)
        _checks.flag("predictor", predictor)
        hidden = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
        for width in hidden:
            _checks.integer("hidden", width)
        super().__init__()
        self.projector = _mlp(in_channels, *hidden, out_channels)
        self.predictor = _mlp(out_channels, *hidden, out_channels) if predictor else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, H, W] -> [B, out_channels, H, W]`"""
        return self.predictor(self.projector(x))

    @classmethod
    def like(
        cls, adaptor: SpatialAdaptor, in_channels: int, *, predictor: bool = True
    ) -> "PixelHead":
        """The head for a student of `in_channels`, with the widths of the teacher's adapted head."""
        if not isinstance(adaptor, SpatialAdaptor):
            raise TypeError(f"adaptor must be a SpatialAdaptor; got {type(adaptor).__name__}")
        if not adaptor.widths:
            raise ValueError("adaptor must have a linear layer to take the widths from")
        return cls(in_channels, adaptor.widths[:-1], adaptor.widths[-1], predictor=predictor)


def tokens_to_map(tokens: Tensor, grid: Sequence[int], *, prefix_tokens: int = 1) -> Tensor:
    """The patch tokens of a ViT as a map: `[B, P + H*W, C] -> [B, C, H, W]`, without a copy.

    Args:
        tokens: in row-major order of the grid, after `prefix_tokens` others.
        grid: (H, W), or one or three sizes. It is never guessed: 16 tokens may be 4 x 4 or 8 x 2.
        prefix_tokens: P, how many tokens to drop: one for a class token, more with registers.

    Raises:
        ValueError: if the number of tokens is not P + H*W.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must have shape [B, N, C]; got {got}")
    if not isinstance(grid, Sequence) or not 1 <= len(grid) <= 3:
        raise TypeError(
            f"grid must be a sequence of one to three sizes, such as (H, W); got {grid!r}"
        )
    for size in grid:
        _checks.integer("grid", size)
    if isinstance(prefix_tokens, bool) or not isinstance(prefix_tokens, int) or prefix_tokens < 0:
        raise ValueError(f"prefix_tokens must be an int of at least 0; got {prefix_tokens!r}")
    if tokens.shape[1] != prefix_tokens + math.prod(grid):
        raise ValueError(
            f"tokens must hold {prefix_tokens} + {' x '.join(map(str, grid))} = "
            f"{prefix_tokens + math.prod(grid)} tokens; got {tokens.shape[1]}"
        )
    return rearrange(tokens[:, prefix_tokens:], "b n c -> b c n").unflatten(2, tuple(grid))


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths[:-1]):
        convolution = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-2], widths[-1], kernel_size=1))
