"""Learned masks of the pixels that matter (MasKD, ICLR 2023, arXiv 2205.14589).

A token is a vector E_t of the width of a teacher's map x. It marks pixels, and each image weighs its
tokens:

    m_t = sigmoid(<E_t, x>) at each pixel,    w = softmax(conv1x1(average_pool(conv3x3(x)))).

The tokens learn in front of the frozen teacher's head, which reads `sum_t w_t m_t x` in place of x,
against its task loss plus the overlap of the masks. Two rewritings, both exact, make this cheap:

- `sum_t w_t m_t x = x * (sum_t w_t m_t)`: tokens are summed before they meet the channels, so that no
  tensor has both axes;
- the 3x3 convolution goes straight into the average, so only sums of x over nine shifted windows
  matter, and convolving costs one pass over x instead of 18 C operations a number.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks
from .ops.backend import detached, sum_dtype

# The names of a module's tensors in official checkpoints.
_WEIGHTING = ("prob.0.weight", "prob.0.bias", "prob.2.weight", "prob.2.bias")
_LEVELS = "mask_modules."


class MaskedReceptiveTokens(nn.Module):
    """Masks of a map, one a token: `masked_map, diversity = tokens(x)` while they are learned.

    Args:
        channels: C, the width of the teacher's map.
        num_tokens: T. MasKD uses 6 for detection, 8 for segmentation.
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
        _checks.integer("channels", channels)
        _checks.integer("num_tokens", num_tokens)
        _checks.flag("weighted", weighted)
        self.channels = channels
        self.num_tokens = num_tokens
        self.weighted = weighted
        self.mask_token = nn.Parameter(torch.empty(num_tokens, channels))
        # Never called: `weights` computes the same from window sums. It gives parameters their names.
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
        """Tokens from N(0, 0.01^2), convolutions by their fan-out (He), biases at zero."""
        self.mask_token.normal_(0, 0.01)
        for layer in self.prob or ():
            if isinstance(layer, _Convolution):
                layer.reset_parameters()

    def masks(self, x: Tensor) -> Tensor:
        """`sigmoid(<E_t, x>)` `[B, T, H, W]`, in float32 (float64 for float64)."""
        _checks.map_2d("x", x, self.channels)
        return token_masks(x, self.mask_token)

    def weights(self, x: Tensor, *, valid_mask: Tensor | None = None) -> Tensor:
        """The share of each token `[B, T]`, summing to 1; 1/T when not weighted.

        `valid_mask` `[B, H, W]` bool leaves out pixels as if the image ended where they begin.
        """
        _checks.map_2d("x", x, self.channels)
        _checks.mask(valid_mask, x.shape[:1] + x.shape[2:], x)
        dtype = sum_dtype(x)
        if self.prob is None:
            return x.new_full((x.shape[0], self.num_tokens), 1 / self.num_tokens, dtype=dtype)
        kernel, kernel_bias, mixing, mixing_bias = self.prob.parameters()
        pooled = pooled_convolution(x, kernel, kernel_bias, valid_mask=valid_mask)
        with _exactly(x):
            logits = F.linear(pooled, mixing.flatten(1).to(dtype), mixing_bias.to(dtype))
        return logits.softmax(dim=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The masked map `sum_t w_t m_t x` `[B, C, H, W]` and the diversity term, a scalar.

        To learn the tokens, minimise the task loss of the frozen teacher's head on the masked map plus
        the diversity. Without weights w is 1, as in the official code. The map has the dtype of `x`.
        """
        _checks.map_2d("x", x, self.channels)
        x = detached(x)  # once for the masks and the product
        masks = self.masks(x)
        if self.weighted:
            seen = (self.weights(x)[:, :, None, None] * masks).sum(dim=1, keepdim=True)
        else:
            seen = masks.sum(dim=1, keepdim=True)
        return x * seen.to(x.dtype), mask_diversity(masks)

    def extra_repr(self) -> str:
        """The settings, in the order of the constructor."""
        return f"channels={self.channels}, num_tokens={self.num_tokens}, weighted={self.weighted}"

    @classmethod
    def from_official(cls, state_dict: Mapping[str, object]) -> nn.ModuleList:
        """The tokens of an official MasKD checkpoint, a module a level, on the CPU.

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

        A sequence of modules, a level each, gives the detection layout under `state_dict`. A single
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
    """Resets itself by its fan-out (He), the bias to zero: `to_empty` is followed by a reset of each."""

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
    """`sigmoid(einsum("tc,bchw->bthw", mask_token, x))`; products in the dtype of `x`, also under
    autocast, and the rest in float32 (float64 for float64).
    """
    tokens = mask_token.to(x.dtype).expand(x.shape[0], -1, -1)
    x = detached(x)
    with _exactly(x):
        logits = torch.bmm(tokens, x.flatten(2))  # [B, T, HW]
    return logits.to(sum_dtype(x)).sigmoid().unflatten(2, x.shape[2:])


def mask_diversity(masks: Tensor) -> Tensor:
    """How alike the masks `[B, T, H, W]` of an image are: 0 for disjoint ones, 1 for equal ones.

    The mean over images and ordered pairs t != u of the Dice coefficient
    `2 <m_t, m_u> / (|m_t|^2 + |m_u|^2)`, with 1e-12 added to each squared norm. 0, and attached to the
    graph, for a single token, where the official code has NaN.
    """
    num_tokens = masks.shape[1]
    flat = masks.flatten(2).to(sum_dtype(masks))
    with _exactly(masks):
        products = torch.bmm(flat, flat.mT)  # [B, T, T]
    norms = products.diagonal(dim1=1, dim2=2) + 1e-12
    dice = 2 * products / (norms.unsqueeze(1) + norms.unsqueeze(2))
    itself = torch.eye(num_tokens, dtype=torch.bool, device=masks.device)
    pairs = masks.shape[0] * num_tokens * (num_tokens - 1)
    return dice.masked_fill(itself, 0.0).sum() / max(pairs, 1)


def pooled_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, *, valid_mask: Tensor | None = None
) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1).mean((2, 3))` `[B, O]` for a 3x3 weight `[O, C, 3, 3]`.

    The mean is over output pixels, so with S the window sums of x it is
    `einsum("ocij,bcij->bo", weight, S) / (H * W) + bias`. With `valid_mask` only valid pixels are
    read and averaged. Computed in float32 (float64 for float64).
    """
    dtype = sum_dtype(x)
    sums = window_sums(x, valid_mask=valid_mask)
    count: int | Tensor = x.shape[2] * x.shape[3]
    if valid_mask is not None:
        count = valid_mask.sum(dim=(1, 2)).clamp_min(1).unsqueeze(1)
    with _exactly(x):
        return F.linear(sums.flatten(1), weight.flatten(1).to(dtype)) / count + bias.to(dtype)


def window_sums(x: Tensor, *, valid_mask: Tensor | None = None) -> Tensor:
    """Sums `[B, C, 3, 3]` of the pixels that each tap of a padded 3x3 convolution reads.

    Entry (i, j) is the sum of `x[..., h + i - 1, w + j - 1]` over all (h, w) for which that pixel lies
    in the map: everything, less a border row or column. With `valid_mask` `[B, H, W]`, over those for
    which both pixels are valid.
    """
    dtype = sum_dtype(x)
    if valid_mask is not None:
        # A pixel counts for a tap when the pixel that reads it through this tap is valid as well.
        read = F.unfold(valid_mask.unsqueeze(1).to(dtype), 3, padding=1).flip(1)  # [B, 9, HW]
        clean = x.to(dtype).masked_fill(~valid_mask.unsqueeze(1), 0.0).flatten(2)
        with _exactly(x):
            return torch.bmm(clean, read.mT).unflatten(2, (3, 3))
    row = x.sum(dim=3, dtype=dtype)
    row = torch.stack([row - x[..., -1], row, row - x[..., 0]], dim=3)  # [B, C, H, 3]
    total = row.sum(dim=2)
    return torch.stack([total - row[:, :, -1], total, total - row[:, :, 0]], dim=2)


def _exactly(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off: products keep the dtype of their operands."""
    return torch.autocast(x.device.type, enabled=False)
