"""Heads on maps for pixel-to-pixel distillation (PCD, ICCV 2023, arXiv 2211.00218).

A self-supervised teacher's head was trained on pooled vectors. SpatialAdaptor applies it to a map and
keeps what it says about the whole image:

    adaptor(x).mean(space) == head(x.mean(space)).

Let m be the pooled vector on its way through the head. A layer f acts on m as it always did, and on
the pixels by an affine map that agrees with f at m. A mean passes through an affine map, so m stays
the mean of the pixels from layer to layer. A linear layer and a BatchNorm with fixed statistics are
affine already; an activation x g(x) becomes x g(m), LayerNorm takes the mean and the deviation of m,
L2 normalisation divides by |m|. All but the linear layers scale and shift channels: a run of them is
one multiply-add over the map.

PixelHead is the student's counterpart, and tokens_to_map makes a map of a ViT teacher's tokens.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ._checks import check_count, check_flag
from ._head_layers import (
    Affine,
    apply,
    apply_after,
    check_layer,
    copied,
    in_width,
    layers_of,
    step_of,
    weight_of,
)


class SpatialAdaptor(nn.Module):
    """A head on vectors `[B, C] -> [B, D]`, on maps `[B, C, *spatial] -> [B, D, *spatial]`.

    For every map x of one, two or three spatial axes, to rounding,
    `adaptor(x).flatten(2).mean(2) == head.eval()(x.flatten(2).mean(2))`.

    Args:
        head: any nesting of `nn.Sequential` of Linear (with weight norm, old or parametrized),
            BatchNorm1d, SyncBatchNorm, LayerNorm, Identity, Dropout, `L2Norm`, ReLU, LeakyReLU, GELU,
            SiLU and Hardswish. It is copied: neither module ever changes the other.
        trainable: False freezes the copy, and autograd records nothing: no gradient reaches the copy
            or, through it, the teacher. True keeps the `requires_grad` of each parameter and
            differentiates everything, the pooled statistics too.
        order: for a head of a class of its own, the names of its children in the order in which
            `forward` runs them, with a module in place of each function that it calls. For DINO:
            `{DINOHead: ("mlp", L2Norm(), "last_layer")}`. It is tried on numbers at once.

    BatchNorm keeps its statistics and Dropout stays off in train mode too: the identity holds only
    so. Statistics of m are float32 (float64 for float64), under autocast as well.

    Raises:
        TypeError: names the layer and its path that has no such affine form, such as Softmax, a
            BatchNorm without running statistics, an unknown class, or a layer with a hook; also at
            a call, for a layer put into `adaptor.head` later. Hooks added there later are not run.
        ValueError: for `trainable=True` where nothing requires a gradient, for an `order` that does
            not give what the head gives, and for a map of another shape.

    Source: the paper's SpatialAdaptor and its official code, which know Linear, BatchNorm and ReLU
    (`x * (x.sum(space) > 0)`). The other layers are ours. The official teacher leaves BatchNorm in
    train mode; this one does not.

    Example:
        >>> head = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
        >>> SpatialAdaptor(head)(torch.randn(2, 16, 7, 7)).shape
        torch.Size([2, 8, 7, 7])
    """

    def __init__(
        self,
        head: nn.Module,
        *,
        trainable: bool = False,
        order: Mapping[type[nn.Module], Sequence[str | nn.Module]] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Module):
            raise TypeError(f"head must be a module; got {type(head).__name__}")
        check_flag("trainable", trainable)
        self.trainable = trainable
        names = {module: name for name, module in head.named_modules()}
        layers = layers_of(head, "head", order or {})
        self._names = [names.get(layer, layer) for layer in layers]  # no name: it stands in `order`
        self.head = copied(head).eval()
        if not trainable:
            self.head.requires_grad_(False)
        elif not any(parameter.requires_grad for parameter in self.head.parameters()):
            raise ValueError(
                "trainable=True, but no parameter of head requires a gradient; "
                "call head.requires_grad_() first"
            )
        if order:
            self._check_order()

    @property
    def in_channels(self) -> int | None:
        """Channels of the map that comes in; None if the head takes any number."""
        for layer in self._layers:
            if (width := in_width(layer)) is not None:
                return width
        return None

    @property
    def widths(self) -> tuple[int, ...]:
        """Output width of each linear layer, in order."""
        return tuple(layer.out_features for layer in self._layers if isinstance(layer, nn.Linear))

    def forward(self, x: Tensor) -> Tensor:
        """The head on every pixel, in the dtype of x; in autocast's after a linear layer."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"x must be a floating-point tensor; got {got}")
        channels = self.in_channels
        if not 3 <= x.dim() <= 5 or (channels is not None and channels != x.shape[1]):
            raise ValueError(
                f"x must have shape [B, {channels or 'C'}, *spatial] with one to three spatial "
                f"axes; got {tuple(x.shape)}"
            )
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return self._run(x)

    def train(self, mode: bool = True) -> "SpatialAdaptor":
        """Set the mode of the adaptor; its head stays in eval mode."""
        super().train(mode)
        self.head.eval()
        return self

    def extra_repr(self) -> str:
        """Whether it is trainable."""
        return f"trainable={self.trainable}"

    @property
    def _layers(self) -> list[nn.Module]:
        # by name, since convert_sync_batchnorm and its like put other modules into the head; not by
        # get_submodule, which torch.compile of PyTorch 2.6 refuses
        modules = dict(self.head.named_modules(remove_duplicate=False))
        layers = [modules[n] if isinstance(n, str) else n for n in self._names]
        for name, layer in zip(self._names, layers, strict=True):
            check_layer(layer, f"head.{name}" if isinstance(name, str) and name else "head")
        return layers

    def _run(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        m = x.mean(dim=tuple(range(2, x.dim())), dtype=dtype)  # [B, C]
        pending: Affine = (None, None)  # what the pixels have still to go through
        for layer in self._layers:
            if isinstance(layer, nn.Linear):
                weight = weight_of(layer)
                x = _pointwise(apply(x, pending), weight, layer.bias)
                m = _linear(m, weight, layer.bias)
                pending = (None, None)
            else:
                step = step_of(layer, m)
                m = apply(m, step)
                pending = apply_after(pending, step)
        return apply(x, pending)

    @torch.no_grad()
    def _check_order(self) -> None:
        """Compare with the head itself: nothing else says in which order its forward runs."""
        like = next(self.head.parameters(), torch.empty(0))
        count = 2 * (self.in_channels or 8)
        probe = torch.linspace(0, 9, count, device=like.device).sin().to(like.dtype).view(2, -1)
        try:
            ours, truth = self._run(probe.unsqueeze(2)).squeeze(2), self.head(probe)
        except RuntimeError as error:
            raise ValueError(f"order must name what head.forward runs; got {error}") from error
        close = isinstance(truth, Tensor) and ours.shape == truth.shape
        if not (close and (ours - truth).norm() <= 0.02 * truth.norm()):  # nor if it is NaN
            raise ValueError("order must name what head.forward runs; the results differ")


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
        check_count("in_channels", in_channels)
        check_count("out_channels", out_channels)
        check_flag("predictor", predictor)
        hidden = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
        for width in hidden:
            check_count("hidden", width)
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
        check_count("grid", size)
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


def _linear(m: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(m.device.type, enabled=False):
        return F.linear(m, weight.to(m.dtype), None if bias is None else bias.to(m.dtype))


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    if not torch.is_autocast_enabled(x.device.type):  # which casts them itself
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return convolve(x, weight[(...,) + (None,) * (x.dim() - 2)], bias)
