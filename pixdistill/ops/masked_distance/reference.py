"""The masked distance in plain autograd PyTorch, for gradients of any order and for `torch.func`.

It is also what `torch.compile` sees on a CPU: the compiler fuses it as well as a form of our own.
"""

import torch
from torch import Tensor


def masked_distance(
    student: Tensor,
    teacher: Tensor,
    masks: Tensor,
    weights: Tensor | None,
    valid_mask: Tensor | None,
    eps: float,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and mask areas and number of valid pixels `[B, T + 1]`."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    masks = masks.detach().to(dtype)
    diff = (student.to(dtype) - teacher).to(dtype)  # a float64 teacher promotes
    valid = torch.ones_like(masks[:, 0], dtype=torch.bool) if valid_mask is None else valid_mask
    if valid_mask is not None:
        masks = masks.masked_fill(~valid.unsqueeze(1), 0.0)
        diff = diff.masked_fill(~valid.unsqueeze(1), 0.0)
    areas, pixels = masks.sum(dim=(2, 3)), valid.sum(dim=(1, 2)).to(dtype)
    share = 1 / masks.shape[1] if weights is None else weights.detach().to(dtype)
    scale = share / (areas + eps).clamp_min(torch.finfo(dtype).tiny)
    attention = (masks * scale[:, :, None, None] * masks).sum(dim=1)
    loss = (attention * diff.square().mean(dim=1)).sum(dim=(1, 2))
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (pixels > 0).sum().clamp_min(1)
    return loss, torch.cat([areas, pixels.unsqueeze(1)], dim=1)
