"""Blocked PyTorch form of `patch_lse`: some rows of some patches at a time, nothing kept of a block.

It serves the CPU, float64, and vectors wider than the fused kernel takes. At the usual temperatures few
negatives are near enough to count beside the nearest: on a CPU, exponentials and slopes are then made
of these pairs only, which changes the result by less than its rounding.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from einops import rearrange, repeat
from torch import Tensor

from ..backend import sum_dtype

# Pairs, and numbers, of a block: 4 MiB of float32 stay in a CPU's last cache; a GPU wants more work.
_CPU_BLOCK = 2**20
_CUDA_BLOCK = 2**25

# exp(-87) is the last normal number of float32: below it a CPU's exp is many times slower, and the
# result too small to count beside the largest term of its row, which is 1. It becomes 0.
_LOWEST, _NOTHING = -87.0, 2e-38

# A negative that lies farther than the nearest by log(8 N / eps) temperatures is lost when N of them are
# summed in this precision. Where at most one pair in so many is nearer, the sums are made from these.
_FEW = 32

Area = tuple[slice, slice, slice, slice]


def patch_lse(
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    groups: int,
    patch: tuple[int, int],
    temperature: float,
    distance: str,
    negatives: str,
    *,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Margin `[B, groups, H, W]` and its gradient `[B, C, H, W]`, as the package's operator."""
    dtype = sum_dtype(student)
    batch, channels, height, width = student.shape
    margin = student.new_empty((batch, groups, height, width), dtype=dtype)
    grad = student.new_empty(student.shape) if with_grad else None
    # A CPU holds the distance of a pair of vectors, CUDA's gradient of a distance all differences.
    numbers = _CUDA_BLOCK if student.is_cuda else _CPU_BLOCK
    pairs = numbers * groups // channels if student.is_cuda else numbers
    for area, (p, q) in _areas(student.shape, groups, patch, pairs, numbers):
        sizes = {"m": groups, "p": p, "q": q}
        s, t = (
            rearrange(x[area].to(dtype), "b (m d) (h p) (w q) -> (b h w) (m p q) d", **sizes)
            for x in (student, teacher)
        )
        valid = None
        if valid_mask is not None:
            valid = valid_mask.unsqueeze(1)[area]
            valid = repeat(valid, "b 1 (h p) (w q) -> (b h w) (m p q)", **sizes)
            s, t = (x.masked_fill(~valid.unsqueeze(-1), 0.0) for x in (s, t))
        alike = p * q if negatives == "other_groups" else 1
        values, slopes = _contrast(s, t, valid, alike, temperature, distance, pairs, with_grad)
        place = margin[area]
        sizes |= {"h": place.shape[2] // p, "w": place.shape[3] // q}
        place.copy_(rearrange(values, "(b h w) (m p q) -> b m (h p) (w q)", **sizes))
        if grad is not None and slopes is not None:
            grad[area] = rearrange(slopes, "(b h w) (m p q) d -> b (m d) (h p) (w q)", **sizes)
    return margin, grad


def _contrast(
    s: Tensor,
    t: Tensor,
    valid: Tensor | None,
    alike: int,
    temperature: float,
    distance: str,
    pairs: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Margin `[P, N]` and gradient `[P, N, D]` of the vectors `[P, N, D]` of P patches.

    Each run of `alike` consecutive vectors is of one kind, and no negative of its own kind.
    """
    patches, vectors, _ = s.shape
    margin = s.new_full((patches, vectors), -torch.inf)
    grad = torch.zeros_like(s) if with_grad else None
    if vectors == alike:
        return margin, grad
    order = 1.0 if distance == "l1" else 2.0
    for rows in _row_blocks(vectors, alike, max(1, pairs // (patches * vectors))):
        start, block = rows.start, s[:, rows]
        length = torch.cdist(block, t, p=order, compute_mode="donot_use_mm_for_euclid_dist")
        positive = length.diagonal(start, dim1=1, dim2=2).clone()
        kinds = length.view(patches, -1, min(alike, block.shape[1]), vectors // alike, alike)
        kinds.diagonal(start // alike, dim1=1, dim2=3).fill_(torch.inf)  # its own are no negatives
        if valid is not None:
            length.masked_fill_(~valid.unsqueeze(1), torch.inf)
        nearest = length.amin(dim=2, keepdim=True)
        sums = _all_sums
        if not s.is_cuda:  # to look at a number would make a CUDA stream wait
            reach = math.log(8 * vectors / torch.finfo(s.dtype).eps) * temperature
            near = length <= nearest + reach
            if int(near.count_nonzero()) * _FEW <= near.numel():
                sums = partial(_near_sums, near)
        total, mean = sums(block, t, length, nearest, temperature, order, with_grad)
        margin[:, rows] = (positive - nearest.squeeze(2)) / temperature + total.log()
        if grad is not None and mean is not None:
            slope = _slope(block - t[:, rows], positive.unsqueeze(2), order)
            grad[:, rows] = slope.sub_(mean).div_(temperature)
    if valid is not None:
        of_kind = valid.view(patches, -1, alike).sum(dim=2).repeat_interleave(alike, dim=1)
        dead = ~valid | (of_kind == valid.sum(dim=1, keepdim=True))
        margin.masked_fill_(dead, -torch.inf)
        if grad is not None:
            grad.masked_fill_(dead.unsqueeze(2), 0.0)
    return margin, grad


def _all_sums(
    s: Tensor,
    t: Tensor,
    length: Tensor,
    nearest: Tensor,
    temperature: float,
    order: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum of exp((nearest - length) / tau) over the negatives, and their slopes' mean, so weighted.

    Shapes: s `[P, R, D]`, t `[P, N, D]`, length `[P, R, N]`, nearest `[P, R, 1]`, sum `[P, R]`, mean
    `[P, R, D]`.
    """
    weights = (nearest - length).div_(temperature).clamp_(min=_LOWEST).exp_()
    torch.threshold_(weights, _NOTHING, 0.0)
    total = weights.sum(dim=2, keepdim=True)
    mean = None
    if with_grad:
        # sum_j weights_ij * slope(s_i - t_j): what autograd calls for the gradient of cdist
        mean = torch.ops.aten._cdist_backward(weights.div_(total), s, t, order, length)
    return total.squeeze(2), mean


def _near_sums(
    near: Tensor,
    s: Tensor,
    t: Tensor,
    length: Tensor,
    nearest: Tensor,
    temperature: float,
    order: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same from the pairs that are `near` `[P, R, N]`, where these are few."""
    patches, rows, vectors = near.shape
    pair = near.flatten().nonzero().squeeze(1)
    row = pair // vectors
    length = length.flatten()[pair]
    weights = (nearest.flatten()[row] - length).div_(temperature).exp_()
    total = s.new_zeros(patches * rows).index_add_(0, row, weights)
    mean = None
    if with_grad:
        column = row // rows * vectors + pair % vectors
        slope = _slope(s.flatten(0, 1)[row] - t.flatten(0, 1)[column], length.unsqueeze(1), order)
        slope.mul_((weights / total[row]).unsqueeze(1))
        mean = torch.zeros_like(s).flatten(0, 1).index_add_(0, row, slope).view_as(s)
    return total.view(patches, rows), mean


def _slope(difference: Tensor, length: Tensor, order: float) -> Tensor:
    """Gradient of the distance with respect to its first vector, zero at distance zero; in place."""
    if order == 1.0:
        return difference.sign_()
    return difference.div_(length).masked_fill_(length == 0, 0.0)


def _row_blocks(vectors: int, alike: int, most: int) -> Iterator[slice]:
    """At most so many rows: of whole kinds, or, where these are larger, of one kind."""
    whole = max(alike, most // alike * alike)
    step = min(whole, most)
    for start in range(0, vectors, whole):
        stop = min(start + whole, vectors)
        for first in range(start, stop, step):
            yield slice(first, min(first + step, stop))


def _areas(
    shape: torch.Size, groups: int, patch: tuple[int, int], pairs: int, numbers: int
) -> Iterator[tuple[Area, tuple[int, int]]]:
    """Parts of the map with about so many pairs of vectors at most, and numbers, each with its patch.

    The patch divides the inner part of the map; what remains at its edges are smaller patches.
    """
    batch, channels, height, width = shape
    for rows, p in _spans(height, patch[0]):
        for columns, q in _spans(width, patch[1]):
            patches = max(1, min(pairs // (groups * p * q) ** 2, numbers // (channels * p * q)))
            across = q * min(patches, len(columns) // q)
            down = p * min(max(1, patches * q // across), len(rows) // p)
            images = max(1, patches * p * q // (across * down))
            for b in range(0, batch, images):
                for y in range(rows.start, rows.stop, down):
                    for x in range(columns.start, columns.stop, across):
                        yield (
                            (
                                slice(b, b + images),
                                slice(None),
                                slice(y, min(y + down, rows.stop)),
                                slice(x, min(x + across, columns.stop)),
                            ),
                            (p, q),
                        )


def _spans(length: int, step: int) -> list[tuple[range, int]]:
    """The part of an axis that consists of whole steps, and the shorter step that remains."""
    whole = length - length % step
    spans = [(range(whole), step), (range(whole, length), length - whole)]
    return [(span, size) for span, size in spans if len(span) > 0]
