"""`contrast`: from two maps to the contrastive loss of their pixels."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import Backend, detached, operand_dtype
from ..row_lse import row_lse_and_max

Negatives = Literal["batch", "image"] | None
Reduction = Literal["mean", "sum", "none"]
Exchange = Callable[[Tensor, Tensor | None], Iterable[tuple[Tensor, Tensor | None, int | None]]]


def contrast(
    student: Tensor,
    teacher: Tensor,
    scale: float | Tensor,
    *,
    negatives: Negatives,
    queue_keys: Tensor | None,
    valid_mask: Tensor | None,
    normalize: bool,
    reduction: Reduction,
    backend: Backend,
    with_metrics: bool = False,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and accuracy and mean positive similarity `[2]` where asked for."""
    batch, width = student.shape[:2]
    pixels = student.shape[2:].numel()
    shape = (batch, pixels) if negatives == "image" else (batch * pixels,)
    teacher = detached(teacher)
    mask = None if valid_mask is None else valid_mask.reshape(shape)
    student = student.flatten(2).mT.reshape(*shape, width)
    teacher = teacher.flatten(2).mT.reshape(*shape, width)
    if mask is not None:
        student = student.masked_fill(~mask.unsqueeze(-1), 0.0)
        teacher = teacher.masked_fill(~mask.unsqueeze(-1), 0.0)
    if normalize:
        teacher = _unit(teacher.to(torch.promote_types(student.dtype, teacher.dtype)))
        student = _unit(student)
    bound = scale if normalize and not isinstance(scale, Tensor) else None
    dtype = torch.promote_types(student.dtype, torch.float32)
    if isinstance(scale, Tensor):
        scale = scale.reshape(()).to(dtype)
    similarity = (student.to(dtype) * teacher.to(dtype)).sum(dim=-1)
    positive = scale * similarity
    keys = teacher.to(operand_dtype(teacher))
    options: dict[str, Any] = {
        "logit_bound": bound,
        "backend": backend,
        "with_max": with_metrics,
    }
    sources: list[tuple[Tensor, Tensor | None, int | None]] = []
    if negatives is not None:
        if exchange is None:
            sources.append((keys, mask, 0))
        else:  # blocks are overwritten
            sources += [
                (block.clone(), None if m is None else m.clone(), offset)
                for block, m, offset in exchange(keys, mask)
            ]
    if queue_keys is not None:
        sources.append((detached(queue_keys), None, None))
    parts = [
        row_lse_and_max(student, keys, scale, key_mask=key_mask, exclude_offset=offset, **options)
        for keys, key_mask, offset in sources
    ]
    none = functools.reduce(torch.logical_and, [part == -torch.inf for part, _ in parts])
    lse = torch.stack([part.masked_fill(none, 0.0) for part, _ in parts]).logsumexp(dim=0)
    lse = lse.masked_fill(none, -torch.inf)
    loss = F.softplus(lse - positive, threshold=40)
    if mask is not None:
        loss = loss.masked_fill(~mask, 0.0)
    count: Any = max(loss.numel(), 1) if mask is None else mask.sum().clamp_min(1)
    metrics = None
    if with_metrics:
        query = student.to(operand_dtype(student))
        tie = (query.to(dtype) * keys.to(dtype)).sum(dim=-1).detach() * scale
        reach = tie + 1e-5 * tie.abs()
        correct = functools.reduce(
            torch.logical_and, [top <= reach for _, top in parts if top is not None]
        ).to(dtype)
        logged = torch.stack([correct, similarity.detach()]).flatten(1)
        if mask is not None:
            logged = logged.masked_fill(~mask.flatten(), 0.0)
        metrics = (logged.sum(dim=1) / count).detach()
    if reduction == "none":
        return loss.reshape(batch, pixels), metrics
    loss = loss.sum()
    return (loss / count if reduction == "mean" else loss), metrics


def _unit(vectors: Tensor) -> Tensor:
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=dtype)
    short, long = norm <= 1e-12, norm == torch.inf
    norm = torch.linalg.vector_norm(
        vectors.masked_fill(short, 1.0), dim=-1, keepdim=True, dtype=dtype
    )
    inverse = norm.masked_fill(short, torch.inf).reciprocal().masked_fill(long, torch.nan)
    return (vectors * inverse).to(vectors.dtype)
