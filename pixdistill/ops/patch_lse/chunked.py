"""Chunked PyTorch form of `patch_lse`: some patches at a time, and some rows of a large patch.

It serves the CPU, float64, and vectors wider than the fused kernel takes. At the usual temperatures few
negatives are near enough to count beside the nearest. On a CPU, exponentials and gradients of distances
are then computed for these pairs only, which changes the result by less than its rounding.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..backend import sum_dtype
from .settings import PatchSettings

# Pairs, and elements, of a block: 4 MiB of float32 stay in a CPU's last cache; a GPU wants more work.
_CPU_BLOCK = 2**20
_CUDA_BLOCK = 2**25

# exp(-87) is the last normal number of float32: below it a CPU's exp is many times slower, and the
# result too small to count beside the largest term of its row, which is 1. It becomes 0.
_LOWEST, _NOTHING = -87.0, 2e-38

# A negative that lies farther than the nearest by log(8 N / eps) temperatures is lost when N of them are
# summed in this precision. Where at most one pair in 32 is nearer, only these pairs are summed.
_FEW = 32


def patch_lse(
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    settings: PatchSettings,
    *,
    with_grad: bool,
    cross_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Margin `[B, M, H, W]` and its gradient `[B, C, H, W]`; nothing else of this size is stored.

    With `cross_entropy`, the sum of softplus(margin) and its gradient.
    """
    groups, (p, q), temperature, distance, negatives = settings
    batch, channels, height, width = student.shape
    dtype, device = sum_dtype(student), student.device
    out = torch.zeros((), dtype=dtype, device=device)
    if not cross_entropy:
        out = torch.empty((batch, groups, height, width), dtype=dtype, device=device)
    grad = torch.empty(student.shape, dtype=student.dtype, device=device) if with_grad else None
    # A CPU holds the distance of each pair of vectors; CUDA's gradient of a distance, all differences.
    elements = _CUDA_BLOCK if student.is_cuda else _CPU_BLOCK
    pairs = elements * groups // channels if student.is_cuda else elements
    patches = min(pairs // (groups * p * q) ** 2, elements // (channels * p * q))
    group_size = p * q if negatives == "other_groups" else 1
    cut = "b (m d) h p w q -> (b h w) (m p q) d"
    sizes = {"m": groups, "p": p, "q": q}
    for block in _blocks(batch, height // p, width // q, max(1, patches)):
        s, t = (
            rearrange(_in_patches(x, p, q)[block].to(dtype), cut, m=groups)
            for x in (student, teacher)
        )
        valid = None
        if valid_mask is not None:
            valid = _in_patches(valid_mask.unsqueeze(1), p, q)[block].expand(-1, groups, *[-1] * 4)
            valid = rearrange(valid, cut, d=1).squeeze(2)
            s, t = (x.masked_fill(~valid.unsqueeze(2), 0.0) for x in (s, t))
        values, grads = _contrast(s, t, valid, group_size, temperature, distance, pairs, with_grad)
        sizes |= {"h": len(range(height // p)[block[2]]), "w": len(range(width // q)[block[4]])}
        if not cross_entropy:
            values_map = rearrange(values, "(b h w) (m p q) -> b m h p w q", **sizes)
            _in_patches(out, p, q)[block] = values_map
        else:
            out += F.softplus(values, threshold=40).sum()  # exact to rounding in float64 too
            if grads is not None:
                grads.mul_(values.sigmoid_().unsqueeze(2))
        if grad is not None and grads is not None:
            grads = rearrange(grads, "(b h w) (m p q) d -> b (m d) h p w q", **sizes)
            _in_patches(grad, p, q)[block] = grads
    return out, grad


def _in_patches(map_: Tensor, p: int, q: int) -> Tensor:
    """`[B, C, h * p, w * q]` as `[B, C, h, p, w, q]`."""
    return map_.unflatten(3, (-1, q)).unflatten(2, (-1, p))


def _blocks(batch: int, down: int, across: int, patches: int) -> Iterator[tuple[slice, ...]]:
    """Index the batch, the rows and the columns of patches, at most so many patches at a time."""
    columns = max(1, min(across, patches))
    rows = max(1, min(down, patches // columns))
    images = max(1, patches // (columns * rows))
    every = slice(None)
    for b in range(0, batch, images):
        for y in range(0, down, rows):
            for x in range(0, across, columns):
                columns_here = slice(x, x + columns)
                yield slice(b, b + images), every, slice(y, y + rows), every, columns_here


def _contrast(
    s: Tensor,
    t: Tensor,
    valid: Tensor | None,
    group_size: int,
    temperature: float,
    distance: str,
    pairs: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Margin `[P, N]` and gradient `[P, N, D]` of the vectors `[P, N, D]` of P patches.

    Each run of `group_size` consecutive vectors is a group. No vector is a negative of its own group.
    """
    patches, vectors, _ = s.shape
    margin = s.new_full((patches, vectors), -torch.inf)
    grad = torch.zeros_like(s) if with_grad else None
    if vectors == group_size:
        return margin, grad
    order = 1.0 if distance == "l1" else 2.0
    for rows in _row_blocks(vectors, group_size, max(1, pairs // (patches * vectors))):
        start, block = rows.start, s[:, rows]
        dist = torch.cdist(block, t, p=order, compute_mode="donot_use_mm_for_euclid_dist")
        positive = dist.diagonal(start, dim1=1, dim2=2).clone()
        by_group = (min(group_size, block.shape[1]), vectors // group_size, group_size)
        same_group = dist.view(patches, -1, *by_group).diagonal(start // group_size, dim1=1, dim2=3)
        same_group.fill_(torch.inf)
        if valid is not None:
            dist.masked_fill_(~valid.unsqueeze(1), torch.inf)
        nearest = dist.amin(dim=2, keepdim=True)
        sums = _all_sums
        if not s.is_cuda:  # to read a number would make a CUDA stream wait
            reach = math.log(8 * vectors / torch.finfo(s.dtype).eps) * temperature
            near = dist <= nearest + reach
            if int(near.count_nonzero()) * _FEW <= near.numel():
                sums = partial(_near_sums, near)
        total, mean = sums(block, t, dist, nearest, temperature, order, with_grad)
        margin[:, rows] = (positive - nearest.squeeze(2)) / temperature + total.log()
        if grad is not None and mean is not None:
            own = _distance_grad(block - t[:, rows], positive.unsqueeze(2), order)
            grad[:, rows] = own.sub_(mean).div_(temperature)
    if valid is not None:
        in_group = valid.view(patches, -1, group_size).sum(dim=2)
        in_group = in_group.repeat_interleave(group_size, dim=1)
        dead = ~valid | (in_group == valid.sum(dim=1, keepdim=True))
        margin.masked_fill_(dead, -torch.inf)
        if grad is not None:
            grad.masked_fill_(dead.unsqueeze(2), 0.0)
    return margin, grad


def _all_sums(
    s: Tensor,
    t: Tensor,
    dist: Tensor,
    nearest: Tensor,
    temperature: float,
    order: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum of exp((nearest - dist) / tau) over the negatives, and the mean gradient of their distances.

    Shapes: s `[P, R, D]`, t `[P, N, D]`, dist `[P, R, N]`, nearest `[P, R, 1]`, sum `[P, R]`, mean
    `[P, R, D]`, weighted by the terms of the sum.
    """
    weights = (nearest - dist).div_(temperature).clamp_(min=_LOWEST).exp_()
    torch.threshold_(weights, _NOTHING, 0.0)
    total = weights.sum(dim=2, keepdim=True)
    mean = None
    if with_grad:
        # sum_j weights_ij * distance_grad(s_i - t_j): what autograd calls for the gradient of cdist
        mean = torch.ops.aten._cdist_backward(weights.div_(total), s, t, order, dist)
    return total.squeeze(2), mean


def _near_sums(
    near: Tensor,
    s: Tensor,
    t: Tensor,
    dist: Tensor,
    nearest: Tensor,
    temperature: float,
    order: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same from the pairs that are `near` `[P, R, N]`, where these are few."""
    patches, rows, vectors = near.shape
    pair = near.flatten().nonzero().squeeze(1)
    row = pair // vectors
    dist = dist.flatten()[pair]
    weights = (nearest.flatten()[row] - dist).div_(temperature).exp_()
    total = s.new_zeros(patches * rows).index_add_(0, row, weights)
    mean = None
    if with_grad:
        column = row // rows * vectors + pair % vectors
        grads = _distance_grad(
            s.flatten(0, 1)[row] - t.flatten(0, 1)[column], dist.unsqueeze(1), order
        )
        grads.mul_((weights / total[row]).unsqueeze(1))
        mean = torch.zeros_like(s).flatten(0, 1).index_add_(0, row, grads).view_as(s)
    return total.view(patches, rows), mean


def _distance_grad(diff: Tensor, dist: Tensor, order: float) -> Tensor:
    """Gradient of the distance with respect to its first vector, zero at distance zero; in place."""
    if order == 1.0:
        return diff.sign_()
    return diff.div_(dist).masked_fill_(dist == 0, 0.0)


def _row_blocks(vectors: int, group_size: int, most: int) -> Iterator[slice]:
    """At most so many rows: of whole groups, or, where a group is larger, of one group."""
    whole = max(group_size, most // group_size * group_size)
    step = min(whole, most)
    for start in range(0, vectors, whole):
        stop = min(start + whole, vectors)
        for first in range(start, stop, step):
            yield slice(first, min(first + step, stop))
