"""The masked distance in PyTorch by blocks of rows, so that what lies between operations stays in cache.

For the CPU, for float64, and for more tokens than the kernels take.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backend import sum_dtype
from .tokens import Masks, Tokens, compute_masks

# Elements of a block: 2 MiB of float32 stay in a CPU's cache; a GPU wants more work.
_CPU_BLOCK, _CUDA_BLOCK = 2**19, 2**22


def forward(
    student: Tensor,
    teacher: Tensor,
    source: Masks | Tokens,
    valid_mask: Tensor | None,
    eps: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the attention `[B, H, W]` and the sums `[B, T + 1]`, as the operator documents."""
    dtype = sum_dtype(student)
    if isinstance(source, Tokens):
        source = compute_masks(source, student, teacher, valid_mask)
    masks, images = source.masks.to(dtype), student.shape[0]
    if valid_mask is None:
        pixels = masks.new_full((images, 1), student.shape[2] * student.shape[3])
        count: int | Tensor = max(images, 1)
    else:
        masks = masks.masked_fill(~valid_mask.unsqueeze(1), 0.0)
        pixels = valid_mask.sum(dim=(1, 2), dtype=dtype).unsqueeze(1)
        count = (pixels > 0).sum().clamp_min(1)
    weights = 1 / masks.shape[1] if source.weights is None else source.weights.to(dtype)
    areas = masks.sum(dim=(2, 3))
    # A mask that is zero everywhere must not become 0/0. Dividing by the area before squaring keeps
    # tiny masks from vanishing.
    scale = weights / (areas + eps).clamp_min(torch.finfo(dtype).tiny) * (2 / student.shape[1])
    if reduction == "mean":
        scale = scale / count
    attention = (masks * scale[:, :, None, None] * masks).sum(dim=1)
    distance = torch.empty_like(attention)
    for rows in _blocks(student):
        diff = _difference(student[:, :, rows], teacher[:, :, rows], dtype)
        if valid_mask is not None:
            diff.masked_fill_(~valid_mask[:, rows].unsqueeze(1), 0.0)
        distance[:, rows] = diff.square_().sum(dim=1)
    loss = (attention * distance).sum(dim=(1, 2)) / 2
    loss = loss if reduction == "none" else loss.sum()
    return loss, attention, torch.cat([areas, pixels], dim=1)


def backward(
    student: Tensor, teacher: Tensor, attention: Tensor, grad_loss: Tensor, masked: bool
) -> Tensor:
    """`attention * grad_loss * (student - teacher)`."""
    factor = (attention * grad_loss.reshape(-1, 1, 1)).unsqueeze(1)
    invalid = (attention == 0).unsqueeze(1) if masked else None
    grad = torch.empty_like(student)
    in_place = student.dtype == teacher.dtype == attention.dtype
    for rows in _blocks(student):
        out = grad[:, :, rows]
        if in_place:
            diff = torch.sub(student[:, :, rows], teacher[:, :, rows], out=out)
        else:
            diff = _difference(student[:, :, rows], teacher[:, :, rows], attention.dtype)
        if invalid is not None:
            diff.masked_fill_(invalid[:, :, rows], 0.0)  # it may hold NaN
        diff.mul_(factor[:, :, rows])
        if not in_place:
            out.copy_(diff)
    return grad


def _blocks(student: Tensor) -> Iterator[slice]:
    """Slices of rows, which suit contiguous and channels-last maps alike."""
    block = _CUDA_BLOCK if student.device.type == "cuda" else _CPU_BLOCK
    step = max(1, block // max(1, student[:, :, :1].numel()))
    for start in range(0, student.shape[2], step):
        yield slice(start, start + step)


def _difference(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> Tensor:
    return (student.to(dtype) - teacher).to(dtype)  # a float64 teacher promotes
