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
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks
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
        _checks.flag("trainable", trainable)
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


def _linear(m: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(m.device.type, enabled=False):
        return F.linear(m, weight.to(m.dtype), None if bias is None else bias.to(m.dtype))


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    if not torch.is_autocast_enabled(x.device.type):  # which casts them itself
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return convolve(x, weight[(...,) + (None,) * (x.dim() - 2)], bias)
