"""The dense oracle of `patch_lse`: autograd PyTorch that stores every difference of a patch."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def patch_lse(
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    groups: int,
    patch: tuple[int, int],
    temperature: float,
    distance: str,
    negatives: str,
) -> Tensor:
    """`(-distance / temperature).logsumexp` over the negatives, minus the positive's logit."""
    batch, _, height, width = student.shape
    patch = (min(patch[0], max(1, height)), min(patch[1], max(1, width)))
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    if valid_mask is None:
        valid_mask = student.new_ones((batch, height, width), dtype=torch.bool)
    edges = (0, -width % patch[1], 0, -height % patch[0])
    sizes = {"m": groups, "p": patch[0], "q": patch[1]}
    cut = "b (m d) (h p) (w q) -> b h w (m p q) d"
    hidden = ~valid_mask.unsqueeze(1)
    s, t = (
        rearrange(F.pad(x.to(dtype).masked_fill(hidden, 0.0), edges), cut, **sizes)
        for x in (student, teacher)
    )
    valid = F.pad(valid_mask, edges).unsqueeze(1).expand(-1, groups, -1, -1)
    valid = rearrange(valid, cut, **{**sizes, "d": 1}).squeeze(-1)  # [..., N]

    number = torch.arange(s.shape[-2], device=s.device)
    if negatives == "other_groups":
        number = number // (patch[0] * patch[1])
    seen = (number.unsqueeze(1) != number) & valid.unsqueeze(-2) & valid.unsqueeze(-1)
    order = 1 if distance == "l1" else 2
    difference = s.unsqueeze(-2) - t.unsqueeze(-3)  # [..., N, N, D]
    logits = -torch.linalg.vector_norm(difference, order, dim=-1) / temperature
    positive = logits.diagonal(dim1=-2, dim2=-1)
    alive = seen.any(dim=-1)
    lse = logits.masked_fill(~seen & alive.unsqueeze(-1), -torch.inf).logsumexp(dim=-1)
    margin = (lse - positive).masked_fill(~alive, -torch.inf)
    margin = rearrange(margin, "b h w (m p q) -> b m (h p) (w q)", **sizes)
    return margin[:, :, :height, :width]
