"""Self-attention on the student's map during distillation (PCD, ICCV 2023, arXiv 2211.00218).

    y = x + W_o attention(W_q n, W_k n, W_v n),   n = LayerNorm(x) at each pixel,
    attention(q, k, v) = softmax(q k^T / sqrt(d)) v in each head.

A pixel of a small student sees little of the image, while the teacher's pixel that it should match
sees all of it. PCD relates every pixel to every other by a plug-in multi-head self-attention, but
publishes no code for it and states only its purpose. The design here is ours: W_o starts at zero, so
that plugging it into a trained network does not change the output, and `unplug` takes it out again.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import _checks

POSITIONS = ("sine", "relative", None)


# --- The module -----------------------------------------------------------------------------------


class MHSAPlugin(nn.Module):
    """Residual multi-head self-attention over the pixels of a map `[B, C, H, W]` of any size.

    Every one of the N pixels sees all N, for 4 N^2 C operations in the forward pass. For large maps,
    `key_stride=s` averages the keys and values over cells of s x s pixels: 4 N^2 C / s^2. Memory is
    O(N C) where `F.scaled_dot_product_attention` has a fused kernel: on a CPU, and on CUDA for
    float16, bfloat16 and float32.

    Args:
        channels: the channels C of the map.
        num_heads: divides C.
        position: "sine" adds a fixed code of row and column to what queries and keys are computed
            from. "relative" rotates queries and keys by row and column (2-D rotary), so that a logit
            depends on the displacement only. None computes attention without position. None of the
            three has parameters or depends on a map size.
        key_stride: the side of the cells.

    Raises:
        ValueError, TypeError: for settings that do not fit, and for an input of another shape.

    Source: ours. PCD names such a module, and its code does not contain it.

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
        position: Literal["sine", "relative"] | None = "sine",
        key_stride: int = 1,
    ) -> None:
        super().__init__()
        self.channels = channels = _checks.integer("channels", channels)
        self.num_heads = num_heads = _checks.integer("num_heads", num_heads)
        self.position = _checks.choice("position", position, POSITIONS)
        self.key_stride = _checks.integer("key_stride", key_stride)
        if channels % num_heads:
            raise ValueError(f"num_heads must divide channels={channels}; got {num_heads}")
        if position == "sine" and channels % 4:
            raise ValueError(f'channels must be a multiple of 4 for "sine"; got {channels}')
        if position == "relative" and channels // num_heads % 4:
            raise ValueError(
                'channels / num_heads must be a multiple of 4 for "relative"; '
                f"got {channels} / {num_heads}"
            )
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = _ZeroLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, C, H, W]`"""
        _checks.map_2d("x", x, self.channels, module="MHSAPlugin")
        pixels = rearrange(x, "b c h w -> b h w c")
        pixels = pixels + self._attend(self.norm(pixels))
        return rearrange(pixels, "b h w c -> b c h w")

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"{self.channels}, num_heads={self.num_heads}, position={self.position!r}, "
            f"key_stride={self.key_stride}"
        )

    def _attend(self, pixels: Tensor) -> Tensor:
        """Attention among the normalised pixels `[B, H, W, C]`."""
        height, width = pixels.shape[1:3]
        positions = key_positions = _positions(height, width, like=pixels)
        sources = pixels
        if self.key_stride > 1:
            sources = _average(pixels, self.key_stride)
            key_positions = _average(positions.unsqueeze(0), self.key_stride).squeeze(0)
        queries, keys = pixels, sources
        if self.position == "sine":
            queries = queries + sine_code(positions, self.channels).to(queries.dtype)
            keys = keys + sine_code(key_positions, self.channels).to(keys.dtype)
        q, k, v = (
            rearrange(t, "b h w (n d) -> b n (h w) d", n=self.num_heads)
            for t in (self.query(queries), self.key(keys), self.value(sources))
        )
        if self.position == "relative":
            q, k = rotate(q, positions), rotate(k, key_positions)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(mixed, "b n (h w) d -> b h w (n d)", h=height))


def sine_code(positions: Tensor, channels: int) -> Tensor:
    """Fixed code of positions `[..., 2]`: `[..., channels]`, sine and cosine of row, then of column.

    The wavelengths are those of the Transformer, from 2 pi to 10000 * 2 pi pixels.
    """
    angles = _angles(positions, channels // 4, base=10000.0)  # [..., 2, channels / 4]
    return torch.stack([angles.sin(), angles.cos()], dim=-2).flatten(-3)


def rotate(vectors: Tensor, positions: Tensor) -> Tensor:
    """Rotate pairs of elements of `[B, heads, N, d]` by angles that grow with row and column.

    `<rotate(q, a), rotate(k, b)>` depends on a and b through a - b only: a 2-D rotary code, half of
    the pairs for the rows and half for the columns, wavelengths from 2 pi to 100 * 2 pi pixels.
    """
    angles = _angles(positions, vectors.shape[-1] // 4, base=100.0).flatten(-2).flatten(0, 1)
    cos, sin = angles.cos(), angles.sin()  # [N, d / 2]
    x, y = vectors.chunk(2, dim=-1)
    return torch.cat([x * cos - y * sin, x * sin + y * cos], dim=-1).to(vectors.dtype)


def _angles(positions: Tensor, count: int, base: float) -> Tensor:
    exponents = torch.arange(count, device=positions.device, dtype=positions.dtype) / count
    return positions.unsqueeze(-1) * base**-exponents


def _positions(height: int, width: int, like: Tensor) -> Tensor:
    """Row and column of each pixel, `[H, W, 2]`, in float32, or float64 for float64 pixels."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows, columns = (torch.arange(n, device=like.device, dtype=dtype) for n in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)


def _average(pixels: Tensor, stride: int) -> Tensor:
    """Means over cells of `[B, H, W, C]`; cells at the lower and right edge may be smaller."""
    channels_first = rearrange(pixels, "b h w c -> b c h w")
    cells = F.avg_pool2d(channels_first, stride, ceil_mode=True, count_include_pad=False)
    return rearrange(cells, "b c h w -> b h w c")


class _ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, also where `reset_parameters` follows `to_empty`."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # draws as many random numbers as any linear layer
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


# --- Plug and unplug ------------------------------------------------------------------------------

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
WRAPPED = (
    " yet: it synchronises only the parameters that it finds at the start. Plug first, then wrap."
)
TRACED = (
    ": traced code calls the parts of a child. Plug first, then trace with the plug-in as a leaf: "
    'create_feature_extractor(..., tracer_kwargs={"leaf_modules": [MHSAPlugin]}).'
)
FLATTENED = (
    ", which has flattened its parameters. Load its full state dict into a network that is plugged "
    "but not wrapped, and unplug there."
)
OUTPUT_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class Plugged(nn.Module):
    """A module with a plug-in on its output: `plugin(module(...))`."""

    def __init__(self, module: nn.Module, plugin: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.plugin = plugin.train(module.training)
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The plug-in's output for the module's output."""
        return self.plugin(self.module(*args, **kwargs))


def plug(network: nn.Module, name: str, plugin: nn.Module) -> None:
    """Put a plug-in on the output of a child of `network`, in place.

    The child at `name` (as in `named_modules`, such as "backbone.layer4") becomes
    `Plugged(child, plugin)`: while it is plugged, its state-dict keys begin with `name + ".module"`.
    The plug-in takes the child's training mode. The child's forward and backward hooks move to the
    `Plugged` module, so that they see the output that the network sees; pre-hooks stay. Plug before
    the optimizer is built and before the network is wrapped in DDP or FSDP.

    Args:
        network: the network, or a wrapper that forwards attributes, such as that of `torch.compile`.
        name: name of the child.
        plugin: any module that takes the child's output and returns what the network expects.

    Raises:
        ValueError: if there is no such child, if it has a plug-in already, or if the network is
            traced by torch.fx or wrapped in DDP or FSDP already.
        TypeError: if the plug-in is not a module, or the name not a string.
    """
    if not isinstance(plugin, nn.Module):
        raise TypeError(f"plugin must be a module; got {type(plugin).__name__}")
    parent, key = _find(network, name)
    child = parent._modules[key]
    assert child is not None
    around = _around(network, parent)
    _refuse(around, "GraphModule", why=TRACED)
    _refuse([*around, child], *WRAPPERS, why=WRAPPED)
    if isinstance(child, Plugged):
        raise ValueError(f"name must be a child without a plug-in; {name!r} has one")
    plugged = Plugged(child, plugin)
    _swap_hooks(child, plugged)
    parent._modules[key] = plugged


def unplug(network: nn.Module, name: str) -> nn.Module:
    """Put the very same child back, with its hooks, and return the plug-in.

    Raises:
        ValueError: if there is no plug-in at `name`, if both `name` and `name + ".module"` have
            forward or backward hooks, or in FSDP1, which has flattened the parameters.
    """
    parent, key = _find(network, name)
    _refuse(_around(network, parent), "FullyShardedDataParallel", why=FLATTENED)
    plugged = parent._modules[key]
    if not isinstance(plugged, Plugged):
        raise ValueError(f"name must be a child with a plug-in; {name!r} has none")
    child = plugged.module
    if not _has_hooks(child):
        _swap_hooks(child, plugged)
    elif _has_hooks(plugged):  # two dictionaries cannot become one: handles refer to them
        raise ValueError(
            f"{name!r} and '{name}.module' must not both have forward or backward hooks; "
            "remove those of one first"
        )
    parent._modules[key] = child
    return plugged.plugin


def _has_hooks(module: nn.Module) -> bool:
    return any(vars(module)[name] for name in OUTPUT_HOOKS)


def _swap_hooks(child: nn.Module, plugged: Plugged) -> None:
    """Exchange the dictionaries themselves: the handles that remove hooks refer to them."""
    ours, theirs = vars(child), vars(plugged)
    for name in OUTPUT_HOOKS:
        ours[name], theirs[name] = theirs[name], ours[name]


def _find(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the child, and the child's name there."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, such as 'layer4'; got {name!r}")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(network, wrappers) and not name.startswith("module."):
        network = network.module
    path, _, key = name.rpartition(".")
    try:
        parent = network.get_submodule(path)
        child = parent.get_submodule(key) if key else None
    except AttributeError as error:
        names = [known for known, _ in network.named_modules() if known.endswith(f".{name}")]
        hint = f". Known are {', '.join(map(repr, names))}" if name and names else ""
        raise ValueError(f"name must be that of a child of the network: {error}{hint}") from None
    if child is None:
        raise ValueError("name must be that of a child of the network; got the network itself")
    for module in parent.modules():  # itself, or the module to which a wrapper forwards attributes
        if module._modules.get(key) is child:
            return module, key
    names = [known for known, module in network.named_modules() if module is child]
    raise ValueError(
        f"name must be one of network.named_modules(); {name!r} is another way to {names}"
    )


def _around(network: nn.Module, parent: nn.Module) -> list[nn.Module]:
    """All modules of the network that contain this one, and itself."""
    return [m for m in network.modules() if any(part is parent for part in m.modules())]


def _refuse(modules: list[nn.Module], *kinds: str, why: str) -> None:
    """Raise for a module of these classes, found by name since importing FSDP takes long."""
    found = {kind.__name__ for module in modules for kind in type(module).__mro__} & set(kinds)
    if found:
        raise ValueError(f"network must not be in {min(found)}{why}")
