"""The layers of a vector head, and the affine map over pixels that each becomes (SpatialAdaptor)."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm


class L2Norm(nn.Module):
    """`F.normalize(x, dim=-1, eps=eps)`: the step before the last layer of DINO's head."""

    def __init__(self, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Unit vectors along the last axis."""
        return F.normalize(x, dim=-1, eps=self.eps)

    def extra_repr(self) -> str:
        """The epsilon."""
        return f"eps={self.eps:g}"


# A scale and a shift of channels, [C], [B, C] or [B, 1]; None where there is nothing to do.
Affine = tuple[Tensor | None, Tensor | None]


def apply(x: Tensor, step: Affine) -> Tensor:
    """`x * scale + shift` in the dtype of x; x is the map `[B, C, *spatial]` or m `[B, C]`."""
    scale, shift = (None if t is None else t[(...,) + (None,) * (x.dim() - 2)] for t in step)
    if scale is None:
        return x
    return (x * scale if shift is None else torch.addcmul(shift, x, scale)).to(x.dtype)


def apply_after(first: Affine, then: Affine) -> Affine:
    """The step that does both."""
    (scale, shift), (next_scale, next_shift) = first, then
    if scale is None or next_scale is None:
        return then if scale is None else first
    if shift is not None:
        shift = shift * next_scale
        next_shift = shift if next_shift is None else shift + next_shift
    return scale * next_scale, next_shift


def _batch_norm(layer: Any, m: Tensor) -> Affine:
    scale = (layer.running_var.to(m.dtype) + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.to(m.dtype)
    shift = -layer.running_mean.to(m.dtype) * scale
    return scale, shift if layer.bias is None else shift + layer.bias.to(m.dtype)


def _layer_norm(layer: nn.LayerNorm, m: Tensor) -> Affine:
    mean = m.mean(dim=1, keepdim=True)
    scale = ((m - mean).square().mean(dim=1, keepdim=True) + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.to(m.dtype)
    shift = -mean * scale
    return scale, shift if layer.bias is None else shift + layer.bias.to(m.dtype)


def _gelu(layer: nn.GELU, m: Tensor) -> Affine:
    if layer.approximate == "tanh":
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (m + 0.044715 * m**3))), None
    return 0.5 * torch.erfc(m * -math.sqrt(0.5)), None


# What a layer does to the pixels when the pooled vector before it is m. For an activation: g(m).
STEPS: dict[type[nn.Module], Callable[[Any, Tensor], Affine]] = {
    nn.Identity: lambda layer, m: (None, None),
    nn.Dropout: lambda layer, m: (None, None),
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


def _kind(layer: nn.Module) -> type[nn.Module] | None:
    """The class of KINDS whose forward this layer runs, be it of a subclass."""
    for kind in KINDS:  # not next(..., None), which torch.compile of PyTorch 2.6 refuses
        if type(layer).forward is kind.forward:
            return kind
    return None


def step_of(layer: nn.Module, m: Tensor) -> Affine:
    """The step of a layer that is not linear, for the pooled vectors `[B, C]` before it."""
    kind = _kind(layer)
    assert kind is not None  # see check_layer
    with torch.autocast(m.device.type, enabled=False):
        return STEPS[kind](layer, m)


def layers_of(
    module: nn.Module, path: str, order: Mapping[type[nn.Module], Sequence[str | nn.Module]]
) -> Iterator[nn.Module]:
    """The layers in the order in which they run; TypeError for one that has no affine form."""
    name = f"{path} ({type(module).__name__})"
    pre_hooks = [h for h in module._forward_pre_hooks.values() if not _norms_weight(h, module)]
    if pre_hooks or module._forward_hooks:
        raise TypeError(f"{name} has a hook, which the adaptor would not run; remove it first")
    if "forward" in vars(module):
        raise TypeError(f"{name} has a forward of its own, which the adaptor would not run")
    if type(module) in order:
        children = dict(module.named_modules(remove_duplicate=False))
        del children[""]
        for step in order[type(module)]:
            if isinstance(step, str):
                if step not in children:
                    raise ValueError(f"order of {name} names {step!r}, which is no child of it")
                yield from layers_of(children[step], f"{path}.{step}", order)
            elif isinstance(step, nn.Module) and not step.state_dict():
                yield from layers_of(step, f"{path}, order", order)
            else:
                raise TypeError(
                    f"order of {name} must hold names of children, and modules without parameters; "
                    f"got {step!r}"
                )
    elif type(module).forward is nn.Sequential.forward:
        for key, child in module._modules.items():
            if child is not None:
                yield from layers_of(child, f"{path}.{key}", order)
    else:
        check_layer(module, path)
        yield module


def check_layer(layer: nn.Module, path: str) -> None:
    """A layer that has an affine form, or TypeError."""
    problem = _problem(layer)
    if problem:
        name = f"{path} ({type(layer).__name__})"
        raise TypeError(f"{name} cannot be adapted exactly: {problem}")


def _problem(layer: Any) -> str | None:
    kind = _kind(layer)
    if kind is None:
        known = ", ".join(k.__name__ for k in KINDS)
        return f"known are {known} and nn.Sequential; for a class of your own, pass `order`"
    if kind in (nn.BatchNorm1d, nn.SyncBatchNorm) and layer.running_var is None:
        return "it has no running statistics"
    if kind is nn.LayerNorm and len(layer.normalized_shape) != 1:
        return "it normalises over more than the channels"
    return None


def in_width(layer: Any) -> int | None:
    """Width of the vectors that the layer takes, where it is fixed."""
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[0]
    return getattr(layer, "in_features", getattr(layer, "num_features", None))


def weight_of(layer: Any) -> Tensor:
    """The weight; computed anew where the older `weight_norm` would do so before each forward."""
    for hook in layer._forward_pre_hooks.values():
        if _norms_weight(hook, layer):
            return hook.compute_weight(layer)
    return layer.weight


def copied(head: nn.Module) -> nn.Module:
    """A deep copy. The computed weight of the older `weight_norm` cannot be copied with its graph."""
    computed: dict[int, Any] = {}
    layer: Any
    for layer in head.modules():
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                weight = getattr(layer, hook.name)
                computed[id(weight)] = weight.detach().clone()
    return copy.deepcopy(head, memo=computed)


def _norms_weight(hook: Any, layer: nn.Module) -> bool:
    """Whether this is the older `weight_norm` of a linear layer's weight."""
    return isinstance(layer, nn.Linear) and isinstance(hook, WeightNorm) and hook.name == "weight"
