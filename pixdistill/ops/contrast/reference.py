"""Dense oracle of `contrast`: one matrix of logits, plain autograd, no code shared with other forms.

It also has second-order and forward-mode gradients, and takes part in torch.func transforms.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def contrast(
    student: Tensor,
    teacher: Tensor,
    scale: float | Tensor,
    queue_keys: Tensor | None,
    queue_labels: Tensor | None,
    valid_mask: Tensor | None,
    labels: Tensor | None,
    negatives: str | None,
    normalize: bool,
    reduction: str,
    operand: torch.dtype,
    with_metrics: bool,
    exchange: Callable[[Tensor, Tensor | None, Tensor | None], Iterable[Any]] | None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results as in the package's `contrast`."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    valid = torch.ones_like(student[:, 0], dtype=torch.bool) if valid_mask is None else valid_mask
    s, t = (
        _rows(x.to(dtype).masked_fill(~valid.unsqueeze(1), 0.0), negatives, normalize)
        for x in (student, teacher.detach())
    )  # [G, N, D]
    valid = valid.reshape(s.shape[:2])
    labels = None if labels is None else labels.reshape(s.shape[:2])
    positive = (s * t).sum(dim=2)
    query, own_keys = (x.to(operand).to(dtype) for x in (s, t))  # as they are multiplied

    logits, counts = [], []  # of each set of keys, [G, N, M]
    sources: Iterable[Any] = ()
    if negatives is not None:
        sources = [(t.to(operand), valid, 0, labels)]
        if exchange is not None:
            sources = exchange(t[0].to(operand), valid[0], None if labels is None else labels[0])
    queue = [] if queue_keys is None else [(queue_keys, None, None, queue_labels)]
    for keys, mask, offset, key_labels in [*sources, *queue]:
        keys = keys.to(operand).to(dtype, copy=True).expand(s.shape[0], -1, -1)
        logits.append(scale * (query @ keys.mT))
        counted = torch.ones_like(logits[-1], dtype=torch.bool)
        if mask is not None:
            counted = counted & mask.unsqueeze(-2)
        if offset is not None:
            row, column = (torch.arange(n, device=s.device) for n in counted.shape[1:])
            counted = counted & (column != row.unsqueeze(1) + offset)
        if labels is not None and key_labels is not None:
            of_anchor = labels.unsqueeze(2)
            counted = counted & ((of_anchor < 0) | (of_anchor != key_labels.unsqueeze(-2)))
        counts.append(counted)
    logit, counted = torch.cat(logits, dim=2), torch.cat(counts, dim=2)

    some = counted.any(dim=2)  # where there are no negatives, -inf would have no finite gradient
    lse = logit.masked_fill(~counted & some.unsqueeze(2), -torch.inf).logsumexp(dim=2)
    loss = F.softplus(lse - scale * positive, threshold=40).masked_fill(~(valid & some), 0.0)
    count = valid.sum().clamp_min(1)
    metrics = None
    if with_metrics:
        tie = scale * (query * own_keys).sum(dim=2, keepdim=True)
        correct = (~counted | (logit <= tie + 1e-5 * tie.abs())).all(dim=2)
        logged = torch.stack([correct.to(dtype), positive]).masked_fill(~valid, 0.0)
        metrics = (logged.sum(dim=(1, 2)) / count).detach()
    if reduction == "none":
        return loss.flatten(), metrics
    return loss.sum() / count if reduction == "mean" else loss.sum(), metrics


def _rows(image: Tensor, negatives: str | None, normalize: bool) -> Tensor:
    """`[B, D, H, W]` as the vectors of one or of B sets, `[G, N, D]`, normalised if asked for."""
    batch, channels, height, width = image.shape
    groups = batch if negatives == "image" else 1
    count = batch * height * width // max(groups, 1)
    rows = image.movedim(1, -1).reshape(groups, count, channels)
    if not normalize:
        return rows
    short = torch.linalg.vector_norm(rows, dim=2, keepdim=True) <= 1e-12
    norm = torch.linalg.vector_norm(rows.masked_fill(short, 1.0), dim=2, keepdim=True)
    return rows.masked_fill(short, 0.0) / norm.masked_fill(norm == torch.inf, torch.nan)
