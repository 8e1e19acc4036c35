"""The dense oracle of `patch_contrast`: autograd PyTorch that stores every difference of a patch."""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def patch_contrast(
    student: Tensor, teacher: Tensor, valid_mask: Tensor | None, settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, mimic and contrast; a term without weight is zero."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if valid_mask is None:
        valid_mask = torch.ones_like(student[:, 0], dtype=torch.bool)
    hidden = ~valid_mask.unsqueeze(1)
    student, teacher = (x.to(dtype).masked_fill(hidden, 0.0) for x in (student, teacher))
    mimic = contrast = student.flatten()[:0].sum()  # zero, attached to the graph
    if settings.mimic_weight > 0:
        mimic = (student - teacher).square().sum()
        if settings.mimic_reduction == "sum":
            mimic = mimic / max(len(student), 1)
        else:
            mimic = mimic / (student.shape[1] * valid_mask.sum()).clamp_min(1)
    if settings.contrast_weight > 0:
        contrast = _contrast(student, teacher, valid_mask, settings)
    loss = settings.mimic_weight * mimic + settings.contrast_weight * contrast
    return loss, mimic, contrast


def _contrast(student: Tensor, teacher: Tensor, valid_mask: Tensor, settings: Any) -> Tensor:
    """Cross-entropy of the positive of each vector among itself and its negatives."""
    groups, (p, q), temperature, distance, negatives = settings.patch
    student, teacher = (
        F.max_pool2d(x.masked_fill(~valid_mask.unsqueeze(1), -torch.inf), settings.pool_size)
        for x in (student, teacher)
    )
    valid_mask = F.max_pool2d(valid_mask.unsqueeze(1).to(student.dtype), settings.pool_size) > 0
    cut = "b (m d) (h p) (w q) -> (b h w) (p q m) d"
    s, t = (
        rearrange(x.masked_fill(~valid_mask, 0.0), cut, m=groups, p=p, q=q)
        for x in (student, teacher)
    )
    valid = rearrange(valid_mask.expand(-1, groups, -1, -1), cut, m=groups, p=p, q=q).squeeze(2)
    order = 1 if distance == "l1" else 2
    logits = -torch.linalg.vector_norm(s.unsqueeze(2) - t.unsqueeze(1), order, dim=3) / temperature
    number = torch.arange(s.shape[1], device=s.device)
    own = number % groups if negatives == "other_groups" else number
    negative = (own.unsqueeze(1) != own) & valid.unsqueeze(1) & valid.unsqueeze(2)
    alive = negative.any(dim=2)
    lse = logits.masked_fill(~negative & alive.unsqueeze(2), -torch.inf).logsumexp(dim=2)
    margin = (lse - logits.diagonal(dim1=1, dim2=2)).masked_fill(~alive, -torch.inf)
    total = F.softplus(margin, threshold=40).sum()  # exact to rounding in float64 too
    return total / valid_mask.sum().clamp_min(1)
