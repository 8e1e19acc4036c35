"""Self-attention on the student's map during distillation (PCD, ICCV 2023, arXiv 2211.00218).

A small student's pixels see little of the image, while the teacher's, which they are to match, see all
of it. A plug-in multi-head self-attention relates every pixel to every other:

    y = x + W_o attention(W_q n, W_k n, W_v n),   n = LayerNorm(x) of each pixel,
    attention(q, k, v) = softmax(q k^T / sqrt(d)) v in each head.

PCD publishes no code for this module and states no more than its purpose. What stands here is our
design: W_o starts at zero, so that plugging it into a trained network does not change its output, and
`unplug` takes it out again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import _checks

POSITIONS = ("sine", "relative", None)


class MHSAPlugin(nn.Module):
    """Residual multi-head self-attention over the pixels of a map `[B, C, H, W]` of any size.

    For N pixels, every one sees all N, at 4 N^2 C operations forward. For large maps, either

    - `key_stride=s` averages the keys and values over cells of s x s pixels: 4 N^2 C / s^2; or
    - `window=w` cuts the map into windows of w x w pixels that see only themselves: 4 N w^2 C.

    Memory is O(N C) in all three where `F.scaled_dot_product_attention` has a fused kernel: on a CPU,
    and on CUDA for float16, bfloat16 and float32.

    Args:
        channels: C.
        num_heads: divides C.
        position: "sine", a fixed code of row and column, added to what makes queries and keys;
            "relative", queries and keys rotated by row and column (2-D rotary), so that a logit
            depends on the displacement only; None, for attention without position. None of them has
            parameters or a size.
        ffn_ratio: adds a feed-forward part of `round(ffn_ratio * channels)` hidden units, with a
            norm and a residual of its own, that starts as the identity too.
        key_stride, window: see above; not both.

    Raises:
        ValueError, TypeError: for settings that do not fit, and for an input of another shape.

    Source: ours, see the top of this file.

    Example:
        >>> plugin = MHSAPlugin(64)
        >>> x = torch.randn(2, 64, 12, 20)
        >>> torch.equal(plugin(x), x)
        True
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 8,
        *,
        position: str | None = "sine",
        ffn_ratio: float | None = None,
        key_stride: int = 1,
        window: int | None = None,
    ) -> None:
        super().__init__()
        _checks.integer("channels", channels)
        _checks.integer("num_heads", num_heads)
        _checks.choice("position", position, POSITIONS)
        _checks.integer("key_stride", key_stride)
        if window is not None:
            _checks.integer("window", window)
            if key_stride != 1:
                raise ValueError(f"key_stride must be 1 with a window; got {key_stride}")
        if channels % num_heads:
            raise ValueError(f"num_heads must divide channels={channels}; got {num_heads}")
        if position == "sine" and channels % 4:
            raise ValueError(f'channels must be a multiple of 4 for "sine"; got {channels}')
        if position == "relative" and channels // num_heads % 4:
            raise ValueError(
                'channels / num_heads must be a multiple of 4 for "relative"; '
                f"got {channels} / {num_heads}"
            )
        self.channels = channels
        self.num_heads = num_heads
        self.position = position
        self.key_stride = key_stride
        self.window = window
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = _ZeroLinear(channels, channels)
        self.ffn = None if ffn_ratio is None else _feed_forward(channels, ffn_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, C, H, W]`"""
        fits = isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == self.channels
        if not fits or x.shape[2] < 1 or x.shape[3] < 1:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"x must have shape [B, {self.channels}, H, W], H and W at least 1; got {got}"
            )
        pixels = rearrange(x, "b c h w -> b h w c")
        pixels = pixels + self._attend(self.norm(pixels))
        if self.ffn is not None:
            pixels = pixels + self.ffn(pixels)
        return rearrange(pixels, "b h w c -> b c h w")

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"{self.channels}, num_heads={self.num_heads}, position={self.position!r}, "
            f"key_stride={self.key_stride}, window={self.window}"
        )

    def _attend(self, pixels: Tensor) -> Tensor:
        """Attention among the normalised pixels `[B, H, W, C]`, or among those of a window."""
        if self.window is None:
            return self._attention(pixels, None)
        batch, height, width, _ = pixels.shape
        # Always padded and masked, also by nothing: a branch would compile once more for it.
        # Two remainders: torch.compile of PyTorch 2.6 is not sure of the sign of `-width % window`.
        right, below = (self.window - size % self.window for size in (width, height))
        edges = (0, 0, 0, right % self.window, 0, below % self.window)
        inside = F.pad(pixels.new_ones(1, height, width, 1, dtype=torch.bool), edges)
        mask = _cut(inside, self.window).flatten(1)[:, None, None].repeat(batch, 1, 1, 1)
        pixels = F.pad(pixels, edges)
        rows, columns = (size // self.window for size in pixels.shape[1:3])
        windows = self._attention(_cut(pixels, self.window), mask)
        joined = rearrange(windows, "(b i j) h w c -> b (i h) (j w) c", i=rows, j=columns)
        return F.pad(joined, tuple(-edge for edge in edges))

    def _attention(self, pixels: Tensor, key_mask: Tensor | None) -> Tensor:
        height, width = pixels.shape[1:3]
        places = key_places = _places(height, width, like=pixels)
        sources = pixels
        if self.key_stride > 1:
            sources = _average(pixels, self.key_stride)
            key_places = _average(places.unsqueeze(0), self.key_stride).squeeze(0)
        queries, keys = pixels, sources
        if self.position == "sine":
            queries = queries + sine_code(places, self.channels).to(queries.dtype)
            keys = keys + sine_code(key_places, self.channels).to(keys.dtype)
        q, k, v = (
            rearrange(t, "b h w (n d) -> b n (h w) d", n=self.num_heads)
            for t in (self.query(queries), self.key(keys), self.value(sources))
        )
        if self.position == "relative":
            q, k = rotate(q, places), rotate(k, key_places)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        return self.out(rearrange(mixed, "b n (h w) d -> b h w (n d)", h=height))


class Plugged(nn.Module):
    """A module with a plug-in on its output: `plugin(module(...))`."""

    def __init__(self, module: nn.Module, plugin: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.plugin = plugin.train(module.training)
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the plug-in makes of the module's output."""
        return self.plugin(self.module(*args, **kwargs))


def plug(network: nn.Module, name: str, plugin: nn.Module) -> None:
    """Put a plug-in on the output of a child of `network`, in place.

    The child at `name` (as in `named_modules`, say "backbone.layer4") becomes
    `Plugged(child, plugin)`, so that its parameters are found under `name + ".module"` while it is
    plugged. The plug-in takes the child's training mode. Plug before the optimizer is made and
    before the network is wrapped in DDP.

    Raises:
        ValueError: if there is no such child, or a plug-in is there already.
        TypeError: if the plug-in is no module, or the name no string.
    """
    if not isinstance(plugin, nn.Module):
        raise TypeError(f"plugin must be a module; got {type(plugin).__name__}")
    parent, key, child = _child(network, name)
    if isinstance(child, Plugged):
        raise ValueError(f"name must be a child without a plug-in; {name!r} has one")
    parent._modules[key] = Plugged(child, plugin)


def unplug(network: nn.Module, name: str) -> nn.Module:
    """Put the child back as it was, the very same module, and return the plug-in.

    Raises:
        ValueError: if there is no plug-in at `name`.
    """
    parent, key, child = _child(network, name)
    if not isinstance(child, Plugged):
        raise ValueError(f"name must be a child with a plug-in; {name!r} has none")
    parent._modules[key] = child.module
    return child.plugin


def sine_code(places: Tensor, width: int) -> Tensor:
    """Fixed code of places `[..., 2]`: `[..., width]`, sine and cosine of the row, then the column.

    The wavelengths are those of the Transformer, from 2 pi to 10000 * 2 pi pixels.
    """
    angles = _angles(places, width // 4, base=10000.0)  # [..., 2, width / 4]
    return torch.stack([angles.sin(), angles.cos()], dim=-2).flatten(-3)


def rotate(vectors: Tensor, places: Tensor) -> Tensor:
    """Turn pairs of numbers of `[B, heads, N, d]` by angles that grow with row and column.

    `<rotate(q, a), rotate(k, b)>` depends on a and b through a - b only: a 2-D rotary code, half of
    the pairs for the rows and half for the columns, wavelengths from 2 pi to 100 * 2 pi pixels.
    """
    angles = _angles(places, vectors.shape[-1] // 4, base=100.0).flatten(-2).flatten(0, 1)
    cos, sin = angles.cos(), angles.sin()  # [N, d / 2]
    x, y = vectors.chunk(2, dim=-1)
    return torch.cat([x * cos - y * sin, x * sin + y * cos], dim=-1).to(vectors.dtype)


def _angles(places: Tensor, count: int, base: float) -> Tensor:
    exponents = torch.arange(count, device=places.device, dtype=places.dtype) / count
    return places.unsqueeze(-1) * base**-exponents


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """Row and column of each pixel, `[H, W, 2]`, in float32, or float64 for float64 pixels."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows, columns = (torch.arange(n, device=like.device, dtype=dtype) for n in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)


def _average(pixels: Tensor, stride: int) -> Tensor:
    """Means over cells of `[B, H, W, C]`; those at the lower and right edge may be smaller."""
    channels_first = rearrange(pixels, "b h w c -> b c h w")
    cells = F.avg_pool2d(channels_first, stride, ceil_mode=True, count_include_pad=False)
    return rearrange(cells, "b c h w -> b h w c")


def _cut(pixels: Tensor, window: int) -> Tensor:
    """Windows of `[B, H, W, C]` as a batch."""
    return rearrange(pixels, "b (i h) (j w) c -> (b i j) h w c", h=window, w=window)


def _feed_forward(channels: int, ratio: float) -> nn.Sequential:
    _checks.positive("ffn_ratio", ratio)
    hidden = max(1, round(ratio * channels))
    inner = nn.Linear(channels, hidden)
    return nn.Sequential(nn.LayerNorm(channels), inner, nn.GELU(), _ZeroLinear(hidden, channels))


class _ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, also where its parameters are made after it (`to_empty`)."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # draws as many random numbers as any linear layer
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


def _child(network: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module]:
    """The parent of a child, the child's name there, and the child."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, such as 'layer4'; got {name!r}")
    path, _, key = name.rpartition(".")
    try:
        parent = network.get_submodule(path)
        child = parent.get_submodule(key) if key else None
    except AttributeError as error:
        raise ValueError(f"name must be that of a child of the network: {error}") from None
    if child is None:
        raise ValueError("name must be that of a child of the network; got the network itself")
    return parent, key, child
