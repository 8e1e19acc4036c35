"""The dense oracle of `patch_lse`: autograd PyTorch that stores every difference of a patch."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor


def patch_lse(
    student: Tensor, teacher: Tensor, valid_mask: Tensor | None, settings: tuple[Any, ...]
) -> Tensor:
    """`(-distance / temperature).logsumexp` over the negatives, minus the positive's logit."""
    groups, patch, temperature, distance, negatives = settings
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    pixels = student[:, 0].shape
    if valid_mask is None:
        valid_mask = torch.ones(pixels, dtype=torch.bool, device=student.device)
    hidden = ~valid_mask.unsqueeze(1)
    sizes = {"m": groups, "p": patch[0], "q": patch[1]}
    cut = "b (m d) (h p) (w q) -> b h w (m p q) d"
    s, t = (
        rearrange(x.to(dtype).masked_fill(hidden, 0.0), cut, **sizes) for x in (student, teacher)
    )
    valid = valid_mask.unsqueeze(1).expand(-1, groups, -1, -1)
    valid = rearrange(valid, cut, **{**sizes, "d": 1}).squeeze(-1)  # [..., N]

    group = torch.arange(s.shape[-2], device=s.device)
    if negatives == "other_groups":
        group = group // (patch[0] * patch[1])
    seen = (group.unsqueeze(1) != group) & valid.unsqueeze(-2) & valid.unsqueeze(-1)
    order = 1 if distance == "l1" else 2
    diff = s.unsqueeze(-2) - t.unsqueeze(-3)  # [..., N, N, D]
    logits = -torch.linalg.vector_norm(diff, order, dim=-1) / temperature
    positive = logits.diagonal(dim1=-2, dim2=-1)
    alive = seen.any(dim=-1)
    lse = logits.masked_fill(~seen & alive.unsqueeze(-1), -torch.inf).logsumexp(dim=-1)
    margin = (lse - positive).masked_fill(~alive, -torch.inf)
    sizes |= {"h": pixels[1] // patch[0], "w": pixels[2] // patch[1]}
    return rearrange(margin, "b h w (m p q) -> b m (h p) (w q)", **sizes)
