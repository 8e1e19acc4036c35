"""SpatialAdaptor: a head that was trained on pooled vectors, on every pixel of a map.

    adaptor(x).mean(space) = head(x.mean(space))

Let m be the pooled vector that reaches a layer f of the head. The adaptor applies f to m, and applies
to the pixels an affine map that agrees with f at m:

    x_p -> A_m x_p + b_m,   A_m m + b_m = f(m).

A mean passes through an affine map, so m stays the mean of the pixels from layer to layer. A linear
layer and a BatchNorm with fixed statistics are affine already; an activation x g(x) becomes x g(m),
LayerNorm takes mean and variance of m, L2 normalisation divides by |m|. All but the linear layers
scale and shift channels, and a run of them is one multiply-add over the map.

Source: PCD (ICCV 2023, arXiv 2211.00218).
"""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from . import _checks
from .ops.backend import no_autocast, operand_dtype

# A scale and a shift of the channels, [C], [B, C] or [B, 1]; None where there is nothing to do.
Affine = tuple[Tensor | None, Tensor | None]
# The layers of a head in the order in which they run, each with the known class whose forward it has.
Layers = list[tuple[type[nn.Module], Any]]


class L2Norm(nn.Module):
    """`F.normalize(x, dim=-1, eps=eps)` as a module, for heads that normalise, such as DINO's."""

    def __init__(self, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = _checks.nonnegative("eps", eps)

    def forward(self, x: Tensor) -> Tensor:
        """Unit vectors along the last axis."""
        return F.normalize(x, dim=-1, eps=self.eps)

    def extra_repr(self) -> str:
        """The epsilon."""
        return f"eps={self.eps:g}"


class SpatialAdaptor(nn.Module):
    """A head on vectors `[B, C] -> [B, D]`, applied to maps `[B, C, *spatial] -> [B, D, *spatial]`.

    For every map x with one to three spatial axes, up to rounding,
    `adaptor(x).flatten(2).mean(2) == head.eval()(x.flatten(2).mean(2))`.

    Args:
        head: one of these layers, or `nn.Sequential` of them at any depth: Linear (with weight norm,
            old or parametrized), BatchNorm1d, SyncBatchNorm, LayerNorm, `L2Norm`, ReLU, LeakyReLU,
            GELU, SiLU, Hardswish, Identity, Dropout, `Flatten(1)`. For a head class with a forward of
            its own, pass its layers; for DINO:
            `SpatialAdaptor(nn.Sequential(head.mlp, L2Norm(), head.last_layer))`.
            The head is copied: later changes of either do not reach the other.
        trainable: False freezes the copy and records no graph: no gradient reaches the copy or,
            through it, the teacher. True keeps the `requires_grad` of each parameter and
            differentiates everything, including the pooled statistics.

    The head stays in eval mode, also after `train()`: the identity needs fixed BatchNorm statistics
    and no dropout. The pooled vector is float32 (float64 for float64 maps), under autocast too.

    Raises:
        TypeError: for a layer without an affine form, such as Softmax, a BatchNorm without running
            statistics, or a class with a forward of its own; also in a call, for a layer that was put
            into `adaptor.head` later. For a layer with a forward hook, which would not run; hooks
            that are added to `adaptor.head` later do not run either.
        ValueError: for `trainable=True` where no parameter requires a gradient, and for a map of
            another shape.

    Source: the SpatialAdaptor of PCD and its official code, which know Linear, BatchNorm and ReLU. The
    other layers are ours. The official teacher leaves BatchNorm in train mode; this one does not.

    Example:
        >>> head = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
        >>> SpatialAdaptor(head)(torch.randn(2, 16, 7, 7)).shape
        torch.Size([2, 8, 7, 7])
    """

    def __init__(self, head: nn.Module, *, trainable: bool = False) -> None:
        super().__init__()
        if not isinstance(head, nn.Module):
            raise TypeError(f"head must be a module; got {type(head).__name__}")
        self.trainable = _checks.flag("trainable", trainable)
        _layers(head)
        _refuse_hooks(head)
        self.head = _copy(head).eval()
        if not trainable:
            self.head.requires_grad_(False)
        elif not any(parameter.requires_grad for parameter in self.head.parameters()):
            raise ValueError(
                "trainable=True, but no parameter of head requires a gradient; "
                "call head.requires_grad_() first"
            )

    @property
    def in_channels(self) -> int | None:
        """Channels of the input map; None if the head takes any number."""
        return _in_channels(_layers(self.head))

    @property
    def widths(self) -> tuple[int, ...]:
        """Output width of each linear layer, in order."""
        layers = _layers(self.head)
        return tuple(layer.out_features for kind, layer in layers if kind is nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        """The head on every pixel, in the dtype of x, or in autocast's after a linear layer."""
        layers = _layers(self.head)
        _checks.map_nd("x", x, _in_channels(layers), module="SpatialAdaptor")
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            return _run(layers, x)

    def train(self, mode: bool = True) -> "SpatialAdaptor":
        """Set the mode of the adaptor; its head stays in eval mode."""
        super().train(mode)
        self.head.eval()
        return self

    def extra_repr(self) -> str:
        """Whether it is trainable."""
        return f"trainable={self.trainable}"


# --- Layers as affine maps ------------------------------------------------------------------------


def _run(layers: Layers, x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    m = x.mean(dim=tuple(range(2, x.dim())), dtype=dtype)  # [B, C]
    pending: Affine = (None, None)  # steps that the pixels have not taken yet
    for kind, layer in layers:
        if kind is nn.Linear:
            weight = _weight_of(layer)
            x = _pointwise(_apply(x, pending), weight, layer.bias)
            m = _linear(m, weight, layer.bias)
            pending = (None, None)
        else:
            step = STEPS[kind](layer, m)
            m = _apply(m, step)
            pending = _compose(pending, step)
    return _apply(x, pending)


def _apply(x: Tensor, step: Affine) -> Tensor:
    """`x * scale + shift` in the dtype of x; x is the map `[B, C, *spatial]` or m `[B, C]`."""
    scale, shift = (None if t is None else t[(...,) + (None,) * (x.dim() - 2)] for t in step)
    if scale is None:
        return x
    return (x * scale if shift is None else torch.addcmul(shift, x, scale)).to(x.dtype)


def _compose(first: Affine, then: Affine) -> Affine:
    """Both steps as one."""
    (scale, shift), (next_scale, next_shift) = first, then
    if scale is None or next_scale is None:
        return then if scale is None else first
    if shift is not None:
        shift = shift * next_scale
        next_shift = shift if next_shift is None else shift + next_shift
    return scale * next_scale, next_shift


def _linear(m: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with no_autocast(m.device):
        return F.linear(m, weight.to(m.dtype), None if bias is None else bias.to(m.dtype))


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    dtype = operand_dtype(x)
    weight = weight[(...,) + (None,) * (x.dim() - 2)]
    return convolve(x, weight.to(dtype), None if bias is None else bias.to(dtype))


def _normalisation(layer: Any, mean: Tensor, variance: Tensor) -> Affine:
    scale = (variance + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.to(scale.dtype)
    shift = -mean * scale
    return scale, shift if layer.bias is None else shift + layer.bias.to(scale.dtype)


def _batch_norm(layer: Any, m: Tensor) -> Affine:
    return _normalisation(layer, layer.running_mean.to(m.dtype), layer.running_var.to(m.dtype))


def _layer_norm(layer: nn.LayerNorm, m: Tensor) -> Affine:
    mean = m.mean(dim=1, keepdim=True)
    return _normalisation(layer, mean, (m - mean).square().mean(dim=1, keepdim=True))


def _gelu(layer: nn.GELU, m: Tensor) -> Affine:
    if layer.approximate == "tanh":
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3))), None
    return 0.5 * torch.erfc(m * -math.sqrt(0.5)), None


def _nothing(layer: nn.Module, m: Tensor) -> Affine:
    return None, None


# The step of the pixels where the pooled vector before the layer is m. For an activation: g(m).
STEPS: dict[type[nn.Module], Callable[[Any, Tensor], Affine]] = {
    nn.Identity: _nothing,
    nn.Dropout: _nothing,
    nn.Flatten: _nothing,
    nn.BatchNorm1d: _batch_norm,
    nn.SyncBatchNorm: _batch_norm,
    nn.LayerNorm: _layer_norm,
    L2Norm: lambda layer, m: (m.norm(dim=1, keepdim=True).clamp_min(layer.eps).reciprocal(), None),
    nn.ReLU: lambda layer, m: ((m > 0).to(m.dtype), None),
    nn.LeakyReLU: lambda layer, m: (torch.ones_like(m).where(m > 0, layer.negative_slope), None),
    nn.GELU: _gelu,
    nn.SiLU: lambda layer, m: (m.sigmoid(), None),
    nn.Hardswish: lambda layer, m: (F.hardsigmoid(m), None),
}
KINDS: tuple[type[nn.Module], ...] = (nn.Linear, *STEPS)


# --- What a head consists of ----------------------------------------------------------------------


def _layers(module: Any, path: str = "head") -> Layers:
    """What the module runs; TypeError for a layer that has no affine form.

    Read at every call, since `convert_sync_batchnorm` and others replace layers later.
    """
    if type(module).forward is nn.Sequential.forward:
        children = module._modules.items()
        return [layer for name, child in children for layer in _layers(child, f"{path}.{name}")]
    kind = _kind(module)
    problem = ""
    if kind is None:
        problem = _remedy(module, path)
    elif kind in (nn.BatchNorm1d, nn.SyncBatchNorm) and module.running_var is None:
        problem = "it has no running statistics"
    elif kind is nn.LayerNorm and len(module.normalized_shape) != 1:
        problem = "it normalises over more than the channels"
    elif kind is nn.Flatten and (abs(module.start_dim) != 1 or abs(module.end_dim) != 1):
        problem = "only nn.Flatten(1) leaves a vector as it is"
    if kind is None or problem:
        name = f"{path} ({type(module).__name__})"
        raise TypeError(f"{name} cannot be adapted exactly: {problem}")
    return [(kind, module)]


def _kind(layer: nn.Module) -> type[nn.Module] | None:
    """The known class whose forward this layer runs, also for a subclass."""
    for kind in KINDS:  # not next(..., None), which PyTorch 2.6 cannot compile
        if type(layer).forward is kind.forward:
            return kind
    return None


def _remedy(module: nn.Module, path: str) -> str:
    """What to pass instead of a module of an unknown class."""
    path = re.sub(r"\.(\d+)", r"[\1]", path)
    children = [name for name, _ in module.named_children()]
    if children in (["_orig_mod"], ["module"]):
        return f"it wraps another module; pass {path}.{children[0]}"
    if not children:
        known = ", ".join(kind.__name__ for kind in KINDS)
        return f"known are {known} and nn.Sequential"
    if "base_layer" in children:
        return f"it changes what {path}.base_layer computes; merge it into that first"
    steps = [f"{path}.{name}" for name in children]
    if all(name.isdigit() for name in children):
        steps = [f"*{path}"]
    elif "last_layer" in children:  # as DINO and iBOT call it
        steps.insert(children.index("last_layer"), "L2Norm()")
    return (
        "the order in which its forward runs its layers is not known. Pass them in that order, "
        f"nn.Sequential({', '.join(steps)}), with L2Norm() where forward calls F.normalize"
    )


def _refuse_hooks(head: nn.Module) -> None:
    for name, module in head.named_modules():
        hooks = [h for h in module._forward_pre_hooks.values() if not _is_weight_norm(h, module)]
        path = f"head.{name}" if name else "head"
        if hooks or module._forward_hooks:
            problem = "has a hook, which the adaptor would not run; remove it first"
            raise TypeError(f"{path} ({type(module).__name__}) {problem}")
        if "forward" in vars(module):
            problem = "has a forward set on the instance, which the adaptor would not run"
            raise TypeError(f"{path} ({type(module).__name__}) {problem}")


def _is_weight_norm(hook: Any, layer: nn.Module) -> bool:
    """Whether this is the old `weight_norm` of a linear layer's weight, which is a pre-hook."""
    return isinstance(layer, nn.Linear) and isinstance(hook, WeightNorm) and hook.name == "weight"


def _weight_of(layer: Any) -> Tensor:
    """The weight; computed anew where the old `weight_norm` does so before each forward."""
    for hook in layer._forward_pre_hooks.values():
        if _is_weight_norm(hook, layer):
            return hook.compute_weight(layer)
    _checks.whole("SpatialAdaptor", layer.weight)
    return layer.weight


def _copy(head: nn.Module) -> nn.Module:
    """A deep copy; the weight that the old `weight_norm` computed cannot be copied with its graph."""
    computed: dict[int, Any] = {}
    for layer in head.modules():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                weight = getattr(layer, hook.name)
                computed[id(weight)] = weight.detach().clone()
    return copy.deepcopy(head, memo=computed)


def _in_channels(layers: Layers) -> int | None:
    """Width of the vectors that the first layer of a fixed width takes."""
    for kind, layer in layers:
        if kind is nn.Linear:
            return layer.in_features
        if kind is nn.LayerNorm:
            return layer.normalized_shape[0]
        if kind in (nn.BatchNorm1d, nn.SyncBatchNorm):
            return layer.num_features
    return None
