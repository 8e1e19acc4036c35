"""Blocked PyTorch form of `patch_lse`: some rows of some patches at a time, nothing kept of a block.

It serves the CPU, float64, and vectors wider than the fused kernel takes.
"""

from collections.abc import Iterator

import torch
from einops import rearrange, repeat
from torch import Tensor

# Numbers held of a block: 1 MiB of float32 stay in a CPU's cache; a GPU wants enough work a launch.
_CPU_BLOCK = 2**18
_CUDA_BLOCK = 2**25

# exp(-87) is the last normal number of float32: below it a CPU's exp is many times slower, and the
# result too small to count beside the largest term of its row, which is 1. It becomes 0.
_LOWEST, _NOTHING = -87.0, 2e-38

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
    dtype = accumulation_dtype(student)
    batch, _, height, width = student.shape
    margin = student.new_empty((batch, groups, height, width), dtype=dtype)
    grad = student.new_empty(student.shape) if with_grad else None
    # A CPU holds the distance of a pair of vectors, CUDA's gradient of a distance all differences.
    pairs = _CUDA_BLOCK * groups // max(1, student.shape[1]) if student.is_cuda else _CPU_BLOCK
    for area, (p, q) in _areas(student.shape, groups, patch, pairs):
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


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums and statistics: float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


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
    kind = torch.arange(vectors, device=s.device) // alike
    order = 1.0 if distance == "l1" else 2.0
    step = min(vectors, max(1, pairs // (patches * vectors)))
    for start in range(0, vectors, step):
        rows = slice(start, min(start + step, vectors))
        length = torch.cdist(s[:, rows], t, p=order, compute_mode="donot_use_mm_for_euclid_dist")
        weights = length * (-1.0 / temperature)  # the logits
        weights.masked_fill_(kind[rows].unsqueeze(1) == kind, -torch.inf)
        if valid is not None:
            weights.masked_fill_(~valid.unsqueeze(1), -torch.inf)
        top = weights.amax(dim=2, keepdim=True)
        torch.threshold_(weights.sub_(top).clamp_(min=_LOWEST).exp_(), _NOTHING, 0.0)
        total = weights.sum(dim=2, keepdim=True)
        positive = length.diagonal(start, dim1=1, dim2=2) / temperature
        margin[:, rows] = (top + total.log()).squeeze(2) + positive
        if grad is None:
            continue
        weights.div_(total.mul_(-temperature))
        weights.diagonal(start, dim1=1, dim2=2).fill_(1.0 / temperature)
        # sum_j weights_ij * slope(s_i - t_j): what autograd calls for the gradient of cdist
        grad[:, rows] = torch.ops.aten._cdist_backward(weights, s[:, rows], t, order, length)
    if valid is not None:
        of_kind = valid.view(patches, -1, alike).sum(dim=2)[:, kind]
        dead = ~valid | (of_kind == valid.sum(dim=1, keepdim=True))
        margin.masked_fill_(dead, -torch.inf)
        if grad is not None:
            grad.masked_fill_(dead.unsqueeze(2), 0.0)
    return margin, grad


def _areas(
    shape: torch.Size, groups: int, patch: tuple[int, int], pairs: int
) -> Iterator[tuple[Area, tuple[int, int]]]:
    """Parts of the map with about this many pairs of vectors, each with the one patch it consists of.

    The patch divides the inner part of the map; what remains at its edges are smaller patches.
    """
    batch, _, height, width = shape
    for rows, p in _spans(height, patch[0]):
        for columns, q in _spans(width, patch[1]):
            patches = max(1, pairs // (groups * p * q) ** 2)
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
