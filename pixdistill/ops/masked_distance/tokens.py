"""Masks and token weights in PyTorch, differentiable in tokens and maps.

A token is a vector E_t of the width of a teacher's map x. Its mask and its weight are

    m_t = sigmoid(<E_t, x>) per pixel,    w = softmax(conv1x1(average_pool(conv3x3(x)))).

The 3x3 convolution goes straight into the average, so only sums of x over nine shifted windows matter:
one pass over x instead of 18 C^2 operations per pixel.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import no_autocast, sum_dtype, without_inference


class Masks(NamedTuple):
    """Masks that are given."""

    masks: Tensor
    """`[B, T, H, W]`"""
    weights: Tensor | None
    """`[B, T]`; None for 1/T."""

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.masks.shape[1]


class Tokens(NamedTuple):
    """Frozen tokens, from which masks and weights are computed."""

    mask_token: Tensor
    """`[T, C]`"""
    weighting: tuple[Tensor, ...]
    """Weight and bias of the 3x3 convolution and of the 1x1 convolution; empty for weights 1/T."""
    steps: Tensor | None = None
    """Number of optimizer steps, 0-dim int64; None to leave out the student's masks."""
    customize_after: int = 0
    """The student's masks join when `steps` has reached this number."""

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.mask_token.shape[0]


def compute_masks(
    tokens: Tokens, student: Tensor, teacher: Tensor, valid_mask: Tensor | None
) -> Masks:
    """The masks of the teacher's map, times the student's where they have joined, and the weights."""
    masks = token_masks(teacher, tokens.mask_token)
    if tokens.steps is not None:
        own = token_masks(student, tokens.mask_token)
        masks = masks * own.masked_fill(tokens.steps < tokens.customize_after, 1.0)
    if not tokens.weighting:
        return Masks(masks, None)
    return Masks(masks, token_weights(teacher, tokens.weighting, valid_mask=valid_mask))


def token_masks(x: Tensor, mask_token: Tensor) -> Tensor:
    """`sigmoid(einsum("tc,bchw->bthw", mask_token, x))`, products in the dtype of `x`."""
    tokens = mask_token.to(x.dtype).expand(x.shape[0], -1, -1)
    x = without_inference(x)
    with no_autocast(x.device):
        logits = torch.bmm(tokens, x.flatten(2))  # [B, T, HW]
    return logits.to(sum_dtype(x)).sigmoid().unflatten(2, x.shape[2:])


def token_weights(
    x: Tensor, weighting: tuple[Tensor, ...], *, valid_mask: Tensor | None = None
) -> Tensor:
    """Weights `[B, T]` of the tokens for each image, which sum to 1."""
    kernel, kernel_bias, mixing, bias = weighting
    dtype = sum_dtype(x)
    pooled = pooled_convolution(x, kernel, kernel_bias, valid_mask=valid_mask)
    with no_autocast(x.device):
        return F.linear(pooled, mixing.flatten(1).to(dtype), bias.to(dtype)).softmax(dim=1)


def pooled_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, *, valid_mask: Tensor | None = None
) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1).mean((2, 3))`, with S the window sums of x:

    `einsum("ocij,bcij->bo", weight, S) / (H * W) + bias`.
    """
    dtype = sum_dtype(x)
    sums = window_sums(x, valid_mask=valid_mask)
    count: int | Tensor = x.shape[2] * x.shape[3]
    if valid_mask is not None:
        count = valid_mask.sum(dim=(1, 2)).clamp_min(1).unsqueeze(1)
    with no_autocast(x.device):
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
        with no_autocast(x.device):
            return torch.bmm(clean, read.mT).unflatten(2, (3, 3))
    row = x.sum(dim=3, dtype=dtype)
    row = torch.stack([row - x[..., -1], row, row - x[..., 0]], dim=3)  # [B, C, H, 3]
    total = row.sum(dim=2)
    return torch.stack([total - row[:, :, -1], total, total - row[:, :, 0]], dim=2)
