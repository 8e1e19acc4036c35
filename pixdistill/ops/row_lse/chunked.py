"""Streaming PyTorch form of `row_lse`: two matrix products a block of keys, nothing of size N x M.

It serves the CPU, float64, features wider than the fused kernel takes, and strict float32 on CUDA.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..backend import sum_dtype

# Logits held at once: 4 MiB of float32 stay in a CPU's cache; a GPU wants enough work a launch.
_CPU_BLOCK = (1024, 1024)
_CUDA_BLOCK = (4096, 4096)


def row_lse(
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    *,
    subtract_max: bool,
    with_weighted_keys: bool,
    with_max: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-sum-exp `[G, N]`, softmax-weighted mean of the keys `[G, N, D]` and max_logit logit `[G, N]`.

    Shapes as in the package's operator: query `[G, N, D]`, keys `[G, M, D]`, key_mask `[G, M]`.
    `subtract_max` subtracts a running maximum; without it the caller vouches that `exp(logit)` and its
    sum stay in range.
    """
    dtype = sum_dtype(query)
    operand = _operand_dtype(query)
    groups, rows, columns = query.shape[0], query.shape[1], keys.shape[1]
    keys, key_mask = _expand(keys, key_mask, groups)
    lse = query.new_full((groups, rows), -torch.inf, dtype=dtype)
    max_logit = torch.full_like(lse, -torch.inf) if with_max else None
    expected = query.new_zeros(query.shape, dtype=query.dtype) if with_weighted_keys else None
    step_g, step_n, step_m = _block_sizes(query, columns)
    buffer = query.new_empty(step_g * step_n * step_m, dtype=dtype)

    for g in _slices(groups, step_g):
        for n in _slices(rows, step_n):
            scaled = (query[g, n].to(dtype) * scale).to(operand)
            total = scaled.new_zeros(scaled.shape[:2], dtype=dtype)
            top = torch.full_like(total, -torch.inf)
            weighted = torch.zeros_like(scaled, dtype=dtype) if expected is not None else None
            for m in _slices(columns, step_m):
                block, seen = _key_block(keys, key_mask, g, m, operand)
                logits = _product(scaled, block.mT, buffer)
                _hide(logits, seen, exclude_offset, n.start, m.start)
                if subtract_max or with_max:
                    new_top = torch.maximum(top, logits.amax(dim=-1))
                if subtract_max:
                    shift = new_top.clamp_min(torch.finfo(dtype).min)  # no key yet: -inf stays -inf
                    shrink = (top - shift).exp_()
                    logits.sub_(shift.unsqueeze(-1))
                    total.mul_(shrink)
                    if weighted is not None:
                        weighted.mul_(shrink.unsqueeze(-1))
                if subtract_max or with_max:
                    top = new_top
                logits.exp_()
                total.add_(logits.sum(dim=-1))
                if weighted is not None:
                    _add_product(weighted, logits, block)
            lse[g, n] = total.log() + top if subtract_max else total.log()
            if max_logit is not None:
                max_logit[g, n] = top
            if expected is not None and weighted is not None:
                expected[g, n] = weighted.div_(total.masked_fill(total == 0, 1.0).unsqueeze(-1))
    return lse, expected, max_logit


def row_lse_grad_keys(
    grad_rows: Tensor,
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    key_mask: Tensor | None,
    exclude_offset: int | None,
    lse: Tensor,
) -> Tensor:
    """`(softmax(logits) * grad_rows[..., None]).mT @ query` `[G, M, D]`, probabilities recomputed."""
    dtype = sum_dtype(query)
    operand = _operand_dtype(query)
    groups, rows, columns = query.shape[0], query.shape[1], keys.shape[1]
    shared = keys.shape[0] == 1 and groups > 1
    keys, key_mask = _expand(keys, key_mask, groups)
    grad_keys = keys.new_zeros((groups, *keys.shape[1:]), dtype=dtype if shared else keys.dtype)
    step_g, step_n, step_m = _block_sizes(query, columns)
    buffer = query.new_empty(step_g * step_n * step_m, dtype=dtype)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row without keys has no probabilities

    for g in _slices(groups, step_g):
        for m in _slices(columns, step_m):
            block, seen = _key_block(keys, key_mask, g, m, operand)
            total = torch.zeros_like(block, dtype=dtype)
            for n in _slices(rows, step_n):
                scaled = (query[g, n].to(dtype) * scale).to(operand)
                weights = _product(scaled, block.mT, buffer)
                _hide(weights, seen, exclude_offset, n.start, m.start)
                weights.sub_(lse[g, n].unsqueeze(-1)).exp_().mul_(grad_rows[g, n].unsqueeze(-1))
                total += weights.mT @ query[g, n].to(dtype)
            grad_keys[g, m] = total
    return grad_keys.sum(dim=0, keepdim=True).to(keys.dtype) if shared else grad_keys


def _expand(keys: Tensor, key_mask: Tensor | None, groups: int) -> tuple[Tensor, Tensor | None]:
    if key_mask is not None:
        key_mask = key_mask.expand(groups, -1)
    return keys.expand(groups, -1, -1), key_mask


def _operand_dtype(tensor: Tensor) -> torch.dtype:
    """Half operands pay on a GPU's tensor cores; a CPU multiplies them no faster than float32."""
    return tensor.dtype if tensor.device.type == "cuda" else sum_dtype(tensor)


def _block_sizes(query: Tensor, columns: int) -> tuple[int, int, int]:
    """Groups, queries and keys of a block: a fixed number of logits, whatever the shape."""
    step_n, step_m = _CUDA_BLOCK if query.device.type == "cuda" else _CPU_BLOCK
    held = max(1, min(step_n, query.shape[1]) * min(step_m, columns))
    step_g = min(query.shape[0], max(1, step_n * step_m // held))
    return step_g, min(step_n, query.shape[1]), min(step_m, columns)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, max(1, step)))


def _key_block(
    keys: Tensor, key_mask: Tensor | None, g: slice, m: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """A block of keys with the hidden ones set to zero, so that a NaN in them reaches no product."""
    block = keys[g, m].to(dtype)
    if key_mask is None:
        return block, None
    seen = key_mask[g, m]
    return block.masked_fill(~seen.unsqueeze(-1), 0.0), seen


def _hide(
    logits: Tensor, seen: Tensor | None, exclude_offset: int | None, row: int, column: int
) -> None:
    """Set the logits that do not count to -inf, in place."""
    if seen is not None:
        logits.masked_fill_(~seen.unsqueeze(-2), -torch.inf)
    if exclude_offset is not None:
        offset = row + exclude_offset - column
        if -logits.shape[1] < offset < logits.shape[2]:
            logits.diagonal(offset, dim1=1, dim2=2).fill_(-torch.inf)


def _product(a: Tensor, b: Tensor, buffer: Tensor | None = None) -> Tensor:
    """Batched `a @ b` with float32 sums; in `buffer` unless the operands are half."""
    if a.dtype == torch.float32 or a.dtype == torch.float64:
        if buffer is None:
            return torch.bmm(a, b)
        shape = (a.shape[0], a.shape[1], b.shape[2])
        return torch.bmm(a, b, out=buffer[: math.prod(shape)].view(shape))
    if a.device.type == "cuda" and hasattr(torch.ops.aten.bmm, "dtype"):  # since torch 2.8
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b).float()


def _add_product(total: Tensor, weights: Tensor, block: Tensor) -> None:
    """`total += weights @ block` in place, with the weights rounded to the block's dtype."""
    if block.dtype == total.dtype:
        total.baddbmm_(weights, block)
    else:
        total += _product(weights.to(block.dtype), block)
