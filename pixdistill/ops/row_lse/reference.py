"""The dense oracle of `row_lse`: a few lines of autograd PyTorch that store the N x M logits."""

import contextlib

import torch
from torch import Tensor


def row_lse(
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    key_mask: Tensor | None = None,
    exclude_offset: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`(scale * query @ keys.mT).logsumexp(-1)` and `.amax(-1)` over the keys that each row may see."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    autocast: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if not query.is_meta:  # which PyTorch has no autocast for
        autocast = torch.autocast(query.device.type, enabled=False)
    with autocast:
        logits = scale * (query.to(dtype) @ keys.to(dtype).mT)  # [..., N, M]
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask.unsqueeze(-2), -torch.inf)
    if exclude_offset is not None:
        row = torch.arange(query.shape[-2], device=query.device).unsqueeze(-1)
        column = torch.arange(keys.shape[-2], device=query.device)
        logits = logits.masked_fill(column == row + exclude_offset, -torch.inf)
    # One column that never wins gives M = 0 a value, and a row without keys a zero gradient.
    none = logits.new_full((*logits.shape[:-1], 1), -torch.inf)
    logits = torch.cat([logits, none], dim=-1)
    dead = (logits == -torch.inf).all(dim=-1)
    lse = logits.masked_fill(dead.unsqueeze(-1), 0.0).logsumexp(dim=-1)
    return lse.masked_fill(dead, -torch.inf), logits.detach().amax(dim=-1)
