"""The student's head on maps (PCD, ICCV 2023, arXiv 2211.00218), and the map of a ViT's tokens."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from . import _checks
from .spatial_adaptor import SpatialAdaptor


class PixelHead(nn.Module):
    """The student's projector and predictor, on maps `[B, C, H, W] -> [B, D, H, W]`.

    Both have the same shape: for every hidden width a 1x1 convolution, BatchNorm2d and ReLU, then a
    1x1 convolution with bias. The head is trained with the student and dropped afterwards.

    Args:
        in_channels: C, of the student's map.
        hidden: the hidden width, or one for each hidden layer; `()` for none.
        out_channels: D, of the teacher's map.
        predictor: False leaves the predictor out.

    Raises:
        ValueError, TypeError: for a width that is not an int of at least 1.

    Source: the student's heads of the official code, for MoCo v3
    `PixelHead(in_channels, 4096, 256)`: in -> 4096 -> 256 -> 4096 -> 256.

    Example:
        >>> PixelHead(64, 128, 32)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 32, 7, 7])
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int | Sequence[int],
        out_channels: int,
        *,
        predictor: bool = True,
    ) -> None:
        super().__init__()
        inputs = _checks.integer("in_channels", in_channels)
        outputs = _checks.integer("out_channels", out_channels)
        widths = hidden if isinstance(hidden, Iterable) else [hidden]
        between = [_checks.integer("hidden", width) for width in widths]
        _checks.flag("predictor", predictor)
        self.projector = _mlp(inputs, *between, outputs)
        self.predictor = _mlp(outputs, *between, outputs) if predictor else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, H, W] -> [B, out_channels, H, W]`"""
        return self.predictor(self.projector(x))

    @classmethod
    def like(
        cls, adaptor: SpatialAdaptor, in_channels: int, *, predictor: bool = True
    ) -> "PixelHead":
        """The head for a student of `in_channels`, with the widths of the teacher's adapted head.

        All widths are copied. A last layer of thousands of prototypes is wide: adapt the teacher's
        head without it, or write the widths out.
        """
        if not isinstance(adaptor, SpatialAdaptor):
            raise TypeError(f"adaptor must be a SpatialAdaptor; got {type(adaptor).__name__}")
        if not adaptor.widths:
            raise ValueError("adaptor must have a linear layer to take the widths from")
        return cls(in_channels, adaptor.widths[:-1], adaptor.widths[-1], predictor=predictor)


def tokens_to_map(tokens: Tensor, grid: Sequence[int], *, prefix_tokens: int = 1) -> Tensor:
    """The patch tokens of a ViT as a map: `[B, P + H*W, C] -> [B, C, H, W]`, a view.

    Args:
        tokens: P other tokens, then the patches, row by row.
        grid: (H, W), or one or three sizes. It is never guessed: 16 tokens may be 4 x 4 or 8 x 2.
        prefix_tokens: P, the number of tokens to drop: 1 for a class token, more with registers.

    Raises:
        ValueError: if the number of tokens is not P + H*W.

    Example:
        >>> tokens_to_map(torch.randn(2, 1 + 6 * 8, 48), grid=(6, 8)).shape
        torch.Size([2, 48, 6, 8])
    """
    grid = _checks.sizes("grid", grid, most=3)
    prefix_tokens = _checks.integer("prefix_tokens", prefix_tokens, minimum=0)
    _check_count(tokens, grid, prefix_tokens)
    return tokens[:, prefix_tokens:].mT.unflatten(2, grid)


def _check_count(tokens: Any, grid: tuple[int, ...], prefix_tokens: int) -> None:
    if isinstance(tokens, torch.fx.Proxy):  # its shape is not known
        return
    _checks.tensor("tokens", tokens)
    if tokens.dim() != 3:
        raise ValueError(f"tokens must have shape [B, N, C]; got {tuple(tokens.shape)}")
    patches, count = math.prod(grid), tokens.shape[1]
    if count != prefix_tokens + patches:
        fits = f". prefix_tokens={count - patches} would fit" if count >= patches else ""
        raise ValueError(
            f"tokens must hold {prefix_tokens} + {' x '.join(map(str, grid))} = "
            f"{prefix_tokens + patches} tokens; got {count}{fits}"
        )


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths[:-1]):
        convolution = nn.Conv2d(inputs, outputs, kernel_size=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-2], widths[-1], kernel_size=1))
