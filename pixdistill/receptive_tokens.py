"""Learned masks of the pixels that matter (MasKD, ICLR 2023, arXiv 2205.14589).

A token is a vector E_t of the width of a teacher's map x. It marks pixels, and each image weighs its
tokens:

    m_t = sigmoid(<E_t, x>) per pixel,    w = softmax(conv1x1(average_pool(conv3x3(x)))).

The tokens learn in front of the frozen teacher's head, which reads `sum_t w_t m_t x` in place of x,
against its task loss plus the overlap of the masks. `sum_t w_t m_t x = x * (sum_t w_t m_t)`: tokens are
summed before they meet the channels, so no tensor has both axes. Masks and weights are computed by
`ops/masked_distance/tokens.py`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from .ops import masked_distance as operator
from .ops.backend import no_autocast, sum_dtype, without_inference

# The names of a module's tensors in official checkpoints.
_WEIGHTING = ("prob.0.weight", "prob.0.bias", "prob.2.weight", "prob.2.bias")
_LEVELS = "mask_modules."


class MaskedReceptiveTokens(nn.Module):
    """Masks of a map, one per token: `masked_map, diversity = tokens(x)` while they are learned.

    Args:
        channels: C, the width of the teacher's map.
        num_tokens: T, the number of masks; MasKD uses 6 for detection and 8 for segmentation.
        weighted: whether each image weighs its tokens, as in detection.

    Shapes: maps `[B, C, H, W]` of any size.

    Parameters are named and initialised as in the official code: `mask_token` `[T, C]` from
    N(0, 0.01^2), and when weighted `prob.0` (3x3) and `prob.2` (1x1).

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the argument.

    Example:
        >>> tokens = MaskedReceptiveTokens(16, num_tokens=4)
        >>> masked_map, diversity = tokens(torch.randn(2, 16, 8, 8))
        >>> masked_map.shape, diversity.shape
        (torch.Size([2, 16, 8, 8]), torch.Size([]))
    """

    def __init__(self, channels: int, num_tokens: int = 6, *, weighted: bool = True) -> None:
        super().__init__()
        self.channels = channels = _checks.integer("channels", channels)
        self.num_tokens = num_tokens = _checks.integer("num_tokens", num_tokens)
        self.weighted = weighted = _checks.flag("weighted", weighted)
        self.mask_token = nn.Parameter(torch.empty(num_tokens, channels))
        # Never called: `weights` computes the same from window sums. It names the parameters.
        self.prob = (
            nn.Sequential(
                _Convolution(channels, channels, kernel_size=3, padding=1),
                nn.AdaptiveAvgPool2d(1),
                _Convolution(channels, num_tokens, kernel_size=1),
            )
            if weighted
            else None
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Tokens from N(0, 0.01^2), convolutions with Kaiming fan-out initialisation and zero bias."""
        self.mask_token.normal_(0, 0.01)
        for layer in self.prob or ():
            if isinstance(layer, _Convolution):
                layer.reset_parameters()

    def masks(self, x: Tensor) -> Tensor:
        """`sigmoid(<E_t, x>)` `[B, T, H, W]`, in float32 (float64 for float64)."""
        self._check(x)
        return operator.token_masks(x, self.mask_token)

    def weights(self, x: Tensor, *, valid_mask: Tensor | None = None) -> Tensor:
        """The weight of each token `[B, T]`, which sum to 1; 1/T when not weighted.

        `valid_mask` `[B, H, W]` bool leaves out pixels as if the image ended where they begin.
        """
        self._check(x)
        _checks.mask(valid_mask, x.shape[:1] + x.shape[2:], x)
        if self.prob is None:
            shape = (x.shape[0], self.num_tokens)
            return x.new_full(shape, 1 / self.num_tokens, dtype=sum_dtype(x))
        return operator.token_weights(x, self.weighting, valid_mask=valid_mask)

    @property
    def weighting(self) -> tuple[Tensor, ...]:
        """Weight and bias of both convolutions of the token weights; empty when not weighted."""
        _checks.whole("MaskedReceptiveTokens", self.mask_token)
        if self.prob is None:
            return ()
        first: Any = self.prob[0]
        last: Any = self.prob[2]
        for name, layer, size in (("prob.0", first, 3), ("prob.2", last, 1)):
            known = type(layer).forward is nn.Conv2d.forward and layer.bias is not None
            if not known or layer.kernel_size != (size, size):
                raise TypeError(
                    f"{name} must be a {size} x {size} nn.Conv2d with bias, which the weights are "
                    f"computed from without a call of it; got {type(layer).__name__}"
                )
            _checks.whole("MaskedReceptiveTokens", layer.weight)
        return first.weight, first.bias, last.weight, last.bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The masked map `sum_t w_t m_t x` `[B, C, H, W]` and the diversity term, a scalar.

        To learn the tokens, minimise the task loss of the frozen teacher's head on the masked map plus
        the diversity. Without weights w is 1, as in the official code. The map has the dtype of `x`.
        """
        self._check(x)
        x = without_inference(x)  # once for the masks and the product
        masks = operator.token_masks(x, self.mask_token)
        weighted = masks
        if self.weighted:
            weights = operator.token_weights(x, self.weighting)
            weighted = weights[:, :, None, None] * masks
        return x * weighted.sum(dim=1, keepdim=True).to(x.dtype), _diversity(masks)

    def _check(self, x: Tensor) -> None:
        _checks.map_2d("x", x, self.channels, module="MaskedReceptiveTokens")
        _checks.device("MaskedReceptiveTokens", self.mask_token, x, of="map")

    def extra_repr(self) -> str:
        """The settings, in the order of the constructor."""
        return f"channels={self.channels}, num_tokens={self.num_tokens}, weighted={self.weighted}"

    @classmethod
    def from_official(cls, state_dict: Mapping[str, object]) -> nn.ModuleList:
        """The tokens of an official MasKD checkpoint, one module per level, on the CPU.

        Two layouts are known. Detection: `mask_modules.{level}.mask_token` and the like, inside or
        outside an entry `state_dict`; such a file may hold the whole detector, so keys that do not
        start with `mask_modules.` are ignored, and all that do must fit. Segmentation: `mask_token`
        and nothing else.

        Raises:
            ValueError: naming the keys that are missing or unexpected.
            RuntimeError: from `load_state_dict`, naming a tensor whose shape does not fit.
        """
        state = state_dict
        if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]  # type: ignore[assignment]
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict must be a mapping; got {type(state).__name__}")
        given = {key: value for key, value in state.items() if key.startswith(_LEVELS)}
        if given:
            numbers = {key.split(".")[1] for key in given}
            prefixes = [f"{_LEVELS}{level}." for level in range(len(numbers))]
        else:
            given, prefixes = dict(state), [""]
        weighted = bool(prefixes[0]) and any(".prob." in key for key in given)
        names = ("mask_token", *(_WEIGHTING if weighted else ()))
        expected = {prefix + name for prefix in prefixes for name in names}
        if set(given) != expected:
            raise ValueError(
                "state_dict must hold an official MasKD checkpoint; "
                f"missing keys: {sorted(expected - set(given))}, "
                f"unexpected keys: {sorted(set(given) - expected)}"
            )
        levels = nn.ModuleList()
        for prefix in prefixes:
            shape = tuple(given[prefix + "mask_token"].shape)  # type: ignore[attr-defined]
            if len(shape) != 2:
                raise ValueError(f"{prefix}mask_token must have shape [T, C]; got {shape}")
            level = cls(shape[1], shape[0], weighted=weighted)
            level.load_state_dict({name: given[prefix + name] for name in names})
            levels.append(level)
        return levels

    @staticmethod
    def to_official(
        tokens: "MaskedReceptiveTokens | Iterable[MaskedReceptiveTokens]",
    ) -> dict[str, object]:
        """What the official code loads: the inverse of `from_official`.

        A sequence of modules, one per level, gives the detection layout under `state_dict`. A single
        module gives the segmentation layout, which has no weights.

        Raises:
            ValueError: for a single module that is weighted, or when some are weighted and some not.
        """
        if isinstance(tokens, MaskedReceptiveTokens):
            if tokens.weighted:
                raise ValueError(
                    "tokens must not be weighted in the segmentation layout; "
                    "pass [tokens] for the detection layout"
                )
            return dict(tokens.state_dict())
        levels = list(tokens)
        if len({level.weighted for level in levels}) > 1:
            raise ValueError("tokens must be all weighted or none of them")
        state = {
            f"{_LEVELS}{number}.{name}": value
            for number, level in enumerate(levels)
            for name, value in level.state_dict().items()
        }
        return {"state_dict": state}


class _Convolution(nn.Conv2d):
    """Conv2d with Kaiming fan-out initialisation and zero bias, also when reset after `to_empty`."""

    _built = False

    def __init__(self, inputs: int, outputs: int, *, kernel_size: int, padding: int = 0) -> None:
        super().__init__(inputs, outputs, kernel_size, padding=padding)
        self._built = True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if not self._built:  # the tokens reset it: a seed gives the numbers that it always gave
            super().reset_parameters()
            return
        fan_out = math.prod(self.kernel_size) * self.out_channels
        self.weight.normal_(0, math.sqrt(2 / fan_out))
        if self.bias is not None:
            self.bias.zero_()


def token_masks(x: Tensor, mask_token: Tensor) -> Tensor:
    """Masks of a map, `sigmoid(einsum("tc,bchw->bthw", mask_token, x))`.

    Products run in the dtype of `x`, also under autocast; the rest in float32 (float64 for float64).

    Args:
        x: `[B, C, H, W]`.
        mask_token: `[T, C]`.

    Returns:
        `[B, T, H, W]`.

    Example:
        >>> token_masks(torch.randn(2, 16, 8, 8), torch.randn(4, 16)).shape
        torch.Size([2, 4, 8, 8])
    """
    _checks.map_2d("x", x)
    _checks.shaped("mask_token", mask_token, ("T", x.shape[1]), x)
    return operator.token_masks(x, mask_token)


def pooled_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, *, valid_mask: Tensor | None = None
) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1).mean((2, 3))`, without the convolution.

    One pass over x, in float32 (float64 for float64).

    Args:
        x: `[B, C, H, W]`.
        weight, bias: `[O, C, 3, 3]` and `[O]`.
        valid_mask: `[B, H, W]` bool. Only pixels that are True are read and averaged.

    Returns:
        `[B, O]`.

    Example:
        >>> pooled_convolution(torch.randn(2, 4, 8, 8), torch.randn(5, 4, 3, 3), torch.zeros(5)).shape
        torch.Size([2, 5])
    """
    _checks.map_2d("x", x)
    _checks.shaped("weight", weight, ("O", x.shape[1], 3, 3), x)
    _checks.shaped("bias", bias, weight.shape[:1], x)
    _checks.mask(valid_mask, x.shape[:1] + x.shape[2:], x)
    return operator.pooled_convolution(x, weight, bias, valid_mask=valid_mask)


def mask_diversity(masks: Tensor) -> Tensor:
    """How alike the masks of an image are: 0 for disjoint masks, 1 for equal masks.

    The mean over images and ordered pairs t != u of the Dice coefficient
    `2 <m_t, m_u> / (|m_t|^2 + |m_u|^2)`, with 1e-12 added to each squared norm.

    Args:
        masks: `[B, T, H, W]`.

    Returns:
        A scalar. For a single token it is 0 and attached to the graph; the official code has NaN.

    Example:
        >>> mask_diversity(torch.eye(4).reshape(1, 4, 2, 2))
        tensor(0.)
    """
    _checks.map_2d("masks", masks)
    return _diversity(masks)


def _diversity(masks: Tensor) -> Tensor:
    num_tokens = masks.shape[1]
    flat = masks.flatten(2).to(sum_dtype(masks))
    with no_autocast(masks.device):
        products = torch.bmm(flat, flat.mT)  # [B, T, T]
    norms = products.diagonal(dim1=1, dim2=2) + 1e-12
    dice = 2 * products / (norms.unsqueeze(1) + norms.unsqueeze(2))
    itself = torch.eye(num_tokens, dtype=torch.bool, device=masks.device)
    pairs = masks.shape[0] * num_tokens * (num_tokens - 1)
    return dice.masked_fill(itself, 0.0).sum() / max(pairs, 1)
