"""Chunked PyTorch form of `patch_contrast`: some channels of some images at a time.

It serves the CPU, float64, and vectors wider than the fused kernel takes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backend import sum_dtype
from ..patch_lse import patch_lse_forward
from .launch import argmax_dtype
from .settings import Settings, Upstream

# Elements of a block: 1 MiB of float32 stays in a CPU's cache; a GPU wants more work.
_CPU_BLOCK = 2**18
_CUDA_BLOCK = 2**25


def forward(
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    settings: Settings,
    *,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    """Loss, mimic, contrast, and what `backward` needs: contrast_grad, argmax, divisors."""
    dtype, device = sum_dtype(student), student.device
    batch, channels = student.shape[:2]
    contrast_grad = torch.empty(0, dtype=student.dtype, device=device)
    argmax = torch.empty(0, dtype=argmax_dtype(settings.pool_size), device=device)
    sums = torch.zeros(2, dtype=dtype, device=device)
    divisors = torch.ones(2, dtype=dtype, device=device)
    if settings.has_mimic:
        sums[0] = _squared_distance(student, teacher, valid_mask, dtype)
        if settings.mimic_reduction == "sum":
            divisors[0] = max(batch, 1)
        elif valid_mask is None:
            divisors[0] = max(student.numel(), 1)
        else:
            divisors[0] = (channels * valid_mask.sum()).clamp_min(1)
    if settings.has_contrast:
        if settings.is_pooled:
            student, argmax = _pooled(student, valid_mask, settings.pool_size, with_grad)
            teacher, _ = _pooled(teacher, valid_mask, settings.pool_size, False)
            if valid_mask is not None:
                ph, pw = settings.pool_size
                valid_mask = valid_mask.unflatten(2, (-1, pw)).unflatten(1, (-1, ph)).any(4).any(2)
        sums[1], grad = patch_lse_forward(
            student,
            teacher,
            valid_mask,
            settings.patch,
            backend="torch",
            with_grad=with_grad,
            cross_entropy=True,
        )
        contrast_grad = contrast_grad if grad is None else grad
        divisors[1] = max(student[:, 0].numel(), 1)
        if valid_mask is not None:
            divisors[1] = valid_mask.sum().clamp_min(1)
    mimic, contrast = sums / divisors
    loss = settings.mimic_weight * mimic + settings.contrast_weight * contrast
    return loss, mimic.clone(), contrast.clone(), contrast_grad, argmax, divisors


def backward(
    student: Tensor,
    teacher: Tensor | None,
    valid_mask: Tensor | None,
    contrast_grad: Tensor,
    argmax: Tensor,
    divisors: Tensor,
    grad_mimic: Upstream | None,
    grad_contrast: Upstream | None,
    settings: Settings,
) -> Tensor:
    """Gradient of the student's map. A gradient that is None counts as zero."""
    dtype = sum_dtype(student)
    grad = torch.empty_like(student)
    in_place = grad.dtype == dtype and grad.is_contiguous()
    corners = positions = None
    if grad_contrast is not None and settings.is_pooled:
        corners, positions = _positions(grad.shape[2:], settings.pool_size, grad.device)
    for part in _parts(student):
        # A block of a contiguous map is contiguous: one image, or all channels.
        block = grad[part]
        g = block if in_place else torch.empty(block.shape, dtype=dtype, device=grad.device)
        if grad_mimic is not None and teacher is not None:
            torch.sub(student[part].to(dtype), teacher[part].to(dtype), out=g)
            g.mul_(grad_mimic.tensor * (2 * grad_mimic.weight) / divisors[0])
        else:
            g.zero_()
        if grad_contrast is not None:
            factor = grad_contrast.tensor * grad_contrast.weight / divisors[1]
            pooled = contrast_grad[part].to(dtype) * factor
            if corners is None or positions is None:
                g.add_(pooled)
            else:
                index = positions[argmax[part].long()].add_(corners)
                g.flatten(2).scatter_add_(2, index.flatten(2), pooled.flatten(2))
        if valid_mask is not None:
            g.masked_fill_(~valid_mask[part[0]].unsqueeze(1), 0.0)
        if not in_place:
            block.copy_(g)
    return grad


def _parts(map_: Tensor) -> Iterator[tuple[slice, slice]]:
    """Index some images, or some channels of one image, at a time."""
    elements = _CUDA_BLOCK if map_.is_cuda else _CPU_BLOCK
    batch, channels, height, width = map_.shape
    count = max(1, min(channels, elements // (height * width)))
    images = max(1, elements // (channels * height * width))
    for b in range(0, batch, images):
        for c in range(0, channels, count):
            yield slice(b, b + images), slice(c, c + count)


def _squared_distance(
    student: Tensor, teacher: Tensor, valid_mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Sum over the valid pixels of the squared difference of two maps."""
    sums = [torch.zeros((), dtype=dtype, device=student.device)]
    for part in _parts(student):
        diff = student[part].to(dtype) - teacher[part].to(dtype)
        if valid_mask is not None:
            diff.masked_fill_(~valid_mask[part[0]].unsqueeze(1), 0.0)
        sums.append(diff.square_().sum())
    return torch.stack(sums).sum()


def _pooled(
    map_: Tensor, valid_mask: Tensor | None, pool: tuple[int, int], with_argmax: bool
) -> tuple[Tensor, Tensor]:
    """Maximum of each window over its valid pixels, and its first position in the window.

    Faster on a CPU than `max_pool2d`, which looks at one element at a time where it seeks positions.
    """
    ph, pw = pool
    batch, channels, height, width = map_.shape
    shape = (batch, channels, height // ph, width // pw)
    pooled = torch.empty(shape, dtype=map_.dtype, device=map_.device)
    dtype = argmax_dtype(pool)
    argmax = torch.empty(shape if with_argmax else 0, dtype=dtype, device=map_.device)
    # The first position has the largest number.
    numbers = torch.arange(ph * pw, 0, -1, dtype=dtype, device=map_.device)
    numbers = numbers.view(ph, pw).repeat(1, width // pw)
    for part in _parts(map_):
        rows = map_[part]
        if valid_mask is not None:
            rows = rows.masked_fill(~valid_mask[part[0]].unsqueeze(1), -torch.inf)
        rows = rows.unflatten(2, (-1, ph))  # [b, c, h, ph, W]
        largest = rows.amax(3).unflatten(3, (-1, pw)).amax(4)
        pooled[part] = largest
        if with_argmax:
            hits = rows == largest.repeat_interleave(pw, dim=3).unsqueeze(3)
            first = (hits * numbers).amax(3).unflatten(3, (-1, pw)).amax(4)
            argmax[part] = (ph * pw - first).clamp_(max=ph * pw - 1)  # NaN has none
    return pooled, argmax


def _positions(
    size: torch.Size, pool: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Index of each window's first pixel `[h, w]`, and of each position relative to it."""
    ph, pw = pool
    index = torch.arange(size.numel(), device=device).view(size)
    return index[::ph, ::pw], index[:ph, :pw].flatten()
